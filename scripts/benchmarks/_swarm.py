"""A swarm on this machine for a benchmark: real processes, a job, and what its log says."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import psutil
import trio
from _table import say
from _timings import Timings, read_timings

from meshd.config.amounts import format_mcc
from meshd.node.client import Client
from meshd.node.control.api import ENDED, ControlError, JobDetail
from meshd.node.demo.errors import DemoError
from meshd.node.demo.processes import open_processes
from meshd.node.demo.swarm import Swarm, call

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

HERE = Path(__file__).resolve().parent
POLL_S = 0.5
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class BenchSwarm:
    """A swarm whose orchestrator notes when entries reach its log."""

    swarm: Swarm

    @property
    def researcher(self) -> Client:
        """The daemon that submits."""
        return self.swarm.participants["researcher"].client

    def timings(self) -> Timings:
        """Return what the orchestrator has noted so far, over all jobs."""
        path = self.swarm.folder / "orchestrator.timings"
        return read_timings(path.read_text().splitlines(keepends=True))

    def cpu_s(self) -> dict[str, float]:
        """Return the processor seconds that each role has used, its executors included."""
        used: dict[str, float] = {}
        for participant in self.swarm.participants.values():
            own = psutil.Process(participant.child.pid)
            for process in [own, *own.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    seconds = times.user + times.system
                    used[participant.role] = used.get(participant.role, 0.0) + seconds
        return used

    async def run_job(self, toml: str, *, limit_s: float) -> JobDetail:
        """Submit a job; return it when it has ended, or as it is after *limit_s* seconds.

        Raises DemoError if it ends without being settled.
        """
        orchestrator = self.swarm.participants["orchestrator"].address
        text = f'orchestrator = "{orchestrator}"\n{toml}'
        job = await call(lambda: self.researcher.submit_text(text, self.swarm.folder))
        say(f"job {job['id'][:10]} of {job['shards']} shards submitted")
        with trio.move_on_after(limit_s):
            await self._wait_ended(job["id"])
        detail = await call(lambda: self.researcher.job(job["id"]))
        if detail["state"] in ENDED and detail["state"] != "settled":
            raise DemoError(f"job {job['id']} is {detail['state']}: {detail['note']}")
        if detail["state"] not in ENDED:
            counts = detail["shards"]
            done = f"{counts['accepted']} of {counts['total']} shards accepted"
            say(f"stopped after {limit_s:g} s with {done}")
        return detail

    async def _wait_ended(self, job_id: str) -> None:
        said = time.monotonic()
        while True:
            self.swarm.processes.check()
            detail = await call(lambda: self.researcher.job(job_id))
            if detail["state"] in ENDED:
                return
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                counts = detail["shards"]
                say(f"{detail['state']}: {counts['accepted']} of {counts['total']} accepted")
            await trio.sleep(POLL_S)


def run(measure: Callable[[*Arguments], Awaitable[T]], *arguments: *Arguments) -> T:
    """Run a measurement in an event loop; what goes wrong in the swarm ends it with its text."""
    try:
        return trio.run(measure, *arguments)
    except* (DemoError, ControlError) as group:
        errors = [str(error) for error in _leaves(group)]
    raise SystemExit("bench: " + "; ".join(errors))


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@asynccontextmanager
async def open_swarm(
    folder: Path,
    *,
    workers: int,
    validators: int,
    orchestrator: str = "_timed",
    worker: str = "meshd.node.cli",
) -> AsyncIterator[BenchSwarm]:
    """Yield a swarm that is funded, staked and connected; no process is left when it closes.

    *orchestrator* and *worker* are the modules that these daemons run as.
    """
    async with open_processes(folder) as processes:
        with _importable_here():
            yield await _start(Swarm(folder, processes), workers, validators, orchestrator, worker)


async def _start(
    swarm: Swarm, workers: int, validators: int, orchestrator: str, worker: str
) -> BenchSwarm:
    await swarm.start_chain()
    roles = ("orchestrator", "aggregator")
    await swarm.add("orchestrator", "orchestrator", roles, module=orchestrator)
    async with trio.open_nursery() as nursery:
        for number in range(1, validators + 1):
            name = f"validator-{number}"
            nursery.start_soon(swarm.add, name, "validator", ("validator",))
        for number in range(1, workers + 1):
            add = partial(swarm.add, f"worker-{number}", "worker", ("worker",), module=worker)
            nursery.start_soon(add)
        nursery.start_soon(swarm.add, "researcher", "researcher", ())
    await swarm.fund()
    await swarm.stake()
    await swarm.wait_discovered()
    say(f"swarm of {workers} workers and {validators} validators is up")
    return BenchSwarm(swarm)


@contextmanager
def _importable_here() -> Iterator[None]:
    """Let processes that start meanwhile import the modules of this folder."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{HERE}:{before}" if before else str(HERE)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def cap_for(units: int, price: int) -> str:
    """Return a cap (MCC) that pays for *units* of work, its services and as much again in audits.

    *price* is in MCC's smallest unit a 10^9 units.
    """
    return format_mcc(-(-units * price * 3 // 10**9) + 10**6)
