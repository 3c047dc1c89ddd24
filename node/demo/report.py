"""What a run of the demo came to, whether all of it holds, and the same as JSON.

Amounts are in MCC's smallest unit here and exact decimal text in JSON. Addresses are `0x` and 40
hex digits; job ids, roots and transactions `0x` and 64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from meshd.config.amounts import format_mcc
from meshd.node.control.api import JobState

LARGEST_DIFFERENCE: Final = 1e-5
"""How far the job's output may be from plain torch, for any number of any row."""
SMALL_COMMITTEE: Final = 7
"""With fewer members a job's outcome rests on trust in their quorum."""

Mark = Literal["", "cheater", "killed"]
AuditKind = Literal["first", "second", "confirm"]
AuditResult = Literal["accepted", "mismatch", "silent", "malformed"]
ReceiptKind = Literal["work", "audit", "orchestrate", "aggregate", "relay"]


@dataclass(frozen=True)
class Shards:
    """A job's shards (`total`), and what became of the attempts at them."""

    total: int
    accepted: int
    rejected: int
    reissued: int


@dataclass(frozen=True)
class Check:
    """The job's output next to plain torch's: rows compared, and the largest difference."""

    rows: int
    max_abs_diff: float


@dataclass(frozen=True)
class Job:
    """One job of the run; `check` is None if its output could not be compared."""

    id: str
    kind: str
    state: JobState
    shards: Shards
    seconds: float
    check: Check | None
    why: str = ""
    """Why it failed or could not be compared."""


@dataclass(frozen=True)
class Worker:
    """What became of one worker's attempts at shards, over all jobs."""

    name: str
    address: str
    accepted: int
    rejected: int
    void: int = 0
    """Accepted first, then void because the worker was caught."""
    lost: int = 0
    """Leased and never committed, or committed by a worker that was gone before the audit."""
    mark: Mark = ""


@dataclass(frozen=True)
class Audits:
    """How many audits of one kind an auditor made that ended in one result."""

    auditor: str
    kind: AuditKind
    result: AuditResult
    count: int
    units: int
    """Compute units of the rows that were computed again."""


@dataclass(frozen=True)
class Finding:
    """A shard that was rejected, with the name of who found it and who confirmed it."""

    shard: int
    rows_drawn: int
    found_by: str
    confirmed_by: str


@dataclass(frozen=True)
class Cheater:
    """The worker that invents rows; `received` is the difference of its on-chain balances."""

    address: str
    rejected: int
    received: int
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Killed:
    """The worker killed with SIGKILL: its peer id, and how many of its shards others got."""

    peer: str
    reissued: int


@dataclass(frozen=True)
class Receipts:
    """All receipts of one kind: how many, and their sum."""

    kind: ReceiptKind
    count: int
    amount: int


@dataclass(frozen=True)
class Anchor:
    """A settlement on chain."""

    epoch: int
    root: str
    tx: str


@dataclass(frozen=True)
class Account:
    """One role's account: its on-chain balances around the jobs, the sum of its receipts."""

    name: str
    address: str
    before: int
    after: int
    earned: int

    @property
    def received(self) -> int:
        """What the chain says that it got."""
        return self.after - self.before


@dataclass(frozen=True)
class Researcher:
    """The account that pays for the jobs: its on-chain balances around them."""

    address: str
    before: int
    after: int


@dataclass(frozen=True)
class Escrow:
    """Where the money of all jobs went."""

    deposited: int
    burnt: int
    paid: int
    refunded: int


@dataclass(frozen=True)
class Process:
    """One participant: an operating system process with a port of its own."""

    role: str
    pid: int
    port: int


@dataclass(frozen=True)
class Output:
    """A file that the run leaves on purpose."""

    path: str
    size: int
    """Bytes."""
    what: str


@dataclass(frozen=True)
class Report:
    """Everything that the last page shows and that the JSON holds."""

    jobs: tuple[Job, ...]
    workers: tuple[Worker, ...]
    audits: tuple[Audits, ...]
    cheater: Cheater
    killed: Killed
    receipts: tuple[Receipts, ...]
    anchors: tuple[Anchor, ...]
    accounts: tuple[Account, ...]
    """Every role's account, also of those that got nothing; without the researcher's."""
    researcher: Researcher
    escrow: Escrow
    audit_overhead: float
    """Compute units of audits over those of accepted shards in this run (probation)."""
    audit_overhead_steady: float
    """The same where every worker has passed probation, by the terms of these jobs."""
    heads: int
    """Certified heads of the job logs."""
    committee: int
    quorum: int
    processes: tuple[Process, ...]
    outputs: tuple[Output, ...]
    seconds: float
    pss_mb: float
    """The most that all processes together held, in MiB of proportional set size."""
    left_behind: tuple[str, ...] = field(default=())
    """Processes and files that should be gone and are not."""

    @property
    def small_committee(self) -> bool:
        """Whether the outcome rests on trust in the committee's quorum."""
        return self.committee < SMALL_COMMITTEE


def problems(report: Report) -> list[str]:
    """Return every way in which the run does not hold what the demo promises; empty: all does."""
    found = [problem for job in report.jobs for problem in _of_job(job)]
    if not report.jobs:
        found.append("no job ran")
    return [
        *found,
        *_of_workers(report),
        *_of_audits(report),
        *_of_receipts(report),
        *_of_money(report),
        *_of_processes(report.processes),
        *(f"left behind: {what}" for what in report.left_behind),
    ]


def _of_job(job: Job) -> Iterator[str]:
    name, shards = f"job {job.id[:10]} ({job.kind})", job.shards
    because = f": {job.why}" if job.why else ""
    if job.state != "settled":
        yield f"{name} is {job.state}, not settled{because}"
    if shards.total < 1 or shards.accepted != shards.total:
        yield f"{name}: {shards.accepted} of {shards.total} shards were accepted"
    if job.check is None or job.check.rows < 1:
        yield f"{name}: its output was not compared with plain torch{because}"
    elif not job.check.max_abs_diff <= LARGEST_DIFFERENCE:
        yield (
            f"{name}: its output differs from plain torch by {job.check.max_abs_diff:.3g}, "
            f"more than {LARGEST_DIFFERENCE:g}"
        )


def _of_workers(report: Report) -> Iterator[str]:
    cheater = report.cheater
    accepted = sum(job.shards.accepted for job in report.jobs)
    by_workers = sum(worker.accepted for worker in report.workers)
    if by_workers != accepted:
        yield f"{accepted} shards were accepted, but the workers' add up to {by_workers}"
    if cheater.rejected < 1:
        yield f"the cheater {cheater.address} was not caught: none of its shards was rejected"
    if cheater.received != 0:
        yield f"the cheater {cheater.address} received {format_mcc(cheater.received)} MCC"
    if report.killed.reissued < 1:
        yield f"no shard of the killed worker {report.killed.peer} was re-issued"
    for worker in report.workers:
        if worker.rejected and worker.mark == "":
            yield f"{worker.name} is honest, and {worker.rejected} of its shards were rejected"


def _of_audits(report: Report) -> Iterator[str]:
    accepted = sum(job.shards.accepted for job in report.jobs)
    passed = sum(audits.count for audits in report.audits if audits.result == "accepted")
    if passed < accepted:
        yield f"{accepted} shards were accepted, but only {passed} audits passed"
    for name in ("audit_overhead", "audit_overhead_steady"):
        value = getattr(report, name)
        if not 0 < value < math.inf:
            yield f"{name} is {value:g}: a share of the compute is above 0"
    if report.heads < 1:
        yield "no head of a job log was certified"


def _of_receipts(report: Report) -> Iterator[str]:
    accepted = sum(job.shards.accepted for job in report.jobs)
    works = sum(receipts.count for receipts in report.receipts if receipts.kind == "work")
    if works != accepted:
        yield f"{accepted} shards were accepted, but {works} receipts are of work"
    amount = sum(receipts.amount for receipts in report.receipts)
    if amount != report.escrow.paid:
        yield (
            f"the receipts add up to {format_mcc(amount)} MCC, "
            f"the escrow paid {format_mcc(report.escrow.paid)}"
        )
    if not report.anchors:
        yield "no settlement was anchored"
    for anchor in report.anchors:
        if not anchor.tx:
            yield f"the anchor of epoch {anchor.epoch} has no transaction"


def _of_money(report: Report) -> Iterator[str]:
    escrow = report.escrow
    spent = escrow.burnt + escrow.paid + escrow.refunded
    if escrow.deposited < 1:
        yield "nothing was deposited into an escrow"
    if escrow.deposited != spent:
        yield (
            f"the escrow is not exact: {format_mcc(escrow.deposited)} MCC deposited, "
            f"{format_mcc(spent)} burnt, paid and refunded"
        )
    for account in report.accounts:
        if account.received != account.earned:
            yield (
                f"{account.name} {account.address} received {format_mcc(account.received)} MCC, "
                f"its receipts add up to {format_mcc(account.earned)}"
            )
    received = sum(account.received for account in report.accounts)
    if received != escrow.paid:
        yield (
            f"the escrow paid {format_mcc(escrow.paid)} MCC, "
            f"the accounts received {format_mcc(received)}"
        )
    listed = Counter(account.address for account in report.accounts)
    for address in (a for a, count in listed.items() if count > 1):
        yield f"the account {address} is listed twice"
    for address in (report.cheater.address, *(worker.address for worker in report.workers)):
        if address not in listed:
            yield f"the account {address} of a worker is missing among the payments"
    cost = report.researcher.before - report.researcher.after
    if cost != escrow.deposited - escrow.refunded:
        yield (
            f"the jobs cost the researcher {format_mcc(cost)} MCC, not the "
            f"{format_mcc(escrow.deposited - escrow.refunded)} that were not refunded"
        )


def _of_processes(processes: Sequence[Process]) -> Iterator[str]:
    if not processes:
        yield "no process is listed"
    for name in ("pid", "port"):
        counts = Counter(getattr(process, name) for process in processes)
        for value in (value for value, count in counts.items() if count > 1):
            roles = " and ".join(p.role for p in processes if getattr(p, name) == value)
            yield f"{roles} have the same {name} {value}: every participant has its own"


def to_json(report: Report) -> dict[str, object]:
    """Return the report as `--json` writes it."""
    return {
        "jobs": [_job_json(job) for job in report.jobs],
        "cheater": {
            "address": report.cheater.address,
            "rejected": report.cheater.rejected,
            "received": format_mcc(report.cheater.received),
        },
        "killed": asdict(report.killed),
        "receipts": sum(receipts.count for receipts in report.receipts),
        "anchors": [asdict(anchor) for anchor in report.anchors],
        "payments": {
            account.address: {
                "earned": format_mcc(account.earned),
                "received": format_mcc(account.received),
            }
            for account in report.accounts
        },
        "escrow": {name: format_mcc(amount) for name, amount in asdict(report.escrow).items()},
        "audit_overhead": report.audit_overhead,
        "audit_overhead_steady": report.audit_overhead_steady,
        "processes": [asdict(process) for process in report.processes],
        "seconds": report.seconds,
        "pss_mb": report.pss_mb,
    }


def _job_json(job: Job) -> dict[str, object]:
    described = asdict(job)
    del described["why"]
    return described
