"""One node of a swarm in memory: the Network port that the roles of that node see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import structlog
import trio

from meshd.p2p.blobs import BlobStore
from meshd.p2p.capabilities import CapabilityBook
from meshd.p2p.codec import CodecError, Domain, Signed, digest
from meshd.p2p.identity import Address, Identity, hex_address
from meshd.p2p.limits import check_gossip
from meshd.p2p.memory_links import BANDWIDTH, PING_LOSS_S
from meshd.p2p.messages import Capability, Message
from meshd.p2p.network import (
    BlobUnavailable,
    Departure,
    Handler,
    NetworkError,
    Peer,
    RequestRefused,
    RequestTimeout,
    Unreachable,
)
from meshd.p2p.services import Services, Turns, open_fresh
from meshd.p2p.subscriptions import Subscriptions

if TYPE_CHECKING:
    from meshd.p2p.memory import MemorySwarm

_log = structlog.get_logger()


class Reply:
    """What becomes of one request at the node that answers it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self._raw: bytes | None = None
        self._error: NetworkError | None = None

    def settle(self, raw: bytes | None = None, error: NetworkError | None = None) -> None:
        """Say how it went; only the first word counts."""
        if not self.done.is_set():
            self._raw, self._error = raw, error
            self.done.set()

    def result(self) -> bytes | None:
        """Return the answer's frame, or raise what the asker is to see."""
        if self._error is not None:
            raise self._error
        return self._raw


class MemoryNetwork:
    """One node of a MemorySwarm; made by `MemorySwarm.join`."""

    def __init__(self, swarm: MemorySwarm, identity: Identity, blobs: BlobStore) -> None:
        self._swarm = swarm
        self._identity = identity
        self._blobs = blobs
        self._stats: Counter[str] = Counter()
        self._alive = True
        self._topics = Subscriptions[Signed[Message]](self._stats)
        self._departures = Subscriptions[Departure](self._stats)
        self._services = Services(swarm.domain, swarm.wall)
        self._book = CapabilityBook(swarm.wall)
        self._replies: dict[Reply, None] = {}
        self._fetches = Turns()

    @property
    def domain(self) -> Domain:
        """The network whose messages are accepted."""
        return self._swarm.domain

    @property
    def address(self) -> Address:
        """This node."""
        return self._identity.address

    def stats(self) -> Mapping[str, int]:
        """Return the counters: dropped, bad frames, refused, handler errors, blob bytes."""
        return dict(self._stats)

    # ---- gossip -----------------------------------------------------------------------------

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        """Gossip on *topic*; own subscriptions hear it too. Raises ValueError if it is too big."""
        check_gossip(signed.raw)
        await trio.lowlevel.checkpoint()
        if self._alive:
            self.hear(topic, signed.raw)
            self._swarm.gossip(self.address, topic, signed.raw)

    def subscribe(
        self, topic: str
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Signed[Message]]]:
        """Open a bounded subscription."""
        return self._topics.open(topic)

    def departures(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Departure]]:
        """Open a bounded subscription of lost connections."""
        return self._departures.open()

    def hear(self, topic: str, raw: bytes) -> None:
        """Take gossip from the swarm."""
        if topic not in self._topics:
            return
        try:
            self._topics.deliver(open_fresh(self.domain, raw, self._swarm.wall()), topic)
        except CodecError:
            self._stats["bad frames"] += 1

    def tell_departure(self, address: Address) -> None:
        """Take word from the swarm that the connection to *address* is gone."""
        if self._alive:
            self._departures.deliver(Departure(address))

    def die(self) -> None:
        """Stop answering and hearing, as a killed process does."""
        self._alive = False
        for reply in list(self._replies):
            reply.settle(error=Unreachable(f"{hex_address(self.address)} closed the connection"))
            reply.scope.cancel()

    # ---- requests ---------------------------------------------------------------------------

    def serve(self, model: type[Message], handler: Handler) -> AbstractAsyncContextManager[None]:
        """While open, answer requests of *model*; one handler a model."""
        return self._services.open(model, handler)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        """Send *signed* to *to* (this node itself too) and return its answer."""
        with trio.move_on_after(deadline_s):
            raw = await self._ask(to, signed.raw)
            try:
                return None if raw is None else open_fresh(self.domain, raw, self._swarm.wall())
            except CodecError as error:
                raise Unreachable(f"{hex_address(to)} sent no valid answer: {error}") from error
        raise RequestTimeout(
            f"{hex_address(to)} did not answer {signed.message.kind!r} within {deadline_s} s"
        )

    async def _ask(self, to: Address, raw: bytes) -> bytes | None:
        if to == self.address:
            return (await self.take(raw)).result()
        there, back = (self.address, to), (to, self.address)
        node = await self._swarm.reach(there)
        if self._swarm.links.loses(there, "request"):
            await trio.sleep_forever()
        reply = await node.take(raw)
        if self._swarm.links.loses(back, "answer"):
            await trio.sleep_forever()
        await self._swarm.transfer(back)
        return reply.result()

    async def take(self, raw: bytes) -> Reply:
        """Answer a request that arrived, in a task of this node's: the asker may give up."""
        reply = Reply()
        if not self._alive:
            raise Unreachable(f"{hex_address(self.address)} closed the connection")
        self._replies[reply] = None
        self._swarm.nursery.start_soon(self._run_handler, raw, reply)
        await reply.done.wait()
        return reply

    async def _run_handler(self, raw: bytes, reply: Reply) -> None:
        broken = Unreachable(f"{hex_address(self.address)} closed the stream before answering")
        try:
            with reply.scope:
                answer = await self._services.answer(raw)
                reply.settle(None if answer is None else answer.raw)
        except RequestRefused as error:
            self._stats["refused"] += 1
            reply.settle(error=error)
        except CodecError:
            self._stats["bad frames"] += 1
            reply.settle(error=broken)
        except Exception as error:  # a peer's request must not take the node down
            _log.warning("handler failed", node=hex_address(self.address), error=repr(error))
            self._stats["handler errors"] += 1
            self._swarm.handler_errors.append(error)
            reply.settle(error=broken)
        finally:
            reply.settle(error=broken)
            del self._replies[reply]

    # ---- blobs ------------------------------------------------------------------------------

    async def fetch(
        self,
        digest: bytes,
        *,
        max_bytes: int,
        holders: Sequence[Address],
        deadline_s: float = 120.0,
    ) -> None:
        """Bring the blob *digest* into this node's blob store, from any of *holders*."""
        problems: list[str] = []
        with trio.move_on_after(deadline_s) as scope:
            async with self._fetches.of(digest):
                if digest in self._blobs:
                    return
                for holder in holders:
                    if holder == self.address:
                        continue
                    try:
                        with trio.fail_after(PING_LOSS_S + max_bytes / BANDWIDTH):
                            return await self._fetch_from(holder, digest, max_bytes)
                    except trio.TooSlowError:
                        problems.append(f"{hex_address(holder)} is silent")
                    except (BlobUnavailable, Unreachable) as error:
                        problems.append(str(error))
        if scope.cancelled_caught:
            problems.append(f"not within {deadline_s} s")
        raise BlobUnavailable(
            f"blob {digest.hex()}: {'; '.join(problems) or 'nobody is named as its holder'}"
        )

    async def _fetch_from(self, holder: Address, name: bytes, max_bytes: int) -> None:
        there, where = (self.address, holder), hex_address(holder)
        node = await self._swarm.reach(there)
        data = node.serve_blob(name, self.address)
        if data is None:
            raise BlobUnavailable(f"{where} does not serve it")
        if len(data) > max_bytes:
            raise BlobUnavailable(f"{where} has {len(data)} bytes, over the limit of {max_bytes}")
        await self._swarm.transfer((holder, self.address), len(data))
        if self._swarm.node(holder) is not node:
            raise BlobUnavailable(f"{where} closed the connection")
        if digest(data) != name:
            self._stats["corrupt blobs"] += 1
            raise BlobUnavailable(f"{where} sent bytes with another digest")
        self._blobs.put(data)
        self._stats["blob bytes received"] += len(data)

    def serve_blob(self, name: bytes, asker: Address) -> bytes | None:
        """Return the blob's bytes if it is here and *asker* may have it."""
        if name not in self._blobs or not self._blobs.may_read(name, asker):
            self._stats["refused"] += 1
            return None
        data = self._blobs.read(name)
        self._stats["blob bytes sent"] += len(data)
        return data

    # ---- who is there -----------------------------------------------------------------------

    async def advertise(self, capability: Signed[Capability]) -> None:
        """Put this node's capability where others find it, instead of the former one."""
        await trio.lowlevel.checkpoint()
        problem = self._book.problem(capability)
        if problem is not None:
            raise ValueError(problem)
        self._book.learn(capability)
        if self._alive:
            self._swarm.spread(self)

    def learn(self, records: Sequence[Signed[Capability]]) -> None:
        """Take capabilities from the swarm."""
        for record in records:
            self._book.learn(self.domain.open(record.raw))

    def capabilities(self) -> Sequence[Signed[Capability]]:
        """Return the unexpired capabilities known now, this node's included."""
        return self._book.known()

    def peers(self) -> Sequence[Peer]:
        """Return who is connected now."""
        return tuple(
            Peer(other.address, other.peer_id, (), None)
            for other in self._swarm.others(self.address)
            if self._alive and self._swarm.connected((self.address, other.address))
        )

    @property
    def peer_id(self) -> str:
        """This node's libp2p PeerId."""
        return self._identity.peer_id
