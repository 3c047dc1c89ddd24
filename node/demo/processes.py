"""The demo's processes: started with a log each, watched, and all ended, whatever happens."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import trio

from meshd.node.demo.errors import DemoError

END_S = 10.0
"""Seconds a process has to end after SIGTERM."""
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A participant's process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    async def wait(self) -> int:
        """Wait for its end and return its exit code."""
        if self.process.poll() is not None:
            return self.process.returncode
        descriptor = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        return self.process.wait()

    def tail(self, lines: int = 5) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class Processes:
    """Every process that the demo started."""

    folder: Path
    children: list[Child] = field(default_factory=list)
    peak_pss_bytes: int = 0
    killed: set[int] = field(default_factory=set)

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start ``python -m arguments`` with its output in a log file named after it."""
        log = self.log_of(name)
        with log.open("ab") as output:
            # Started by this very thread: the kernel ends a child with the thread that made it.
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,  # ctrl-C is for the demo, which ends them in order
                preexec_fn=_die_with_parent,
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def log_of(self, name: str) -> Path:
        """Return the file that a process of this name writes to."""
        return self.folder / f"{name}.log"

    async def run(self, name: str, arguments: Sequence[str]) -> str:
        """Run a process to its end and return what it printed; raises DemoError if it failed."""
        child = self.start(name, arguments)
        code = await child.wait()
        self.children.remove(child)
        if code != 0:
            raise DemoError(f"{name} failed with exit code {code}:\n{child.tail()}")
        return child.log.read_text()

    def kill(self, child: Child) -> None:
        """Kill a process as a power cut would."""
        self.killed.add(child.pid)
        child.process.kill()

    def check(self) -> None:
        """Raise DemoError if a process ended that should not have."""
        for child in self.children:
            code = child.process.poll()
            if code is not None and child.pid not in self.killed:
                raise DemoError(f"{child.name} ended with exit code {code}:\n{child.tail()}")

    async def sample_memory(self) -> None:
        """Note the largest sum of proportional set sizes, once a second, until cancelled."""
        while True:
            total = await trio.to_thread.run_sync(_pss_of_family)
            self.peak_pss_bytes = max(self.peak_pss_bytes, total)
            await trio.sleep(1)

    def left_behind(self) -> list[str]:
        """Return the processes that have not ended."""
        return [
            f"{child.name}, process {child.pid}"
            for child in self.children
            if child.process.poll() is None
        ]

    async def end_all(self) -> None:
        """End every process: SIGTERM, then SIGKILL for what does not go."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.terminate()
        with trio.move_on_after(END_S):
            for child in self.children:
                await child.wait()
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
                await child.wait()


@asynccontextmanager
async def open_processes(folder: Path) -> AsyncIterator[Processes]:
    """Yield the demo's processes; none is left when it closes."""
    processes = Processes(folder)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(processes.sample_memory)
        try:
            yield processes
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 2 * END_S, shield=True):
                await processes.end_all()
            nursery.cancel_scope.cancel()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _pss_of_family() -> int:
    """Return the proportional set size (bytes) of this process and all below it."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has ended meanwhile
        for line in text.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def port_of(multiaddr: str) -> int:
    """Return the TCP port in a multiaddr."""
    parts = multiaddr.split("/")
    return int(parts[parts.index("tcp") + 1])
