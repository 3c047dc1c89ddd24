"""What is committed and paid (works), and the spans in which training's works are audited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshd.ledger.audits import Status, Subject
from meshd.p2p.codec import Signed, digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import Assignment, Commitment, JobTerms


@dataclass(kw_only=True, eq=False)
class Work(Subject):
    """A commitment with its lease's assignment. In training its span is audited in its place."""

    commitment: Signed[Commitment]
    assignment: Signed[Assignment]
    payee: Address
    number: int
    """The shard's number in the whole job: round by round, from 0."""
    span: Span | None = None

    @property
    def hash(self) -> bytes:
        """The commitment's digest."""
        return self.commitment.digest

    @property
    def worker(self) -> Address:
        """Who committed."""
        return self.commitment.signer

    @property
    def place(self) -> tuple[int, int]:
        """Its shard and attempt."""
        return self.assignment.message.shard, self.assignment.message.attempt

    @property
    def term(self) -> int:
        """The term of its assignment."""
        return self.assignment.message.term

    @property
    def population(self) -> int:
        """Its rows."""
        return self.commitment.message.n

    def units_of(self, drawn: Sequence[int]) -> int:
        """Return the units of *drawn* rows, rounded up."""
        return -(-self.assignment.message.units * len(drawn) // self.population)

    @property
    def outcome(self) -> Status:
        """What has become of it, its span's audit included."""
        return self.span.status if self.span is not None else self.status

    @property
    def entered(self) -> bool:
        """Whether a settlement has it."""
        return bool(self.span.epoch if self.span is not None else self.epoch)

    def drop(self) -> None:
        """Its worker was rejected: nothing of it that is unsettled is paid."""
        (self.span or self).void()


@dataclass(kw_only=True, eq=False)
class Span(Subject):
    """Consecutive works of one worker in a training job, audited and paid as one."""

    works: tuple[Work, ...]

    @property
    def hash(self) -> bytes:
        """A digest over its commitments, in order."""
        return digest(b"meshd.span.v1\0" + b"".join(work.hash for work in self.works))

    @property
    def worker(self) -> Address:
        """Who committed."""
        return self.works[0].worker

    @property
    def place(self) -> tuple[int, int]:
        """Shard and attempt of its first work."""
        return self.works[0].place

    @property
    def population(self) -> int:
        """Its shards."""
        return len(self.works)

    def units_of(self, drawn: Sequence[int]) -> int:
        """Return the units of the *drawn* shards."""
        return sum(self.works[at].assignment.message.units for at in drawn)


def works_of(subject: Subject) -> tuple[Work, ...]:
    """Return the works that an audit of *subject* decides on."""
    return subject.works if isinstance(subject, Span) else (_as_work(subject),)


def _as_work(subject: Subject) -> Work:
    assert isinstance(subject, Work)
    return subject


LostHead = tuple[int, int]
"""The term that dropped a head, and the head's height."""


def lost_beacons(terms: JobTerms, lost: Sequence[LostHead], term: int) -> tuple[int, ...]:
    """Return the beacons of those *lost* heads that may have held what was assigned in *term*."""
    return tuple(sorted({height + terms.lag for dropped, height in lost if dropped > term}))


class OpenSpans:
    """The works of a training job that no span holds yet, by worker."""

    def __init__(self, terms: JobTerms) -> None:
        self._terms = terms
        self._works: dict[Address, list[Work]] = {}
        self._closed: dict[Address, int] = {}
        """How many works of each worker lie in closed spans."""

    def add(self, work: Work) -> bool:
        """Take a work; return whether that fills its worker's span."""
        works = self._works.setdefault(work.worker, [])
        works.append(work)
        return len(works) >= self._terms.span_shards

    def workers(self) -> list[Address]:
        """Return who has works that no span holds, in the order of their first ones."""
        return [worker for worker, works in self._works.items() if works]

    def close(
        self,
        worker: Address,
        height: int,
        position: int,
        lost: Sequence[LostHead],
        *,
        left: bool = False,
    ) -> Span | None:
        """Close the span of *worker* at *height*; None if it has no work in it.

        A head of *lost* may have closed it before, with the same works or with fewer. A worker
        is on probation until `span_shards` of its works lie in closed spans; one that *left*
        pays for its last audit too, or it could spend the job's budget on many short spans.
        """
        works = self._works.pop(worker, [])
        works = [work for work in works if work.status is Status.PENDING]
        if not works:
            return None
        before = self._closed.get(worker, 0)
        self._closed[worker] = before + len(works)
        first = before < self._terms.span_shards
        span = Span(
            works=tuple(works),
            height=height,
            position=position,
            beacon_height=height + self._terms.lag,
            lost_beacons=lost_beacons(self._terms, lost, min(work.term for work in works)),
            sample=sample_size(self._terms, len(works), first=first),
            probation=first or left,
        )
        for work in works:
            work.span = span
        return span


FEW = 4
"""With fewer contributions a round the gate cannot compare directions: every shard is audited."""


def sample_size(terms: JobTerms, shards: int, *, first: bool) -> int:
    """Return how many of a span's *shards* are audited; *first*: its worker is on probation."""
    if terms.shards < FEW:
        return shards
    if not first:
        return min(terms.audit_shards, shards)
    share = -(-shards * terms.probation_span_shards // max(1, terms.span_shards))
    return min(max(terms.audit_shards, share), shards)
