"""Who holds which shard of a job, and how many more a worker may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from meshd.ledger.audits import Status, Work
from meshd.p2p.codec import Signed
from meshd.p2p.messages import Assignment, LeaseAccept, LeaseEndReason


class ShardPlan(Protocol):
    """What terms, program and data say about each shard (node.workloads)."""

    def units(self, shard: int) -> int:
        """Return the compute units of a shard."""
        ...

    def input_hash(self, round_: int, shard: int) -> bytes:
        """Return the digest of everything a shard is computed from."""
        ...


@dataclass
class Lease:
    """An assignment and what has become of it."""

    assignment: Signed[Assignment]
    until: int
    """The last height at which a commitment counts; a lost term's blocks are added."""
    accept: Signed[LeaseAccept] | None = None
    ended: LeaseEndReason | None = None
    work: Work | None = None

    @property
    def open(self) -> bool:
        """Whether a commitment for it would still count."""
        return self.ended is None and self.work is None

    @property
    def holds_shard(self) -> bool:
        """Whether its shard is not to be given to anybody else."""
        if self.work is not None:
            return self.work.status in (Status.PENDING, Status.ACCEPTED)
        return self.ended is None


@dataclass
class WorkerRecord:
    """One worker in one job."""

    works: list[Work] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    accepted: int = 0
    halvings: int = 0
    rejected: bool = False

    @property
    def in_flight(self) -> int:
        """Shards it holds that are not accepted yet."""
        return sum(
            lease.holds_shard and (lease.work is None or lease.work.status is Status.PENDING)
            for lease in self.leases
        )

    @property
    def unsettled(self) -> int:
        """Shards it holds or delivered that have entered no settlement."""
        return sum(
            lease.holds_shard and (lease.work is None or not lease.work.epoch)
            for lease in self.leases
        )

    @property
    def allowance(self) -> int:
        """Leases it may have in flight: one more than it had accepted, halved by each lapse."""
        return max(1, (1 + self.accepted) >> self.halvings)
