"""What a job's log says, as the control API tells it: pure, from JobState to its answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from meshd.config.amounts import format_mcc
from meshd.ledger.audits import Status as WorkStatus
from meshd.ledger.joblog import Batch
from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import WorkerRecord
from meshd.ledger.rounds import accepted
from meshd.node.control.api import (
    AuditInfo,
    JobEarnings,
    LogLine,
    LogPage,
    NodeWhy,
    ReceiptInfo,
    RoundsInfo,
    ShardCounts,
    ShardWhy,
    WorkerShare,
)
from meshd.node.counts import Counts
from meshd.node.why import NodeReason, ShardReason
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address, hex_address
from meshd.p2p.messages import (
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
    LeaseEnd,
    LeaseEndReason,
    Message,
    RoundClose,
    TermStart,
)

PAGE_LINES = 2_000
"""Entries in one answer, but for the last batch's."""


def shard_counts(counts: Counts) -> ShardCounts:
    """Return a job's counts as the API tells them."""
    return ShardCounts(
        total=counts.total,
        accepted=counts.accepted,
        rejected=counts.rejected,
        reissued=counts.reissued,
    )


def worker_shares(state: JobState) -> list[WorkerShare]:
    """Return each worker's part in a job."""
    lost: Counter[bytes] = Counter(
        lease.assignment.message.worker for leases in state.shards.values() for lease in leases[:-1]
    )
    return [
        WorkerShare(
            account=hex_address(address),
            accepted=_count(worker, WorkStatus.ACCEPTED),
            rejected=_count(worker, WorkStatus.REJECTED),
            voided=_count(worker, WorkStatus.VOID),
            leases=len(worker.leases),
            lost=lost[address],
            finding=next(
                (
                    (work.span or work).reason
                    for work in worker.works
                    if work.outcome is WorkStatus.REJECTED
                ),
                "",
            ),
        )
        for address, worker in state.workers.items()
    ]


def _count(worker: WorkerRecord, status: WorkStatus) -> int:
    return sum(work.outcome is status for work in worker.works)


def audit_infos(state: JobState) -> list[AuditInfo]:
    """Return every audit in a job's log; of a span it names the first shard."""
    return [
        AuditInfo(
            shard=subject.place[0],
            attempt=subject.place[1],
            worker=hex_address(subject.worker),
            auditor=hex_address(finding.auditor),
            kind=finding.kind.name.lower(),
            result=finding.result.name.lower(),
            rows=_rows(state, len(finding.challenge.message.drawn)),
            units=finding.attestation.message.units_reexecuted,
        )
        for subject in state.subjects.values()
        for finding in subject.findings
    ]


def _rows(state: JobState, drawn: int) -> int:
    """Return the rows in what an auditor drew: rows, or whole shards in training."""
    return drawn * state.terms.rows_per_shard if state.rounds.training else drawn


def receipt_infos(state: JobState) -> list[ReceiptInfo]:
    """Return a job's receipts so far, in the order of its log."""
    return [
        ReceiptInfo(
            kind=receipt.receipt_kind,
            shard=receipt.shard,
            attempt=receipt.attempt,
            account=hex_address(receipt.account),
            units=receipt.units,
            charged=format_mcc(receipt.charged),
            amount=format_mcc(receipt.amount),
            log_seq=receipt.log_seq,
        )
        for receipt in state.book.receipts
    ]


def job_earnings(job_id: bytes, state: JobState | None, account: Address, paid: int) -> JobEarnings:
    """Return what a job owes *account*, as far as its log is known here, and what it *paid*."""
    own = [r for r in state.book.receipts if r.account == account] if state is not None else None
    return JobEarnings(
        job="0x" + job_id.hex(),
        receipts=None if own is None else len(own),
        earned=None if own is None else format_mcc(sum(r.amount for r in own)),
        paid=format_mcc(paid),
    )


def rounds_info(state: JobState) -> RoundsInfo | None:
    """Return how far a training job's rounds are; None for another job."""
    if not state.rounds.training:
        return None
    closes = [close.message for close in state.rounds.closes if accepted(close.message)]
    return RoundsInfo(
        done=state.rounds.open,
        total=state.terms.rounds,
        losses=[_loss(close.loss) for close in closes],
        state="0x" + state.rounds.state.hex(),
    )


def _loss(text: str) -> float | None:
    """Return a close's loss as a number; None if it is none."""
    try:
        loss = float(text)
    except ValueError:
        return None
    return loss if math.isfinite(loss) else None


def shard_why(reason: ShardReason) -> ShardWhy:
    """Return a pending shard's reason as the API tells it."""
    return ShardWhy(
        round=reason.round,
        shard=reason.shard,
        attempt=reason.attempt,
        state=reason.state,
        worker=hex_address(reason.worker) if reason.worker is not None else "",
        reason=reason.text,
    )


def node_why(reason: NodeReason) -> NodeWhy:
    """Return a node's reason as the API tells it."""
    return NodeWhy(address=hex_address(reason.address), state=reason.state, reason=reason.text)


# ---- the log -------------------------------------------------------------------------------


def log_page(batches: Sequence[Batch], after: int) -> LogPage:
    """Return the entries after batch *after* (0: all), whole batches, about PAGE_LINES of them."""
    lines: list[LogLine] = []
    for at, batch in enumerate(batches[after:], start=after):
        if len(lines) >= PAGE_LINES:
            return LogPage(lines=lines, next=at)
        lines += [_line(batch, entry) for entry in batch.entries]
    return LogPage(lines=lines, next=None)


def _line(batch: Batch, entry: Signed[Message]) -> LogLine:
    return LogLine(
        term=batch.head.message.term,
        seq=batch.head.message.seq,
        height=batch.height,
        kind=entry.message.kind,
        signer=hex_address(entry.signer),
        text=entry_text(entry.message),
        digest="0x" + entry.digest.hex(),
    )


def entry_text(message: Message) -> str:
    """Return what an entry says, in a few words; empty where its kind says all."""
    match message:
        case Assignment():
            return (
                f"round {message.round} shard {message.shard} attempt {message.attempt} to "
                f"{hex_address(message.worker)} until block {message.lease_until}"
            )
        case LeaseEnd():
            return _name(LeaseEndReason, message.reason)
        case Commitment():
            return f"{message.n} rows, {message.output_bytes} bytes"
        case Challenge():
            drawn = len(message.drawn)
            return f"{_name(AuditKind, message.audit_kind)} audit, {drawn} drawn"
        case Attestation():
            return f"{_name(AuditKind, message.audit_kind)} audit: " + _name(
                AuditResult, message.result
            )
        case RoundClose():
            return (
                f"round {message.round}: {len(accepted(message))} of "
                f"{len(message.commitments)} contributions"
            )
        case Canary():
            return f"numeric class {message.digest.hex()[:16]}"
        case TermStart():
            return f"term {message.term}"
        case Cut():
            return f"epoch {message.epoch}"
        case JobEnd():
            return _name(JobEndReason, message.reason)
        case _:
            return ""


def _name(kind: type[AuditKind | AuditResult | LeaseEndReason | JobEndReason], value: int) -> str:
    """Return the name of an enumeration's value; a later version may know more of them."""
    try:
        return kind(value).name.lower().replace("_", " ")
    except ValueError:
        return str(value)
