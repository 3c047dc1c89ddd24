"""The embedded chain itself: head, pool, and a block whenever its service asks for one."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio
from eth.vm.forks.prague.blocks import PragueBlockHeader
from eth_hash.auto import keccak
from eth_utils.exceptions import ValidationError

from meshd.ledger.devchain.errors import ChainFileError, TransactionRefused
from meshd.ledger.devchain.execution import Accounts, BlockBuilder, Execution, next_header
from meshd.ledger.devchain.pool import Pool, Waiting, waiting_from_raw
from meshd.ledger.devchain.store import Store
from meshd.p2p.identity import Address, hex_address

CHAIN_ID = 31_373
"""Chain id unless another is asked for."""

INITIAL_BASE_FEE = 1_000_000_000
"""Base fee of the first block in wei per gas."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Genesis:
    """What a chain begins with; balances in wei."""

    chain_id: int
    balances: Mapping[Address, int]

    def settings(self) -> dict[str, str]:
        """Return what identifies it, as the store keeps it."""
        listed = sorted((address.hex(), str(wei)) for address, wei in self.balances.items())
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()
        return {"chain_id": str(self.chain_id), "balances": digest}


class Devchain:
    """A chain with one authority: whoever runs it."""

    def __init__(
        self, path: Path, genesis: Genesis, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the chain at *path*, or begin one with *genesis*; *clock* tells Unix time.

        Raises ChainFileError if the file cannot be used or began with another genesis.
        """
        self.chain_id = genesis.chain_id
        self.store = Store(path)
        self.execution = Execution(self.store, self.chain_id)
        self._clock = clock
        try:
            self._begin(genesis)
            self.head = self._stored_head()
            self.pool = self._stored_pool()
        except BaseException:
            self.store.close()
            raise

    def close(self) -> None:
        """Let go of the database."""
        self.store.close()

    # -- reading --

    def header(self, number: int) -> PragueBlockHeader | None:
        """Return the header of block *number*, None if there is none (yet, or any more)."""
        if number == self.head.block_number:
            return self.head
        return self.store.header(number) if 0 <= number < self.head.block_number else None

    def accounts(self, header: PragueBlockHeader) -> Accounts:
        """Return the accounts after the block of *header*."""
        return self.execution.accounts(header)

    def pending_header(self) -> PragueBlockHeader:
        """Return the surroundings in which a transaction sent now would be executed."""
        return next_header(self.head, timestamp=self._next_timestamp(), mix_hash=self.head.mix_hash)

    def pending_nonce(self, sender: Address) -> int:
        """Return the nonce that *sender*'s next transaction should have."""
        return self.pool.next_nonce(sender, self.accounts(self.head).nonce(sender))

    # -- writing --

    def submit(self, raw: bytes) -> bytes:
        """Take a signed transaction in and return its hash, once it is on disk.

        Raises TransactionRefused.
        """
        waiting = waiting_from_raw(raw, self.chain_id)
        accounts = self.accounts(self.head)
        self.pool.check(
            waiting,
            nonce=accounts.nonce(waiting.sender),
            balance=accounts.balance(waiting.sender),
        )
        with self.store.transaction():
            self.store.put_pending(waiting.hash, waiting.sender, waiting.nonce, raw)
        self.pool.put(waiting)
        return waiting.hash

    def seconds_too_early(self) -> float:
        """Return how long to wait until the next block is at most 1 s ahead of the clock."""
        return max(0.0, self.head.timestamp - self._clock())

    async def produce_block(self, *, budget: float = math.inf) -> PragueBlockHeader:
        """Make a block of what waits, in about *budget* seconds of execution; return its header.

        What is left waits for the next block. A transaction that cannot be applied is dropped
        and the reason logged. Other tasks run between two transactions.
        """
        header = next_header(self.head, timestamp=self._next_timestamp(), mix_hash=os.urandom(32))
        builder = await self._filled(header, time.perf_counter() + budget)
        with self.store.transaction():
            block = builder.seal()
            self.store.put_block(block)
            self.store.drop_pending(builder.slots)
        for slot in builder.slots:
            self.pool.drop(slot)
        self.head = block.header
        return block.header

    async def _filled(self, header: PragueBlockHeader, deadline: float) -> BlockBuilder:
        while True:
            builder = self.execution.build(header)
            try:
                await self._fill(builder, deadline)
            except _CannotExecute as error:
                # The machine's state is not to be trusted after this: build the block anew.
                self._drop(error.waiting, repr(error.__cause__))
            else:
                return builder

    async def _fill(self, builder: BlockBuilder, deadline: float) -> None:
        candidates = self.pool.candidates(builder.base_fee)
        for waiting in candidates:
            if not builder.is_empty and time.perf_counter() > deadline:
                return
            has_gap = waiting.nonce > builder.nonce(waiting.sender)
            if has_gap or waiting.transaction.gas > builder.gas_left:
                continue
            try:
                builder.apply(waiting.transaction)
            except ValidationError as error:
                self._drop(waiting, str(error))
            except Exception as error:  # strangers' code in an interpreter that may have faults
                raise _CannotExecute(waiting) from error
            else:
                candidates.advance(waiting)
            await trio.lowlevel.checkpoint()

    def _drop(self, waiting: Waiting, reason: str) -> None:
        with self.store.transaction():
            self.store.drop_pending_hash(waiting.hash)
        if self.pool.get(waiting.hash) is not None:
            self.pool.drop(waiting.slot)
        _log_dropped(waiting.hash, reason, sender=hex_address(waiting.sender), nonce=waiting.nonce)

    def _next_timestamp(self) -> int:
        return max(self.head.timestamp + 1, int(self._clock()))

    # -- opening --

    def _begin(self, genesis: Genesis) -> None:
        settings = self.store.settings()
        if not settings:
            with self.store.transaction():
                self.store.put_settings(genesis.settings())
                self.store.put_block(
                    self.execution.genesis(int(self._clock()), INITIAL_BASE_FEE, genesis.balances)
                )
        elif settings["chain_id"] != str(genesis.chain_id):
            raise ChainFileError(
                f"{self.store.path} is chain {settings['chain_id']}, not {genesis.chain_id};"
                " start it with its own id, or name another path"
            )
        elif settings != genesis.settings():
            raise ChainFileError(
                f"{self.store.path} began with other balances than those given;"
                " start it with the same, or name another path"
            )

    def _stored_head(self) -> PragueBlockHeader:
        height = self.store.height()
        header = None if height is None else self.store.header(height)
        if header is None:
            raise ChainFileError(f"{self.store.path} holds no block; name another path")
        return header

    def _stored_pool(self) -> Pool:
        pool = Pool()
        for raw in self.store.pending():
            try:
                pool.put(waiting_from_raw(raw, self.chain_id))
            except TransactionRefused as error:  # under the rules of an earlier version it was fine
                transaction = keccak(raw)
                with self.store.transaction():
                    self.store.drop_pending_hash(transaction)
                _log_dropped(transaction, str(error))
        return pool


class _CannotExecute(Exception):
    """Executing a transaction broke the machine; the cause says how."""

    def __init__(self, waiting: Waiting) -> None:
        super().__init__(waiting.hash.hex())
        self.waiting = waiting


def _log_dropped(transaction: bytes, reason: str, **details: str | int) -> None:
    _log.warning(
        "devchain.transaction_dropped",
        transaction="0x" + transaction.hex(),
        reason=reason[:300],
        **details,
    )
