"""How nodes find one another: capability records by exchange, by gossip and in the DHT.

Records are signed by the peer they describe and expire, so it does not matter who passes them
on. Two nodes that connect exchange what they know; fresh records are gossiped; and each node
puts its own in the DHT under its address, where a node that heard of an address only finds it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from libp2p.abc import IHost, INetStream
from libp2p.peer.id import ID

from meshd.p2p.capabilities import CapabilityBook
from meshd.p2p.codec import CodecError, Domain, Signed
from meshd.p2p.identity import Address
from meshd.p2p.libp2p.directory import Directory
from meshd.p2p.libp2p.gossip import Gossip
from meshd.p2p.libp2p.links import Link, Links
from meshd.p2p.libp2p.protocols import capabilities_topic, exchange_protocol
from meshd.p2p.libp2p.streams import (
    OversizedFrame,
    StreamFailure,
    finish,
    open_stream,
    read_frame,
    reset,
    write_frame,
)
from meshd.p2p.limits import MAX_RECORD
from meshd.p2p.messages import Capability, Message

EXCHANGE_RECORDS = 256
"""Records that one exchange carries each way."""
EXCHANGE_DEADLINE_S = 20.0
EXCHANGE_S = 30.0
"""Seconds between exchanges with a random peer, which repair what gossip lost."""


class Discovery:
    """Spreads this node's capability record and collects the others'."""

    def __init__(
        self,
        host: IHost,
        domain: Domain,
        book: CapabilityBook,
        gossip: Gossip,
        stats: Counter[str],
        nursery: trio.Nursery,
        *,
        on_news: Callable[[], None],
    ) -> None:
        self._host = host
        self._domain = domain
        self._book = book
        self._gossip = gossip
        self._stats = stats
        self._nursery = nursery
        self._on_news = on_news
        self._topic = capabilities_topic(domain.network)
        self._protocol = exchange_protocol(domain.network)
        self._own: Signed[Capability] | None = None
        self._own_changed = trio.Event()
        self._directory = Directory(host, domain, self._open_and_learn, stats)
        host.set_stream_handler(self._protocol, self._serve_exchange)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the DHT until the context ends."""
        async with self._directory.running():
            yield

    async def run(self, links: Links) -> None:
        """Listen to fresh records, look up, exchange and store this node's own, forever."""
        async with self._gossip.joined(self._topic), trio.open_nursery() as nursery:
            nursery.start_soon(self._exchange_often, links)
            nursery.start_soon(self._directory.keep_filled, links)
            nursery.start_soon(self._store_own)
            await trio.sleep_forever()

    # ---- learning -------------------------------------------------------------------------

    def hear(self, topic: str, signed: Signed[Message]) -> None:
        """Take what was gossiped."""
        if topic == self._topic and self._book.learn(signed):
            self._on_news()

    def check(self, topic: str, signed: Signed[Message]) -> None:
        """Raise CodecError for what does not belong on the topic of records."""
        if topic == self._topic:
            problem = self._book.problem(signed)
            if problem is not None:
                raise CodecError(problem)

    def _open_and_learn(self, raw: bytes) -> Signed[Message]:
        """Open a record and keep it if it is news; raises CodecError if it is none."""
        signed = self._domain.open(raw)
        problem = self._book.problem(signed)
        if problem is not None:
            raise CodecError(problem)
        if self._book.learn(signed):
            self._on_news()
        return signed

    # ---- this node's own ------------------------------------------------------------------

    async def advertise(self, capability: Signed[Capability]) -> None:
        """Spread *capability*; raises ValueError if it is no usable record."""
        problem = self._book.problem(capability)
        if problem is not None:
            raise ValueError(problem)
        self._book.learn(capability)
        self._own = capability
        self._own_changed.set()
        await self._publish(capability.raw)

    async def _publish(self, raw: bytes) -> None:
        try:
            await self._gossip.publish(self._topic, raw)
        except StreamFailure:
            self._stats["gossip failed"] += 1

    async def _store_own(self) -> None:
        """Put the own record into the DHT when it changes."""
        while True:
            await self._own_changed.wait()
            self._own_changed = trio.Event()
            await trio.sleep(random.uniform(1.0, 3.0))  # not all of a swarm at once
            if self._own is not None:
                await self._directory.store(self._own)

    async def find(self, address: Address) -> Signed[Capability] | None:
        """Return the record of *address*; where it is not known here, the DHT is asked."""
        known = self._book.of(address)
        if known is None:
            await self._directory.ask(address)
        return known or self._book.of(address)

    # ---- exchange -------------------------------------------------------------------------

    def greet(self, link: Link, dialled: bool) -> None:
        """Exchange records with a peer that has just connected; who dialled begins."""
        self._nursery.start_soon(self._directory.add, link.peer)
        if dialled:
            self._nursery.start_soon(self._exchange, link.peer)

    async def _exchange_often(self, links: Links) -> None:
        while True:
            await trio.sleep(EXCHANGE_S * random.uniform(0.75, 1.25))
            if links.all():
                await self._exchange(random.choice(links.all()).peer)

    async def _exchange(self, peer: ID) -> None:
        try:
            with trio.move_on_after(EXCHANGE_DEADLINE_S):
                async with open_stream(self._host, peer, self._protocol) as stream:
                    await self._send_records(stream)
                    await self._receive_records(stream)
        except (StreamFailure, OversizedFrame, CodecError):
            self._stats["exchanges failed"] += 1

    async def _serve_exchange(self, stream: INetStream) -> None:
        try:
            with trio.fail_after(EXCHANGE_DEADLINE_S):
                await self._receive_records(stream)
                await self._send_records(stream)
                await finish(stream)
        except (StreamFailure, OversizedFrame, CodecError, trio.TooSlowError):
            self._stats["exchanges failed"] += 1
            await reset(stream)

    async def _send_records(self, stream: INetStream) -> None:
        records = list(self._book.known())
        if len(records) > EXCHANGE_RECORDS:
            records = random.sample(records, EXCHANGE_RECORDS)
        for record in records:
            await write_frame(stream, record.raw)
        await write_frame(stream, b"")

    async def _receive_records(self, stream: INetStream) -> None:
        """Read records up to an empty frame; what is news is gossiped on."""
        news: list[bytes] = []
        for _ in range(EXCHANGE_RECORDS + 1):
            raw = await read_frame(stream, MAX_RECORD)
            if not raw:
                break
            before = self._book.of(self._domain.open(raw).signer)
            record = self._open_and_learn(raw)
            if self._book.of(record.signer) is not before:
                news.append(raw)
            await trio.lowlevel.checkpoint()
        for raw in news:
            await self._publish(raw)
