"""What a job's log means: a fold over its entries, the same on every machine.

Nothing here reads a clock or a chain: an entry counts at the height of the head that holds it,
and block hashes come from the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from meshd.ledger import settlement
from meshd.ledger.audits import Status, Work
from meshd.ledger.joblog import Batch, Genesis, open_vote
from meshd.ledger.leases import Lease, ShardPlan, WorkerRecord
from meshd.ledger.openaudits import OpenAudits
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import NOBODY, Address
from meshd.p2p.messages import (
    Assignment,
    Attestation,
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
        self._plan = plan
        self.height = 0
        self.seq = 0
        self.term = 0
        self.position = 0
        self.leases: dict[bytes, Lease] = {}
        self.shards: dict[int, list[Lease]] = {}
        self.workers: dict[Address, WorkerRecord] = {}
        self.works: dict[bytes, Work] = {}
        self.book = settlement.Book(genesis.job_id, terms)
        self.stop: Signed[Stop] | None = None
        self.end: Signed[JobEnd] | None = None
        self.beacons: dict[int, bytes] = {}
        self._lost_heads: list[tuple[int, int]] = []
        """(term that dropped it, height) of each lost head."""
        self._seen: set[bytes] = set()
        self.audits = OpenAudits(terms, genesis.committee)
        self._challenged: dict[bytes, Work] = {}
        self._judged: dict[bytes, Work] = {}
        """Works by the digest of a challenge, and of a verdict commitment, of theirs."""

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
    ) -> Iterable[Work]:
        """Yield copies of the works that have an audit open at chain *height*; in them auditors
        are replaced whose time was over before *log_height*, the highest certified head's.
        """
        return self.audits.copies_at(height, log_height, {**self.beacons, **beacons})

    def begin_batch(self, term: int, seq: int, height: int, beacons: Mapping[int, bytes]) -> None:
        """Take up the place of the batch whose entries are applied next."""
        if term > self.term:
            for lease in self.leases.values():
                lease.until += height - self.height if lease.open else 0
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
            case Assignment() | LeaseEnd() | TermStart() | Cut() | JobEnd():
                if entry.signer != self.genesis.orchestrator:
                    return "entry is the orchestrator's to sign"
                return self._by_orchestrator(entry)
            case JobTerms():
                same = entry.signer == self.terms.researcher and message == self.terms
                return None if same else "these are not the job's terms"
            case LeaseAccept():
                return self._lease_accept(cast(Signed[LeaseAccept], entry))
            case Commitment():
                return self._commitment(cast(Signed[Commitment], entry))
            case Stop():
                if entry.signer != self.terms.researcher:
                    return "only the researcher may stop the job"
                self.stop = cast(Signed[Stop], entry)
                return None
            case _:
                return self._by_auditor(entry)

    def _by_orchestrator(self, entry: Signed[Message]) -> str | None:
        match entry.message:
            case Assignment():
                return self._assignment(cast(Signed[Assignment], entry))
            case LeaseEnd() as message:
                return self._lease_end(message)
            case TermStart() as message:
                if message.term != self.term:
                    return "term start of another term"
                self._note_lost(cast(Signed[TermStart], entry))
                return None
            case Cut() as message:
                return self._cut(message)
            case _:
                return self._job_end(cast(Signed[JobEnd], entry))

    def _job_end(self, entry: Signed[JobEnd]) -> str | None:
        reason = entry.message.reason
        if reason not in list(JobEndReason):
            return f"unknown reason {reason}"
        if reason == JobEndReason.COMPLETE and not (self.complete and self.audited):
            return "not every shard is accepted and audited"
        if reason == JobEndReason.STOPPED and self.stop is None:
            return "the researcher has not stopped the job"
        self.end = entry
        return None

    def _by_auditor(self, entry: Signed[Message]) -> str | None:
        match entry.message:
            case Challenge() as message:
                work = self.works.get(message.commitments)
                if work is None:
                    return "challenge of an unknown commitment"
                challenge = cast(Signed[Challenge], entry)
                why = work.on_challenge(challenge, self.height, self.terms, self.beacons)
                if why is None:
                    self._challenged[entry.digest] = work
                return why
            case VerdictCommit():
                return self._verdict(cast(Signed[VerdictCommit], entry))
            case Attestation() as message:
                found = self.works.get(message.commitment_hash)
                if found is None:
                    return "attestation of an unknown commitment"
                return self._attestation(found, cast(Signed[Attestation], entry))
            case Reveal() as message:
                judged = self._judged.get(message.verdict_commit)
                if judged is None:
                    return "no such verdict"
                return judged.on_reveal(cast(Signed[Reveal], entry), ended=self.end is not None)
            case _:
                return f"{entry.message.kind} has no effect in this kind of job"

    # ---- leases and commitments ----------------------------------------------------------

    def _assignment(self, entry: Signed[Assignment]) -> str | None:
        message = entry.message
        worker = self.workers.get(Address(message.worker)) or WorkerRecord()
        if message.term > self.term or message.round >= self.terms.rounds:
            return "assignment is of a later term or round"
        if message.shard >= self.terms.shards:
            return f"the job has no shard {message.shard}"
        attempts = self.shards.get(message.shard, [])
        if message.attempt != len(attempts):
            return f"attempt {message.attempt} is not number {len(attempts)}"
        if any(lease.holds_shard for lease in attempts):
            return f"shard {message.shard} is another lease's"
        if not self.height < message.lease_until <= self.height + self.terms.lease_blocks:
            return "lease ends before its beginning or after the terms' limit"
        if self.terms.workers and message.worker not in self.terms.workers:
            return "worker is not among those the terms allow"
        if worker.rejected:
            return "worker was rejected in this job"
        if worker.in_flight >= worker.allowance:
            return f"worker has {worker.in_flight} leases in flight and may have no more"
        if worker.unsettled >= self.terms.max_unsettled:
            return f"worker has {worker.unsettled} unsettled shards and may have no more"
        if self._plan is not None and (message.units, message.input_hash) != (
            self._plan.units(message.shard),
            self._plan.input_hash(message.round, message.shard),
        ):
            return "units or input are not those of the shard"
        lease = Lease(entry, message.lease_until)
        self.leases[entry.digest] = lease
        self.shards.setdefault(message.shard, []).append(lease)
        self.workers.setdefault(Address(message.worker), worker).leases.append(lease)
        return None

    def _lease_accept(self, entry: Signed[LeaseAccept]) -> str | None:
        lease = self.leases.get(entry.message.assignment_hash)
        if lease is None or entry.signer != lease.assignment.message.worker:
            return "no lease of this worker"
        if lease.accept is not None or not lease.open:
            return "lease was accepted already or is over"
        if entry.message.payee == NOBODY:
            return "no payee"
        lease.accept = entry
        return None

    def _lease_end(self, message: LeaseEnd) -> str | None:
        lease = self.leases.get(message.assignment_hash)
        if lease is None or not lease.open:
            return "no such lease is open"
        try:
            lease.ended = LeaseEndReason(message.reason)
        except ValueError:
            return f"unknown reason {message.reason}"
        if lease.ended is not LeaseEndReason.HANDED_BACK:
            self.workers[Address(lease.assignment.message.worker)].halvings += 1
        return None

    def _commitment(self, entry: Signed[Commitment]) -> str | None:
        message = entry.message
        lease = self.leases.get(message.assignment_hash)
        if lease is None or entry.signer != lease.assignment.message.worker:
            return "no lease of this worker"
        if lease.accept is None or not lease.open:
            return "lease was not accepted, or is over"
        assignment = lease.assignment.message
        if self.height > lease.until:
            return "the lease lapsed"
        if message.n != self.rows_of(assignment.shard) or message.hash_alg != 1:
            return "commitment is to another number of rows, or by an unknown hash"
        worker = self.workers[entry.signer]
        probation = len(worker.works) < self.terms.probation_shards
        rows = self.terms.probation_rows if probation else self.terms.audit_rows
        work = Work(
            commitment=entry,
            assignment=lease.assignment,
            payee=Address(lease.accept.message.payee),
            height=self.height,
            position=self.position,
            beacon_height=self.height + self.terms.lag,
            lost_beacons=tuple(
                height + self.terms.lag
                for term, height in self._lost_heads
                if term > assignment.term
            ),
            sample_rows=rows,
            probation=probation,
        )
        lease.work = work
        worker.works.append(work)
        self.works[entry.digest] = self.audits.works[entry.digest] = work
        return None

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard (its inner steps are training's)."""
        start = shard * self.terms.rows_per_shard
        return min(self.terms.rows_per_shard, self.terms.rows - start)

    def _note_lost(self, entry: Signed[TermStart]) -> None:
        for raw in entry.attached:
            for head in open_vote(self.domain, self.genesis, raw).signed:
                lost = (entry.message.term, head.message.height)
                if head.digest in entry.message.lost and lost not in self._lost_heads:
                    self._lost_heads.append(lost)

    # ---- audits and settlements ----------------------------------------------------------

    def _verdict(self, entry: Signed[VerdictCommit]) -> str | None:
        work = self._challenged.get(entry.message.challenge)
        if work is None:
            return "verdict on an unknown challenge"
        why = work.on_verdict(entry, self.height, self.terms)
        if why is None:
            self._judged[entry.digest] = work
        return why

    def _attestation(self, work: Work, entry: Signed[Attestation]) -> str | None:
        before = work.status
        most = -(-work.assignment.message.units * work.drawn_now() // work.commitment.message.n)
        if entry.message.units_reexecuted > most:
            return f"attestation claims more than the {most} units of its draw"
        why = work.on_attestation(entry, self.height, self.terms)
        if why is None and work.status is not before:
            worker = self.workers[work.worker]
            if work.status is Status.ACCEPTED:
                worker.accepted += 1
            elif work.status is Status.REJECTED:
                self._reject(worker)
        return why

    def _reject(self, worker: WorkerRecord) -> None:
        worker.rejected = True
        for lease in worker.leases:
            if lease.open:
                lease.ended = LeaseEndReason.REJECTED
            elif lease.work is not None and not lease.work.epoch:
                lease.work.void()

    def _cut(self, message: Cut) -> str | None:
        if message.epoch != self.book.epoch + 1:
            return f"cut has epoch {message.epoch}, not {self.book.epoch + 1}"
        if message.payee == NOBODY:
            return "cut names no payee"
        if self.book.closed:
            return "everything is settled"
        self.book.cut(
            list(self.works.values()),
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
                list(self.works.values()),
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
        return not self.audits.works

    @property
    def revealed(self) -> bool:
        """Whether every verdict that is to be paid for is revealed."""
        return all(
            finding.reveal is not None or not finding.in_majority
            for work in self.works.values()
            for finding in work.findings
        )

    @property
    def complete(self) -> bool:
        """Whether every shard has an accepted work."""
        return all(self.shard_done(shard) is not None for shard in range(self.terms.shards))

    def shard_done(self, shard: int) -> Work | None:
        """Return the accepted work of a shard, if it has one."""
        for lease in self.shards.get(shard, []):
            if lease.work is not None and lease.work.status is Status.ACCEPTED:
                return lease.work
        return None
