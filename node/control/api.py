"""What a daemon tells its user: the answers of the control API, and its errors.

Answers are JSON as they stand: amounts of MCC are decimal strings (``"1.5"``), addresses are
``0x`` and 40 hex digits, digests, job ids and transactions ``0x`` and 64, times Unix seconds.
Imports nothing heavy: the command line loads this module on every call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Literal, TypedDict

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
    paused: bool
    """Whether it takes no new shards, by its user's wish."""
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


class JobEarnings(TypedDict):
    """What one job owes and paid to this node's account."""

    job: str
    receipts: int | None
    """Receipts in the job's log so far; None: this node does not follow it any more."""
    earned: str | None
    """What they come to."""
    paid: str


class PaymentInfo(TypedDict):
    """A payment out of an escrow, as the chain has it."""

    job: str
    amount: str
    height: int
    tx: str


class Earnings(TypedDict):
    """What the account that is paid has earned, of the chain's events and the jobs' logs."""

    account: str
    paid: str
    """Sum of the payments."""
    pending: str
    """Earned in jobs that this node follows, and not paid yet."""
    jobs: list[JobEarnings]
    payments: list[PaymentInfo]


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


class RoundsInfo(TypedDict):
    """The rounds of a training job."""

    done: int
    total: int
    losses: list[float | None]
    """The mean training loss of each closed round, as the log has it."""
    state: str
    """Digest of the newest round's state."""


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
    rounds: RoundsInfo | None
    """None unless the job trains."""


class JobEvent(TypedDict):
    """Something happened in a job; `shards` and `state` are as they are after it."""

    time: float
    event: str
    text: str
    state: JobState
    shards: ShardCounts


SendEvent = Callable[[JobEvent], Awaitable[None]]
"""Hands one event to whoever watches."""


ReplayResult = Literal["equal", "different", "other-class"]
"""Whether computing something again gave the same bits; other-class: this machine's are others."""


class ReplayShard(TypedDict):
    """A shard whose contribution is in a closed round, trained again."""

    round: int
    shard: int
    worker: str
    result: ReplayResult
    audit: str
    """What its audit came to: pending, accepted, rejected or void."""


class ReplayEvent(TypedDict):
    """A shard or a round that was computed again, or (event "end") the result of all of it."""

    event: Literal["shard", "round", "end"]
    result: ReplayResult
    text: str
    round: int
    """The shard's or the round's; the last one that was computed again."""
    rounds: int
    """Closed rounds in the log."""
    done: int
    total: int
    """Shards looked at so far, and in all."""
    state: str
    """Digest of the state that follows; empty for a shard."""
    logged: str
    """The one that the log names."""
    shards: list[ReplayShard]
    """The shard; of a round, and of all of it, those that are not equal."""


SendReplay = Callable[[ReplayEvent], Awaitable[None]]
"""Hands one event to whoever asked for the replay."""


class Submitted(TypedDict):
    """A job whose escrow is open."""

    id: str
    state: JobState
    shards: int
    cap: str
    deadline: int
    warnings: list[str]


class ShardWhy(TypedDict):
    """Why one shard is not through; `state` is free, handed-out, computing or audit."""

    round: int
    shard: int
    attempt: int
    state: str
    worker: str
    reason: str


class NodeWhy(TypedDict):
    """What a node does for a job, or why it does nothing; `state` is one word for it."""

    address: str
    state: str
    reason: str


class JobWhy(TypedDict):
    """Why a job is not further; `note` is what holds up the whole of it."""

    id: str
    state: JobState
    note: str
    height: int
    shards: list[ShardWhy]
    nodes: list[NodeWhy]


class LogLine(TypedDict):
    """An entry of a job's certified log."""

    term: int
    seq: int
    height: int
    kind: str
    signer: str
    text: str
    digest: str


class LogPage(TypedDict):
    """Some of a job's log, in order; `next` is the batch after which it goes on, None: the end."""

    lines: list[LogLine]
    next: int | None


class JobPart(TypedDict):
    """A part of a result: an accepted shard's rows, or the weights after a round."""

    number: int
    """Of the shard, or of the round."""
    start: int
    stop: int
    """Its rows [start, stop), or how many rounds were closed before and after it."""
    digest: str
    """Another one if the part was computed again."""


class ResultFile(TypedDict):
    """A job's final output, or a part of it, written to a file."""

    path: str
    bytes: int
    digest: str
    rows: int
    """0 for weights."""


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
