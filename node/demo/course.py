"""The course of the demo: start the swarm, run its jobs, kill a worker in each, add up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from meshd.node.demo.accounts import mcc_balances
from meshd.node.demo.embedding import EmbeddingJob
from meshd.node.demo.options import DemoOptions
from meshd.node.demo.processes import Processes
from meshd.node.demo.progress import Progress
from meshd.node.demo.stage import JobOutcome, Stage
from meshd.node.demo.swarm import Participant, Swarm
from meshd.node.demo.training import TrainingJob

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio


class DemoJob(Protocol):
    """A job of the demo."""

    inputs: str
    """What it is computed from, in words."""

    async def make_inputs(self, processes: Processes, folder: Path, seed: int) -> None:
        """Write program and data into *folder*."""
        ...

    async def run(
        self, stage: Stage, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> JobOutcome:
        """See the job through; it counts as started when all its work is done."""
        ...


JOBS: dict[str, type[DemoJob]] = {"infer": EmbeddingJob, "train": TrainingJob}


@dataclass
class Outcome:
    """What happened, for the report."""

    swarm: Swarm
    cheater: Participant
    victim: Participant
    before: dict[str, int]
    after: dict[str, int] = field(default_factory=dict)
    jobs: list[JobOutcome] = field(default_factory=list)


async def run_course(
    options: DemoOptions, folder: Path, processes: Processes, progress: Progress
) -> Outcome:
    """Run the whole demo in *folder*; raises DemoError if it cannot go on."""
    swarm = Swarm(folder, processes)
    jobs = [JOBS[kind]() for kind in options.jobs]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_make_inputs, jobs, processes, folder, options.seed)
        progress.phase("chain: starting it and deploying the contracts")
        await swarm.start_chain()
        progress.phase("daemons: starting them")
        cheats, dies = await _start_daemons(options, swarm)
        progress.phase("accounts: funding, registering, staking")
        await swarm.fund()
        await swarm.stake()
        progress.phase("discovery: through the bootstrap peer and the DHT")
        await swarm.wait_discovered()
        progress.phase("inputs: " + ", ".join(job.inputs for job in jobs))
    stage = Stage(options, swarm, progress, cheats, dies)
    before = await _balances(swarm)
    done = await _run_jobs(stage, jobs)
    progress.phase("adding up")
    after = await _balances(swarm)
    return Outcome(swarm, stage.cheater, stage.victim, before, after, done)


async def _make_inputs(jobs: list[DemoJob], processes: Processes, folder: Path, seed: int) -> None:
    for job in jobs:
        await job.make_inputs(processes, folder, seed)


async def _start_daemons(options: DemoOptions, swarm: Swarm) -> tuple[str, str]:
    """Start everybody; name the worker that cheats and the one that will be killed."""
    chosen = random.Random(options.seed).sample(range(1, options.workers + 1), 2)
    cheats, dies = (f"worker-{number}" for number in chosen)
    await swarm.add("orchestrator", "orchestrator", ("orchestrator", "aggregator"))
    async with trio.open_nursery() as nursery:
        for number in range(1, options.validators + 1):
            nursery.start_soon(swarm.add, f"validator-{number}", "validator", ("validator",))
        for number in range(1, options.workers + 1):
            name = f"worker-{number}"
            module = "meshd.node.demo.cheater" if name == cheats else "meshd.node.cli"
            nursery.start_soon(partial(swarm.add, name, "worker", ("worker",), module=module))
        nursery.start_soon(swarm.add, "researcher", "researcher", ())
    swarm.put_in_order()
    return cheats, dies


async def _run_jobs(stage: Stage, jobs: list[DemoJob]) -> list[JobOutcome]:
    """Run the jobs; one begins when all work of the one before is done, and settles meanwhile."""
    done: dict[int, JobOutcome] = {}

    async def run(at: int, *, task_status: TaskStatus[None]) -> None:
        done[at] = await jobs[at].run(stage, task_status=task_status)

    async with trio.open_nursery() as nursery:
        for at in range(len(jobs)):
            if stage.victim.child.pid in stage.swarm.processes.killed:
                stage.progress.note(f"{stage.dies} is started again")
                await stage.swarm.restart(stage.dies)
            await nursery.start(partial(run, at))
    return [done[at] for at in range(len(jobs))]


async def _balances(swarm: Swarm) -> dict[str, int]:
    addresses = [participant.address for participant in swarm.participants.values()]
    return await mcc_balances(swarm.rpc, swarm.deployment, addresses)
