"""The process that imports torch once and forks children that compute.

Run by the daemon as `python -m meshd.node.compute.server FD USER NICE PARENT`, FD being its end
of the control socket. It becomes USER when root, starts children on request, reports when they
end, and ends with them as soon as the daemon has gone.
"""

import os
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass

import torch

from meshd.node.compute import child
from meshd.node.compute.confinement import (
    ConfinementError,
    die_with_parent,
    drop_privileges,
    give_way,
)
from meshd.node.compute.framing import MAX_CONTROL, FramingError, pack_control, parse_control
from meshd.node.compute.measuring import benchmark_program, benchmark_rows
from meshd.node.workloads.interpreter import infer_rows, load
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.optimizers import orthogonalised


@dataclass(frozen=True, slots=True)
class _Running:
    number: int
    pid: int
    pidfd: int


def main(arguments: list[str]) -> int:
    """Serve until the daemon closes the control socket; return the exit status."""
    descriptor, user, nice, parent = arguments
    control = socket.socket(fileno=int(descriptor))
    try:
        _pin_numerics()
        _import_lazily()
        give_way(int(nice))
        drop_privileges(user)
        die_with_parent(int(parent))
    except (ConfinementError, OSError, RuntimeError) as error:
        control.send(pack_control("failed", str(error)[:1000]))
        return 1
    control.send(pack_control("ready", torch.backends.cpu.get_cpu_capability()))
    _Server(control).serve()
    return 0


def _pin_numerics() -> None:
    """Make results depend on as little as possible: one thread, deterministic algorithms."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float32)


def _import_lazily() -> None:
    """Compute and train a little, so that children find imported what torch imports late."""
    interpreter = load(benchmark_program(8, 8))
    infer_rows(interpreter, unpack(benchmark_rows(8, 2)))
    matrix = torch.ones(1, 2, 2, requires_grad=True)
    torch.autograd.grad(matrix.square().sum(), [matrix], allow_unused=True)
    orthogonalised(matrix.detach(), 1)


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._running: dict[int, _Running] = {}

    def serve(self) -> None:
        """Handle messages and ends of children until the daemon has gone; then kill them all."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while True:
            for running in self._running.values():
                poll.register(running.pidfd, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll()}
            for running in list(self._running.values()):
                if running.pidfd in ready:
                    poll.unregister(running.pidfd)
                    self._reap(running)
            if self._control.fileno() in ready and not self._handle_message():
                break
        for running in self._running.values():
            os.kill(running.pid, signal.SIGKILL)
        for running in self._running.values():
            os.waitpid(running.pid, 0)

    def _handle_message(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MAX_CONTROL, 1)
        except ConnectionError:
            return False
        if not data:
            return False
        match parse_control(data):
            case ("spawn", int(number), int(memory_bytes), int(threads)) if descriptors:
                self._spawn(number, descriptors[0], memory_bytes, threads)
            case ("kill", int(number)):
                if number in self._running:
                    os.kill(self._running[number].pid, signal.SIGKILL)
            case parts:
                raise FramingError(f"unknown control message {parts!r}")
        return True

    def _spawn(self, number: int, descriptor: int, memory_bytes: int, threads: int) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._control.close()
                for running in self._running.values():
                    os.close(running.pidfd)
                child.run(socket.socket(fileno=descriptor), parent, memory_bytes, threads)
                status = 0
            except (FramingError, ConfinementError, OSError, MemoryError):
                traceback.print_exc()
            finally:
                child.end(status)
        os.close(descriptor)
        self._running[number] = _Running(number, pid, os.pidfd_open(pid))
        self._tell(pack_control("spawned", number, pid))

    def _reap(self, running: _Running) -> None:
        _, status = os.waitpid(running.pid, 0)
        os.close(running.pidfd)
        del self._running[running.number]
        self._tell(pack_control("exited", running.number, os.waitstatus_to_exitcode(status)))

    def _tell(self, message: bytes) -> None:
        try:
            self._control.send(message)
        except ConnectionError:
            return  # the daemon has gone: the next read says so


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
