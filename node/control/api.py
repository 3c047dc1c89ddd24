"""What a daemon tells and does for its user: the answers, the errors and the Node port.

Answers are JSON as they stand: amounts of MCC are decimal strings (``"1.5"``), addresses are
``0x`` and 40 hex digits, digests, job ids and transactions ``0x`` and 64, times Unix seconds.
Imports nothing heavy: the command line loads this module on every call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from meshd.config.job import JobSpec

MAX_BODY: Final = 1 << 20
"""Bytes of a request's body."""

Code = Literal["usage", "not-found", "failed", "unavailable", "again", "config"]
EXIT_CODES: Final[dict[Code, int]] = {
    "failed": 1,
    "usage": 2,
    "not-found": 2,
    "unavailable": 69,
    "again": 75,
    "config": 78,
}
"""The command's exit code for each kind of error (sysexits.h)."""

JobState = Literal["announced", "running", "settling", "settled", "cancelled", "failed"]
ENDED: Final[frozenset[JobState]] = frozenset({"settled", "cancelled", "failed"})
"""States that no longer change."""


class ControlError(Exception):
    """A request that cannot be served: what is wrong, and what to do about it."""

    def __init__(self, code: Code, message: str, cure: str = "") -> None:
        super().__init__(f"{message}: {cure}" if cure else message)
        self.code = code
        self.message = message
        self.cure = cure

    @property
    def exit_code(self) -> int:
        """What the command that meets this error exits with."""
        return EXIT_CODES[self.code]


class ChainStatus(TypedDict):
    """The chain as the daemon sees it; `height` is None while it cannot be reached."""

    rpc: str
    chain_id: int
    height: int | None


class Status(TypedDict):
    """A daemon in one glance."""

    version: str
    pid: int
    network: str
    address: str
    peer_id: str
    roles: list[str]
    listen: list[str]
    uptime_s: float
    peers: int
    jobs: int
    """Jobs that have not ended and that this daemon has a part in."""
    shards: int
    """Shards computed at this moment."""
    chain: ChainStatus
    warnings: list[str]


class PeerInfo(TypedDict):
    """A connected peer; what it has not said is empty or None."""

    address: str
    peer_id: str
    multiaddrs: list[str]
    roles: list[str]
    latency_ms: float | None
    device: str
    ask: str | None


class Wallet(TypedDict):
    """What the node's account holds; `coin` is the chain's native coin, which pays for gas."""

    address: str
    payout: str
    chain_id: int
    mcc: str
    coin: str
    stake: str


class Staked(TypedDict):
    """A stake that is on chain; `stake` is the node's whole stake after it."""

    tx: str
    height: int
    stake: str


class ShardCounts(TypedDict):
    """Counts of a job's shards (`total`) and of what became of attempts at them."""

    total: int
    accepted: int
    rejected: int
    reissued: int


class JobSummary(TypedDict):
    """A job in one line; `seconds` counts from its announcement to its end, or to now."""

    id: str
    kind: str
    state: JobState
    researcher: str
    shards: ShardCounts
    cap: str
    deadline: int
    seconds: float
    note: str
    """Why it waits or failed, or what to know about it; empty: nothing."""


class WorkerShare(TypedDict):
    """One worker's part in a job."""

    account: str
    accepted: int
    rejected: int
    voided: int
    """Results that were void because the worker was rejected, or its auditors disagreed."""
    leases: int
    lost: int
    """Leases without an accepted result whose shard went to another attempt."""
    finding: str
    """What its rejection rests on, such as "mismatch"; empty: it was not rejected."""


class AuditInfo(TypedDict):
    """One audit as the log has it; `kind` is first, second or confirm."""

    shard: int
    attempt: int
    worker: str
    auditor: str
    kind: str
    result: str
    rows: int
    """Rows that were computed again."""
    units: int


class Escrow(TypedDict):
    """A job's money: deposited = burnt + paid + refunded, once it has ended."""

    deposited: str
    burnt: str
    paid: str
    refunded: str


class Anchor(TypedDict):
    """A settlement on chain."""

    epoch: int
    root: str
    total: str
    tx: str


class JobDetail(JobSummary):
    """Everything that is known of a job."""

    program: str
    data: str
    rows: int
    price: str
    orchestrator: str
    committee: list[str]
    quorum: int
    term: int
    certified_seq: int
    """The last certified batch of the job's log; 0: none."""
    workers: list[WorkerShare]
    audits: list[AuditInfo]
    escrow: Escrow
    anchors: list[Anchor]
    output: str
    """Digest of the final output; empty while there is none."""


class JobEvent(TypedDict):
    """Something happened in a job; `shards` and `state` are as they are after it."""

    time: float
    event: str
    text: str
    state: JobState
    shards: ShardCounts


SendEvent = Callable[[JobEvent], Awaitable[None]]
"""Hands one event to whoever watches."""


class Submitted(TypedDict):
    """A job whose escrow is open."""

    id: str
    state: JobState
    shards: int
    cap: str
    deadline: int
    warnings: list[str]


class ResultFile(TypedDict):
    """A job's final output, written to a file."""

    path: str
    bytes: int
    digest: str
    rows: int


class ReceiptInfo(TypedDict):
    """One accepted contribution as it is paid; `units` are compute units."""

    kind: str
    shard: int
    attempt: int
    account: str
    units: int
    charged: str
    amount: str
    log_seq: int


class Node(Protocol):
    """What the control API needs of a daemon.

    Each method raises ControlError with the cure; ConfigError, WorkloadError, IdentityError,
    NetworkError and ChainError are translated by the server. Job ids come complete and well
    formed (32 bytes); an unknown one is ControlError("not-found").
    """

    async def status(self) -> Status:
        """Return the daemon in one glance; from memory, without asking anybody."""
        ...

    async def peers(self) -> list[PeerInfo]:
        """Return the connected peers."""
        ...

    async def wallet(self) -> Wallet:
        """Return what the node's account holds, asked of the chain now."""
        ...

    async def stake(self, amount: int) -> Staked:
        """Register if need be, stake *amount* (smallest unit), return when it is on chain."""
        ...

    async def job_submit(self, spec: JobSpec) -> Submitted:
        """Check and store program and data, open the escrow, announce the job."""
        ...

    async def job_list(self) -> list[JobSummary]:
        """Return the jobs that this daemon knows, the newest first."""
        ...

    async def job_show(self, job_id: bytes) -> JobDetail:
        """Return everything known of a job."""
        ...

    async def job_watch(self, job_id: bytes, send: SendEvent) -> None:
        """Send the job as it is now, then every event; return when it has ended.

        `send` waits until the client has read; it is cancelled when the client leaves.
        """
        ...

    async def job_cancel(self, job_id: bytes) -> JobSummary:
        """Take the job back before its start; after it, stop it: what passed is paid."""
        ...

    async def job_result(self, job_id: bytes, path: Path) -> ResultFile:
        """Write the final output to *path* (absolute), replacing it only when complete."""
        ...

    async def job_receipts(self, job_id: bytes) -> list[ReceiptInfo]:
        """Return the job's receipts so far, in the order of its log."""
        ...
