"""The executor that computes with torch, in processes of its own; the daemon never loads torch.

A server process imports torch at the first request (about two seconds), becomes an unprivileged
user, and forks one child for each job and slot. A child serves that job's shards one after
another; it is replaced after a failure, a limit or a cancellation, and ended when idle. Server
and children end when the daemon does, however it ends.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from meshd.node.compute.channel import Channel, ChannelClosed
from meshd.node.compute.executor import (
    Admission,
    ExecutorDied,
    ExecutorUnavailable,
    InferRequest,
    LimitExceeded,
    Limits,
    ShardFailed,
    admit,
    admit_rows,
)
from meshd.node.compute.framing import MAX_CONTROL, FramingError, Kind, pack_control, parse_control
from meshd.node.compute.measuring import benchmark_program, benchmark_rows
from meshd.node.workloads.errors import RowsError, WorkloadError
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import Program, parse_program, program_digest
from meshd.node.workloads.rows import check_finite, unpack

_STARTUP_S: Final = 60.0
_SPAWN_S: Final = 10.0
_ENDING_S: Final = 5.0
_MEASURE: Final = b"measure"
Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class ForkserverOptions:
    """How executor processes are run."""

    user: str = "nobody"
    """Whom to compute as when the daemon runs as root."""
    idle_s: float = 60.0
    """After how long without work a child ends, and then the server."""
    nice: int = 10
    cpu_capability: str = "avx2"
    """Which kernels torch may use: default, avx2 or avx512; default where the machine lacks it."""


@asynccontextmanager
async def open_forkserver(
    options: ForkserverOptions | None = None,
) -> AsyncIterator["ForkserverExecutor"]:
    """Yield an executor; no process is started before the first request, none is left behind."""
    async with trio.open_nursery() as nursery:
        executor = ForkserverExecutor(options or ForkserverOptions(), nursery)
        try:
            yield executor
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 3 * _ENDING_S, shield=True):
                await executor.aclose()
            nursery.cancel_scope.cancel()


@dataclass
class _Child:
    """One process, as the daemon sees it."""

    number: int
    limits: Limits
    channel: Channel
    spawned: trio.Event = field(default_factory=trio.Event)
    exited: trio.Event = field(default_factory=trio.Event)
    pid: int = 0
    status: int | None = None
    source: bytes | Path | None = None
    """What it has loaded: the digest of a program's file, or where the file lies."""
    program: Program | None = None
    busy: bool = False
    idle_since: float = 0.0


@dataclass
class _Server:
    """The process that forks, as the daemon sees it."""

    process: subprocess.Popen[bytes]
    raw: socket.socket
    control: trio.socket.SocketType
    """The same socket: `raw` for what must be sent without waiting."""
    ready: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    capability: str = ""
    failure: str = ""
    children: dict[int, _Child] = field(default_factory=dict)
    idle_since: float = 0.0


class ForkserverExecutor:
    """Runs shards in child processes; see `open_forkserver`."""

    def __init__(self, options: ForkserverOptions, nursery: trio.Nursery) -> None:
        self._options = options
        self._nursery = nursery
        self._server: _Server | None = None
        self._starting = trio.Lock()
        self._children: dict[Key, _Child] = {}
        self._locks: dict[Key, trio.Lock] = {}
        self._numbers = 0
        self._speed: int | None = None
        self._closed = False

    async def infer(self, job: InferRequest) -> bytes:
        """Return the packed output rows. Raises ExecutorError.

        Requests of one job and slot wait for one another. When the caller is cancelled the child
        is killed. A program given as a path must not change while the executor is open.
        """
        key = (job.job_id, job.slot)
        lock = self._locks.setdefault(key, trio.Lock())
        async with lock:
            try:
                return await self._infer(key, job)
            finally:
                if key not in self._children and not lock.statistics().tasks_waiting:
                    del self._locks[key]

    async def _infer(self, key: Key, job: InferRequest) -> bytes:
        source = await trio.to_thread.run_sync(_identity, job.program)
        child = self._children.get(key)
        if child is not None and (
            child.exited.is_set() or child.limits != job.limits or child.source != source
        ):
            self._drop(key)
            child = None
        if child is not None:
            child.busy = True
        try:
            known = child.program if child is not None else None
            admission = await trio.to_thread.run_sync(_admit, job, known)
            if child is None:
                child = await self._spawn(key, job.limits)
            return await self._compute(key, child, job, admission, source)
        finally:
            if child is not None:
                child.busy = False
                child.idle_since = trio.current_time()

    async def measure(self) -> int:
        """Return compute units a second of one slot: the best of five runs of two layers."""
        if self._speed is None:
            program, rows = benchmark_program(), benchmark_rows()
            request = InferRequest(_MEASURE, 0, program, rows, Limits(memory_bytes=256 << 20))
            cost = units(parse_program(program), unpack(rows).count)
            best = float("inf")
            for _ in range(5):
                started = trio.current_time()
                await self.infer(request)
                best = min(best, trio.current_time() - started)
            self._drop((_MEASURE, 0))
            self._speed = max(1, int(cost / best))
        return self._speed

    async def aclose(self) -> None:
        """End every process; requests that run get ExecutorDied."""
        self._closed = True
        async with self._starting:
            if self._server is not None:
                await self._end_server(self._server)

    def child_pids(self) -> list[int]:
        """Return the process ids of the children that live, for tests and diagnosis."""
        server = self._server
        return [c.pid for c in server.children.values() if c.pid] if server else []

    @property
    def server_pid(self) -> int | None:
        """The process id of the server, None while it does not run."""
        return None if self._server is None else self._server.process.pid

    async def _compute(
        self, key: Key, child: _Child, job: InferRequest, admission: Admission, source: bytes | Path
    ) -> bytes:
        finished, limit = False, job.limits.memory_bytes
        try:
            with trio.move_on_after(job.limits.wall_s):
                if child.program is None:
                    await child.channel.request(Kind.PROGRAM, (admission.data,), 0, limit)
                    child.source, child.program = source, admission.program
                output = await self._exchange(child, job, admission)
                finished = True
                return output
            raise LimitExceeded("wall_s", job.limits.wall_s)
        except ChannelClosed as error:
            raise await _death(child, job.limits) from error
        finally:
            if not finished:
                self._drop(key)

    async def _exchange(self, child: _Child, job: InferRequest, admission: Admission) -> bytes:
        schema, count = admission.program.output_schema, admission.rows.count
        seconds = struct.pack("<I", job.limits.cpu_s)
        output = await child.channel.request(
            Kind.ROWS, (seconds, job.inputs), schema.packed_bytes(count), job.limits.memory_bytes
        )
        try:
            rows = unpack(output)
            check_finite(rows)
        except RowsError as error:
            raise ShardFailed(f"the executor returned what are no rows: {error}") from error
        if rows.schema != schema or rows.count != count:
            raise ShardFailed("the executor returned other rows than the program makes")
        return output

    async def _spawn(self, key: Key, limits: Limits) -> _Child:
        server = await self._running_server()
        ours, theirs = socket.socketpair()
        self._numbers += 1
        child = _Child(self._numbers, limits, Channel(ours), busy=True)
        server.children[child.number] = child
        self._children[key] = child
        spawned = False
        try:
            with theirs, trio.move_on_after(_SPAWN_S):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", theirs.fileno()))]
                message = pack_control("spawn", child.number, limits.memory_bytes, limits.threads)
                await server.control.sendmsg([message], rights)
                await child.spawned.wait()
                spawned = not child.exited.is_set()
        except (OSError, trio.ClosedResourceError) as error:
            raise ExecutorDied("the server of executor processes ended") from error
        finally:
            if not spawned:
                self._drop(key)
        if not spawned:
            raise ExecutorDied("the server of executor processes did not start one")
        return child

    def _drop(self, key: Key) -> None:
        """Forget a child and have it killed; never waits."""
        child = self._children.pop(key, None)
        if child is None:
            return
        child.channel.close()
        server = self._server
        if server is None or child.number not in server.children or server.gone.is_set():
            return
        try:
            server.raw.send(pack_control("kill", child.number))
        except OSError:
            server.process.kill()  # its children are killed with it

    async def _running_server(self) -> _Server:
        async with self._starting:
            if self._closed:
                raise ExecutorUnavailable("the executor is closed; open a new one")
            if self._server is None or self._server.gone.is_set():
                self._server = self._start_server()
            server = self._server
            with trio.move_on_after(_STARTUP_S):
                await server.ready.wait()
            if not server.ready.is_set() or server.failure:
                await self._end_server(server)
                reason = server.failure or f"torch was not imported within {_STARTUP_S:g} s"
                raise ExecutorUnavailable(f"this machine cannot compute: {reason}")
            return server

    def _start_server(self) -> _Server:
        """Start the process from this thread: it is killed when the thread that started it ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-B", "-m", "meshd.node.compute.server"]
        with theirs:
            process = subprocess.Popen(
                [
                    *command,
                    str(theirs.fileno()),
                    self._options.user,
                    str(self._options.nice),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(self._options.cpu_capability),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        server = _Server(process, ours, trio.socket.from_stdlib_socket(ours))
        self._nursery.start_soon(self._attend, server)
        return server

    async def _attend(self, server: _Server) -> None:
        """Follow one server until it ends: its messages, and what is idle."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_idle, server)
                while data := await server.control.recv(MAX_CONTROL):
                    _note(server, parse_control(data))
                nursery.cancel_scope.cancel()
        except* (OSError, trio.ClosedResourceError, FramingError) as errors:
            server.failure = server.failure or str(errors.exceptions[0])
        finally:
            _bury(server)
            with trio.CancelScope(deadline=trio.current_time() + 2 * _ENDING_S, shield=True):
                await trio.to_thread.run_sync(_wait_or_kill, server.process)
            server.ended.set()

    async def _end_idle(self, server: _Server) -> None:
        """End children without work, then a server without children."""
        idle_s = self._options.idle_s
        while True:
            await trio.sleep(idle_s / 4)
            before = trio.current_time() - idle_s
            for key, child in list(self._children.items()):
                if not child.busy and child.idle_since <= before:
                    self._drop(key)
            if server.ready.is_set() and not server.children and server.idle_since <= before:
                server.control.close()

    async def _end_server(self, server: _Server) -> None:
        server.control.close()
        await server.ended.wait()
        if self._server is server:
            self._server = None


def _note(server: _Server, message: tuple[object, ...]) -> None:
    """Keep what the server says."""
    match message:
        case ("ready", str(capability)):
            server.capability, server.idle_since = capability, trio.current_time()
            server.ready.set()
        case ("failed", str(reason)):
            server.failure = reason
            server.ready.set()
        case ("spawned", int(number), int(pid)) if number in server.children:
            server.children[number].pid = pid
            server.children[number].spawned.set()
        case ("exited", int(number), int(status)) if number in server.children:
            child = server.children.pop(number)
            child.status = status
            child.exited.set()
            child.spawned.set()
            server.idle_since = trio.current_time()
        case _:
            raise FramingError(f"the server said {message!r}")


def _bury(server: _Server) -> None:
    """Wake everybody who waits for a server that has gone."""
    server.failure = server.failure or "the server ended; is torch installed?"
    server.control.close()
    server.gone.set()
    server.ready.set()
    for child in server.children.values():
        child.exited.set()
        child.spawned.set()
        child.channel.close()
    server.children.clear()


def _wait_or_kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _death(child: _Child, limits: Limits) -> ExecutorDied | LimitExceeded:
    """Return the error that says why a child went away."""
    with trio.move_on_after(_ENDING_S):
        await child.exited.wait()
    if child.status == -signal.SIGXCPU:
        return LimitExceeded("cpu_s", limits.cpu_s)
    how = "with its server" if child.status is None else f"with status {child.status}"
    if child.status is not None and child.status < 0:
        how = f"by {signal.Signals(-child.status).name}"
    return ExecutorDied(f"executor process {child.pid} ended {how}; try the shard again")


def _identity(source: bytes | Path) -> bytes | Path:
    return source if isinstance(source, Path) else program_digest(source)


def _admit(job: InferRequest, known: Program | None) -> Admission:
    """Check a request, in a thread: large weights take a while."""
    if known is None:
        return admit(job)
    try:
        return admit_rows(known, b"", job)
    except WorkloadError as error:
        raise ShardFailed(str(error)) from error


def _environment(capability: str) -> dict[str, str]:
    """Return all that the server's environment holds: nothing of the daemon's."""
    flags = Path("/proc/cpuinfo").read_text() if capability != "default" else ""
    needed = {"avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512dq", "avx512vl", "avx512bw")}
    if not all(flag in flags for flag in needed.get(capability, ())):
        capability = "default"
    return {
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "LANG": "C.UTF-8",
    }
