"""The executor that computes with torch, in processes of its own; the daemon never loads torch.

A server process imports torch at the first request (about two seconds), becomes an unprivileged
user, and forks one child for each job and slot. A child serves that job's shards one after
another; it is replaced after a failure, a limit or a cancellation, and ended when idle. Server
and children end when the daemon does, however it ends.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import trio

from meshd.node.compute.channel import ChannelClosed
from meshd.node.compute.errands import (
    Errand,
    errand_of_close,
    errand_of_rows,
    errand_of_shard,
)
from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    ExecutorUnavailable,
    InferRequest,
    LimitExceeded,
    Limits,
    TrainRequest,
    TrainResult,
)
from meshd.node.compute.framing import Kind
from meshd.node.compute.measuring import benchmark_program, benchmark_rows
from meshd.node.compute.processes import (
    ENDING_S,
    ChildProcess,
    ForkserverOptions,
    ServerProcess,
)
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import Program, parse_program, program_digest
from meshd.node.workloads.rows import unpack

_MEASURE: Final = b"measure"
_CLOSING: Final = -2
"""The slot in which rounds are closed: nobody's shard or audit is waited for there."""
_OTHERS_IDLE_S: Final = 5.0
"""A child of another job that was idle for so long makes room for a new one."""
Key = tuple[bytes, int]
J = TypeVar("J", InferRequest, TrainRequest, CloseRequest)
T = TypeVar("T")


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
            with trio.CancelScope(deadline=trio.current_time() + 3 * ENDING_S, shield=True):
                await executor.aclose()
            nursery.cancel_scope.cancel()


class ForkserverExecutor:
    """Runs shards in child processes; see `open_forkserver`."""

    def __init__(self, options: ForkserverOptions, nursery: trio.Nursery) -> None:
        self._options = options
        self._nursery = nursery
        self._server: ServerProcess | None = None
        self._starting = trio.Lock()
        self._children: dict[Key, ChildProcess] = {}
        self._locks: dict[Key, trio.Lock] = {}
        self._numbers = 0
        self._speed: int | None = None
        self._closed = False

    async def infer(self, job: InferRequest) -> bytes:
        """Return the packed output rows. Raises ExecutorError.

        Requests of one job and slot wait for one another. When the caller is cancelled the child
        is killed. A program given as a path must not change while the executor is open.
        """
        return await self._run((job.job_id, job.slot), job, errand_of_rows)

    async def train(self, job: TrainRequest) -> TrainResult:
        """Return contribution and end digest of a shard. As `infer`, in the same process."""
        return await self._run((job.job_id, job.slot), job, errand_of_shard)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        """Return the state after a round. As `infer`, in a process of its own for each job."""
        return await self._run((job.job_id, _CLOSING), job, errand_of_close)

    async def _run(self, key: Key, job: J, prepare: Callable[[J, Program | None], Errand[T]]) -> T:
        lock = self._locks.setdefault(key, trio.Lock())
        async with lock:
            try:
                return await self._run_alone(key, job, prepare)
            finally:
                if key not in self._children and not lock.statistics().tasks_waiting:
                    del self._locks[key]

    async def _run_alone(
        self, key: Key, job: J, prepare: Callable[[J, Program | None], Errand[T]]
    ) -> T:
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
            errand = await trio.to_thread.run_sync(prepare, job, known)
            if child is None:
                child = await self._spawn(key, job.limits)
            return await self._compute(key, child, errand, source)
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
            await self._end_server()
        for key in list(self._children):
            self._drop(key)

    def child_pids(self) -> list[int]:
        """Return the process ids of the children that live, for tests and diagnosis."""
        children = self._server.children.values() if self._server is not None else ()
        return [child.pid for child in children if child.pid]

    @property
    def server_pid(self) -> int | None:
        """The process id of the server, None while it does not run."""
        return None if self._server is None else self._server.process.pid

    async def _compute(
        self, key: Key, child: ChildProcess, errand: Errand[T], source: bytes | Path
    ) -> T:
        finished, limits = False, child.limits
        try:
            with trio.move_on_after(limits.wall_s):
                if child.program is None:
                    await child.channel.request(
                        Kind.PROGRAM, (errand.data,), 0, limits.memory_bytes
                    )
                    child.source, child.program = source, errand.program
                reply = await child.channel.request(
                    errand.kind, errand.payload, errand.expected, limits.memory_bytes
                )
                result = errand.read(reply)
                finished = True
                return result
            raise LimitExceeded("wall_s", limits.wall_s)
        except ChannelClosed as error:
            raise await child.death() from error
        finally:
            if not finished:
                self._drop(key)

    async def _spawn(self, key: Key, limits: Limits) -> ChildProcess:
        server = await self._running_server()
        before = trio.current_time() - _OTHERS_IDLE_S
        for other, child in list(self._children.items()):
            if other[0] != key[0] and not child.busy and child.idle_since <= before:
                self._drop(other)
        self._numbers += 1
        child = server.prepare(self._numbers, limits)
        self._children[key] = child
        spawned = False
        try:
            await server.spawn(child)
            spawned = True
        finally:
            if not spawned:
                self._drop(key)
        return child

    def _drop(self, key: Key) -> None:
        """Forget a child and have it killed; never waits."""
        child = self._children.pop(key, None)
        if child is None:
            return
        child.channel.close()
        if self._server is not None:
            self._server.kill(child)

    async def _running_server(self) -> ServerProcess:
        async with self._starting:
            if self._closed:
                raise ExecutorUnavailable("the executor is closed; open a new one")
            if self._server is None or self._server.gone.is_set():
                self._server = ServerProcess(self._options)
                self._nursery.start_soon(self._attend, self._server)
            try:
                await self._server.wait_ready()
            except ExecutorUnavailable:
                await self._end_server()
                raise
            return self._server

    async def _attend(self, server: ServerProcess) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_idle, server)
            await server.run()
            nursery.cancel_scope.cancel()

    async def _end_idle(self, server: ServerProcess) -> None:
        """End children without work, then a server without children."""
        idle_s = self._options.idle_s
        while True:
            await trio.sleep(idle_s / 4)
            before = trio.current_time() - idle_s
            for key, child in list(self._children.items()):
                if not child.busy and child.idle_since <= before:
                    self._drop(key)
            if server.ready.is_set() and not server.children and server.idle_since <= before:
                server.close()

    async def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.ended.wait()
            self._server = None


def _identity(source: bytes | Path) -> bytes | Path:
    return source if isinstance(source, Path) else program_digest(source)
