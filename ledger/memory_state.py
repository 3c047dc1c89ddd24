"""What the memory chain's contracts store, as immutable values in dicts: a copy is a snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from eth_hash.auto import keccak

from meshd.ledger.chain import CallFailed, JobOnChain, OpenJob
from meshd.p2p.codec import Domain
from meshd.p2p.identity import NOBODY, Address

BURN_DIVISOR = 100
"""One part in so many of a job's cap is burnt when it is opened, rounded up."""


@dataclass(frozen=True)
class Node:
    """A registered node: its payout address, role bits and stake."""

    payout: Address
    roles: int
    bonded: int = 0


class Status(Enum):
    """Where a job's escrow stands."""

    OPEN = 1
    STARTED = 2
    REFUNDED = 3
    """The rest is refunded; what settlements promise stays claimable."""
    CANCELLED = 4


@dataclass(frozen=True)
class Pot:
    """One job's escrow: its terms and what was anchored, paid and returned."""

    job_id: bytes
    researcher: Address
    terms: OpenJob
    opened: int
    status: Status = Status.OPEN
    committee: tuple[Address, ...] = ()
    paid: int = 0
    settled_total: int = 0
    """Total of the last anchor that has survived its window: the bound of all claims."""
    claimable_at: int = 0
    pending: bool = False
    """The last anchor is not yet counted in `settled_total`."""
    anchored_total: int = 0
    last_epoch: int = 0
    is_final: bool = False

    @property
    def burnt(self) -> int:
        """What was burnt when the job was opened."""
        return -(-self.terms.cap // BURN_DIVISOR)

    @property
    def payable(self) -> int:
        """What the job can pay out: the cap less what was burnt."""
        return self.terms.cap - self.burnt

    @property
    def refunded(self) -> int:
        """What went back to the researcher."""
        match self.status:
            case Status.CANCELLED:
                return self.payable
            case Status.REFUNDED:
                return self.payable - self.settled_total
            case _:
                return 0

    @property
    def held(self) -> int:
        """What the escrow still holds for this job."""
        return self.payable - self.paid - self.refunded

    @property
    def anchor_deadline(self) -> int:
        """The last second in which a settlement can be anchored, unless a final one is."""
        follow = self.claimable_at + self.terms.window if self.claimable_at else 0
        return max(self.terms.settle_deadline, follow)

    def in_window(self, epoch: int, now: int) -> bool:
        """Return whether the root of *epoch* is the last and cannot be claimed against yet."""
        return self.pending and now < self.claimable_at and epoch == self.last_epoch

    def settle(self, now: int) -> Pot:
        """Return the pot with the last anchor counted, if its window has passed."""
        if not self.pending or now < self.claimable_at:
            return self
        return replace(self, settled_total=self.anchored_total, pending=False)


@dataclass
class ContractState:
    """Everything the contracts store. Values are immutable: a shallow copy is a snapshot."""

    balances: dict[Address, int] = field(default_factory=dict)
    burnt: int = 0
    nodes: dict[Address, Node] = field(default_factory=dict)
    seats: dict[tuple[int, Address], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """(role, node) to its (epoch, weight in whole MCC) checkpoints, in order of seats."""
    pots: dict[bytes, Pot] = field(default_factory=dict)
    roots: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    """(job id, epoch) to the anchored root."""
    claimed: dict[tuple[bytes, Address], int] = field(default_factory=dict)

    def copy(self) -> ContractState:
        """Return a state that can be changed without changing this one."""
        return ContractState(
            dict(self.balances),
            self.burnt,
            dict(self.nodes),
            dict(self.seats),
            dict(self.pots),
            dict(self.roots),
            dict(self.claimed),
        )

    def job(self, job_id: bytes) -> JobOnChain | None:
        """Return a job's escrow as the Chain port shows it; None if there is none."""
        pot = self.pots.get(job_id)
        if pot is None:
            return None
        terms = pot.terms
        return JobOnChain(
            job_id=job_id,
            researcher=pot.researcher,
            spec_hash=terms.spec_hash,
            deposited=terms.cap,
            burnt=pot.burnt,
            paid=pot.paid,
            refunded=pot.refunded,
            epoch_limit=terms.epoch_limit,
            window=terms.window,
            work_deadline=terms.work_deadline,
            settle_deadline=terms.settle_deadline,
            opened=pot.opened,
            started=bool(pot.committee),
            cancelled=pot.status is Status.CANCELLED,
            settled=pot.is_final,
            last_epoch=pot.last_epoch,
            last_root=self.roots.get((job_id, pot.last_epoch), bytes(32)),
            total=pot.anchored_total,
            anchored_at=pot.claimable_at - terms.window if pot.claimable_at else 0,
        )

    def active(self, role: int, epoch: int) -> dict[Address, int]:
        """Return the nodes of *role* whose stake counts in *epoch*, with weights in whole MCC."""
        weights = {}
        for (held, node), checkpoints in self.seats.items():
            weight = next((w for since, w in reversed(checkpoints) if since <= epoch), 0)
            if held == role and weight:
                weights[node] = weight
        return weights

    def transfer(self, sender: Address, to: Address, amount: int) -> None:
        """Move MCC as ERC-20 does; raises CallFailed."""
        if to == NOBODY:
            raise CallFailed("ERC20InvalidReceiver")
        self.move(sender, to, amount)

    def move(self, sender: Address, to: Address, amount: int) -> None:
        """Move MCC to any account; raises CallFailed if the sender has less."""
        self._take(sender, amount)
        self.balances[to] = self.balances.get(to, 0) + amount

    def burn(self, sender: Address, amount: int) -> None:
        """Destroy MCC; raises CallFailed if the sender has less."""
        self._take(sender, amount)
        self.burnt += amount

    def _take(self, sender: Address, amount: int) -> None:
        balance = self.balances.get(sender, 0)
        if amount > balance:
            raise CallFailed("ERC20InsufficientBalance")
        self.balances[sender] = balance - amount


@dataclass(frozen=True)
class Setting:
    """What a transaction sees besides the state: the deployment and its own block."""

    domain: Domain
    epoch_length: int
    minimum_stake: int
    height: int
    timestamp: int
    tx: bytes
    sender: Address
    block_hash: Callable[[int], bytes]

    @property
    def escrow(self) -> Address:
        """The account that holds all jobs' pots."""
        return self.domain.escrow

    @property
    def registry(self) -> Address:
        """The account that holds all stakes."""
        return registry_account(self.domain)


def registry_account(domain: Domain) -> Address:
    """Return the account that holds all stakes on the memory chain of *domain*."""
    return Address(keccak(b"registry" + domain.escrow)[12:])
