"""Who is connected: pings every few seconds, and word of those who have gone.

TCP does not tell that a peer was frozen or its network cut, and py-libp2p keeps such a peer
"connected" while reads from it block: a peer that leaves two pings unanswered is dropped.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import trio
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction

from meshd.p2p.identity import Address, IdentityError, address_from_peer_id
from meshd.p2p.libp2p.host import NetworkSettings
from meshd.p2p.libp2p.protocols import ping_protocol
from meshd.p2p.libp2p.streams import (
    StreamFailure,
    finish,
    library_errors,
    open_stream,
    read_exactly,
    write,
)

DROP_DEADLINE_S = 2.0
"""Seconds that saying goodbye may take before the socket is closed."""
IDLE_PING_S = 60.0
"""Seconds after which an idle ping stream is ended."""
MISSED_PINGS = 2


@dataclass
class Link:
    """A connected peer."""

    peer: ID
    address: Address
    since: float
    """When it connected, on trio's clock."""
    latency_s: float | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Links(INotifee):
    """The connected peers of one host.

    *on_arrival* gets each new link and whether this node dialled; *on_departure* the link
    of each peer whose last connection is gone. Both are called from the event loop and must
    not wait.
    """

    def __init__(
        self,
        host: IHost,
        network_name: str,
        settings: NetworkSettings,
        stats: Counter[str],
        nursery: trio.Nursery,
        *,
        on_arrival: Callable[[Link, bool], None],
        on_departure: Callable[[Link], None],
    ) -> None:
        self._host = host
        self._network = cast(Swarm, host.get_network())
        self._protocol = ping_protocol(network_name)
        self._interval_s = settings.ping_interval_s
        self._stats = stats
        self._nursery = nursery
        self._on_arrival = on_arrival
        self._on_departure = on_departure
        self._links: dict[ID, Link] = {}
        self._peers: dict[Address, ID] = {}
        host.set_stream_handler(self._protocol, self._echo)
        self._network.register_notifee(self)

    def __len__(self) -> int:
        return len(self._links)

    def all(self) -> tuple[Link, ...]:
        """Return the links, oldest first."""
        return tuple(self._links.values())

    def peer_of(self, address: Address) -> ID | None:
        """Return the PeerId of *address* if it is connected."""
        return self._peers.get(address)

    def multiaddrs(self, link: Link) -> tuple[str, ...]:
        """Return the remote ends of the peer's connections."""
        found = []
        for connection in self._network.get_connections(link.peer):
            for remote in connection.get_transport_addresses():
                found.append(f"{remote}/p2p/{link.peer}")
        return tuple(dict.fromkeys(found))

    # ---- the library's notifications ------------------------------------------------------

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """Take note of a new connection; drop a peer that is not of meshd's kind."""
        peer = conn.muxed_conn.peer_id
        if peer in self._links:
            return
        try:
            address = address_from_peer_id(str(peer))
        except IdentityError:
            self._stats["foreign peers"] += 1
            self._nursery.start_soon(self.drop, peer)
            return
        link = Link(peer, address, trio.current_time())
        self._links[peer] = link
        self._peers[address] = peer
        dialled = cast(SwarmConn, conn).direction is Direction.OUTBOUND
        self._nursery.start_soon(self._watch, link)
        self._on_arrival(link, dialled)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """Take note of a lost connection; the peer has departed with its last."""
        peer = conn.muxed_conn.peer_id
        if peer in self._links and not self._network.get_connections(peer):
            link = self._links.pop(peer)
            self._peers.pop(link.address, None)
            link.scope.cancel()
            self._on_departure(link)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not of interest."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not of interest."""

    async def listen(self, network: INetwork, multiaddr: Any) -> None:
        """Not of interest."""

    async def listen_close(self, network: INetwork, multiaddr: Any) -> None:
        """Not of interest."""

    # ---- pings ----------------------------------------------------------------------------

    async def _watch(self, link: Link) -> None:
        """Ping the peer until it is gone; drop it when it misses two."""
        missed = 0
        with link.scope:
            while missed < MISSED_PINGS:
                try:
                    async with open_stream(self._host, link.peer, self._protocol) as stream:
                        for number in itertools.count():
                            missed = 0 if await self._ping(stream, link, number) else missed + 1
                            if missed >= MISSED_PINGS:
                                break
                            if not missed:
                                await trio.sleep(self._interval_s)
                except StreamFailure:
                    missed += 1
                    await trio.sleep(self._interval_s)
            self._stats["pings missed"] += missed
        if missed >= MISSED_PINGS:
            await self.drop(link.peer)

    async def _ping(self, stream: INetStream, link: Link, number: int) -> bool:
        nonce = number.to_bytes(8, "big")
        start = trio.current_time()
        with trio.move_on_after(self._interval_s):
            await write(stream, nonce)
            while await read_exactly(stream, 8) != nonce:
                pass  # the late answer to a ping that was given up
            link.latency_s = trio.current_time() - start
            return True
        return False

    async def _echo(self, stream: INetStream) -> None:
        """Answer pings until the peer ends the stream or stays silent."""
        with trio.move_on_after(IDLE_PING_S) as scope:
            while True:
                try:
                    nonce = await read_exactly(stream, 8)
                except StreamFailure:
                    break
                await write(stream, nonce)
                scope.deadline = trio.current_time() + IDLE_PING_S
        await finish(stream)

    # ---- goodbye --------------------------------------------------------------------------

    async def drop(self, peer: ID) -> None:
        """Close every connection to *peer*, by force if it does not take part."""
        with trio.CancelScope(deadline=trio.current_time() + DROP_DEADLINE_S, shield=True):
            try:
                with library_errors("disconnect"):
                    await self._host.disconnect(peer)
            except StreamFailure:
                self._stats["goodbyes failed"] += 1
        with trio.CancelScope(deadline=trio.current_time() + DROP_DEADLINE_S, shield=True):
            for connection in self._network.get_connections(peer):
                try:
                    with library_errors("close socket"):
                        await cast(Any, connection.muxed_conn).secured_conn.close()
                except StreamFailure:
                    self._stats["goodbyes failed"] += 1

    async def drop_all(self) -> None:
        """Close every connection, all at once."""
        async with trio.open_nursery() as nursery:
            for peer in list(self._network.connections):
                nursery.start_soon(self.drop, peer)
