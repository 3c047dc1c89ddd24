"""Who holds which shard of a job, and how many more a worker may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from meshd.ledger.audits import Status
from meshd.ledger.rounds import Rounds
from meshd.ledger.works import Work
from meshd.p2p.codec import Signed
from meshd.p2p.identity import NOBODY, Address
from meshd.p2p.messages import (
    Assignment,
    Commitment,
    JobTerms,
    LeaseAccept,
    LeaseEnd,
    LeaseEndReason,
)


class ShardPlan(Protocol):
    """What terms, program and data say about each shard (node.workloads)."""

    def units(self, shard: int) -> int:
        """Return the compute units of a shard."""
        ...

    def input_hash(self, round_: int, shard: int, state: bytes) -> bytes:
        """Return the digest of everything a shard is computed from; *state* is its round's."""
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
    released: bool = False
    """Its round is repeated: the shard is free again, what was delivered stays payable."""
    entered: bool = False
    """In training: its contribution waits for its round, not for an audit."""

    @property
    def open(self) -> bool:
        """Whether a commitment for it would still count."""
        return self.ended is None and self.work is None

    @property
    def holds_shard(self) -> bool:
        """Whether its shard is not to be given to anybody else."""
        if self.work is not None:
            passed = self.work.outcome in (Status.PENDING, Status.ACCEPTED)
            return passed and not self.released
        return self.ended is None


@dataclass
class WorkerRecord:
    """One worker in one job."""

    works: list[Work] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    accepted: int = 0
    """Works accepted; in training, works delivered."""
    halvings: int = 0
    rejected: bool = False

    @property
    def in_flight(self) -> int:
        """Shards it holds that are neither accepted nor, in training, delivered yet."""
        return sum(
            lease.open
            or (
                lease.work is not None
                and lease.work.outcome is Status.PENDING
                and not lease.entered
            )
            for lease in self.leases
        )

    @property
    def unsettled(self) -> int:
        """Shards it holds or delivered that have entered no settlement."""
        return sum(
            lease.open
            or (
                lease.work is not None
                and lease.work.outcome in (Status.PENDING, Status.ACCEPTED)
                and not lease.work.entered
            )
            for lease in self.leases
        )

    @property
    def allowance(self) -> int:
        """Leases it may have in flight: one more than it had accepted, halved by each lapse."""
        return max(1, (1 + self.accepted) >> self.halvings)


class Leases:
    """The leases of one job, as its log gives and ends them."""

    def __init__(self, terms: JobTerms, rounds: Rounds, plan: ShardPlan | None) -> None:
        self._terms = terms
        self._rounds = rounds
        self._plan = plan
        self.all: dict[bytes, Lease] = {}
        """By the digest of their assignments."""
        self.shards: dict[int, list[Lease]] = {}
        """The attempts at each shard, by its number in the whole job."""
        self.workers: dict[Address, WorkerRecord] = {}

    def assign(self, entry: Signed[Assignment], *, height: int, term: int) -> str | None:
        """Give a shard to a worker; return why that has no effect, None if it has."""
        message = entry.message
        worker = self.workers.get(Address(message.worker)) or WorkerRecord()
        if self._rounds.over:
            return "no round is open"
        if message.term > term or message.round != self._rounds.open:
            return "assignment is of a later term, or of a round that is not open"
        if message.shard >= self._terms.shards:
            return f"the job has no shard {message.shard}"
        number = self.number(message.round, message.shard)
        attempts = self.shards.get(number, [])
        if message.attempt != len(attempts):
            return f"attempt {message.attempt} is not number {len(attempts)}"
        if any(lease.holds_shard for lease in attempts):
            return f"shard {message.shard} is another lease's"
        why = self._worker_problem(message, worker, height)
        if why is not None:
            return why
        if self._plan is not None and (message.units, message.input_hash) != (
            self._plan.units(message.shard),
            self._plan.input_hash(message.round, message.shard, self._rounds.state),
        ):
            return "units or input are not those of the shard"
        lease = Lease(entry, message.lease_until)
        self.all[entry.digest] = lease
        self.shards.setdefault(number, []).append(lease)
        self.workers.setdefault(Address(message.worker), worker).leases.append(lease)
        return None

    def _worker_problem(self, message: Assignment, worker: WorkerRecord, height: int) -> str | None:
        if not height < message.lease_until <= height + self._terms.lease_blocks:
            return "lease ends before its beginning or after the terms' limit"
        if self._terms.workers and message.worker not in self._terms.workers:
            return "worker is not among those the terms allow"
        if worker.rejected:
            return "worker was rejected in this job"
        if worker.in_flight >= worker.allowance:
            return f"worker has {worker.in_flight} leases in flight and may have no more"
        if worker.unsettled >= self._terms.max_unsettled:
            return f"worker has {worker.unsettled} unsettled shards and may have no more"
        return self._rounds.class_problem(Address(message.worker), message.numeric_class)

    def number(self, round_: int, shard: int) -> int:
        """Return a shard's number in the whole job."""
        return round_ * self._terms.shards + shard

    def accept(self, entry: Signed[LeaseAccept]) -> str | None:
        """Note that a worker takes its lease; return why that has no effect, None if it has."""
        lease = self.all.get(entry.message.assignment_hash)
        if lease is None or entry.signer != lease.assignment.message.worker:
            return "no lease of this worker"
        if lease.accept is not None or not lease.open:
            return "lease was accepted already or is over"
        if entry.message.payee == NOBODY:
            return "no payee"
        lease.accept = entry
        return None

    def end(self, message: LeaseEnd) -> str | None:
        """End a lease; return why that has no effect, None if it has."""
        lease = self.all.get(message.assignment_hash)
        if lease is None or not lease.open:
            return "no such lease is open"
        try:
            lease.ended = LeaseEndReason(message.reason)
        except ValueError:
            return f"unknown reason {message.reason}"
        if lease.ended is not LeaseEndReason.HANDED_BACK:
            self.workers[Address(lease.assignment.message.worker)].halvings += 1
        return None

    def commitment_problem(self, entry: Signed[Commitment], *, height: int) -> str | None:
        """Return why a commitment does not count, None if it does."""
        message = entry.message
        lease = self.all.get(message.assignment_hash)
        if lease is None or entry.signer != lease.assignment.message.worker:
            return "no lease of this worker"
        if lease.accept is None or not lease.open:
            return "lease was not accepted, or is over"
        if height > lease.until:
            return "the lease lapsed"
        if message.n != self.rows_of(lease.assignment.message.shard) or message.hash_alg != 1:
            return "commitment is to another number of rows, or by an unknown hash"
        if message.numeric_class != lease.assignment.message.numeric_class:
            return "commitment is of another numeric class than its assignment"
        return None

    def rows_of(self, shard: int) -> int:
        """Return the number of rows that a shard reads."""
        if self._rounds.training:
            return self._terms.rows_per_shard
        start = shard * self._terms.rows_per_shard
        return min(self._terms.rows_per_shard, self._terms.rows - start)

    def extend(self, blocks: int) -> None:
        """Give open leases the *blocks* that a change of term cost."""
        for lease in self.all.values():
            lease.until += blocks if lease.open else 0
