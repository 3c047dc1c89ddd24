"""The Chain port: what the roles see of the chain. Adapters: `memory_chain`, `evm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address
from meshd.p2p.messages import Settlement


class ChainError(Exception):
    """Root of what the chain can do to a caller.

    ChainError
    ├── ChainUnavailable   the RPC cannot be reached
    │   └── WrongChain     it can, but is on another chain, or one without the contracts
    └── CallFailed         a transaction was refused or reverted; the text is the contract's error
    """


class ChainUnavailable(ChainError):
    """The RPC cannot be reached, or does not answer as a chain does."""


class WrongChain(ChainUnavailable):
    """The RPC is on another chain than the deployment, or its chain lacks the contracts."""


class CallFailed(ChainError):
    """A transaction was refused or reverted; the text is the contract's error."""


@dataclass(frozen=True)
class Block:
    """A block: height, hash and timestamp (Unix seconds)."""

    height: int
    hash: bytes
    timestamp: int


@dataclass(frozen=True)
class JobOnChain:
    """An escrow as the contract holds it. Amounts in MCC's smallest unit."""

    job_id: bytes
    researcher: Address
    spec_hash: bytes
    deposited: int
    burnt: int
    paid: int
    refunded: int
    epoch_limit: int
    window: int
    work_deadline: int
    settle_deadline: int
    opened: int
    """Height of the block that opened it."""
    started: bool
    cancelled: bool
    settled: bool
    """A final settlement is anchored."""
    last_epoch: int
    last_root: bytes
    total: int
    """Sum promised by the last anchored root."""
    anchored_at: int
    """Timestamp of the last anchor; 0: none."""

    @property
    def held(self) -> int:
        """What is still in the pot."""
        return self.deposited - self.burnt - self.paid - self.refunded

    @property
    def refundable(self) -> int:
        """What no anchored root promises to anybody."""
        return self.deposited - self.burnt - self.total - self.refunded


# ---- events -----------------------------------------------------------------------------


@dataclass(frozen=True)
class JobOpened:
    """An escrow was opened for a job with these terms."""

    height: int
    job_id: bytes
    researcher: Address
    spec_hash: bytes
    cap: int


@dataclass(frozen=True)
class JobStarted:
    """The committee was drawn."""

    height: int
    job_id: bytes
    committee: tuple[Address, ...]
    quorum: int
    beacon: bytes


@dataclass(frozen=True)
class JobCancelled:
    """The researcher took the job back before its start."""

    height: int
    job_id: bytes


@dataclass(frozen=True)
class Anchored:
    """A settlement is on chain."""

    height: int
    job_id: bytes
    epoch: int
    root: bytes
    total: int
    is_final: bool
    tx: bytes


@dataclass(frozen=True)
class Claimed:
    """An account was paid."""

    height: int
    job_id: bytes
    account: Address
    amount: int
    tx: bytes


@dataclass(frozen=True)
class Refunded:
    """The researcher got back what was not owed."""

    height: int
    job_id: bytes
    amount: int
    tx: bytes


ChainEvent: TypeAlias = JobOpened | JobStarted | JobCancelled | Anchored | Claimed | Refunded


# ---- calls ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    """Register this node with a bitmap of roles (1 orchestrator, 2 validator)."""

    roles: int
    payout: Address


@dataclass(frozen=True)
class Stake:
    """Stake *amount* for this node (the allowance is the adapter's business)."""

    amount: int


@dataclass(frozen=True)
class Transfer:
    """Send MCC."""

    to: Address
    amount: int


@dataclass(frozen=True)
class OpenJob:
    """Deposit a job's cap (the allowance is the adapter's business)."""

    spec_hash: bytes
    salt: bytes
    cap: int
    epoch_limit: int
    window: int
    work_deadline: int
    settle_deadline: int


@dataclass(frozen=True)
class StartJob:
    """Draw the committee (anybody may)."""

    job_id: bytes


@dataclass(frozen=True)
class CancelJob:
    """Take the job back before its start."""

    job_id: bytes


@dataclass(frozen=True)
class AnchorSettlement:
    """Put a settlement on chain under a quorum's signatures (by committee position)."""

    settlement: Settlement
    committee: tuple[Address, ...]
    bitmap: int
    signatures: tuple[bytes, ...]


@dataclass(frozen=True)
class Claim:
    """One account's leaf and path under an anchored root."""

    job_id: bytes
    epoch: int
    account: Address
    earned: int
    receipts_root: bytes
    proof: tuple[bytes, ...]


@dataclass(frozen=True)
class ClaimMany:
    """Pay several accounts."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class RefundJob:
    """Return to the researcher what is not owed."""

    job_id: bytes


Call: TypeAlias = (
    Register
    | Stake
    | Transfer
    | OpenJob
    | StartJob
    | CancelJob
    | AnchorSettlement
    | ClaimMany
    | RefundJob
)


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its transaction, block and, if it failed, why."""

    tx: bytes
    height: int
    error: str | None


class Chain(Protocol):
    """One node's account on one chain with meshd's contracts."""

    @property
    def domain(self) -> Domain:
        """Network name, chain id and escrow contract: what signatures are bound to."""
        ...

    @property
    def address(self) -> Address:
        """The account that sends."""
        ...

    async def head(self) -> Block:
        """Return the newest block (at most one poll old). Raises ChainUnavailable."""
        ...

    async def block(self, height: int) -> Block | None:
        """Return the block at *height*; None if there is none yet. Raises ChainUnavailable."""
        ...

    async def wait_height(self, height: int) -> Block:
        """Return the block at *height* as soon as it exists."""
        ...

    async def events(self, from_height: int, to_height: int) -> Sequence[ChainEvent]:
        """Return the escrow's events in that range of heights, in order."""
        ...

    async def job(self, job_id: bytes) -> JobOnChain | None:
        """Return the job's escrow; None if there is none."""
        ...

    def job_id(self, researcher: Address, spec_hash: bytes, salt: bytes) -> bytes:
        """Return the id that the contract gives a job."""
        ...

    async def orchestrators(self) -> Sequence[Address]:
        """Return the nodes registered as orchestrators with active stake."""
        ...

    async def stake_of(self, node: Address) -> int:
        """Return a node's stake, active or not yet."""
        ...

    async def balance(self, account: Address) -> int:
        """Return an account's MCC."""
        ...

    async def gas_balance(self, account: Address) -> int:
        """Return an account's native coin (wei): what pays for transactions."""
        ...

    async def claimed(self, job_id: bytes, account: Address) -> int:
        """Return what an account has been paid of a job."""
        ...

    async def send(self, key: str, call: Call) -> None:
        """Put *call* into the outbox under its business *key* and return when it is on disk.

        The same key again is a no-op: whatever crashes, the call is made at most once.
        """
        ...

    async def wait(self, key: str) -> Outcome:
        """Return what became of the call under *key* once its block is confirmed."""
        ...
