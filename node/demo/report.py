"""What a run of the demo came to, and the same as JSON.

Amounts are in MCC's smallest unit here and exact decimal text in JSON. Addresses are `0x` and 40
hex digits; job ids, roots and transactions `0x` and 64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, Self

from meshd.config.amounts import format_mcc
from meshd.node.control.api import JobState

SMALL_COMMITTEE: Final = 7
"""With fewer members a job's outcome rests on trust in their quorum."""

Mark = Literal["", "cheater", "killed"]
AuditKind = Literal["first", "second", "confirm"]
AuditResult = Literal["accepted", "mismatch", "silent", "malformed"]
ReceiptKind = Literal["work", "audit", "orchestrate", "aggregate", "relay"]


@dataclass(frozen=True)
class Shards:
    """A job's shards, all rounds together (`total`), and what became of the attempts at them.

    In training `accepted` ones entered a closed round; of these, `rejected` ones failed their
    audit. In inference `accepted` ones passed it.
    """

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
class Losses:
    """Losses on held-out text, in nats per byte."""

    loss: tuple[float, ...]
    """Before the first round, and after each."""
    loss_alone: float
    """Of one worker alone, after as many steps as all rounds have for each worker."""


@dataclass(frozen=True)
class Worker:
    """What became of one worker's attempts at the shards of a job."""

    name: str
    address: str
    accepted: int
    """Delivered, passed and paid."""
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
    """Compute units of what was computed again."""


@dataclass(frozen=True)
class Finding:
    """What the cheater was caught at, with the name of who found it and who confirmed it."""

    what: str
    """What was computed again, such as "8 rows of shard 3"."""
    found_by: str
    confirmed_by: str


@dataclass(frozen=True)
class Job:
    """One job of the run; `check` is None if its output could not be compared."""

    id: str
    kind: str
    state: JobState
    shards: Shards
    seconds: float
    check: Check | Losses | None
    why: str = ""
    """Why it failed or could not be compared."""
    rounds: int = 0
    """Of a training job."""
    workers: tuple[Worker, ...] = ()
    audits: tuple[Audits, ...] = ()
    findings: tuple[Finding, ...] = ()
    reissued_of_killed: int = 0
    """How many shards of the killed worker others got."""
    audit_overhead: float = 0.0
    """Compute units of audits over those of paid work."""
    audit_overhead_steady: float = 0.0
    """The same by the job's terms where every worker has passed probation."""

    @property
    def paid_shards(self) -> int:
        """Shards that passed their audit and are paid: one each in inference."""
        return sum(worker.accepted for worker in self.workers)

    @property
    def rejected_of_cheater(self) -> int:
        """Shards of the cheater that two auditors found wrong."""
        return sum(worker.rejected for worker in self.workers if worker.mark == "cheater")


@dataclass(frozen=True)
class Cheater:
    """The worker that saves itself work; `received` is the difference of its on-chain balances."""

    address: str
    rejected: int
    received: int


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

    @classmethod
    def of(cls, path: Path, what: str) -> Self:
        """Return a file that exists, with what it is."""
        return cls(str(path), path.stat().st_size, what)


@dataclass(frozen=True)
class Report:
    """Everything that the last page shows and that the JSON holds."""

    jobs: tuple[Job, ...]
    cheater: Cheater
    killed: Killed
    receipts: tuple[Receipts, ...]
    anchors: tuple[Anchor, ...]
    accounts: tuple[Account, ...]
    """Every role's account, also of those that got nothing; without the researcher's."""
    researcher: Researcher
    escrow: Escrow
    audit_overhead: float
    """Compute units of audits over those of paid work in this run (probation)."""
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
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "shards": asdict(job.shards),
        "seconds": job.seconds,
        "check": None if job.check is None else asdict(job.check),
    }
