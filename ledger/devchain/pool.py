"""The pool: transactions that wait for a block, and the rules by which one is taken in.

The rules and the error texts are those of geth, because clients tell errors apart by text. Pure:
the caller brings the account's nonce and balance, and keeps on disk what the pool took.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from eth.abc import SignedTransactionAPI
from eth.exceptions import PyEVMError
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from meshd.ledger.devchain.errors import TransactionRefused
from meshd.ledger.devchain.execution import MAX_INITCODE_SIZE, decode_transaction, least_gas
from meshd.ledger.devchain.store import GAS_LIMIT
from meshd.p2p.identity import Address

MAX_TRANSACTION_BYTES = 128 * 1024
"""Longest transaction."""
MAX_WAITING = 8_192
"""Most transactions in the pool."""
MAX_WAITING_BYTES = 64 * 1024 * 1024
"""Most bytes of transactions in the pool."""
MAX_NONCE_GAP = 1_024
"""A nonce must be less than this far above the account's."""
MIN_MAX_FEE = 7
"""Least maximum fee per gas in wei: the base fee never falls below it (EIP-1559's rounding)."""
REPLACEMENT_PERCENT = 10
"""A replacement must raise both fees by this much."""

_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0
_TYPES = (None, 1, 2)  # legacy, access list, dynamic fee


@dataclass(frozen=True)
class Waiting:
    """A transaction in the pool."""

    transaction: SignedTransactionAPI
    raw: bytes
    hash: bytes
    sender: Address
    nonce: int
    max_fee: int
    """Wei per gas, at most, tip included."""
    max_tip: int
    """Wei per gas for the block's author, at most."""

    @property
    def cost(self) -> int:
        """Wei that the sender must have: gas at the maximum fee, and the value."""
        return self.transaction.gas * self.max_fee + self.transaction.value

    @property
    def slot(self) -> tuple[Address, int]:
        """Sender and nonce: only one transaction can have them."""
        return self.sender, self.nonce

    def tip(self, base_fee: int) -> int:
        """Return what the author of a block with *base_fee* gets per gas; negative: not payable."""
        return min(self.max_tip, self.max_fee - base_fee)


def waiting_from_raw(raw: bytes, chain_id: int) -> Waiting:
    """Return the transaction in *raw* if it could ever be valid on chain *chain_id*.

    Raises TransactionRefused.
    """
    if len(raw) > MAX_TRANSACTION_BYTES:
        raise TransactionRefused(
            f"oversized data: transaction size {len(raw)}, limit {MAX_TRANSACTION_BYTES}"
        )
    if raw[:1] and raw[0] < 0x80 and raw[0] not in (1, 2):
        raise TransactionRefused("transaction type not supported")
    try:
        transaction = decode_transaction(raw)
    except (RLPException, ValidationError, PyEVMError, ValueError, TypeError) as error:
        raise TransactionRefused(f"rlp: not a transaction: {error}"[:200]) from error
    if transaction.chain_id is None:
        raise TransactionRefused("only replay-protected (EIP-155) transactions allowed over RPC")
    if transaction.chain_id != chain_id:
        raise TransactionRefused(
            f"invalid chain id for signer: have {transaction.chain_id} want {chain_id}"
        )
    _check_form(transaction)
    return Waiting(
        transaction=transaction,
        raw=raw,
        hash=transaction.hash,
        sender=_sender(transaction),
        nonce=transaction.nonce,
        max_fee=transaction.max_fee_per_gas,
        max_tip=transaction.max_priority_fee_per_gas,
    )


def _check_form(transaction: SignedTransactionAPI) -> None:
    max_fee, max_tip = transaction.max_fee_per_gas, transaction.max_priority_fee_per_gas
    if transaction.gas > GAS_LIMIT:
        raise TransactionRefused("exceeds block gas limit")
    if transaction.to == b"" and len(transaction.data) > MAX_INITCODE_SIZE:
        raise TransactionRefused(
            f"max initcode size exceeded: code size {len(transaction.data)},"
            f" limit {MAX_INITCODE_SIZE}"
        )
    if max_fee.bit_length() > 256 or transaction.value.bit_length() > 256:
        raise TransactionRefused("max fee per gas or value higher than 2^256-1")
    if max_tip > max_fee:
        raise TransactionRefused(
            "max priority fee per gas higher than max fee per gas:"
            f" maxPriorityFeePerGas: {max_tip}, maxFeePerGas: {max_fee}"
        )
    if max_fee < MIN_MAX_FEE:
        raise TransactionRefused(
            f"transaction underpriced: max fee per gas {max_fee}, minimum needed {MIN_MAX_FEE}"
        )
    if transaction.gas < least_gas(transaction):
        raise TransactionRefused(
            f"intrinsic gas too low: have {transaction.gas}, want {least_gas(transaction)}"
        )


def _sender(transaction: SignedTransactionAPI) -> Address:
    if transaction.s > _HALF_ORDER:  # EIP-2; py-evm checks it for legacy transactions only
        raise TransactionRefused("invalid transaction v, r, s values")
    try:
        transaction.validate()
        return Address(transaction.sender)
    except (ValidationError, BadSignature) as error:
        raise TransactionRefused(f"invalid sender: {error}") from error


class Pool:
    """Transactions that wait, by sender and nonce."""

    def __init__(self) -> None:
        self._by_sender: dict[Address, dict[int, Waiting]] = {}
        self._by_hash: dict[bytes, Waiting] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_hash)

    def get(self, transaction_hash: bytes) -> Waiting | None:
        """Return the waiting transaction with *transaction_hash*."""
        return self._by_hash.get(transaction_hash)

    def check(self, new: Waiting, *, nonce: int, balance: int) -> None:
        """Refuse *new* if its sender, with *nonce* and *balance* on chain, cannot send it.

        Raises TransactionRefused.
        """
        if new.hash in self._by_hash:
            raise TransactionRefused("already known")
        if new.nonce < nonce:
            raise TransactionRefused(f"nonce too low: next nonce {nonce}, tx nonce {new.nonce}")
        if new.nonce >= nonce + MAX_NONCE_GAP:
            raise TransactionRefused(
                f"nonce too high: next nonce {nonce}, tx nonce {new.nonce},"
                f" limit {nonce + MAX_NONCE_GAP - 1}"
            )
        queue = self._by_sender.get(new.sender, {})
        old = queue.get(new.nonce)
        if old is not None and not _outbids(new, old):
            raise TransactionRefused("replacement transaction underpriced")
        queued = sum(other.cost for other in queue.values() if other is not old)
        if new.cost + queued > balance:
            raise TransactionRefused(
                f"insufficient funds for gas * price + value: balance {balance},"
                f" queued cost {queued}, tx cost {new.cost},"
                f" overshot {new.cost + queued - balance}"
            )
        is_full = len(self) >= MAX_WAITING or self._bytes + len(new.raw) > MAX_WAITING_BYTES
        if old is None and is_full:
            raise TransactionRefused("txpool is full")

    def put(self, new: Waiting) -> None:
        """Take *new* in, in place of one with the same sender and nonce."""
        self.drop(new.slot)
        self._by_sender.setdefault(new.sender, {})[new.nonce] = new
        self._by_hash[new.hash] = new
        self._bytes += len(new.raw)

    def drop(self, slot: tuple[Address, int]) -> None:
        """Forget what waits with this sender and nonce."""
        sender, nonce = slot
        queue = self._by_sender.get(sender, {})
        old = queue.pop(nonce, None)
        if old is not None:
            del self._by_hash[old.hash]
            self._bytes -= len(old.raw)
            if not queue:
                del self._by_sender[sender]

    def next_nonce(self, sender: Address, nonce: int) -> int:
        """Return the nonce after those that wait without a gap from *nonce*, the chain's."""
        queue = self._by_sender.get(sender, {})
        while nonce in queue:
            nonce += 1
        return nonce

    def candidates(self, base_fee: int) -> Candidates:
        """Return the transactions that can pay *base_fee*, in the order in which to try them."""
        return Candidates({s: dict(q) for s, q in self._by_sender.items()}, base_fee)


class Candidates:
    """Waiting transactions, best tip first, but each sender's in the order of the nonces.

    After each one the caller says `advance` if it is done with, so that the sender's next one
    can come up; if it does not, nothing more comes from that sender.
    """

    def __init__(self, queues: dict[Address, dict[int, Waiting]], base_fee: int) -> None:
        self._queues = queues
        self._base_fee = base_fee
        self._heap: list[tuple[int, int, Waiting]] = []
        self._count = 0
        for queue in queues.values():
            self._push(queue[min(queue)])

    def __iter__(self) -> Iterator[Waiting]:
        while self._heap:
            yield heapq.heappop(self._heap)[2]

    def advance(self, done: Waiting) -> None:
        """Let the transaction come up that follows *done*."""
        following = self._queues[done.sender].get(done.nonce + 1)
        if following is not None:
            self._push(following)

    def _push(self, waiting: Waiting) -> None:
        tip = waiting.tip(self._base_fee)
        if tip >= 0:
            self._count += 1
            heapq.heappush(self._heap, (-tip, self._count, waiting))


def _outbids(new: Waiting, old: Waiting) -> bool:
    factor = 100 + REPLACEMENT_PERCENT
    return (
        new.max_fee * 100 >= old.max_fee * factor
        and new.max_tip * 100 >= old.max_tip * factor
        and new.max_fee > old.max_fee
        and new.max_tip > old.max_tip
    )
