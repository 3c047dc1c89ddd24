"""What the demo's jobs have in common: being submitted, watched, and losing a worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import trio

from meshd.config.amounts import format_mcc, parse_mcc
from meshd.ledger.draws import PPM
from meshd.node.control.api import ENDED, ControlError, JobDetail, ReceiptInfo
from meshd.node.demo.errors import DemoError
from meshd.node.demo.options import DemoOptions
from meshd.node.demo.progress import Progress
from meshd.node.demo.report import Check, Losses, Output
from meshd.node.demo.swarm import Participant, Swarm, call

PRICE = "0.001"
"""MCC per 10^9 compute units."""
JOB_S = 600
"""Seconds that a job may take before the demo gives up."""
POLL_S = 0.5
SECOND_AUDITS = 0.1
"""The share of what was accepted that is audited twice."""

COMMON = """\
price = "{price}"
cap = "{cap}"
deadline = "15m"
orchestrator = "{orchestrator}"
"""
"""Keys of every job's description."""


@dataclass
class JobOutcome:
    """What became of one job, for the report."""

    detail: JobDetail
    rows_per_shard: int
    overhead_steady: float
    was_killed: bool
    receipts: list[ReceiptInfo] = field(default_factory=list)
    check: Check | Losses | None = None
    outputs: list[Output] = field(default_factory=list)


@dataclass
class Stage:
    """The swarm with its roles given, and where what it makes goes."""

    options: DemoOptions
    swarm: Swarm
    progress: Progress
    cheats: str
    dies: str
    """Names of the worker that cheats and of the one that is killed."""

    @property
    def folder(self) -> Path:
        """Where inputs and everything temporary lie."""
        return self.swarm.folder

    @property
    def out(self) -> Path:
        """Where outputs go; made if need be."""
        folder = self.options.out.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def cheater(self) -> Participant:
        """The worker that cheats."""
        return self.swarm.participants[self.cheats]

    @property
    def victim(self) -> Participant:
        """The worker that is killed, in each job anew."""
        return self.swarm.participants[self.dies]

    @property
    def researcher(self) -> Participant:
        """Who submits the jobs."""
        return self.swarm.of_role("researcher")[0]

    async def submit(self, text: str, units: int) -> str:
        """Submit a job whose shards take *units* in all; return its id."""
        common = COMMON.format(
            price=PRICE,
            cap=_cap(units),
            orchestrator=self.swarm.of_role("orchestrator")[0].address,
        )
        client = self.researcher.client
        return (await call(lambda: client.submit_text(common + text, self.folder)))["id"]

    async def wait_until(
        self,
        job_id: str,
        holds: Callable[[JobDetail], bool],
        on_change: Callable[[JobDetail], Awaitable[None]] | None = None,
    ) -> JobDetail:
        """Return the job as soon as it has ended or *holds* is true of it.

        *on_change* gets every detail on the way. Raises DemoError if it takes too long.
        """
        client = self.researcher.client
        with trio.move_on_after(JOB_S):
            while True:
                self.swarm.processes.check()
                detail = await call(lambda: client.job(job_id))
                self.progress.job(detail)
                if on_change is not None:
                    await on_change(detail)
                if detail["state"] in ENDED or holds(detail):
                    return detail
                await trio.sleep(POLL_S)
        raise DemoError(f"the job took over {JOB_S} s: run again with --keep for the logs")

    async def kill_while_computing(self) -> bool:
        """Kill the victim as soon as it computes a shard, hence holds a lease."""
        victim = self.victim
        while True:
            try:
                status = await call(victim.client.status)
            except ControlError:
                return False
            if status["shards"] > 0:
                self.swarm.processes.kill(victim.child)
                self.progress.note(f"{victim.name} is killed while it computes a shard")
                return True
            await trio.sleep(POLL_S / 4)


def is_settling(detail: JobDetail) -> bool:
    """Return whether all work of a job is done, whatever came of it."""
    return detail["state"] == "settling"


def _cap(units: int) -> str:
    """Return a cap that pays for so many units, services and audits, and the burnt share."""
    work = Fraction(units * parse_mcc(PRICE), 10**9)
    return format_mcc(int(work * Fraction(125, 100)) + PPM)
