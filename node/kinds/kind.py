"""What a role needs to know of a kind of job, and the job that it knows it of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from meshd.ledger.audits import Finding, Subject
from meshd.node.compute.executor import Limits
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.workloads.plans import Plan
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import Assignment, AuditResult, Challenge, Commitment, Open


@dataclass(frozen=True)
class JobContext:
    """One job as a role of this node takes part in it."""

    ports: Ports
    jobs: Jobs
    record: JobRecord
    plan: Plan
    view: LogView


@dataclass(frozen=True)
class Shard:
    """A leased shard and, once computed, what was committed to."""

    assignment: Signed[Assignment]
    seed: bytes
    output: bytes | None = None
    commitment: Signed[Commitment] | None = None


@dataclass(frozen=True)
class Computed:
    """A shard's result as its worker commits to it."""

    output: bytes
    """The blob that the worker answers its auditors from."""
    output_root: bytes
    output_bytes: int
    trace_root: bytes
    n: int
    seconds: float


TRIAL_SLOT = -3
"""The executor's slot in which it is found out whether a shard fails everywhere."""
AUDIT_SLOT = -1
"""The executor's slot in which what others committed to is computed again."""


class Kind(Protocol):
    """Computing, opening and checking the shards of one job."""

    @property
    def audit_limits(self) -> Limits:
        """What computing a shard again may use."""
        ...

    async def numeric_class(self, slot: int, limits: Limits) -> bytes:
        """Return the digest that says which machines compute the same bits as this one.

        Where that has to be computed, it is in *slot* and within *limits*.
        """
        ...

    def assignment_problem(self, assignment: Assignment) -> str | None:
        """Return why *assignment* is not one of this job's shards, None if it is."""
        ...

    async def compute(self, shard: Shard, slot: int, limits: Limits) -> Computed:
        """Compute a leased shard. Raises ExecutorError and WorkloadError."""
        ...

    async def attempt(self, round_: int, shard: int) -> None:
        """Compute a shard for nobody (-1: the job's first steps). Raises ExecutorError.

        ShardFailed is raised on every machine alike.
        """
        ...

    def share(self, shard: Shard) -> None:
        """Let whoever needs it for the job's output have an accepted shard's result."""
        ...

    def open(
        self, subject: Subject, shards: Sequence[Shard], challenge: Challenge, auditor: Address
    ) -> Open:
        """Return what the worker opens of *shards*, those that *subject* consists of."""
        ...

    async def own(self, subject: Subject, drawn: Sequence[int]) -> bytes:
        """Return an auditor's own result for what it drew, to be compared and revealed."""
        ...

    async def judge(
        self,
        subject: Subject,
        challenge: Signed[Challenge],
        own: bytes,
        opened: Open,
        wait_s: float,
    ) -> tuple[AuditResult, bytes | None]:
        """Return what a worker's opening is worth beside *own*, and the output held for it.

        Raises NetworkError if what was opened cannot be had within *wait_s*.
        """
        ...

    async def agrees(self, subject: Subject, own: bytes, finding: Finding) -> bool:
        """Return whether another auditor's revealed result equals *own*."""
        ...
