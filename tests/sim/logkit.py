"""Job logs written by hand: who says what at which height, and what the fold makes of it."""

from __future__ import annotations

from typing import Any, TypeVar

from meshd.ledger.audits import Subject
from meshd.ledger.draws import drawn_rows, salted_verdict
from meshd.ledger.joblog import Genesis
from meshd.ledger.jobstate import JobState
from meshd.ledger.works import Work
from meshd.p2p.codec import Domain, Signed, digest
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import (
    ZERO,
    Assignment,
    Attestation,
    AuditKind,
    AuditResult,
    Challenge,
    Commitment,
    Cut,
    JobEnd,
    JobEndReason,
    JobTerms,
    LeaseAccept,
    LeaseEnd,
    LeaseEndReason,
    LogHead,
    Message,
    Reveal,
    Stop,
    TermStart,
    TermVote,
    VerdictCommit,
)

M = TypeVar("M", bound=Message)

DOMAIN = Domain("logkit", 31373, Address(b"\x0e" * 20))
JOB = b"\x0a" * 32
UNITS = 1000
PRICE = 10**9
"""One smallest unit of MCC a compute unit."""
LAG = 5
PEOPLE = ("oscar", "rita", "wanda", "will", "wilma", "wolf")
"""Orchestrator, researcher and four workers; the committee is v0, v1, ..."""


def person(name: str) -> Identity:
    """Return the same identity for the same name."""
    return Identity(digest(b"logkit." + name.encode()))


def beacon(height: int) -> bytes:
    """Return the block hash at a height."""
    return digest(b"logkit.block" + height.to_bytes(8, "big"))


def terms_of(**over: Any) -> JobTerms:
    """Return terms of four shards of eight rows; *over* replaces some."""
    values: dict[str, Any] = {
        "network": "logkit",
        "workload": "infer",
        "researcher": person("rita").address,
        "orchestrator": person("oscar").address,
        "program": ZERO,
        "data": ZERO,
        "rows": 32,
        "shards": 4,
        "rows_per_shard": 8,
        "rounds": 1,
        "initial_state": ZERO,
        "hyperparameters": (),
        "seed": ZERO,
        "price": PRICE,
        "cap": 100_000,
        "orchestrator_share": 20_000,
        "aggregator_share": 10_000,
        "audit_budget": 100_000,
        "audit_rows": 2,
        "probation_rows": 4,
        "probation_shards": 1,
        "span_shards": 32,
        "audit_shards": 1,
        "probation_span_shards": 8,
        "second_audit_share": 0,
        "retention": 8,
        "max_unsettled": 32,
        "epoch_limit": 100_000,
        "window": 5,
        "work_deadline": 2_000_000_000,
        "settle_deadline": 2_000_001_000,
        "beacon_source": "blockhash",
        "lag": LAG,
        "silence": 10,
        "challenge_blocks": 10,
        "audit_blocks": 20,
        "lease_blocks": 60,
        "memory_bytes": 1,
        "device": "any",
        "workers": (),
        "allow_tolerance": False,
    }
    return JobTerms(**(values | over))


def genesis_of(members: int) -> Genesis:
    """Return the start of a log whose committee is v0, v1, ..."""
    committee = tuple(person(f"v{i}").address for i in range(members))
    return Genesis(JOB, committee, -(-2 * members // 3), b"\x0b" * 32, person("oscar").address, LAG)


class Story:
    """A job's log, told entry by entry.

    `at` begins a batch at a height; `say` applies an entry and returns why it had no effect.
    """

    def __init__(self, *, members: int = 3, **terms: Any) -> None:
        self.genesis = genesis_of(members)
        self.terms = terms_of(**terms)
        self.state = JobState(DOMAIN, self.genesis, self.terms)
        self.people = {
            person(name).address: person(name)
            for name in (*PEOPLE, *(f"v{i}" for i in range(members)))
        }
        self.at(1)

    def at(self, height: int, term: int = 0) -> None:
        """Begin the next batch."""
        needed = self.state.needed_beacons(height)
        beacons = {number: beacon(number) for number in needed}
        self.state.begin_batch(term, self.state.seq + 1, height, beacons)

    def sign(self, name: str | Address, message: M, attached: tuple[bytes, ...] = ()) -> Signed[M]:
        """Return *message* signed by a person, named or by address."""
        identity = self.people[name] if isinstance(name, bytes) else person(name)
        return DOMAIN.sign(identity, message, expires=2_100_000_000, attached=attached)

    def say(self, name: str | Address, message: Message) -> str | None:
        """Let somebody enter something; return why it has no effect."""
        return self.state.apply(self.sign(name, message))

    def term_start(self, term: int, *lost: int) -> Signed[TermStart]:
        """Return the start of *term*, which drops heads of the heights *lost*: v0 signed them."""
        values: dict[str, Any] = {"job_id": JOB, "orchestrator": self.genesis.orchestrator}
        heads = [
            self.sign(
                "oscar",
                LogHead(
                    job_id=JOB,
                    term=term - 1,
                    seq=self.state.seq + place,
                    prev=ZERO,
                    start=ZERO,
                    entries_root=ZERO,
                    height=height,
                    block_hash=beacon(height),
                ),
            )
            for place, height in enumerate(lost)
        ]
        names = tuple(head.digest for head in heads)
        vote = TermVote(**values, term=term, high=self.genesis.hash, signed=names)
        signed = self.sign("v0", vote, tuple(head.raw for head in heads))
        start = TermStart(
            **values,
            term=term,
            committee=self.genesis.committee,
            prev=ZERO,
            seq=self.state.seq,
            lost=names,
            votes_root=ZERO,
        )
        return self.sign("oscar", start, (signed.raw,))

    # ---- leases --------------------------------------------------------------------------

    def assignment(self, shard: int, worker: str, **over: Any) -> Assignment:
        """Return the assignment of a shard's next attempt."""
        values: dict[str, Any] = {
            "job_id": JOB,
            "term": self.state.term,
            "round": 0,
            "shard": shard,
            "attempt": len(self.state.shards.get(shard, [])),
            "worker": person(worker).address,
            "input_hash": ZERO,
            "units": UNITS,
            "lease_until": self.state.height + 60,
            "numeric_class": ZERO,
        }
        return Assignment(**(values | over))

    def lease(self, shard: int, worker: str) -> bytes:
        """Assign a shard and have it accepted; return the assignment's digest."""
        entry = self.sign("oscar", self.assignment(shard, worker))
        assert self.state.apply(entry) is None
        accept = LeaseAccept(job_id=JOB, assignment_hash=entry.digest, payee=person(worker).address)
        assert self.say(worker, accept) is None
        return entry.digest

    def commitment(self, assignment: bytes, **over: Any) -> Commitment:
        """Return a commitment for a lease."""
        values: dict[str, Any] = {
            "job_id": JOB,
            "assignment_hash": assignment,
            "hash_alg": 1,
            "trace_root": ZERO,
            "n": 8,
            "output_root": ZERO,
            "output_bytes": 100,
            "numeric_class": ZERO,
        }
        return Commitment(**(values | over))

    def work(self, shard: int, worker: str = "wanda") -> Work:
        """Lease a shard, commit to it, and go on to its beacon; its first audit is open."""
        work = self.committed(shard, worker)
        self.at(work.beacon_height)
        return work

    def committed(self, shard: int, worker: str = "wanda") -> Work:
        """Lease a shard and commit to it."""
        lease = self.lease(shard, worker)
        assert self.say(worker, self.commitment(lease)) is None
        work = self.state.leases[lease].work
        assert work is not None
        return work

    def end_lease(
        self, assignment: bytes, reason: LeaseEndReason = LeaseEndReason.LAPSED
    ) -> str | None:
        """End a lease."""
        end = LeaseEnd(
            job_id=JOB, assignment_hash=assignment, reason=reason, height=self.state.height
        )
        return self.say("oscar", end)

    # ---- audits --------------------------------------------------------------------------

    def challenge(self, work: Subject, **over: Any) -> Challenge:
        """Return the challenge of the auditor whose turn it is."""
        track = work.track
        assert track is not None
        nonce = over.get("nonce", b"\x01" * 32)
        drawn = track.drawn or drawn_rows(
            work.hash, beacon(track.beacon_height), nonce, work.population, work.sample
        )
        values: dict[str, Any] = {
            "job_id": JOB,
            "commitments": work.hash,
            "audit_kind": int(track.kind),
            "draw_index": track.index,
            "beacon_height": track.beacon_height,
            "nonce": nonce,
            "drawn": drawn,
            "payee": track.auditor,
        }
        return Challenge(**(values | over))

    def verdict(self, work: Subject, challenge: Signed[Challenge], **over: Any) -> VerdictCommit:
        """Return the auditor's salted verdict (salt and own digest are ones)."""
        shard, attempt = work.place
        values: dict[str, Any] = {
            "job_id": JOB,
            "shard": shard,
            "attempt": attempt,
            "challenge": challenge.digest,
            "draw_index": challenge.message.draw_index,
            "salted": salted_verdict(
                b"\x01" * 32,
                b"\x01" * 32,
                validator=challenge.signer,
                challenge=challenge.digest,
                draw_index=challenge.message.draw_index,
            ),
        }
        return VerdictCommit(**(values | over))

    def attestation(
        self,
        work: Subject,
        verdict: Signed[VerdictCommit],
        result: AuditResult = AuditResult.ACCEPTED,
        **over: Any,
    ) -> Attestation:
        """Return what the auditor found."""
        track = work.track
        assert track is not None
        good = result is AuditResult.ACCEPTED
        values: dict[str, Any] = {
            "job_id": JOB,
            "commitment_hash": work.hash,
            "validator": verdict.signer,
            "result": int(result),
            "audit_kind": int(track.kind),
            "draw_index": track.index,
            "beacon_height": track.beacon_height,
            "units_reexecuted": work.units_of(work.drawn_now()),
            "verdict_commit": verdict.digest,
            "holds_output": good,
            "output": ZERO,
            "agrees_with": ZERO,
            "evidence_hash": ZERO,
        }
        return Attestation(**(values | over))

    def judge(self, work: Subject) -> tuple[Address, Signed[VerdictCommit]]:
        """Let the auditor whose turn it is challenge and commit to a verdict."""
        assert work.track is not None
        auditor = work.track.auditor
        challenge = self.sign(auditor, self.challenge(work))
        assert self.state.apply(challenge) is None
        verdict = self.sign(auditor, self.verdict(work, challenge))
        assert self.state.apply(verdict) is None
        return auditor, verdict

    def audit(
        self,
        work: Subject,
        result: AuditResult = AuditResult.ACCEPTED,
        *,
        agrees_with: bytes = ZERO,
        reveal: bool = False,
    ) -> Address:
        """Let the auditor whose turn it is audit to the end; return who it was."""
        auditor, verdict = self.judge(work)
        if result is AuditResult.SILENT:
            self.at(self.state.height + self.terms.silence)
        entry = self.attestation(work, verdict, result, agrees_with=agrees_with)
        assert self.say(auditor, entry) is None
        if reveal:
            self.at(self.state.height + LAG)  # second audits are decided
            assert self.say(auditor, self.reveal(verdict)) is None
        return auditor

    def reveal(self, verdict: Signed[VerdictCommit], **over: Any) -> Reveal:
        """Return the opening of a verdict."""
        values: dict[str, Any] = {
            "job_id": JOB,
            "verdict_commit": verdict.digest,
            "salt": b"\x01" * 32,
            "digest": b"\x01" * 32,
        }
        return Reveal(**(values | over))

    def reject(self, work: Subject) -> None:
        """Let two auditors agree that the work is wrong."""
        self.audit(work, AuditResult.MISMATCH)
        first = work.findings[-1].attestation.digest
        self.audit(work, AuditResult.MISMATCH, agrees_with=first)

    # ---- the end -------------------------------------------------------------------------

    def cut(self, **over: Any) -> str | None:
        """Cut; return why it has no effect."""
        values: dict[str, Any] = {
            "job_id": JOB,
            "term": self.state.term,
            "epoch": self.state.book.epoch + 1,
            "payee": person("oscar").address,
        }
        return self.say("oscar", Cut(**(values | over)))

    def end(self, reason: int = JobEndReason.COMPLETE, output: bytes = ZERO) -> str | None:
        """End the job; return why it has no effect."""
        message = JobEnd(job_id=JOB, term=self.state.term, output_root=output, reason=reason)
        return self.say("oscar", message)

    def stop(self, name: str = "rita") -> str | None:
        """Let somebody stop the job."""
        return self.say(name, Stop(job_id=JOB))


def kinds(story: Story) -> dict[str, int]:
    """Return what was paid by kind of receipt."""
    paid: dict[str, int] = {}
    for receipt in story.state.book.receipts:
        paid[receipt.receipt_kind] = paid.get(receipt.receipt_kind, 0) + receipt.amount
    return paid


__all__ = [
    "JOB",
    "LAG",
    "PRICE",
    "UNITS",
    "AuditKind",
    "AuditResult",
    "JobEndReason",
    "LeaseEndReason",
    "Story",
    "beacon",
    "genesis_of",
    "kinds",
    "person",
    "terms_of",
]
