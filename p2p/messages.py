"""The protocol: every message, topic and protocol id, and nothing else.

Each message is a frozen model. Its class says its wire name (`kind`), its size limit and
whether it is signed as an EIP-712 struct (`typed = True`: it may reach the chain) or inside an
envelope. Field names travel in camel case. A changed message bumps `PROTOCOL`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL = 1
"""The protocol's major version: part of every envelope, topic and protocol id."""

KIB = 1024
MIB = 1024 * KIB
MAX_CONTROL = 64 * KIB
"""Bytes of an ordinary message."""


class Encoded:
    """How a field is typed in EIP-712 (`solidity`); a uint256 travels as a decimal string."""

    def __init__(self, solidity: str) -> None:
        self.solidity = solidity


def _uint(bits: int) -> tuple[object, Encoded]:
    return Field(ge=0, lt=2**bits), Encoded(f"uint{bits}")


U8 = Annotated[int, *_uint(8)]
U32 = Annotated[int, *_uint(32)]
U64 = Annotated[int, *_uint(64)]
Amount = Annotated[int, *_uint(256)]
"""MCC in its smallest unit (10^-18)."""
Hash = Annotated[bytes, Field(min_length=32, max_length=32), Encoded("bytes32")]
Party = Annotated[bytes, Field(min_length=20, max_length=20), Encoded("address")]
Signature = Annotated[bytes, Field(min_length=65, max_length=65), Encoded("bytes")]
Text = Annotated[str, Field(max_length=128), Encoded("string")]
Flag = Annotated[bool, Encoded("bool")]
Hashes = Annotated[tuple[Hash, ...], Field(max_length=1024), Encoded("bytes32[]")]
Parties = Annotated[tuple[Party, ...], Field(max_length=256), Encoded("address[]")]
Indices = Annotated[tuple[U32, ...], Field(max_length=4096), Encoded("uint32[]")]
Weights = Annotated[tuple[U64, ...], Field(max_length=4096), Encoded("uint64[]")]
Texts = Annotated[tuple[Text, ...], Field(max_length=64), Encoded("string[]")]

HeadFrame = Annotated[bytes, Field(max_length=4 * KIB), Encoded("bytes")]
CertificateBytes = Annotated[bytes, Field(max_length=64 * KIB), Encoded("bytes")]
Frames = Annotated[
    tuple[Annotated[bytes, Field(max_length=4 * MIB), Encoded("bytes")], ...],
    Field(max_length=1024),
    Encoded("bytes[]"),
]
SmallFrame = Annotated[bytes, Field(max_length=32 * KIB), Encoded("bytes")]

ZERO = bytes(32)


class AuditKind(IntEnum):
    """Why an audit is made."""

    FIRST = 1
    SECOND = 2
    CONFIRM = 3


class AuditResult(IntEnum):
    """An auditor's finding."""

    ACCEPTED = 1
    MISMATCH = 2
    SILENT = 3
    MALFORMED = 4


class LeaseEndReason(IntEnum):
    """Why a lease ended before a commitment."""

    LAPSED = 1
    DISCONNECTED = 2
    NO_PROGRESS = 3
    FAILED = 4
    HANDED_BACK = 5
    REJECTED = 6


class JobEndReason(IntEnum):
    """Why a job ended."""

    COMPLETE = 1
    STOPPED = 2
    DEADLINE = 3
    FAILED = 4


class Message(BaseModel):
    """Base of all messages: values are immutable, exactly typed, and have no unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    kind: ClassVar[str]
    typed: ClassVar[bool] = False
    max_size: ClassVar[int] = MAX_CONTROL


# ---- before a job -----------------------------------------------------------------------


class Capability(Message):
    """What a peer offers; refreshed at half its life, kept in the DHT."""

    kind: ClassVar[str] = "capability"
    roles: Texts
    addresses: Texts
    device: Text
    memory_bytes: U64
    units_per_second: U64
    ask: Amount
    issued: U64


class JobTerms(Message):
    """All that money or checks of a job depend on; its EIP-712 hash is the `specHash` on chain.

    `price` and `ask` are MCC (smallest unit) per 10^9 compute units. Shares, budgets and
    probabilities are parts per million. `shards` counts the shards of one round; shard i
    covers the rows from i·`rowsPerShard`. `silence`, `challengeBlocks`, `auditBlocks` and
    `leaseBlocks` are block counts, deadlines are Unix seconds.
    """

    kind: ClassVar[str] = "job-terms"
    typed: ClassVar[bool] = True
    network: Text
    workload: Text
    researcher: Party
    orchestrator: Party
    """Zero: the first in the job's ranking of staked orchestrators."""
    program: Hash
    data: Hash
    rows: U64
    shards: U32
    rows_per_shard: U32
    rounds: U32
    initial_state: Hash
    hyperparameters: Texts
    """Sorted ``name=value`` with decimal strings."""
    seed: Hash
    price: Amount
    cap: Amount
    orchestrator_share: U32
    aggregator_share: U32
    audit_budget: U32
    audit_rows: U32
    probation_rows: U32
    probation_shards: U32
    span_shards: U32
    audit_shards: U32
    probation_span_shards: U32
    second_audit_share: U32
    retention: U32
    max_unsettled: U32
    epoch_limit: Amount
    window: U32
    work_deadline: U64
    settle_deadline: U64
    beacon_source: Text
    lag: U32
    silence: U32
    challenge_blocks: U32
    audit_blocks: U32
    lease_blocks: U32
    memory_bytes: U64
    device: Text
    workers: Parties
    """Only these may work; empty: anybody."""
    allow_tolerance: Flag


class JobAnnounce(Message):
    """A hint that a job exists; what is believed is the chain's JobOpened."""

    kind: ClassVar[str] = "job-announce"
    job_id: Hash
    terms: Hash
    """Blob digest of the signed JobTerms."""
    terms_bytes: U32
    holders: Parties


# ---- assignment and work ----------------------------------------------------------------


class Offer(Message):
    """A worker asks for shards of a job."""

    kind: ClassVar[str] = "offer"
    job_id: Hash
    payee: Party
    ask: Amount
    slots: U32
    numeric_class: Hash


class Assignment(Message):
    """The orchestrator gives a shard to a worker, exclusively, until `leaseUntil` (height)."""

    kind: ClassVar[str] = "assignment"
    typed: ClassVar[bool] = True
    job_id: Hash
    term: U32
    round: U32
    shard: U32
    attempt: U32
    worker: Party
    input_hash: Hash
    units: U64
    lease_until: U64
    numeric_class: Hash


class LeaseAccept(Message):
    """The worker takes the assignment and names the account that is to be paid."""

    kind: ClassVar[str] = "lease-accept"
    typed: ClassVar[bool] = True
    job_id: Hash
    assignment_hash: Hash
    payee: Party


class LeaseEnd(Message):
    """The orchestrator ends a lease; a later commitment for it is not paid."""

    kind: ClassVar[str] = "lease-end"
    job_id: Hash
    assignment_hash: Hash
    reason: U8
    height: U64


class Progress(Message):
    """A worker is alive and this far (rows, or inner steps; 0 of 0: it does not say)."""

    kind: ClassVar[str] = "progress"
    job_id: Hash
    assignment_hash: Hash
    done: U32
    total: U32


class Canary(Message):
    """Digest of the job's own first two steps on this machine: its numeric class."""

    kind: ClassVar[str] = "canary"
    job_id: Hash
    party: Party
    """Whose machine it is: the signer."""
    digest: Hash


class Commitment(Message):
    """The root a worker signs before it knows what is audited."""

    kind: ClassVar[str] = "commitment"
    typed: ClassVar[bool] = True
    job_id: Hash
    assignment_hash: Hash
    hash_alg: U8
    """1: BLAKE3."""
    trace_root: Hash
    n: U32
    output_root: Hash
    output_bytes: U64
    numeric_class: Hash


# ---- the job log ------------------------------------------------------------------------


class LogHead(Message):
    """One certified batch of a job's log; orchestrator and members sign the same struct."""

    kind: ClassVar[str] = "log-head"
    typed: ClassVar[bool] = True
    job_id: Hash
    term: U32
    seq: U64
    prev: Hash
    start: Hash
    entries_root: Hash
    height: U64
    block_hash: Hash


class HeadSignature(Message):
    """A member's signature of a LogHead (over the head's own EIP-712 digest)."""

    kind: ClassVar[str] = "head-signature"
    job_id: Hash
    head_hash: Hash
    signature: Signature


class Certificate(Message):
    """A quorum's signatures of one head. A container: never signed or hashed itself."""

    kind: ClassVar[str] = "certificate"
    job_id: Hash
    head_hash: Hash
    signers: Parties
    signatures: Annotated[tuple[Signature, ...], Field(max_length=256), Encoded("bytes[]")]


class TermVote(Message):
    """A member joins a higher term and signs no lower one again.

    Attached: `high`'s signed head and certificate, then the signed heads above it.
    """

    kind: ClassVar[str] = "term-vote"
    typed: ClassVar[bool] = True
    max_size: ClassVar[int] = MIB
    job_id: Hash
    term: U32
    orchestrator: Party
    high: Hash
    signed: Hashes


class TermStart(Message):
    """The orchestrator begins a term on a quorum of votes (attached; `votesRoot` binds them)."""

    kind: ClassVar[str] = "term-start"
    typed: ClassVar[bool] = True
    max_size: ClassVar[int] = 4 * MIB
    job_id: Hash
    term: U32
    orchestrator: Party
    committee: Parties
    prev: Hash
    seq: U64
    lost: Hashes
    votes_root: Hash


class RoundClose(Message):
    """A training round's contributions, their weights and the state that follows from them."""

    kind: ClassVar[str] = "round-close"
    typed: ClassVar[bool] = True
    max_size: ClassVar[int] = 4 * MAX_CONTROL
    job_id: Hash
    term: U32
    round: U32
    state_before: Hash
    commitments: Hashes
    weights: Weights
    gated: Indices
    """Places in `commitments` of the contributions that the gate kept out."""
    state_after: Hash
    loss: Text
    """Mean training loss of what was accepted, a decimal string; recomputed like the state."""


class Cut(Message):
    """Here a settlement may be made: it covers the log up to this entry."""

    kind: ClassVar[str] = "cut"
    typed: ClassVar[bool] = True
    job_id: Hash
    term: U32
    epoch: U64
    payee: Party
    """The account that is paid for orchestration and aggregation."""


class Stop(Message):
    """The researcher ends a started job: what passed is paid, the rest refunded."""

    kind: ClassVar[str] = "stop"
    job_id: Hash


class JobEnd(Message):
    """The last word of a job's log."""

    kind: ClassVar[str] = "job-end"
    typed: ClassVar[bool] = True
    job_id: Hash
    term: U32
    output_root: Hash
    """Blob digest of the final output; zero if there is none."""
    reason: U8


class TermRequest(Message):
    """The orchestrator asks a member to vote for a term it wants to begin."""

    kind: ClassVar[str] = "term-request"
    max_size: ClassVar[int] = 8 * MIB
    job_id: Hash
    term: U32
    head: HeadFrame
    """The highest certified head the orchestrator has, its certificate and entries; or nothing."""
    certificate: CertificateBytes
    entries: Frames


class LogEntries(Message):
    """Entries of the open batch, streamed by the orchestrator as they arise."""

    kind: ClassVar[str] = "log-entries"
    max_size: ClassVar[int] = 4 * MIB
    job_id: Hash
    term: U32
    seq: U64
    first: U32
    entries: Frames


class LogRequest(Message):
    """Ask for the batches of a job's log after (term, seq)."""

    kind: ClassVar[str] = "log-request"
    job_id: Hash
    after_seq: U64


class LogBatch(Message):
    """One batch: signed head, certificate (empty while there is none) and entries."""

    kind: ClassVar[str] = "log-batch"
    max_size: ClassVar[int] = 8 * MIB
    job_id: Hash
    highest_seq: U64
    """The answering peer's highest certified sequence number."""
    head: HeadFrame
    certificate: CertificateBytes
    entries: Frames


# ---- audits -----------------------------------------------------------------------------


class Challenge(Message):
    """An auditor fixes its draw: rows (or shards of a span) follow from beacon and nonce."""

    kind: ClassVar[str] = "challenge"
    typed: ClassVar[bool] = True
    job_id: Hash
    commitments: Hash
    """One commitment's hash, or the root of a span's."""
    audit_kind: U8
    draw_index: U32
    """The auditor's place in the permutation."""
    beacon_height: U64
    nonce: Hash
    drawn: Indices
    payee: Party
    """The account that is paid for the audit."""


class VerdictCommit(Message):
    """A salted commitment to the auditor's own result, before the worker opens its own."""

    kind: ClassVar[str] = "verdict-commit"
    typed: ClassVar[bool] = True
    job_id: Hash
    shard: U32
    attempt: U32
    challenge: Hash
    draw_index: U32
    salted: Hash


class OpenRequest(Message):
    """An auditor whose verdict is committed asks the worker to open its result."""

    kind: ClassVar[str] = "open-request"
    max_size: ClassVar[int] = 2 * MAX_CONTROL
    job_id: Hash
    commitment_hash: Hash
    challenge: SmallFrame
    """The auditor's signed Challenge."""
    verdict: SmallFrame
    """The auditor's signed VerdictCommit."""


class OpenedRow(Message):
    """One drawn row with its Merkle path."""

    kind: ClassVar[str] = "opened-row"
    max_size: ClassVar[int] = MIB
    index: U32
    row: Annotated[bytes, Field(max_length=256 * KIB), Encoded("bytes")]
    salt: Hash
    path: Annotated[tuple[Hash, ...], Field(max_length=32), Encoded("bytes32[]")]


class Open(Message):
    """The worker's answer: drawn rows, the salts' seed, and where the whole output is."""

    kind: ClassVar[str] = "open"
    max_size: ClassVar[int] = 8 * MIB
    job_id: Hash
    commitment_hash: Hash
    rows: Annotated[tuple[OpenedRow, ...], Field(max_length=4096), Encoded("OpenedRow[]")]
    salt_seed: Hash
    output: Hash
    """Blob digest of the packed rows, served to this auditor only."""
    digests: Hashes
    """Training: salt and end digest of each drawn shard, in turn."""


class Attestation(Message):
    """An auditor's signed word on a commitment."""

    kind: ClassVar[str] = "attestation"
    typed: ClassVar[bool] = True
    job_id: Hash
    commitment_hash: Hash
    validator: Party
    result: U8
    audit_kind: U8
    draw_index: U32
    beacon_height: U64
    units_reexecuted: U64
    verdict_commit: Hash
    holds_output: Flag
    output: Hash
    """Blob digest of the held output."""
    agrees_with: Hash
    evidence_hash: Hash


class Reveal(Message):
    """Opens a VerdictCommit: salt and digest; the digest is a blob of the auditor's own rows."""

    kind: ClassVar[str] = "reveal"
    typed: ClassVar[bool] = True
    job_id: Hash
    verdict_commit: Hash
    salt: Hash
    digest: Hash


class OutputAck(Message):
    """The aggregator holds an accepted output; the auditor may drop it."""

    kind: ClassVar[str] = "output-ack"
    job_id: Hash
    shard: U32
    output_root: Hash


# ---- money ------------------------------------------------------------------------------


class Receipt(Message):
    """An accepted contribution of any kind, as it is paid; hashed, never signed alone."""

    kind: ClassVar[str] = "receipt"
    typed: ClassVar[bool] = True
    receipt_kind: Text
    """work, audit, orchestrate, aggregate or relay."""
    job_id: Hash
    shard: U32
    attempt: U32
    account: Party
    signer: Party
    commitment_hash: Hash
    output_hash: Hash
    units: U64
    charged: Amount
    amount: Amount
    log_seq: U64


class Settlement(Message):
    """What a job owes, as a pure function of its final log up to a Cut."""

    kind: ClassVar[str] = "settlement"
    typed: ClassVar[bool] = True
    job_id: Hash
    committee_term: U32
    epoch: U64
    prev_root: Hash
    root: Hash
    total: Amount
    receipts: U64
    log_seq: U64
    log_head: Hash
    data_hash: Hash
    is_final: Flag


class SettlementSignature(Message):
    """A member's signature of a Settlement (over the settlement's own EIP-712 digest)."""

    kind: ClassVar[str] = "settlement-signature"
    job_id: Hash
    epoch: U64
    settlement_hash: Hash
    signature: Signature


class SettlementRequest(Message):
    """Ask a member for its settlement of an epoch, with signature and every account's leaf."""

    kind: ClassVar[str] = "settlement-request"
    job_id: Hash
    epoch: U64


class AccountLeaf(Message):
    """One account's leaf and path in a settlement's tree: enough to claim."""

    kind: ClassVar[str] = "account-leaf"
    job_id: Hash
    epoch: U64
    account: Party
    earned: Amount
    receipts_root: Hash
    proof: Annotated[tuple[Hash, ...], Field(max_length=32), Encoded("bytes32[]")]


class Refused(Message):
    """A peer's answer to a request that it cannot or will not serve, with the reason."""

    kind: ClassVar[str] = "refused"
    reason: Annotated[str, Field(max_length=512), Encoded("string")]


MESSAGES: dict[str, type[Message]] = {
    model.kind: model
    for model in list(globals().values())
    if isinstance(model, type) and issubclass(model, Message) and model is not Message
}
"""Every message by its kind."""

JOB_LOG_KINDS = frozenset(
    {
        "job-terms", "term-start", "assignment", "lease-accept", "lease-end", "canary",
        "commitment", "challenge", "verdict-commit", "attestation", "reveal", "round-close",
        "cut", "stop", "job-end",
    }
)  # fmt: skip
"""What may be an entry of a job's log."""


def jobs_topic(network: str) -> str:
    """Return the topic on which jobs are announced in *network*."""
    return f"/meshd/{network}/jobs/{PROTOCOL}"


def job_topic(network: str, job_id: bytes) -> str:
    """Return the topic of one job."""
    return f"/meshd/{network}/job/{job_id.hex()}/{PROTOCOL}"
