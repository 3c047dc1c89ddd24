"""The daemon's side of executor processes: starting the server, having it fork and kill."""

import os
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from meshd.node.compute.channel import Channel
from meshd.node.compute.executor import (
    ExecutorDied,
    ExecutorUnavailable,
    LimitExceeded,
    Limits,
)
from meshd.node.compute.framing import MAX_CONTROL, FramingError, pack_control, parse_control
from meshd.node.workloads.program import Program

STARTUP_S: Final = 120.0
SPAWN_S: Final = 30.0
ENDING_S: Final = 5.0


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


@dataclass
class ChildProcess:
    """One process, as the daemon sees it."""

    number: int
    limits: Limits
    channel: Channel
    remote: socket.socket
    """The child's end, until it has been sent."""
    spawned: trio.Event = field(default_factory=trio.Event)
    exited: trio.Event = field(default_factory=trio.Event)
    pid: int = 0
    status: int | None = None
    source: bytes | Path | None = None
    """What it has loaded: the digest of a program's file, or where the file lies."""
    program: Program | None = None
    busy: bool = False
    idle_since: float = 0.0

    async def death(self) -> ExecutorDied | LimitExceeded:
        """Return the error that says why it went away."""
        with trio.move_on_after(ENDING_S):
            await self.exited.wait()
        if self.status == -signal.SIGXCPU:
            return LimitExceeded("cpu_s", self.limits.cpu_s)
        how = "with its server" if self.status is None else f"with status {self.status}"
        if self.status is not None and self.status < 0:
            how = f"by signal {-self.status}"
        return ExecutorDied(f"executor process {self.pid} ended {how}; try the shard again")


class ServerProcess:
    """The process that imported torch and forks children.

    It is started by the thread that makes this object and killed when that thread ends: make it
    in the main thread. `run` follows it until it has ended.
    """

    def __init__(self, options: ForkserverOptions) -> None:
        self.ready = trio.Event()
        self.gone = trio.Event()
        self.ended = trio.Event()
        self.capability = ""
        self.children: dict[int, ChildProcess] = {}
        self.idle_since = 0.0
        self._failure = ""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [theirs.fileno(), options.user, options.nice, os.getpid()]
        command = [sys.executable, "-I", "-B", "-m", "meshd.node.compute.server"]
        with theirs:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(options.cpu_capability),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._raw = ours
        self._control = trio.socket.from_stdlib_socket(ours)

    async def run(self) -> None:
        """Follow its messages until it has ended; then nobody waits for it any more."""
        try:
            while data := await self._control.recv(MAX_CONTROL):
                self._note(parse_control(data))
        except (OSError, trio.ClosedResourceError, FramingError) as error:
            self._failure = self._failure or str(error)
        finally:
            self._bury()
            deadline = trio.current_time() + 2 * ENDING_S
            with trio.CancelScope(deadline=deadline, shield=True):
                await trio.to_thread.run_sync(_wait_or_kill, self.process)
            self.ended.set()

    async def wait_ready(self) -> None:
        """Wait until torch is imported and privileges are gone. Raises ExecutorUnavailable."""
        with trio.move_on_after(STARTUP_S):
            await self.ready.wait()
        if not self.ready.is_set() or self._failure:
            reason = self._failure or f"torch was not imported within {STARTUP_S:g} s"
            raise ExecutorUnavailable(f"this machine cannot compute: {reason}")

    def prepare(self, number: int, limits: Limits) -> "ChildProcess":
        """Return a child that `spawn` is to start."""
        ours, theirs = socket.socketpair()
        child = ChildProcess(number, limits, Channel(ours), theirs, busy=True)
        self.children[number] = child
        return child

    async def spawn(self, child: "ChildProcess") -> None:
        """Have a child forked. Raises ExecutorDied when that does not happen."""
        limits = child.limits
        message = pack_control("spawn", child.number, limits.memory_bytes, limits.threads)
        try:
            with child.remote as remote, trio.move_on_after(SPAWN_S):
                number = struct.pack("i", remote.fileno())
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, number)]
                await self._control.sendmsg([message], rights)
                await child.spawned.wait()
        except (OSError, trio.ClosedResourceError) as error:
            raise ExecutorDied("the server of executor processes ended") from error
        if not child.spawned.is_set() or child.exited.is_set():
            raise ExecutorDied("the server of executor processes did not start one")

    def kill(self, child: "ChildProcess") -> None:
        """Have a child killed; never waits."""
        if child.number not in self.children:
            return
        try:
            self._raw.send(pack_control("kill", child.number))
        except OSError:
            self.process.kill()  # its children are killed with it

    def close(self) -> None:
        """Let it end, and its children with it."""
        self._control.close()

    def _note(self, message: tuple[object, ...]) -> None:
        """Keep what the server says."""
        match message:
            case ("ready", str(capability)):
                self.capability, self.idle_since = capability, trio.current_time()
                self.ready.set()
            case ("failed", str(reason)):
                self._failure = reason
                self.ready.set()
            case ("spawned", int(number), int(pid)) if number in self.children:
                self.children[number].pid = pid
                self.children[number].spawned.set()
            case ("exited", int(number), int(status)) if number in self.children:
                child = self.children.pop(number)
                child.status = status
                child.exited.set()
                child.spawned.set()
                self.idle_since = trio.current_time()
            case _:
                raise FramingError(f"the server said {message!r}")

    def _bury(self) -> None:
        """Wake everybody who waits for it."""
        self._failure = self._failure or "the server ended; is torch installed?"
        self._control.close()
        self.gone.set()
        self.ready.set()
        for child in self.children.values():
            child.exited.set()
            child.spawned.set()
            child.channel.close()
        self.children.clear()


def _wait_or_kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
