"""Holds a handful of peers: dials bootstrap peers, anchors and those whose record is known.

A swarm in which everybody knows only the bootstrap peer loses gossip as soon as it grows, and
is lost when that peer is; so each node dials others at random, comes back to those that were
good after a restart, and tries again with growing pauses.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import trio
from libp2p.abc import IHost
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from meshd.p2p.capabilities import CapabilityBook
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address, hex_address
from meshd.p2p.libp2p.host import NetworkSettings
from meshd.p2p.libp2p.links import Links
from meshd.p2p.libp2p.streams import StreamFailure, library_errors
from meshd.p2p.limits import Endpoint
from meshd.p2p.messages import Capability
from meshd.p2p.network import Unreachable
from meshd.p2p.services import Turns

DIAL_DEADLINE_S = 5.0
DIALS_AT_ONCE = 4
CHECK_S = 1.0
"""Seconds between looks at how many peers are connected."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
"""Seconds until a dial that failed is tried again: doubled each time."""
MAX_ANCHORS = 16
MAX_ADDRESSES = 4
"""Addresses of one record that are tried."""
SAVE_S = 60.0

Lookup = Callable[[Address], Awaitable[Signed[Capability] | None]]
"""Finds a record that is not known here."""


class Connector:
    """Dials for one host. *bootstrap* was given by the user: no filter applies to it."""

    def __init__(
        self,
        host: IHost,
        own: Address,
        links: Links,
        book: CapabilityBook,
        bootstrap: Sequence[Endpoint],
        settings: NetworkSettings,
        stats: Counter[str],
        lookup: Lookup,
    ) -> None:
        self._network = cast(Swarm, host.get_network())
        self._own = own
        self._links = links
        self._book = book
        self._settings = settings
        self._stats = stats
        self._lookup = lookup
        self._bootstrap = tuple(bootstrap)
        self._anchors = _load_anchors(settings.anchors)
        self._dialled: dict[ID, Endpoint] = {}
        self._failures: Counter[Endpoint] = Counter()
        self._not_before: dict[Endpoint, float] = {}
        self._dialling: set[Address] = set()
        self._turns = Turns()
        self._wake = trio.Event()

    # ---- holding peers --------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the target number of peers, forever."""
        saved = trio.current_time()
        async with trio.open_nursery() as nursery:
            while True:
                self._top_up(nursery)
                self._wake = trio.Event()
                with trio.move_on_after(CHECK_S):
                    await self._wake.wait()
                if trio.current_time() - saved > SAVE_S:
                    saved = trio.current_time()
                    await self.save()

    def wake(self) -> None:
        """Look for peers to dial now: something was learned."""
        self._wake.set()

    def _top_up(self, nursery: trio.Nursery) -> None:
        missing = self._settings.target_peers - len(self._links) - len(self._dialling)
        room = min(missing, DIALS_AT_ONCE - len(self._dialling))
        for endpoint in self._candidates():
            if room <= 0:
                return
            room -= 1
            self._dialling.add(endpoint.address)
            nursery.start_soon(self._try, endpoint)

    def _candidates(self) -> Iterator[Endpoint]:
        """Yield whom to dial: bootstrap peers first, then anchors, then others at random."""
        known = [e for record in self._book.known() for e in self._endpoints(record)]
        random.shuffle(known)
        now = trio.current_time()
        taken = {self._own, *self._dialling}
        for endpoint in (*self._bootstrap, *self._anchors, *known):
            address = endpoint.address
            if address in taken or self._links.peer_of(address) is not None:
                continue
            if self._not_before.get(endpoint, 0.0) <= now:
                taken.add(address)
                yield endpoint

    def _endpoints(self, record: Signed[Capability]) -> list[Endpoint]:
        """Return where the signer of *record* may be dialled, by its own word."""
        found = []
        for text in record.message.addresses[:MAX_ADDRESSES]:
            try:
                endpoint = Endpoint.parse(text)
            except ValueError:
                continue
            if endpoint.address == record.signer and endpoint.dialable(lan=self._settings.lan):
                found.append(endpoint)
        return found

    async def _try(self, endpoint: Endpoint) -> None:
        try:
            await self._dial(endpoint)
        except StreamFailure:
            self._stats["dials failed"] += 1
        finally:
            self._dialling.discard(endpoint.address)

    async def _dial(self, endpoint: Endpoint) -> None:
        """Connect to *endpoint*; raises StreamFailure, and remembers how it went."""
        peer = ID.from_string(endpoint.peer_id)
        target = Multiaddr(
            f"/{endpoint.kind}/{endpoint.host}/tcp/{endpoint.port}/p2p/{endpoint.peer_id}"
        )
        try:
            with library_errors(f"dial {endpoint.host}"), trio.fail_after(DIAL_DEADLINE_S):
                await self._network.dial_addr(target, peer)
        except StreamFailure:
            self._failures[endpoint] += 1
            pause = FIRST_PAUSE_S * 2 ** min(self._failures[endpoint] - 1, 10)
            pause = min(pause, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            self._not_before[endpoint] = trio.current_time() + pause
            raise
        self._failures.pop(endpoint, None)
        self._not_before.pop(endpoint, None)
        self._dialled[peer] = endpoint

    # ---- reaching one ---------------------------------------------------------------------

    async def reach(self, address: Address) -> ID:
        """Return the peer of *address*, connected; dial it if it is not.

        Raises Unreachable.
        """
        peer = self._links.peer_of(address)
        if peer is not None:
            return peer
        async with self._turns.of(address):
            peer = self._links.peer_of(address)
            if peer is not None:
                return peer
            problems = []
            for endpoint in await self._endpoints_of(address):
                try:
                    await self._dial(endpoint)
                    return ID.from_string(endpoint.peer_id)
                except StreamFailure as error:
                    problems.append(str(error))
        reason = "; ".join(problems) or "no address of it is known"
        raise Unreachable(f"no connection to {hex_address(address)}: {reason}")

    async def _endpoints_of(self, address: Address) -> list[Endpoint]:
        given = [e for e in (*self._bootstrap, *self._anchors) if e.address == address]
        record = self._book.of(address)
        if record is None and not given:
            record = await self._lookup(address)
        return given if record is None else [*given, *self._endpoints(record)]

    # ---- anchors --------------------------------------------------------------------------

    async def save(self) -> None:
        """Write the anchors file, if there is to be one: peers that were dialled and stayed."""
        path = self._settings.anchors
        if path is None:
            return
        now = trio.current_time()
        good = [
            self._dialled[link.peer]
            for link in self._links.all()
            if link.peer in self._dialled and now - link.since >= self._settings.anchor_after_s
        ]
        anchors = tuple(dict.fromkeys([*good, *self._anchors]))[:MAX_ANCHORS]
        if anchors != self._anchors:
            self._anchors = anchors
            with contextlib.suppress(OSError):  # a full disk: they are written another time
                await trio.to_thread.run_sync(_save_anchors, path, anchors)

    def forget(self, peer: ID) -> None:
        """Drop what is kept for a peer that has gone."""
        self._dialled.pop(peer, None)
        self.wake()


def _load_anchors(path: Path | None) -> tuple[Endpoint, ...]:
    """Read an anchors file; one that is missing or damaged holds nobody."""
    try:
        texts = json.loads(path.read_text()) if path is not None else []
        return tuple(Endpoint.parse(str(text)) for text in texts[:MAX_ANCHORS])
    except (OSError, ValueError, TypeError):
        return ()


def _save_anchors(path: Path, anchors: Sequence[Endpoint]) -> None:
    texts = [f"/{a.kind}/{a.host}/tcp/{a.port}/p2p/{a.peer_id}" for a in anchors]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(texts, indent=1) + "\n")
    os.replace(temporary, path)
