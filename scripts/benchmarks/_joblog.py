"""A job's log that is written for a simulation: entries made, applied, and not signed."""

from __future__ import annotations

import itertools
import random
from typing import TypeVar

from meshd.config.job import AuditTerms, PayTerms, TimeTerms
from meshd.ledger import draws
from meshd.ledger.audits import Finding, Subject
from meshd.ledger.joblog import Genesis
from meshd.ledger.jobstate import JobState
from meshd.ledger.rounds import accepted
from meshd.ledger.works import Span, Work
from meshd.p2p.codec import Domain, Signed, digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    ZERO,
    Assignment,
    Attestation,
    AuditKind,
    AuditResult,
    Canary,
    Challenge,
    Commitment,
    Cut,
    JobEnd,
    JobEndReason,
    JobTerms,
    LeaseAccept,
    Message,
    Reveal,
    RoundClose,
    VerdictCommit,
)

M = TypeVar("M", bound=Message)

DOMAIN = Domain("bench", 31373, Address(b"\x0e" * 20))
JOB = b"\x0a" * 32
COMMITTEE = 21
ROWS = 128
"""Rows of a shard."""
UNITS = ROWS * 10**6
PRICE = 10**12
CLASS = b"\x0c" * 32
SALT = b"\x01" * 32
ORCHESTRATOR = Address(b"\x0f" * 20)
RESEARCHER = Address(b"\x0d" * 20)


def job_terms(workload: str, *, workers: int, shards_each: int) -> JobTerms:
    """Return the terms that `meshd job submit` would make of defaults."""
    audit, pay, time = AuditTerms(), PayTerms(), TimeTerms()
    is_training = workload == "train"
    shards = workers if is_training else workers * shards_each
    rounds = shards_each if is_training else 1
    cap = 2 * shards * rounds * UNITS * PRICE // 10**9
    return JobTerms(
        network="bench",
        workload=workload,
        researcher=RESEARCHER,
        orchestrator=ORCHESTRATOR,
        program=ZERO,
        data=ZERO,
        rows=shards * ROWS,
        shards=shards,
        rows_per_shard=ROWS,
        rounds=rounds,
        initial_state=SALT if is_training else ZERO,
        hyperparameters=(),
        seed=ZERO,
        price=PRICE,
        cap=cap,
        orchestrator_share=pay.orchestrator_share,
        aggregator_share=pay.aggregator_share,
        audit_budget=audit.budget,
        audit_rows=-(-ROWS // 100),
        probation_rows=8,
        probation_shards=audit.probation_shards,
        span_shards=audit.span_shards,
        audit_shards=audit.audit_shards,
        probation_span_shards=audit.probation_span_shards,
        second_audit_share=audit.second_share,
        retention=audit.retention,
        max_unsettled=96 if is_training else 32,
        epoch_limit=cap,
        window=time.window,
        work_deadline=2_000_000_000,
        settle_deadline=2_000_100_000,
        beacon_source="blockhash",
        lag=time.lag,
        silence=audit.silence,
        challenge_blocks=audit.challenge_blocks,
        audit_blocks=audit.blocks,
        lease_blocks=time.lease_blocks,
        memory_bytes=1,
        device="cpu",
        workers=(),
        allow_tolerance=False,
    )


class Entries:
    """Makes the entries of one job and applies them to its state."""

    def __init__(self, terms: JobTerms, chance: random.Random) -> None:
        committee = tuple(Address(chance.randbytes(20)) for _ in range(COMMITTEE))
        quorum = -(-2 * COMMITTEE // 3)
        genesis = Genesis(JOB, committee, quorum, chance.randbytes(32), ORCHESTRATOR, terms.lag)
        self.state = JobState(DOMAIN, genesis, terms)
        self._terms = terms
        self._chance = chance
        self._names = itertools.count()
        self._secret = chance.randbytes(32)
        self._unrevealed: list[tuple[Subject, Finding]] = []
        self._in_class: set[Address] = set()
        self._class = CLASS if terms.workload == "train" else ZERO
        self.reach(1)
        for member in committee:
            self._join_class(member)

    def reach(self, height: int) -> None:
        """Begin a batch at *height*."""
        beacons = {at: self._hash(b"block", at) for at in self.state.needed_beacons(height)}
        self.state.begin_batch(0, self.state.seq + 1, height, beacons)

    def _hash(self, what: bytes, number: int) -> bytes:
        return digest(self._secret + what + number.to_bytes(8, "big"))

    def _entry(self, signer: Address, message: M) -> Signed[M]:
        name = self._hash(b"entry", next(self._names))
        return Signed(message, signer, name, 0, b"", (), b"")

    def _say(self, signer: Address, message: M) -> Signed[M]:
        """Apply an entry that must have its effect."""
        entry = self._entry(signer, message)
        why = self.state.apply(entry)
        if why is not None:
            raise RuntimeError(f"{message.kind} refused: {why}")
        return entry

    # ---- workers -------------------------------------------------------------------------

    def _join_class(self, party: Address) -> None:
        if self._terms.workload == "train" and party not in self._in_class:
            self._in_class.add(party)
            self._say(party, Canary(job_id=JOB, party=party, digest=CLASS))

    def assign(self, shard: int, worker: Address) -> Signed[Assignment] | None:
        """Lease a shard of the open round; None if the worker may not have one now."""
        self._join_class(worker)
        state = self.state
        message = Assignment(
            job_id=JOB,
            term=0,
            round=state.rounds.open,
            shard=shard,
            attempt=len(state.attempts(shard)),
            worker=worker,
            input_hash=ZERO,
            units=UNITS,
            lease_until=state.height + self._terms.lease_blocks,
            numeric_class=self._class,
        )
        entry = self._entry(ORCHESTRATOR, message)
        if state.apply(entry) is not None:
            return None
        accept = LeaseAccept(job_id=JOB, assignment_hash=entry.digest, payee=worker)
        self._say(worker, accept)
        return entry

    def commit(self, lease: Signed[Assignment]) -> Signed[Commitment] | None:
        """Commit to a leased shard; None if that counts no more."""
        message = Commitment(
            job_id=JOB,
            assignment_hash=lease.digest,
            hash_alg=1,
            trace_root=ZERO,
            n=ROWS,
            output_root=ZERO,
            output_bytes=1,
            numeric_class=self._class,
        )
        entry = self._entry(Address(lease.message.worker), message)
        return entry if self.state.apply(entry) is None else None

    # ---- auditors ------------------------------------------------------------------------

    def audit(self, subject: Subject, invented: frozenset[int]) -> None:
        """Have the auditor whose turn it is audit to the end, honestly."""
        track = subject.track
        assert track is not None
        auditor, nonce = track.auditor, self._chance.randbytes(32)
        beacon = self.state.beacons[track.beacon_height]
        drawn = track.drawn or draws.drawn_rows(
            subject.hash, beacon, nonce, subject.population, subject.sample
        )
        challenge = self._say(
            auditor,
            Challenge(
                job_id=JOB,
                commitments=subject.hash,
                audit_kind=int(track.kind),
                draw_index=track.index,
                beacon_height=track.beacon_height,
                nonce=nonce,
                drawn=drawn,
                payee=auditor,
            ),
        )
        wrong = not invented.isdisjoint(drawn)
        verdict = self._say(auditor, self._verdict(subject, challenge))
        contested = subject.contested
        confirms = wrong and track.kind is AuditKind.CONFIRM and contested is not None
        self._say(
            auditor,
            Attestation(
                job_id=JOB,
                commitment_hash=subject.hash,
                validator=auditor,
                result=int(AuditResult.MISMATCH if wrong else AuditResult.ACCEPTED),
                audit_kind=int(track.kind),
                draw_index=track.index,
                beacon_height=track.beacon_height,
                units_reexecuted=subject.units_of(drawn),
                verdict_commit=verdict.digest,
                holds_output=not wrong,
                output=ZERO,
                agrees_with=contested.attestation.digest if confirms and contested else ZERO,
                evidence_hash=ZERO,
            ),
        )
        self._unrevealed.append((subject, subject.findings[-1]))

    def _verdict(self, subject: Subject, challenge: Signed[Challenge]) -> VerdictCommit:
        shard, attempt = subject.place
        index = challenge.message.draw_index
        return VerdictCommit(
            job_id=JOB,
            shard=shard,
            attempt=attempt,
            challenge=challenge.digest,
            draw_index=index,
            salted=draws.salted_verdict(
                SALT,
                SALT,
                validator=challenge.signer,
                challenge=challenge.digest,
                draw_index=index,
            ),
        )

    def reveal(self) -> None:
        """Open every verdict that can be opened now."""
        waiting = []
        ended = self.state.end is not None
        for subject, finding in self._unrevealed:
            if subject.may_reveal(finding, ended=ended):
                assert finding.verdict is not None
                name = finding.verdict.digest
                opened = Reveal(job_id=JOB, verdict_commit=name, salt=SALT, digest=SALT)
                self._say(finding.auditor, opened)
            else:
                waiting.append((subject, finding))
        self._unrevealed = waiting

    # ---- the orchestrator ----------------------------------------------------------------

    def close_round(self) -> None:
        """Close the open round of a training job if every shard of it is in."""
        rounds = self.state.rounds
        if not rounds.training or rounds.done:
            return
        works = self.state.round_works()
        if len(works) < self._terms.shards:
            return
        self._say(
            ORCHESTRATOR,
            RoundClose(
                job_id=JOB,
                term=0,
                round=rounds.open,
                state_before=rounds.state,
                commitments=tuple(work.hash for work in works),
                weights=tuple(work.population for work in works),
                gated=(),
                state_after=self._hash(b"state", rounds.open),
                loss="1",
            ),
        )

    def entered(self, work: Work) -> bool:
        """Return whether a work is in a closed round, paid or not."""
        number = work.assignment.message.round
        return isinstance(work.span, Span) and any(
            close.message.round == number
            and any(close.message.commitments[at] == work.hash for at in accepted(close.message))
            for close in self.state.rounds.closes[number : number + 1]
        )

    def end(self, reason: JobEndReason) -> None:
        """End the job."""
        self._say(ORCHESTRATOR, JobEnd(job_id=JOB, term=0, output_root=ZERO, reason=int(reason)))

    def cut(self) -> None:
        """Enter what is payable into a settlement."""
        epoch = self.state.book.epoch + 1
        self._say(ORCHESTRATOR, Cut(job_id=JOB, term=0, epoch=epoch, payee=ORCHESTRATOR))
