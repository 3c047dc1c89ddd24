"""The DHT: each peer's capability record under its address, admitted only if well signed.

py-libp2p ignores the DHT's protocol prefix, so swarms are told apart by the namespace of the
key: a record of another network is refused.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service

from meshd.p2p.codec import CodecError, Domain, Signed
from meshd.p2p.identity import Address
from meshd.p2p.libp2p.links import Links
from meshd.p2p.libp2p.protocols import dht_namespace
from meshd.p2p.libp2p.streams import StreamFailure, library_errors
from meshd.p2p.messages import Capability, Message

LOOKUP_S = 300.0
"""Seconds between lookups of this node's own place in the DHT, which fill its table."""
STORE_DEADLINE_S = 15.0
ASK_DEADLINE_S = 3.0


class _Records(Validator):
    """Admits to the DHT well-signed, unexpired records under their signer's address only."""

    def __init__(self, domain: Domain, learn: Callable[[bytes], Signed[Message]]) -> None:
        self._prefix = f"/{dht_namespace(domain.network)}/"
        self._learn = learn

    def validate(self, key: str, value: bytes) -> None:
        """Raise ValueError unless *value* may be stored under *key*."""
        try:
            record = self._learn(value)
        except CodecError as error:
            raise ValueError(f"DHT record: {error}") from error
        if key != self._prefix + record.signer.hex():
            raise ValueError("DHT record lies under another address than its signer's")

    def select(self, key: str, values: list[bytes]) -> int:
        """Return the index of the newest of *values*."""
        issued = []
        for value in values:
            try:
                issued.append(cast(Capability, self._learn(value).message).issued)
            except CodecError:  # the one that is stored has expired since
                issued.append(-1)
        return issued.index(max(issued))


class Directory:
    """The DHT of one host. *learn* opens a record, keeps it, or raises CodecError."""

    def __init__(
        self,
        host: IHost,
        domain: Domain,
        learn: Callable[[bytes], Signed[Message]],
        stats: Counter[str],
    ) -> None:
        namespace = dht_namespace(domain.network)
        self._prefix = f"/{namespace}/"
        self._own_id = host.get_id()
        self._stats = stats
        self._dht = KadDHT(
            host,
            DHTMode.SERVER,
            validator=NamespacedValidator({}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
            enable_providers=False,
        )
        self._dht.register_validator(namespace, _Records(domain, learn))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the DHT until the context ends."""
        async with background_trio_service(self._dht):
            yield

    async def store(self, record: Signed[Capability]) -> None:
        """Store *record* with the peers closest to its signer's address."""
        key = self._prefix + record.signer.hex()
        await self._try(STORE_DEADLINE_S, lambda: self._dht.put_value(key, record.raw))

    async def ask(self, address: Address) -> None:
        """Ask others for the record of *address*; what they answer is learned."""
        key = self._prefix + address.hex()
        await self._try(ASK_DEADLINE_S, lambda: self._dht.get_value(key))

    async def add(self, peer: ID) -> None:
        """Add a connected peer to the table, which the library does not do by itself."""
        await self._try(
            ASK_DEADLINE_S, lambda: self._dht.add_peer(peer, skip_server_mode_check=True)
        )

    async def keep_filled(self, links: Links) -> None:
        """Look up this node's own place, forever; staggered, since 50 at once time out."""
        pause_s = random.uniform(2.0, 6.0)
        while True:
            await trio.sleep(pause_s)
            for link in links.all():
                await self.add(link.peer)
            await self._try(STORE_DEADLINE_S, self._look_up_self)
            pause_s = LOOKUP_S * random.uniform(0.75, 1.25)

    async def _look_up_self(self) -> None:
        await self._dht.peer_routing.find_closest_peers_network(self._own_id.to_bytes())

    async def _try(self, deadline_s: float, call: Callable[[], Awaitable[object]]) -> None:
        """Make a call that may fail: the DHT is one way of three to find a peer."""
        try:
            with library_errors("DHT"), trio.fail_after(deadline_s):
                await call()
        except StreamFailure:
            self._stats["DHT failures"] += 1
