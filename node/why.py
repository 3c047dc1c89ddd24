"""Why a job is not further: for each shard that is not through, and for each node that is known.

Pure: what the log says (JobState), what peers offer (capabilities), the chain's height.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from meshd.config.amounts import format_mcc
from meshd.ledger.audits import Status, Subject
from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import Lease, WorkerRecord
from meshd.ledger.works import works_of
from meshd.p2p.identity import NOBODY, Address
from meshd.p2p.messages import ZERO, AuditKind, Capability, JobTerms

CURES = {
    "price": "raise price in job.toml, or ask it to ask for less",
    "not-named": "add it to workers in job.toml",
    "memory": "take fewer rows a shard, or lower need.memory",
    "device": 'set need.device to its device, or to "any"',
    "no-offer": "see whether its daemon runs, is paused (`meshd status`) or works for others",
}
"""What changes a node's state, where its researcher or its owner can."""


@dataclass(frozen=True)
class Candidate:
    """A node as this one knows it."""

    address: Address
    capability: Capability | None
    """What it says it offers; None: nothing is heard of it."""
    connected: bool


@dataclass(frozen=True)
class ShardReason:
    """Why one shard is pending: `state` is free, handed-out, computing or audit."""

    round: int
    shard: int
    attempt: int
    """The attempt that is under way, or the next one."""
    state: str
    worker: Address | None
    text: str


@dataclass(frozen=True)
class NodeReason:
    """What one node does for the job, or why it does nothing; `state` is one word for it."""

    address: Address
    state: str
    text: str


def shard_reasons(state: JobState, height: int) -> list[ShardReason]:
    """Return a reason for each shard that is not through yet; *height* is the chain's.

    Inference: shards without an accepted result. Training: shards of the open round without a
    contribution, then the spans whose audit is open.
    """
    return list(_shard_reasons(state, height))


def _shard_reasons(state: JobState, height: int) -> Iterator[ShardReason]:
    training = state.rounds.training
    if not (training and (state.rounds.done or state.rounds.failed)):
        for shard in range(state.terms.shards):
            attempts = state.attempts(shard)
            if not _through(attempts, training=training):
                yield _shard_reason(state, shard, attempts, height)
    for subject in state.audits.open.values():
        if training and subject.status is Status.PENDING:
            message = works_of(subject)[0].assignment.message
            count = len(works_of(subject))
            yield ShardReason(
                message.round,
                message.shard,
                message.attempt,
                "audit",
                subject.worker,
                f"span of {count} shards from here on: {audit_text(state, subject, height)}",
            )


def _through(attempts: Sequence[Lease], *, training: bool) -> bool:
    """Return whether a shard waits for nothing but, in training, its round and its audit."""
    works = [lease.work for lease in attempts if lease.work is not None and lease.holds_shard]
    return any(training or work.outcome is Status.ACCEPTED for work in works)


def _shard_reason(
    state: JobState, shard: int, attempts: Sequence[Lease], height: int
) -> ShardReason:
    round_ = state.rounds.open
    lease = attempts[-1] if attempts and attempts[-1].holds_shard else None
    if lease is None:
        text = "no worker has it"
        if attempts:
            text += f"; attempt {len(attempts) - 1} {_end_text(attempts[-1])}"
        if state.stop is not None:
            text = "the job is being stopped: it is given to nobody"
        return ShardReason(round_, shard, len(attempts), "free", None, text)
    attempt, worker = len(attempts) - 1, Address(lease.assignment.message.worker)
    if lease.work is not None:
        text = audit_text(state, lease.work, height)
        return ShardReason(round_, shard, attempt, "audit", worker, text)
    if lease.accept is None:
        text = f"leased until block {lease.until}; its worker has not taken it up yet"
        return ShardReason(round_, shard, attempt, "handed-out", worker, text)
    late = f", {height - lease.until} blocks ago" if height > lease.until else ""
    text = f"its worker computes it; the lease ends at block {lease.until}{late}"
    return ShardReason(round_, shard, attempt, "computing", worker, text)


def _end_text(lease: Lease) -> str:
    """Return what became of a lease that no longer holds its shard."""
    if lease.work is not None:
        reason = f" ({lease.work.reason})" if lease.work.reason else ""
        return f"was {lease.work.outcome.value}{reason}"
    return f"ended: {lease.ended.name.lower().replace('_', ' ') if lease.ended else 'unknown'}"


def audit_text(state: JobState, subject: Subject, height: int) -> str:
    """Return where the audit of a commitment, or of a span, stands at chain *height*."""
    since = f"committed to in block {subject.height}"
    track = copy.copy(subject.track)
    if track is None:
        beacon = subject.waiting_beacon(state.terms.lag)
        if beacon is None:
            return f"{since}; its audit is over"
        return f"{since}; its auditor is drawn by block {beacon} (the chain is at {height})"
    track.advance(height, state.terms)
    auditor, due = "0x" + track.auditor.hex(), track.due(state.terms)
    kind = AuditKind(track.kind).name.lower()
    replaced = f" (the {track.index} before it were silent)" if track.index else ""
    if track.challenge is None:
        doing = "has not begun"
    elif track.verdict is None:
        doing = "is computing it again"
    else:
        doing = "has its verdict and waits for the worker to open its rows"
    return f"{since}; {kind} audit by {auditor}{replaced}, which {doing}: until block {due}"


# ---- nodes ---------------------------------------------------------------------------------


def node_reasons(
    state: JobState | None,
    terms: JobTerms,
    candidates: Collection[Candidate],
    offers: Collection[Address] | None = None,
) -> list[NodeReason]:
    """Return what each known node does for a job, or why it does nothing.

    *state* is None before the job's log begins; *offers* are the workers whose offers are good
    now, None where this node does not know them (only the orchestrator does).
    """
    known = {candidate.address: candidate for candidate in candidates}
    if state is not None:
        for address in state.workers:
            known.setdefault(address, Candidate(address, None, connected=False))
    return [_node_reason(state, terms, candidate, offers) for candidate in known.values()]


def _node_reason(
    state: JobState | None,
    terms: JobTerms,
    candidate: Candidate,
    offers: Collection[Address] | None,
) -> NodeReason:
    record = state.workers.get(candidate.address) if state is not None else None
    found = _mismatch(terms, candidate, has_worked=record is not None)
    if found is None and state is not None:
        found = _standing(state, candidate.address, record or WorkerRecord())
    if found is None:
        found = _idle(state, candidate, offers)
    name, text = found
    if name in CURES:
        text += f": {CURES[name]}"
    return NodeReason(candidate.address, name, text)


def _mismatch(terms: JobTerms, candidate: Candidate, *, has_worked: bool) -> tuple[str, str] | None:
    """Return why a node does not fit the job's terms, None if it does."""
    offer = candidate.capability
    if terms.workers and candidate.address not in terms.workers:
        return "not-named", "the job's terms allow other workers only"
    if offer is None:
        return None if has_worked else ("silent", "it has not said what it offers")
    if "worker" not in offer.roles:
        return "no-worker", f"it takes no shards now; its roles: {', '.join(offer.roles) or 'none'}"
    if offer.ask > terms.price:
        asked, paid = format_mcc(offer.ask), format_mcc(terms.price)
        return "price", f"it asks {asked} MCC per 10^9 units, the job pays {paid}"
    if offer.memory_bytes < terms.memory_bytes:
        return "memory", f"it offers {offer.memory_bytes} bytes, a shard takes " + str(
            terms.memory_bytes
        )
    if terms.device not in ("any", offer.device):
        return "device", f"it has a {offer.device}, the job needs a {terms.device}"
    return None


def _standing(state: JobState, address: Address, record: WorkerRecord) -> tuple[str, str] | None:
    """Return what the log says that a worker does, or why it may have no more; None: nothing."""
    if record.rejected:
        return "rejected", f"its work was rejected ({_finding(record)}): it gets no more"
    if state.genesis.committee == (address,):
        return "auditor", "it is the only auditor, and nobody audits himself"
    if state.rounds.training:
        shown = state.rounds.canaries.get(address, ZERO)
        why = state.rounds.class_problem(address, shown)
        if why is not None:
            return "class", why
    computing = [lease for lease in record.leases if lease.open]
    if record.in_flight >= record.allowance:
        waiting = record.in_flight - len(computing)
        lapsed = f", halved {record.halvings} times by leases that lapsed"
        return "allowance", (
            f"it computes {len(computing)} and {waiting} wait for their audit; it may have "
            f"{record.allowance} at once{lapsed if record.halvings else ''}"
        )
    if record.unsettled >= state.terms.max_unsettled:
        return "unsettled", f"{record.unsettled} shards of it are unpaid, the most that may be"
    if computing:
        shards = ", ".join(str(lease.assignment.message.shard) for lease in computing)
        return "computing", f"it computes {'shard' if len(computing) == 1 else 'shards'} {shards}"
    return None


def _finding(record: WorkerRecord) -> str:
    reasons = [(work.span or work).reason for work in record.works]
    return next((reason for reason in reasons if reason), "an audit failed")


def _idle(
    state: JobState | None, candidate: Candidate, offers: Collection[Address] | None
) -> tuple[str, str]:
    away = "" if candidate.connected else "; this node is not connected to it"
    if state is None:
        return "matches", f"it matches; the job has not begun{away}"
    if state.end is not None or not state.free_shards():
        return "idle", f"it matches; no shard is free{away}"
    if offers is not None and candidate.address in offers:
        return "next", "it has offered and is next for a shard"
    known = "has not offered" if offers is not None else "the orchestrator gave it nothing"
    return "no-offer", f"it matches, but {known}{away}"


def job_text(terms: JobTerms, state: JobState | None, orchestrator: Address) -> str:
    """Return why the whole job waits, in one sentence; empty where its shards say it."""
    if orchestrator == NOBODY and terms.orchestrator == NOBODY and state is None:
        return "no orchestrator with active stake is known on this chain"
    if state is None or not state.position:
        return "its log has not begun: the orchestrator has not been heard of yet"
    if state.end is not None:
        return "its shards are done; it is being settled"
    if state.rounds.failed:
        return "a round failed: the gate accepted nothing of it, twice"
    if state.complete and not state.audited:
        return "every shard is in; audits are still open"
    if state.complete:
        return "every shard is in and audited; its end is being logged"
    return ""
