"""A Chain that waits out outages: what roles use, so that a dead RPC delays and kills nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import structlog
import trio

from meshd.ledger.chain import (
    Block,
    Call,
    Chain,
    ChainEvent,
    ChainUnavailable,
    JobOnChain,
    Outcome,
)
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address

T = TypeVar("T")

log = structlog.get_logger()

RETRY_S = 1.0
"""Seconds between two tries."""


class PatientChain:
    """Passes every call on and repeats it for as long as the chain cannot be reached."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    @property
    def domain(self) -> Domain:
        """Network name, chain id and escrow contract."""
        return self._chain.domain

    @property
    def address(self) -> Address:
        """The account that sends."""
        return self._chain.address

    async def _repeat(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except ChainUnavailable as error:
                log.warning("chain unavailable: trying again", why=str(error))
            await trio.sleep(RETRY_S)

    async def head(self) -> Block:
        """Return the newest block."""
        return await self._repeat(self._chain.head)

    async def block(self, height: int) -> Block | None:
        """Return the block at *height*; None if there is none yet."""
        return await self._repeat(lambda: self._chain.block(height))

    async def wait_height(self, height: int) -> Block:
        """Return the block at *height* as soon as it exists."""
        return await self._repeat(lambda: self._chain.wait_height(height))

    async def events(self, from_height: int, to_height: int) -> Sequence[ChainEvent]:
        """Return the escrow's events in that range of heights, in order."""
        return await self._repeat(lambda: self._chain.events(from_height, to_height))

    async def job(self, job_id: bytes) -> JobOnChain | None:
        """Return the job's escrow; None if there is none."""
        return await self._repeat(lambda: self._chain.job(job_id))

    def job_id(self, researcher: Address, spec_hash: bytes, salt: bytes) -> bytes:
        """Return the id that the contract gives a job."""
        return self._chain.job_id(researcher, spec_hash, salt)

    async def orchestrators(self) -> Sequence[Address]:
        """Return the nodes registered as orchestrators with active stake."""
        return await self._repeat(self._chain.orchestrators)

    async def stake_of(self, node: Address) -> int:
        """Return a node's stake, active or not yet."""
        return await self._repeat(lambda: self._chain.stake_of(node))

    async def balance(self, account: Address) -> int:
        """Return an account's MCC."""
        return await self._repeat(lambda: self._chain.balance(account))

    async def gas_balance(self, account: Address) -> int:
        """Return an account's native coin (wei)."""
        return await self._repeat(lambda: self._chain.gas_balance(account))

    async def claimed(self, job_id: bytes, account: Address) -> int:
        """Return what an account has been paid of a job."""
        return await self._repeat(lambda: self._chain.claimed(job_id, account))

    async def send(self, key: str, call: Call) -> None:
        """Put *call* into the outbox under its business *key*."""
        await self._repeat(lambda: self._chain.send(key, call))

    async def wait(self, key: str) -> Outcome:
        """Return what became of the call under *key* once its block is confirmed."""
        return await self._repeat(lambda: self._chain.wait(key))
