"""The outbox: a transaction is on disk before it is sent, and lands exactly once.

An *intent* is what the node wants to happen, under a business key; an *attempt* is one signed
transaction for it. An intent goes new > signed > sent > mined > final or failed. Its nonce and
the signed bytes are on disk before they go out, and after a restart the same bytes go out again.
If they are not mined, both fees are raised under the same nonce; whichever attempt is mined,
the intent is done. A receipt that is gone is a reorganisation: the intent is sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog
import trio
from eth_account import Account
from eth_utils.address import to_checksum_address

from meshd.ledger.chain import ChainUnavailable, Outcome
from meshd.ledger.intents import Attempt, Database, Intent, Intents, State, Transaction
from meshd.p2p.identity import Address, Identity

GWEI = 10**9
MAX_GAS = 2**24
"""Most gas that a transaction may have (EIP-7825)."""
MAX_IN_FLIGHT = 16
"""Most intents that have a nonce and are not yet done: nodes keep no more for one account."""
TAKEN_BLOCKS = 12
"""A nonce that somebody else used is given up after so many more blocks without a receipt."""

_RECHECK_S = 5.0
_HARMLESS = ("already known", "already imported", "nonce too low", "underpriced")
"""Refusals of a transaction that the chain has, or has something better or final in place of."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Fees:
    """What gas costs now, in wei per gas: the base fee of the next block, and a usual tip."""

    base: int
    tip: int


@dataclass(frozen=True)
class Mined:
    """A transaction in a block."""

    height: int
    succeeded: bool


class Wire(Protocol):
    """What the outbox asks of a chain. Everything raises ChainUnavailable."""

    async def height(self) -> int:
        """Return the newest block's height."""
        ...

    async def nonce(self, sender: Address, height: int | None = None) -> int:
        """Return the nonce of *sender*'s next transaction, now or after block *height*."""
        ...

    async def fees(self) -> Fees:
        """Return what gas costs now."""
        ...

    async def gas(self, sender: Address, transaction: Transaction) -> int | None:
        """Return the gas that *transaction* needs; None if it would fail now."""
        ...

    async def broadcast(self, raw: bytes) -> str | None:
        """Send a signed transaction; return the refusal if there is one."""
        ...

    async def mined(self, tx: bytes) -> Mined | None:
        """Return where a transaction is, None if it is in no block."""
        ...

    async def why_failed(self, sender: Address, transaction: Transaction, height: int) -> str:
        """Return the contract's error of a transaction that failed in block *height*."""
        ...


class Outbox:
    """One account's transactions on one chain."""

    def __init__(
        self,
        database: Database,
        wire: Wire,
        identity: Identity,
        *,
        chain_id: int,
        genesis: bytes,
        confirmations: int = 1,
        fee_cap: int = 500 * GWEI,
        bump_blocks: int = 3,
        poll_s: float = 0.25,
    ) -> None:
        """Make an outbox on *database*; what was put for another *genesis* or account is apart.

        An intent is done when *confirmations* blocks follow its own. *fee_cap* is the most wei
        per gas that is ever offered. Fees rise after *bump_blocks* blocks without success.
        """
        self._intents = Intents(database, genesis, identity.address)
        self._wire = wire
        self._identity = identity
        self._chain_id = chain_id
        self._confirmations = confirmations
        self._fee_cap = fee_cap
        self._bump_blocks = bump_blocks
        self._poll_s = poll_s
        self._sent: set[int] = set()
        """Intents that this process sent: what an earlier one sent goes out once more."""

    async def put(self, key: str, transactions: Sequence[Transaction]) -> None:
        """Take *transactions*, to be sent in this order, under *key*; on disk on return.

        The same key again is a no-op, whatever the transactions.
        """
        await self._intents.put(key, transactions)

    async def wait(self, key: str) -> Outcome:
        """Return what became of the last transaction under *key* once it is final.

        Raises ChainError if nothing was put under *key*.
        """
        while True:
            changed = self._intents.changed
            outcome = await self._intents.outcome(key)
            if outcome is not None:
                return outcome
            with trio.move_on_after(_RECHECK_S):  # another outbox may do the work
                await changed.wait()

    async def run(self) -> None:
        """Sign, send and follow what is put, until cancelled."""
        seen, is_down = -1, False
        while True:
            changed = self._intents.changed
            if not await self._intents.has_work():
                await changed.wait()
                continue
            try:
                height = await self._wire.height()
                if height != seen or await self._intents.new():
                    await self.step(height)
                    seen = height
                is_down = False
            except ChainUnavailable as error:
                if not is_down:
                    _log.warning("outbox.chain_unavailable", reason=str(error))
                is_down = True
            await trio.sleep(self._poll_s)

    async def step(self, height: int) -> None:
        """Sign what is new, look for receipts, send and raise what needs it: one pass at *height*.

        Raises ChainUnavailable; what was done by then stays done.
        """
        await self._sign_new()
        await self._follow(height)

    # ---- new > signed -------------------------------------------------------------------

    async def _sign_new(self) -> None:
        new = await self._intents.new()
        free = MAX_IN_FLIGHT - len(await self._intents.in_flight())
        if not new or free <= 0:
            return
        fees = await self._wire.fees()
        if fees.base >= self._fee_cap:
            _log.warning("outbox.fees_above_cap", base_fee=fees.base, cap=self._fee_cap)
            return
        max_fee, tip = self._offer(fees)
        sender = self._identity.address
        for intent in new[:free]:
            estimate = await self._wire.gas(sender, intent.transaction)
            gas = intent.transaction.gas if estimate is None else estimate * 5 // 4 + 20_000
            attempt = partial(self._attempt, intent.transaction, min(gas, MAX_GAS), max_fee, tip)
            await self._intents.sign(intent, await self._wire.nonce(sender), attempt)

    def _offer(self, fees: Fees) -> tuple[int, int]:
        """Return the fees to offer, maximum and tip: good for a while if the base fee rises."""
        max_fee = min(2 * fees.base + fees.tip, self._fee_cap)
        return max_fee, min(fees.tip, max_fee)

    def _attempt(
        self, wanted: Transaction, gas: int, max_fee: int, tip: int, nonce: int
    ) -> Attempt:
        """Return *wanted*, signed."""
        fields: dict[str, Any] = {
            "type": 2,
            "chainId": self._chain_id,
            "nonce": nonce,
            "value": wanted.value,
            "data": wanted.data,
            "gas": gas,
            "maxFeePerGas": max_fee,
            "maxPriorityFeePerGas": tip,
        }
        if wanted.to is not None:
            fields["to"] = to_checksum_address(wanted.to)
        signed = Account.from_key(self._identity.secret).sign_transaction(fields)
        return Attempt(bytes(signed.hash), bytes(signed.raw_transaction), nonce, gas, max_fee, tip)

    # ---- signed > sent > mined > final or failed ----------------------------------------

    async def _follow(self, height: int) -> None:
        intents = await self._intents.in_flight()
        if not intents:
            return
        used = await self._wire.nonce(self._identity.address)
        for intent in intents:
            if intent.nonce is None:
                continue
            if intent.nonce >= used:
                await self._send(intent, height, is_next=intent.nonce == used)
            elif not await self._record_mined(intent, height):
                await self._record_taken(intent, height)

    async def _record_mined(self, intent: Intent, height: int) -> bool:
        for attempt in await self._intents.attempts(intent):
            mined = await self._wire.mined(attempt.hash)
            if mined is None:
                continue
            state, error = State.MINED, None
            if height >= mined.height + self._confirmations:
                state = State.FINAL if mined.succeeded else State.FAILED
            if state is State.FAILED:
                error = await self._wire.why_failed(
                    self._identity.address, intent.transaction, mined.height
                )
            await self._intents.record_mined(intent, state, attempt, mined.height, error)
            return True
        return False

    async def _record_taken(self, intent: Intent, height: int) -> None:
        """The nonce is used but no attempt has a receipt: it was somebody else, or the RPC lags.

        Only a long time without a receipt makes it safe to sign the intent for another nonce.
        """
        confirmed = max(height - self._confirmations, 0)
        settled = await self._wire.nonce(self._identity.address, confirmed)
        if intent.nonce is None or intent.nonce >= settled:
            return
        if intent.taken_at is None:
            _log.warning("outbox.nonce_taken", key=intent.key, nonce=intent.nonce)
            await self._intents.record_taken(intent, height)
        elif height >= intent.taken_at + max(TAKEN_BLOCKS, self._confirmations):
            await self._intents.give_up_nonce(intent)

    async def _send(self, intent: Intent, height: int, *, is_next: bool) -> None:
        attempt = (await self._intents.attempts(intent))[0]
        waited = 0 if attempt.sent_at is None else height - attempt.sent_at
        is_overdue = intent.state is State.SENT and waited >= self._bump_blocks
        if intent.state is State.SENT and intent.id in self._sent and not is_overdue:
            return
        if is_overdue:
            attempt = await self._raised(intent, attempt, is_next=is_next)
        refusal = await self._wire.broadcast(attempt.raw)
        if refusal is None or any(text in refusal.lower() for text in _HARMLESS):
            await self._intents.record_sent(intent, attempt, height)
            self._sent.add(intent.id)
            return
        reason = refusal[:300]
        if reason != intent.error:
            _log.warning("outbox.refused", key=intent.key, nonce=intent.nonce, reason=reason)
            await self._intents.record_refused(intent, reason)

    async def _raised(self, intent: Intent, old: Attempt, *, is_next: bool) -> Attempt:
        """Return an attempt with both fees raised, on disk; *old* if that is of no use."""
        fees = await self._wire.fees()
        if not is_next and old.max_fee >= fees.base:
            return old  # it only waits for those before it
        max_fee, tip = self._offer(fees)
        max_fee, tip = max(max_fee, _raise(old.max_fee)), max(tip, _raise(old.tip))
        if not tip <= max_fee <= self._fee_cap:
            _log.warning("outbox.fees_above_cap", key=intent.key, cap=self._fee_cap)
            return old
        attempt = self._attempt(intent.transaction, old.gas, max_fee, tip, old.nonce)
        await self._intents.add_attempt(intent, attempt)
        return attempt


def _raise(fee: int) -> int:
    """Return *fee* raised by an eighth; nodes ask for at least a tenth more."""
    return max(-(-fee * 9 // 8), 1)
