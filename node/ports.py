"""What every role is given: the node's identity, its ports and its memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import structlog
import trio

from meshd.ledger.beacon import Beacon
from meshd.ledger.chain import Chain
from meshd.node.availability import Availability
from meshd.node.compute.executor import Executor
from meshd.node.store import Store
from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import Attestation, Commitment, Message, job_topic
from meshd.p2p.network import Handler, Network, NetworkError, RequestRefused

M = TypeVar("M", bound=Message)

log = structlog.get_logger()

GOSSIPED = (Commitment, Attestation)
"""Entries that their authors gossip as well as hand in: all that a payment rests on."""
ENVELOPE_LIFE_S = 120
"""How long a signed envelope is good: clocks may differ by as much."""


class Dispatch:
    """Routes requests to whoever on this node handles that kind of message for that job."""

    def __init__(self) -> None:
        self._handlers: dict[tuple[type[Message], bytes], list[Handler]] = {}

    @contextmanager
    def on(self, model: type[Message], job_id: bytes, handler: Handler) -> Iterator[None]:
        """While open, requests of *model* for *job_id* go to *handler*.

        Several roles may handle the same; the one that came last is asked.
        """
        handlers = self._handlers.setdefault((model, job_id), [])
        handlers.append(handler)
        try:
            yield
        finally:
            handlers.remove(handler)
            if not handlers and self._handlers.get((model, job_id)) is handlers:
                del self._handlers[model, job_id]

    async def handle(self, signed: Signed[Message]) -> Signed[Message] | None:
        """Answer a request; raises RequestRefused if nobody here handles it."""
        job_id = getattr(signed.message, "job_id", b"")
        handlers = self._handlers.get((type(signed.message), job_id))
        if not handlers:
            raise RequestRefused(f"{signed.message.kind} of this job is not handled here")
        return await handlers[-1](signed)

    @asynccontextmanager
    async def serving(
        self, network: Network, models: tuple[type[Message], ...]
    ) -> AsyncIterator[None]:
        """While open, answer requests of *models* from the network."""
        async with AsyncExitStack() as stack:
            for model in models:
                await stack.enter_async_context(network.serve(model, self.handle))
            yield


@dataclass(frozen=True)
class Ports:
    """A node as its roles see it."""

    identity: Identity
    network: Network
    chain: Chain
    beacon: Beacon
    store: Store
    blobs: BlobStore
    executor: Executor
    dispatch: Dispatch
    payee: Address
    """The account that is paid for what this node does."""
    wall: Callable[[], float]
    """Unix time in seconds."""
    availability: Availability = field(default_factory=Availability)
    """Whether new work is taken."""

    @property
    def address(self) -> Address:
        """This node."""
        return self.identity.address

    @property
    def domain(self) -> Domain:
        """The network whose messages are valid."""
        return self.network.domain

    def sign(self, message: M, attached: tuple[bytes, ...] = ()) -> Signed[M]:
        """Return *message* signed by this node; an envelope expires in two minutes."""
        expires = int(self.wall()) + ENVELOPE_LIFE_S
        return self.domain.sign(self.identity, message, expires=expires, attached=attached)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        """Send a request, to this very node too; raises NetworkError."""
        if to == self.address:
            return await self.dispatch.handle(signed)
        return await self.network.request(to, signed, deadline_s=deadline_s)

    async def publish(self, job_id: bytes, signed: Signed[Message]) -> None:
        """Gossip on the job's topic."""
        await self.network.publish(job_topic(self.domain.network, job_id), signed)

    async def deliver(
        self,
        to: Address,
        signed: Signed[Message],
        *,
        until: Callable[[], bool],
        retry_s: float = 2.0,
    ) -> str | None:
        """Send *signed* until it is acknowledged, refused or *until* holds.

        Returns the refusal, None otherwise. What is paid for, and everything that is not taken
        at once, is gossiped too, so that an orchestrator that drops it can be seen to.
        """
        job_id = cast(bytes, getattr(signed.message, "job_id", b""))
        gossiped = isinstance(signed.message, GOSSIPED)
        if gossiped:
            await self.publish(job_id, signed)
        while not until():
            try:
                await self.request(to, signed)
                return None
            except RequestRefused as refusal:
                return str(refusal)
            except NetworkError as error:
                log.debug("not delivered yet", kind=signed.message.kind, why=str(error))
            if job_id and not gossiped:
                gossiped = True
                await self.publish(job_id, signed)
            await trio.sleep(retry_s)
        return None
