"""One node on real sockets: puts the parts together, starts and stops them in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio
from libp2p.abc import IHost

from meshd.p2p.blobs import BlobStore
from meshd.p2p.capabilities import CapabilityBook
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import Address, Identity
from meshd.p2p.libp2p.blobstream import Blobs
from meshd.p2p.libp2p.connector import Connector
from meshd.p2p.libp2p.discovery import Discovery
from meshd.p2p.libp2p.gossip import Gossip
from meshd.p2p.libp2p.host import NetworkSettings, listen_at, make_host, stop_listening
from meshd.p2p.libp2p.links import Link, Links
from meshd.p2p.libp2p.requests import Requests
from meshd.p2p.libp2p.streams import StreamFailure
from meshd.p2p.limits import Endpoint
from meshd.p2p.messages import Capability, Message
from meshd.p2p.network import Departure, Handler, NetworkError, Peer
from meshd.p2p.services import Services, open_fresh
from meshd.p2p.subscriptions import Subscriptions

SHUTDOWN_S = 5.0
"""Seconds that saying goodbye to all peers may take."""


class Libp2pNetwork:
    """The Network port over a libp2p host; made by `open_network`."""

    def __init__(
        self,
        host: IHost,
        identity: Identity,
        domain: Domain,
        blobs: BlobStore,
        bootstrap: Sequence[Endpoint],
        settings: NetworkSettings,
        stats: Counter[str],
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._identity = identity
        self._domain = domain
        self._settings = settings
        self._stats = stats
        self._nursery = nursery
        self._topics = Subscriptions[Signed[Message]](stats)
        self._departures = Subscriptions[Departure](stats)
        self._services = Services(domain, settings.wall)
        self._book = CapabilityBook(settings.wall)
        self._gossip = Gossip(host, settings, stats, self._check, self._hear)
        self._discovery = Discovery(
            host, domain, self._book, self._gossip, stats, nursery, on_news=self._on_news
        )
        self._links = Links(
            host,
            domain.network,
            settings,
            stats,
            nursery,
            on_arrival=self._discovery.greet,
            on_departure=self._on_departure,
        )
        self._connector = Connector(
            host,
            identity.address,
            self._links,
            self._book,
            bootstrap,
            settings,
            stats,
            self._discovery.find,
        )
        self._requests = Requests(
            host, identity, domain, self._services, settings, stats, self._connector.reach
        )
        self._blobs = Blobs(host, domain.network, blobs, self._links, stats, self._connector.reach)

    # ---- life -----------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run gossip, discovery and the connector; at the end, part before they stop."""
        async with self._gossip.running(), self._discovery.running():
            scope, ended = trio.CancelScope(), trio.Event()
            self._nursery.start_soon(self._run, scope, ended)
            try:
                yield
            finally:
                # Peers first: pubsub that stops with peers connected raises in the library.
                with trio.move_on_after(SHUTDOWN_S):
                    await self._connector.save()
                    scope.cancel()
                    await ended.wait()
                    await stop_listening(self._host)
                    await self._links.drop_all()

    async def _run(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._connector.run)
                    nursery.start_soon(self._discovery.run, self._links)
        finally:
            ended.set()

    # ---- what the parts tell one another --------------------------------------------------

    def _check(self, topic: str, raw: bytes) -> Signed[Message]:
        signed = open_fresh(self._domain, raw, self._settings.wall())
        self._discovery.check(topic, signed)
        return signed

    def _hear(self, topic: str, signed: Signed[Message]) -> None:
        self._discovery.hear(topic, signed)
        self._topics.deliver(signed, topic)

    def _on_news(self) -> None:
        self._connector.wake()

    def _on_departure(self, link: Link) -> None:
        self._requests.forget(link.peer)
        self._blobs.forget(link.peer)
        self._connector.forget(link.peer)
        self._departures.deliver(Departure(link.address))

    # ---- the port -------------------------------------------------------------------------

    @property
    def domain(self) -> Domain:
        """The network whose messages are accepted."""
        return self._domain

    @property
    def address(self) -> Address:
        """This node."""
        return self._identity.address

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where this node listens, with its peer id: what others dial."""
        return tuple(str(address) for address in self._host.get_addrs())

    def stats(self) -> Mapping[str, int]:
        """Return what was counted: drops, refusals, bad frames, errors, bytes of blobs."""
        return dict(self._stats)

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        """Gossip on *topic*; own subscriptions hear it too. Raises ValueError if it is too big."""
        try:
            await self._gossip.publish(topic, signed.raw)
        except StreamFailure:
            self._stats["gossip failed"] += 1

    @asynccontextmanager
    async def subscribe(
        self, topic: str
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Signed[Message]]]:
        """Open a bounded subscription; the topic is left when its last one closes."""
        async with self._topics.open(topic) as receive, self._gossip.joined(topic):
            yield receive

    def departures(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Departure]]:
        """Open a bounded subscription of lost connections."""
        return self._departures.open()

    def serve(self, model: type[Message], handler: Handler) -> AbstractAsyncContextManager[None]:
        """While open, answer requests of *model*; one handler a model."""
        return self._services.open(model, handler)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        """Send *signed* to *to* (this node itself too) and return its answer."""
        return await self._requests.request(to, signed, deadline_s)

    async def fetch(
        self,
        digest: bytes,
        *,
        max_bytes: int,
        holders: Sequence[Address],
        deadline_s: float = 120.0,
    ) -> None:
        """Bring the blob *digest* into this node's blob store, from any of *holders*."""
        await self._blobs.fetch(digest, max_bytes, holders, deadline_s)

    async def advertise(self, capability: Signed[Capability]) -> None:
        """Put this node's capability where others find it; raises ValueError if unusable."""
        await self._discovery.advertise(capability)

    def capabilities(self) -> Sequence[Signed[Capability]]:
        """Return the unexpired capabilities known now, this node's included."""
        return self._book.known()

    def peers(self) -> Sequence[Peer]:
        """Return who is connected now."""
        return tuple(
            Peer(link.address, str(link.peer), self._links.multiaddrs(link), link.latency_s)
            for link in self._links.all()
        )


@asynccontextmanager
async def open_network(
    identity: Identity,
    domain: Domain,
    blobs: BlobStore,
    *,
    listen: Sequence[str],
    bootstrap: Sequence[str] = (),
    settings: NetworkSettings | None = None,
) -> AsyncIterator[Libp2pNetwork]:
    """Run a node that listens at the multiaddrs *listen* and joins by *bootstrap*.

    *bootstrap* are multiaddrs that end in ``/p2p/PEERID``. Raises ListenError for an address
    that cannot be listened at, NetworkError for a bootstrap address that is malformed. What
    the body raises comes out as it is, not in groups.
    """
    settings = settings or NetworkSettings()
    try:
        known = [Endpoint.parse(text) for text in bootstrap]
    except ValueError as error:
        raise NetworkError(f"bootstrap peer: {error}") from error
    stats: Counter[str] = Counter()
    host = make_host(identity, settings, stats)
    listening = listen_at(host, listen)
    stop = trio.Event()
    failure: Exception | None = None

    async def serve(task_status: Any) -> None:
        # Shielded: cancelled from outside, the library's tasks would end in disorder and leave
        # sockets open; they stop in order when the body has ended.
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                network = Libp2pNetwork(
                    host, identity, domain, blobs, known, settings, stats, nursery
                )
                async with listening, network.running():
                    task_status.started(network)
                    await stop.wait()
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as outer:
        try:
            network = await outer.start(serve)
            yield network
        except Exception as error:  # raised again below, outside of the nursery
            failure = error
        finally:
            stop.set()
    if failure is not None:
        raise failure
