"""Small swarms for tests that tell one story each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from sim.forging import is_canary
from sim.invariants import Cast, check_all
from sim.swarm import SETTLE_IN_S, SimNode, Swarm, reference_rows

from meshd.ledger.jobstate import JobState
from meshd.node.compute.executor import InferRequest, TrainRequest, TrainResult
from meshd.node.compute.toy import ToyExecutor
from meshd.node.submitted import SubmittedJob
from meshd.node.workloads.rows import unpack

VALIDATORS = ("victor", "vera", "vince", "viola", "vito")
WORKERS = ("wanda", "will", "walt", "wendy", "wade")


class CountingExecutor(ToyExecutor):
    """Remembers every shard that it was given."""

    def __init__(self, units_per_second: int = 1000) -> None:
        super().__init__(units_per_second)
        self.inputs: list[bytes] = []
        """Of inference."""
        self.begun: list[tuple[int, int]] = []
        """Round and shard, of training."""
        self.running: set[tuple[int, int]] = set()

    async def infer(self, job: InferRequest) -> bytes:
        if job.slot >= 0:
            self.inputs.append(job.inputs)
        return await super().infer(job)

    async def train(self, job: TrainRequest) -> TrainResult:
        if is_canary(job):
            return await super().train(job)
        place = (job.round, job.shard)
        self.begun.append(place)
        self.running.add(place)
        try:
            return await super().train(job)
        finally:
            self.running.discard(place)


async def gather(
    swarm: Swarm,
    *,
    validators: int = 3,
    workers: int = 3,
    speed: int = 1000,
    **special: dict[str, Any],
) -> SimNode:
    """Add an orchestrator, validators, workers and a researcher, who is returned.

    *special* gives further arguments of `Swarm.add` by name.
    """
    await swarm.add("oscar", "orchestrator", "aggregator", **special.get("oscar", {}))
    for name in VALIDATORS[:validators]:
        await swarm.add(name, "validator", **special.get(name, {}))
    for name in WORKERS[:workers]:
        own = {"executor": CountingExecutor(speed), **special.get(name, {})}
        await swarm.add(name, "worker", **own)
    rita = await swarm.add("rita", **special.get("rita", {}))
    await trio.sleep(SETTLE_IN_S)
    return rita


async def wait_until(condition: Callable[[], bool], limit_s: float = 120) -> None:
    """Wait for *condition* to hold."""
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.1)


def log_of(swarm: Swarm, job: SubmittedJob) -> JobState:
    """Return what the researcher's copy of the final log says."""
    found = swarm.job(swarm.nodes["rita"], job.id)
    assert found is not None
    assert found.view is not None
    return found.view.state


def following(swarm: Swarm, job: SubmittedJob) -> bool:
    """Return whether the researcher follows the job's log."""
    found = swarm.job(swarm.nodes["rita"], job.id)
    return found is not None and found.view is not None


async def finish(
    swarm: Swarm, job: SubmittedJob, *, state: str = "settled", cast: Cast | None = None
) -> SubmittedJob:
    """Wait for the job's end, check every invariant, and return the job."""
    rita = swarm.nodes["rita"]
    await swarm.wait_over(rita, job.id, limit_s=700)
    await wait_until(lambda: swarm.ledger.escrow(job.id).held == 0, limit_s=200)
    await check_all(swarm, rita, job.id, cast or Cast())
    over = swarm.job(rita, job.id)
    assert over is not None
    assert over.state.value == state, over.detail
    return over


def check_whole_output(swarm: Swarm, job: SubmittedJob) -> None:
    """Every row of the delivered output is right."""
    assert job.output is not None
    rows = unpack(swarm.nodes["rita"].blobs.read(job.output)).rows()
    assert tuple(rows) == reference_rows(job.terms.message.rows)


def received(swarm: Swarm, job: SubmittedJob, name: str) -> int:
    """Return what an account was paid of a job."""
    return swarm.ledger.state().claimed.get((job.id, swarm.nodes[name].address), 0)
