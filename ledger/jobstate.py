"""What a job's log means: a fold over its entries, the same on every machine.

Nothing here reads a clock or a chain: an entry counts at the height of the head that holds it,
and block hashes come from the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from meshd.ledger import settlement
from meshd.ledger.audits import Status, Subject
from meshd.ledger.joblog import Batch, Genesis, LogError, open_vote
from meshd.ledger.leases import Lease, Leases, ShardPlan, WorkerRecord
from meshd.ledger.openaudits import OpenAudits
from meshd.ledger.rounds import Rounds
from meshd.ledger.works import LostHead, OpenSpans, Work, lost_beacons, works_of
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import NOBODY, Address
from meshd.p2p.messages import (
    Assignment,
    Attestation,
    Canary,
    Challenge,
    Commitment,
    Cut,
    JobEnd,
    JobEndReason,
    JobTerms,
    LeaseAccept,
    LeaseEnd,
    LeaseEndReason,
    Message,
    Reveal,
    RoundClose,
    Stop,
    TermStart,
    VerdictCommit,
)


class JobState:
    """One job as its log tells it."""

    def __init__(
        self, domain: Domain, genesis: Genesis, terms: JobTerms, plan: ShardPlan | None = None
    ) -> None:
        self.domain = domain
        self.genesis = genesis
        self.terms = terms
        self.height = 0
        self.seq = 0
        self.term = 0
        self.position = 0
        self.rounds = Rounds(terms, genesis.committee)
        self._leases = Leases(terms, self.rounds, plan)
        self._spans = OpenSpans(terms)
        self.works: dict[bytes, Work] = {}
        """By the digest of their commitments."""
        self.book = settlement.Book(genesis.job_id, terms)
        self.stop: Signed[Stop] | None = None
        self.end: Signed[JobEnd] | None = None
        self.beacons: dict[int, bytes] = {}
        self._lost_heads: list[LostHead] = []
        self._seen: set[bytes] = set()
        self.audits = OpenAudits(terms, self._auditors)

    @property
    def leases(self) -> dict[bytes, Lease]:
        """Every lease, by the digest of its assignment."""
        return self._leases.all

    @property
    def shards(self) -> dict[int, list[Lease]]:
        """The attempts at each shard, by its number in the whole job."""
        return self._leases.shards

    @property
    def subjects(self) -> dict[bytes, Subject]:
        """What is audited and paid as one: the works, or the spans of a training job."""
        return self.audits.all

    @property
    def workers(self) -> dict[Address, WorkerRecord]:
        """What every worker did in the job."""
        return self._leases.workers

    # ---- applying ------------------------------------------------------------------------

    def needed_beacons(self, height: int) -> set[int]:
        """Return the heights whose block hashes must be given before entries at *height*."""
        return self.audits.needed_beacons(height) - self.beacons.keys()

    def reach(self, height: int, beacons: Mapping[int, bytes]) -> None:
        """Go on to *height* and open the audits whose beacons exist there.

        *beacons* are block hashes as `needed_beacons` asks for them.
        """
        self.beacons.update(beacons)
        self.height = height
        self.audits.reach(height, self.beacons)

    def audits_at(
        self, height: int, log_height: int, beacons: Mapping[int, bytes]
    ) -> Iterable[Subject]:
        """Yield copies of the subjects that have an audit open at chain *height*; in them auditors
        are replaced whose time was over before *log_height*, the highest certified head's.
        """
        return self.audits.copies_at(height, log_height, {**self.beacons, **beacons})

    def begin_batch(self, term: int, seq: int, height: int, beacons: Mapping[int, bytes]) -> None:
        """Take up the place of the batch whose entries are applied next."""
        if term > self.term:
            self._leases.extend(height - self.height)
        self.reach(height, beacons)
        self.seq, self.term = seq, term

    def apply_batch(self, batch: Batch, beacons: Mapping[int, bytes]) -> dict[bytes, str]:
        """Apply a batch; return which entries had no effect, by digest, and why."""
        head = batch.head.message
        self.begin_batch(head.term, head.seq, head.height, beacons)
        refused = {}
        for entry in batch.entries:
            reason = self.apply(entry)
            if reason is not None:
                refused[entry.digest] = reason
        return refused

    def apply(self, entry: Signed[Message]) -> str | None:
        """Apply one entry at the present height; return why it has no effect, None if it has."""
        if entry.digest in self._seen:
            return "logged already"
        reason = self._dispatch(entry)
        if reason is None:
            self.position += 1
            self._seen.add(entry.digest)
        return reason

    def __contains__(self, name: bytes) -> bool:
        """Return whether the entry of digest *name* had its effect."""
        return name in self._seen

    def _dispatch(self, entry: Signed[Message]) -> str | None:
        message = entry.message
        if getattr(message, "job_id", self.genesis.job_id) != self.genesis.job_id:
            return "entry is of another job"
        if self.end is not None and not isinstance(message, Cut | Reveal | TermStart):
            return "the job has ended"
        match message:
            case Assignment() | LeaseEnd() | RoundClose() | TermStart() | Cut() | JobEnd():
                if entry.signer != self.genesis.orchestrator:
                    return "entry is the orchestrator's to sign"
                return self._by_orchestrator(entry)
            case JobTerms():
                same = entry.signer == self.terms.researcher and message == self.terms
                return None if same else "these are not the job's terms"
            case LeaseAccept():
                return self._leases.accept(cast(Signed[LeaseAccept], entry))
            case Canary():
                return self.rounds.on_canary(cast(Signed[Canary], entry))
            case Commitment():
                return self._commitment(cast(Signed[Commitment], entry))
            case Stop():
                if entry.signer != self.terms.researcher:
                    return "only the researcher may stop the job"
                self.stop = cast(Signed[Stop], entry)
                self._close_spans(self._spans.workers())
                return None
            case _:
                return self._by_auditor(entry)

    def _by_orchestrator(self, entry: Signed[Message]) -> str | None:
        match entry.message:
            case Assignment():
                return self._leases.assign(
                    cast(Signed[Assignment], entry), height=self.height, term=self.term
                )
            case LeaseEnd() as message:
                return self._lease_end(message)
            case RoundClose():
                return self._round_close(cast(Signed[RoundClose], entry))
            case TermStart() as message:
                if message.term != self.term:
                    return "term start of another term"
                return self._note_lost(cast(Signed[TermStart], entry))
            case Cut() as message:
                return self._cut(message)
            case _:
                return self._job_end(cast(Signed[JobEnd], entry))

    def _job_end(self, entry: Signed[JobEnd]) -> str | None:
        reason = entry.message.reason
        if reason not in list(JobEndReason):
            return f"unknown reason {reason}"
        if reason == JobEndReason.COMPLETE and self.rounds.failed:
            return "a round failed: the gate accepted nothing of it"
        if reason == JobEndReason.COMPLETE and not (self.complete and self.audited):
            return "not every shard is accepted and audited"
        if reason == JobEndReason.STOPPED and self.stop is None:
            return "the researcher has not stopped the job"
        self.end = entry
        return None

    def _by_auditor(self, entry: Signed[Message]) -> str | None:
        message = entry.message
        if not isinstance(message, Challenge | VerdictCommit | Attestation | Reveal):
            return f"{message.kind} has no effect in this kind of job"
        named = message.commitment_hash if isinstance(message, Attestation) else b""
        subject = self.subjects.get(named)
        before = subject.status if subject is not None else None
        why = self.audits.take(
            entry, height=self.height, beacons=self.beacons, ended=self.end is not None
        )
        if subject is not None and subject.status is not before:
            worker = self.workers[subject.worker]
            if subject.status is Status.ACCEPTED:
                worker.accepted += not self.rounds.training
            elif subject.status is Status.REJECTED:
                self._reject(worker)
        return why

    # ---- leases and commitments ----------------------------------------------------------

    def _lease_end(self, message: LeaseEnd) -> str | None:
        why = self._leases.end(message)
        if why is None:
            worker = Address(self.leases[message.assignment_hash].assignment.message.worker)
            if not any(lease.open for lease in self.workers[worker].leases):
                self._close_spans([worker], left=True)
        return why

    def _commitment(self, entry: Signed[Commitment]) -> str | None:
        why = self._leases.commitment_problem(entry, height=self.height)
        if why is not None:
            return why
        lease = self.leases[entry.message.assignment_hash]
        assert lease.accept is not None
        assignment = lease.assignment.message
        worker = self.workers[entry.signer]
        probation = len(worker.works) < self.terms.probation_shards
        work = Work(
            commitment=entry,
            assignment=lease.assignment,
            payee=Address(lease.accept.message.payee),
            number=self._leases.number(assignment.round, assignment.shard),
            height=self.height,
            position=self.position,
            beacon_height=self.height + self.terms.lag,
            lost_beacons=lost_beacons(self.terms, self._lost_heads, assignment.term),
            sample=self.terms.probation_rows if probation else self.terms.audit_rows,
            probation=probation,
        )
        lease.work = work
        worker.works.append(work)
        self.works[entry.digest] = work
        if self.rounds.training:
            worker.accepted += 1
            lease.entered = True
            if self._spans.add(work) or self.rounds.over or self.stop is not None:
                self._close_spans([work.worker])
        else:
            self.audits.add(work)
        return None

    # ---- rounds and spans ----------------------------------------------------------------

    def round_works(self) -> list[Work]:
        """Return what is committed to the open round, in the order of its shards."""
        works = []
        for shard in range(self.terms.shards):
            for lease in self.shards.get(self._leases.number(self.rounds.open, shard), []):
                if lease.work is not None and lease.holds_shard:
                    works.append(lease.work)
        return works

    def free_shards(self) -> list[int]:
        """Return the shards of the open round that nobody holds."""
        if self.rounds.over:
            return []
        return [
            shard
            for shard in range(self.terms.shards)
            if not any(lease.holds_shard for lease in self.attempts(shard))
        ]

    def attempts(self, shard: int) -> list[Lease]:
        """Return the attempts at a shard of the open round."""
        return self.shards.get(self._leases.number(self.rounds.open, shard), [])

    def _round_close(self, entry: Signed[RoundClose]) -> str | None:
        works = self.round_works()
        tries = self.rounds.tries
        why = self.rounds.on_close(entry, works)
        if why is None and self.rounds.tries > tries:
            for shard in range(self.terms.shards):
                for lease in self.attempts(shard):
                    lease.released = lease.released or lease.work is not None
        if why is None and self.rounds.over:
            self._close_spans(self._spans.workers())
        return why

    def _close_spans(self, workers: Iterable[Address], *, left: bool = False) -> None:
        """Close the spans of *workers*: here their beacon is fixed."""
        for worker in workers:
            span = self._spans.close(
                worker, self.height, self.position, self._lost_heads, left=left
            )
            if span is not None:
                self.audits.add(span)

    def _auditors(self, subject: Subject) -> tuple[Address, ...]:
        """Return the members that can audit *subject*: in training those of its class."""
        commitment = works_of(subject)[0].commitment.message
        return self.rounds.members_of(commitment.numeric_class)

    def _note_lost(self, entry: Signed[TermStart]) -> str | None:
        try:
            votes = [open_vote(self.domain, self.genesis, raw) for raw in entry.attached]
        except LogError as error:
            return str(error)
        for head in (head for vote in votes for head in vote.signed):
            lost = (entry.message.term, head.message.height)
            if lost[1] > self.height:
                continue  # nobody who waited for its beacon could begin a term so early
            if head.digest in entry.message.lost and lost not in self._lost_heads:
                self._lost_heads.append(lost)
        return None

    # ---- audits and settlements ----------------------------------------------------------

    def _reject(self, worker: WorkerRecord) -> None:
        worker.rejected = True
        for lease in worker.leases:
            if lease.open:
                lease.ended = LeaseEndReason.REJECTED
            elif lease.work is not None and not lease.work.entered:
                lease.work.drop()

    def _cut(self, message: Cut) -> str | None:
        if message.epoch != self.book.epoch + 1:
            return f"cut has epoch {message.epoch}, not {self.book.epoch + 1}"
        if message.payee == NOBODY:
            return "cut names no payee"
        if self.book.closed:
            return "everything is settled"
        self.book.cut(
            list(self.subjects.values()),
            payee=Address(message.payee),
            signer=self.genesis.orchestrator,
            seq=self.seq,
            ended=self.end is not None,
        )
        return None

    def close_without_end(self) -> None:
        """Enter everything that passed, as if the job ended here: its deadline is over."""
        while not self.book.closed:
            self.book.cut(
                list(self.subjects.values()),
                payee=self.genesis.orchestrator,
                signer=self.genesis.orchestrator,
                seq=self.seq,
                ended=True,
            )

    def overdue(self, log_height: int, height: int) -> bool:
        """Return whether an auditor's time, running at *log_height* (the highest certified
        head's), is over at chain *height*: an empty head then makes that part of the log.
        """
        return self.audits.overdue(log_height, height)

    @property
    def audited(self) -> bool:
        """Whether no audit is open or still to come."""
        return not self.audits.open and not self._spans.workers()

    @property
    def revealed(self) -> bool:
        """Whether every verdict that is to be paid for is revealed."""
        return all(
            finding.reveal is not None or not finding.in_majority
            for subject in self.subjects.values()
            for finding in subject.findings
        )

    @property
    def complete(self) -> bool:
        """Whether every shard has an accepted work, or every round is closed."""
        if self.rounds.training:
            return self.rounds.done
        return all(self.shard_done(shard) is not None for shard in range(self.terms.shards))

    def shard_done(self, shard: int) -> Work | None:
        """Return the accepted work of a shard (by its number in the job), if it has one."""
        for lease in self.shards.get(shard, []):
            if lease.work is not None and lease.work.outcome is Status.ACCEPTED:
                return lease.work
        return None
