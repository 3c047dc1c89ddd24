"""The Chain port on any EVM network with meshd's contracts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import httpx
import structlog
import trio

from meshd.config.deployment import Deployment
from meshd.ledger.chain import (
    Block,
    Call,
    ChainEvent,
    ChainUnavailable,
    JobOnChain,
    Outcome,
    WrongChain,
)
from meshd.ledger.chain_calls import (
    ESCROW,
    EVENT_NAMES,
    MCC,
    REGISTRY,
    address,
    chain_event,
    job_on_chain,
    transactions,
)
from meshd.ledger.evm import EvmRpc
from meshd.ledger.intents import Database
from meshd.ledger.memory_escrow import job_id
from meshd.ledger.outbox import GWEI, Outbox
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address, Identity, hex_address

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

_log = structlog.get_logger(__name__)


class EvmChain:
    """One node's account on an EVM network: the Chain port. `run` has to run for what it sends."""

    def __init__(
        self,
        rpc_url: str,
        deployment: Deployment,
        identity: Identity,
        database: Database,
        *,
        network: str,
        confirmations: int = 1,
        fee_cap: int = 500 * GWEI,
        poll_s: float = 0.25,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Make the adapter of *identity*'s account; what it sends is kept in *database*.

        A call is done when *confirmations* blocks follow its own. *fee_cap* is the most wei per
        gas that is ever offered. The chain is asked for its head every *poll_s* seconds while
        somebody waits.
        """
        self._rpc = EvmRpc(rpc_url, transport)
        self._deployment = deployment
        self._identity = identity
        self._database = database
        self._domain = Domain(network, deployment.chain_id, Address(deployment.escrow))
        self._confirmations = confirmations
        self._fee_cap = fee_cap
        self._poll_s = poll_s
        self._outbox: Outbox | None = None
        self._connecting = trio.Lock()
        self._head: Block | None = None
        self._asked_at = -math.inf
        self._asking = trio.Lock()
        self._spec_hashes: dict[bytes, bytes] = {}

    @property
    def domain(self) -> Domain:
        """Network name, chain id and escrow contract."""
        return self._domain

    @property
    def address(self) -> Address:
        """The account that sends."""
        return self._identity.address

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check that this is the right chain, then send what is to be sent, until cancelled.

        Raises ChainUnavailable if the chain cannot be reached at the start, WrongChain if it is
        another one.
        """
        try:
            outbox = await self._connected()
            task_status.started()
            await outbox.run()
        finally:
            with trio.move_on_after(1) as closing:
                closing.shield = True
                await self._rpc.aclose()

    async def aclose(self) -> None:
        """Close the connection to the chain, where `run` was never started."""
        await self._rpc.aclose()

    async def _connected(self) -> Outbox:
        async with self._connecting:
            if self._outbox is None:
                await self._check()
                self._outbox = Outbox(
                    self._database,
                    self._rpc,
                    self._identity,
                    chain_id=self._deployment.chain_id,
                    genesis=await self._rpc.genesis(),
                    confirmations=self._confirmations,
                    fee_cap=self._fee_cap,
                    poll_s=self._poll_s,
                )
            return self._outbox

    async def _check(self) -> None:
        url, wanted = self._rpc.url, self._deployment.chain_id
        found = await self._rpc.chain_id()
        if found != wanted:
            raise WrongChain(
                f"the chain at {url} has the id {found}, not {wanted}: correct chain.rpc"
            )
        for contract in (self._deployment.escrow, self._deployment.registry, self._deployment.mcc):
            if not await self._rpc.has_code(Address(contract)):
                raise WrongChain(
                    f"the chain at {url} has no contract at {hex_address(contract)}: "
                    "correct chain.deployment, or deploy first"
                )

    # ---- blocks -------------------------------------------------------------------------

    async def head(self) -> Block:
        """Return the newest block, at most one poll old. Raises ChainUnavailable."""
        async with self._asking:
            is_old = trio.current_time() - self._asked_at >= self._poll_s
            if self._head is None or is_old:
                self._head = None
                try:
                    self._head = await self._rpc.block()
                finally:
                    self._asked_at = trio.current_time()
            if self._head is None:
                raise ChainUnavailable(
                    f"the chain at {self._rpc.url} has no block: check chain.rpc"
                )
            return self._head

    async def block(self, height: int) -> Block | None:
        """Return the block at *height*; None if there is none yet. Raises ChainUnavailable."""
        return await self._rpc.block(height) if height >= 0 else None

    async def wait_height(self, height: int) -> Block:
        """Return the block at *height* as soon as it exists; an outage is waited out."""
        is_down = False
        while True:
            try:
                head = await self.head()
                if head.height >= height:
                    block = head if head.height == height else await self.block(height)
                    if block is not None:
                        return block
                is_down = False
            except ChainUnavailable as error:
                if not is_down:
                    _log.warning("chain.unavailable", reason=str(error))
                is_down = True
            # All who wait wake together, and one question answers them all.
            await trio.sleep_until(self._asked_at + self._poll_s)

    async def events(self, from_height: int, to_height: int) -> Sequence[ChainEvent]:
        """Return the escrow's events in that range of heights, in order."""
        last = min(to_height, (await self.head()).height)
        topics = [[ESCROW.topic(name) for name in EVENT_NAMES]]
        logs = await self._rpc.logs(self.domain.escrow, topics, max(from_height, 0), last)
        found = []
        for log in logs:
            event = ESCROW.event([bytes(topic) for topic in log["topics"]], bytes(log["data"]))
            if event is not None:
                told = chain_event(event, int(log["blockNumber"]), bytes(log["transactionHash"]))
                if told is not None:
                    found.append(told)
        return found

    # ---- views --------------------------------------------------------------------------

    async def job(self, job_id: bytes) -> JobOnChain | None:
        """Return the job's escrow; None if there is none."""
        at = await self._rpc.height()
        view = await self._rpc.read(ESCROW, self.domain.escrow, "job", job_id, at=at)
        if view["status"] == 0:
            return None
        epoch = view["lastEpoch"]
        root = await self._rpc.read(ESCROW, self.domain.escrow, "roots", job_id, epoch, at=at)
        return job_on_chain(job_id, view, await self._spec_hash(job_id, view["openBlock"]), root)

    async def _spec_hash(self, job_id: bytes, opened: int) -> bytes:
        """Return the hash of a job's terms, which only the event of its opening tells."""
        if job_id not in self._spec_hashes:
            topics = [ESCROW.topic("JobOpened"), job_id]
            logs = await self._rpc.logs(self.domain.escrow, topics, opened, opened)
            if not logs:
                raise ChainUnavailable(
                    f"the chain does not tell of the opening of job {job_id.hex()} "
                    f"in block {opened}: use an RPC that keeps logs"
                )
            self._spec_hashes[job_id] = bytes(logs[0]["topics"][3])
        return self._spec_hashes[job_id]

    def job_id(self, researcher: Address, spec_hash: bytes, salt: bytes) -> bytes:
        """Return the id that the contract gives a job."""
        return job_id(self.domain, researcher, spec_hash, salt)

    async def orchestrators(self) -> Sequence[Address]:
        """Return the nodes registered as orchestrators with active stake, by seat."""
        registry = Address(self._deployment.registry)
        return [address(one) for one in await self._rpc.read(REGISTRY, registry, "orchestrators")]

    async def stake_of(self, node: Address) -> int:
        """Return a node's stake, active or not yet."""
        registry = Address(self._deployment.registry)
        return int((await self._rpc.read(REGISTRY, registry, "nodeOf", node))["bonded"])

    async def balance(self, account: Address) -> int:
        """Return an account's MCC."""
        token = Address(self._deployment.mcc)
        return int(await self._rpc.read(MCC, token, "balanceOf", account))

    async def gas_balance(self, account: Address) -> int:
        """Return an account's native coin (wei)."""
        return await self._rpc.balance(account)

    async def claimed(self, job_id: bytes, account: Address) -> int:
        """Return what an account has been paid of a job."""
        return int(await self._rpc.read(ESCROW, self.domain.escrow, "claimed", job_id, account))

    # ---- calls --------------------------------------------------------------------------

    async def send(self, key: str, call: Call) -> None:
        """Put *call* into the outbox under its business *key* and return when it is on disk.

        The same key again is a no-op. Raises CallFailed if the call does not fit the contract,
        and ChainUnavailable if this process has not reached the chain yet.
        """
        outbox = await self._connected()
        await outbox.put(key, transactions(call, self._deployment, self.address))

    async def wait(self, key: str) -> Outcome:
        """Return what became of the call under *key* once its block is confirmed.

        A call that the chain does not take, for want of coin for gas, is tried again and again.
        Raises ChainError if nothing was sent under *key*.
        """
        return await (await self._connected()).wait(key)
