"""The Chain port in memory: one ledger for all nodes of a simulation, run by trio's clock.

Blocks need no task: a block exists when its time has come, its hash follows from the seed, and
the transactions sent before it are executed when somebody next looks.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio
from blake3 import blake3
from eth_hash.auto import keccak

from meshd.ledger import memory_contracts, memory_escrow
from meshd.ledger.chain import (
    Block,
    Call,
    CallFailed,
    ChainError,
    ChainEvent,
    ChainUnavailable,
    JobOnChain,
    Outcome,
)
from meshd.ledger.memory_contracts import ORCHESTRATOR, WEIGHT_UNIT
from meshd.ledger.memory_state import ContractState, Setting, registry_account
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address, Identity

SUPPLY = 1_000_000_000 * 10**18
"""MCC that exist at the first block, in the smallest unit."""
GENESIS_TIME = 1_800_000_000
"""Timestamp of block 0 by default (Unix seconds)."""
FEE = 10**14
"""Native coin (wei) that each transaction costs, whether it succeeds or not."""
TREASURY = Address(keccak(b"treasury")[12:])
"""Holds what `MemoryLedger.fund` has not handed out."""
_ROUNDING = 1e-6


@dataclass
class _Sent:
    """A call in the outbox and, when its block exists, what became of it."""

    sender: Address
    call: Call
    tx: bytes
    height: int
    error: str | None = None


@dataclass(frozen=True)
class EscrowSums:
    """A job's pot to the last unit: deposited = burnt + paid + refunded + held."""

    deposited: int
    burnt: int
    paid: int
    refunded: int

    @property
    def held(self) -> int:
        """What is still in the pot."""
        return self.deposited - self.burnt - self.paid - self.refunded


class MemoryLedger:
    """The chain that a simulation's nodes share: blocks, contracts, outboxes and faults.

    Block h exists from (h - 1) · *block_time_s* after the ledger is first looked at inside
    trio's loop; outside a loop it stands at its first block. Everything is a function of
    *seed*, the clock and the order of calls.
    """

    def __init__(
        self,
        domain: Domain,
        *,
        seed: int = 0,
        block_time_s: float = 1.0,
        epoch_length: int = 5,
        minimum_stake: int = WEIGHT_UNIT,
        confirmations: int = 1,
        genesis_time: int = GENESIS_TIME,
        gas: int = 10**18,
    ) -> None:
        self.domain = domain
        self._seed = seed.to_bytes(32, "big", signed=True)
        self._block_time_s = block_time_s
        self.epoch_length = epoch_length
        self._minimum_stake = minimum_stake
        self._confirmations = confirmations
        self._genesis_time = genesis_time
        self._origin: float | None = None
        self._heights = [0]
        self._states = [ContractState(balances={TREASURY: SUPPLY})]
        self._events: list[ChainEvent] = []
        self._outbox: dict[tuple[Address, str], _Sent] = {}
        self._pending: list[_Sent] = []
        self._initial_gas = gas
        self._spent_gas: dict[Address, int] = {}
        self._granted_gas: dict[Address, int] = {}
        self._outages: dict[Address | None, float] = {}
        self._lags: dict[Address, int] = {}

    # ---- blocks -------------------------------------------------------------------------

    @property
    def height(self) -> int:
        """The newest block's height, without any node's lag."""
        try:
            now = trio.current_time()
        except RuntimeError:
            return 1
        if self._origin is None:
            self._origin = now
        return math.floor((now - self._origin + _ROUNDING) / self._block_time_s) + 1

    def block(self, height: int) -> Block:
        """Return the block at *height*, whether its time has come or not."""
        name = blake3(self._seed + height.to_bytes(32, "big")).digest()
        return Block(height, name, self._genesis_time + int(height * self._block_time_s))

    def time_of(self, height: int) -> float:
        """Return when block *height* comes into being, on trio's clock."""
        origin = self._origin if self._origin is not None else trio.current_time()
        return origin + (height - 1) * self._block_time_s + _ROUNDING

    def state(self, height: int | None = None) -> ContractState:
        """Return the contracts' state after block *height* (default: the newest); read only."""
        self._execute()
        if height is None:
            return self._states[-1]
        return self._states[max(bisect.bisect_right(self._heights, height) - 1, 0)]

    def _execute(self) -> None:
        head = self.height
        while self._pending and self._pending[0].height <= head:
            self._run(self._pending.pop(0))

    def _run(self, sent: _Sent) -> None:
        at = Setting(
            domain=self.domain,
            epoch_length=self.epoch_length,
            minimum_stake=self._minimum_stake,
            height=sent.height,
            timestamp=self.block(sent.height).timestamp,
            tx=sent.tx,
            sender=sent.sender,
            block_hash=lambda height: self.block(height).hash,
        )
        if self.gas_of(sent.sender) < FEE:
            sent.error = "insufficient funds for gas"
            return
        self._spent_gas[sent.sender] = self._spent_gas.get(sent.sender, 0) + FEE
        state = self._states[-1].copy()
        try:
            events = memory_contracts.apply(state, sent.call, at)
        except CallFailed as error:
            sent.error = str(error)
            return
        self._events.extend(events)
        if self._heights[-1] == sent.height:
            self._states[-1] = state
        else:
            self._heights.append(sent.height)
            self._states.append(state)

    # ---- outbox -------------------------------------------------------------------------

    def submit(self, sender: Address, key: str, call: Call) -> None:
        """Take *call* for the next block; the same sender and *key* again is a no-op."""
        self._execute()
        if (sender, key) in self._outbox:
            return
        tx = keccak(b"tx" + sender + key.encode())
        sent = _Sent(sender, call, tx, self.height + 1)
        self._outbox[sender, key] = sent
        self._pending.append(sent)

    def final_height(self, sender: Address, key: str) -> int:
        """Return the height at which a call is confirmed; raises ChainError if never sent."""
        if (sender, key) not in self._outbox:
            raise ChainError(f"no call was sent under key {key!r}: call send() first")
        return self._outbox[sender, key].height + self._confirmations

    def outcome(self, sender: Address, key: str) -> Outcome:
        """Return what became of a call whose block exists."""
        self._execute()
        sent = self._outbox[sender, key]
        return Outcome(sent.tx, sent.height, sent.error)

    def events(self, from_height: int, to_height: int) -> list[ChainEvent]:
        """Return the events in that range of heights, both ends included."""
        self._execute()
        low = bisect.bisect_left(self._events, from_height, key=lambda event: event.height)
        high = bisect.bisect_right(self._events, to_height, key=lambda event: event.height)
        return self._events[low:high]

    def gas_of(self, account: Address) -> int:
        """Return an account's native coin (wei)."""
        granted = self._granted_gas.get(account, self._initial_gas)
        return granted - self._spent_gas.get(account, 0)

    # ---- set-up and faults --------------------------------------------------------------

    def fund(self, account: Address, amount: int) -> None:
        """Give MCC from the treasury at once, without a transaction."""
        self._execute()
        balances = self._states[-1].balances
        balances[TREASURY] -= amount
        balances[account] = balances.get(account, 0) + amount

    def set_gas(self, account: Address, amount: int) -> None:
        """Set what an account can spend on transactions (wei)."""
        self._granted_gas[account] = amount + self._spent_gas.get(account, 0)

    def outage(self, until: float, address: Address | None = None) -> None:
        """Make the chain unreachable, for one node or for all, until trio's clock says *until*."""
        self._outages[address] = until

    def outage_end(self, address: Address) -> float | None:
        """Return when the node's outage ends; None if it has none now."""
        end = max(self._outages.get(address, -math.inf), self._outages.get(None, -math.inf))
        return end if end > trio.current_time() else None

    def lagging(self, address: Address, blocks: int) -> None:
        """Let a node see every block so many blocks late, from now on."""
        self._lags[address] = blocks

    def lag(self, address: Address) -> int:
        """Return how many blocks late the node sees the chain."""
        return self._lags.get(address, 0)

    # ---- what tests look at -------------------------------------------------------------

    def escrow(self, job_id: bytes) -> EscrowSums:
        """Return a job's sums; raises KeyError if there is no such job."""
        pot = self.state().pots[job_id]
        return EscrowSums(pot.terms.cap, pot.burnt, pot.paid, pot.refunded)

    def balances(self) -> Mapping[Address, int]:
        """Return every account's MCC, the contracts' own included."""
        return dict(self.state().balances)

    def imbalances(self) -> list[str]:
        """Return every way in which the books do not add up: none, on a right chain."""
        state = self.state()
        registry = registry_account(self.domain)
        books = {
            "all MCC": (sum(state.balances.values()) + state.burnt, SUPPLY),
            "the escrow's account": (
                state.balances.get(self.domain.escrow, 0),
                sum(pot.held for pot in state.pots.values()),
            ),
            "the registry's account": (
                state.balances.get(registry, 0),
                sum(node.bonded for node in state.nodes.values()),
            ),
        }
        found = [
            f"{name}: {there} and not {due}" for name, (there, due) in books.items() if there != due
        ]
        found += [
            f"job {job_id.hex()} holds {pot.held}"
            for job_id, pot in state.pots.items()
            if pot.held < 0
        ]
        found += [
            f"{who.hex()} has {amount}" for who, amount in state.balances.items() if amount < 0
        ]
        return found


class MemoryChain:
    """One node's account on a `MemoryLedger`: the Chain port."""

    def __init__(self, ledger: MemoryLedger, identity: Identity) -> None:
        self._ledger = ledger
        self._address = identity.address

    @property
    def domain(self) -> Domain:
        """Network name, chain id and escrow contract."""
        return self._ledger.domain

    @property
    def address(self) -> Address:
        """The account that sends."""
        return self._address

    async def _seen(self) -> int:
        """Return the newest height that this node sees; raises ChainUnavailable."""
        await trio.lowlevel.checkpoint()
        end = self._ledger.outage_end(self._address)
        if end is not None:
            raise ChainUnavailable(f"the chain cannot be reached before {end:.3f}: wait")
        return max(self._ledger.height - self._ledger.lag(self._address), 0)

    async def _state(self) -> ContractState:
        return self._ledger.state(await self._seen())

    async def head(self) -> Block:
        """Return the newest block. Raises ChainUnavailable."""
        return self._ledger.block(await self._seen())

    async def block(self, height: int) -> Block | None:
        """Return the block at *height*; None if there is none yet. Raises ChainUnavailable."""
        return self._ledger.block(height) if 0 <= height <= await self._seen() else None

    async def wait_height(self, height: int) -> Block:
        """Return the block at *height* as soon as this node sees it; an outage is waited out."""
        while True:
            try:
                if await self._seen() >= height:
                    return self._ledger.block(height)
            except ChainUnavailable:
                end = self._ledger.outage_end(self._address)
                if end is not None:
                    await trio.sleep_until(end)
            else:
                late = height + self._ledger.lag(self._address)
                await trio.sleep_until(self._ledger.time_of(late))

    async def events(self, from_height: int, to_height: int) -> Sequence[ChainEvent]:
        """Return the escrow's events in that range of heights, in order."""
        seen = await self._seen()
        return self._ledger.events(from_height, min(to_height, seen))

    async def job(self, job_id: bytes) -> JobOnChain | None:
        """Return the job's escrow; None if there is none."""
        return (await self._state()).job(job_id)

    def job_id(self, researcher: Address, spec_hash: bytes, salt: bytes) -> bytes:
        """Return the id that the contract gives a job."""
        return memory_escrow.job_id(self.domain, researcher, spec_hash, salt)

    async def orchestrators(self) -> Sequence[Address]:
        """Return the nodes registered as orchestrators with active stake, by seat."""
        seen = await self._seen()
        epoch = seen // self._ledger.epoch_length
        return list(self._ledger.state(seen).active(ORCHESTRATOR, epoch))

    async def stake_of(self, node: Address) -> int:
        """Return a node's stake, active or not yet."""
        found = (await self._state()).nodes.get(node)
        return found.bonded if found else 0

    async def balance(self, account: Address) -> int:
        """Return an account's MCC."""
        return (await self._state()).balances.get(account, 0)

    async def gas_balance(self, account: Address) -> int:
        """Return an account's native coin (wei)."""
        await self._seen()
        return self._ledger.gas_of(account)

    async def claimed(self, job_id: bytes, account: Address) -> int:
        """Return what an account has been paid of a job."""
        return (await self._state()).claimed.get((job_id, account), 0)

    async def send(self, key: str, call: Call) -> None:
        """Take *call* for the next block under its business *key*; the same key is a no-op.

        Raises ChainUnavailable in an outage, and then has taken nothing.
        """
        await self._seen()
        self._ledger.submit(self._address, key, call)

    async def wait(self, key: str) -> Outcome:
        """Return what became of the call under *key* once confirmed; an outage is waited out."""
        await self.wait_height(self._ledger.final_height(self._address, key))
        return self._ledger.outcome(self._address, key)
