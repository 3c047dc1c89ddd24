"""The Network port in one process: seeded latency, loss, duplication, partitions and crashes.

No sockets, threads or wall clock: everything waits on trio's clock, so a swarm runs under
virtual time. Each direction between two nodes draws from a random generator of its own, seeded
by the swarm's seed and the two addresses: a run is repeated by its seed, and the order in which
unrelated tasks happen to run does not shift anybody's luck.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import trio

from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import Address, Identity, hex_address
from meshd.p2p.memory_links import BANDWIDTH, DIAL_DEADLINE_S, PING_LOSS_S, Links, Pair, Wire
from meshd.p2p.memory_node import MemoryNetwork
from meshd.p2p.messages import Capability
from meshd.p2p.network import Unreachable

__all__ = ["MemoryNetwork", "MemorySwarm"]


class MemorySwarm:
    """Nodes that reach one another through this object, and the faults between them.

    *latency_s* bounds one way's delay in seconds (uniform). *loss* is the probability that
    gossip to one receiver, a request or an answer vanishes; *duplicate* that gossip arrives
    twice. *wall* returns Unix seconds, for expiry only. A partition swallows what is sent: a
    request into it times out, and after PING_LOSS_S both sides see a Departure and dials fail.
    When it heals, every link works again at once.
    """

    def __init__(
        self,
        domain: Domain,
        nursery: trio.Nursery,
        *,
        seed: int,
        wall: Callable[[], float],
        latency_s: tuple[float, float] = (0.005, 0.05),
        loss: float = 0.0,
        duplicate: float = 0.0,
    ) -> None:
        self.domain = domain
        self.wall = wall
        self.nursery = nursery
        self.links = Links(seed=seed, latency_s=latency_s, loss=loss, duplicate=duplicate)
        self.handler_errors: list[Exception] = []
        """What handlers raised besides RequestRefused; a simulation asserts that it is empty."""
        self._wire = Wire()
        self._nodes: dict[Address, MemoryNetwork] = {}
        nursery.start_soon(self._wire.run)

    @property
    def faults(self) -> Counter[str]:
        """How often each kind of fault was injected."""
        return self.links.faults

    def join(self, identity: Identity, blobs: BlobStore) -> MemoryNetwork:
        """Add a node, connected to all that no partition cuts it off from."""
        if identity.address in self._nodes:
            raise ValueError(f"{identity!r} is in the swarm: crash it first")
        node = MemoryNetwork(self, identity, blobs)
        self._nodes[node.address] = node
        for other in self.others(node.address):
            for pair in ((node.address, other.address), (other.address, node.address)):
                if not self.links.joined(pair):
                    self.links.give_up(pair)
            self._send_capabilities(other, node)
        return node

    def rejoin(self, identity: Identity, blobs: BlobStore) -> MemoryNetwork:
        """Start a crashed node again: a new network object under the same address."""
        self.faults["rejoin"] += 1
        return self.join(identity, blobs)

    def crash(self, address: Address) -> None:
        """Kill a node: its handlers end where they are, and those connected notice at once."""
        node = self._nodes.pop(address)
        self.faults["crash"] += 1
        node.die()
        for other in self._nodes.values():
            pair = (address, other.address)
            if self.links.joined(pair):
                self._wire.add(self.links.delay(pair), partial(other.tell_departure, address))

    def partition(self, groups: Sequence[Sequence[Address]]) -> None:
        """Cut every link between nodes of different *groups*; the unnamed are one more group."""
        self.faults["partition"] += 1
        self._regroup(groups)

    def heal(self) -> None:
        """Restore every link; nodes that were cut off exchange what they know."""
        self.faults["heal"] += 1
        self._regroup(())

    def _regroup(self, groups: Sequence[Sequence[Address]]) -> None:
        cut, joined = self.links.regroup(groups, list(itertools.permutations(self._nodes, 2)))
        now = trio.current_time()
        for one, other in cut:
            if one in self._nodes:
                miss = partial(self._miss_pings, self._nodes[one], other, now)
                self._wire.add(PING_LOSS_S, miss)
        for one, other in joined:
            if one in self._nodes and other in self._nodes:
                self._send_capabilities(self._nodes[one], self._nodes[other])

    def _miss_pings(self, node: MemoryNetwork, silent: Address, since: float) -> None:
        pair = (node.address, silent)
        alive = self._nodes.get(node.address) is node
        if alive and self.links.cut_since(pair) == since and not self.links.given_up(pair):
            self.links.give_up(pair)
            node.tell_departure(silent)

    def node(self, address: Address) -> MemoryNetwork | None:
        """Return the living node of *address*."""
        return self._nodes.get(address)

    def others(self, address: Address) -> tuple[MemoryNetwork, ...]:
        """Return every living node but that of *address*, in the order they joined."""
        return tuple(node for node in self._nodes.values() if node.address != address)

    def connected(self, pair: Pair) -> bool:
        """Return whether the first takes the second to be connected."""
        return pair[1] in self._nodes and not self.links.given_up(pair)

    def gossip(self, sender: Address, topic: str, raw: bytes) -> None:
        """Schedule the delivery of *raw* to everybody else who is linked to *sender*."""
        for node in self.others(sender):
            pair = (sender, node.address)
            if not self.links.joined(pair):
                self.faults["gossip cut"] += 1
            elif not self.links.loses(pair, "gossip"):
                delay_s = self.links.delay(pair)
                self._wire.add(delay_s, partial(self._arrive, pair, topic, raw))
                if self.links.duplicates(pair):
                    delay_s += self.links.delay(pair)
                    self._wire.add(delay_s, partial(self._arrive, pair, topic, raw))

    def _arrive(self, pair: Pair, topic: str, raw: bytes) -> None:
        node = self._nodes.get(pair[1])
        if node is None or not self.links.joined(pair):
            self.faults["gossip cut"] += 1
        else:
            node.hear(topic, raw)

    def spread(self, sender: MemoryNetwork) -> None:
        """Send *sender*'s capabilities to everybody linked to it."""
        for other in self.others(sender.address):
            self._send_capabilities(sender, other)

    def _send_capabilities(self, sender: MemoryNetwork, receiver: MemoryNetwork) -> None:
        pair = (sender.address, receiver.address)
        known = sender.capabilities()
        if known and self.links.joined(pair):
            deliver = partial(self._arrive_capabilities, pair, known)
            self._wire.add(self.links.delay(pair), deliver)

    def _arrive_capabilities(self, pair: Pair, records: Sequence[Signed[Capability]]) -> None:
        node = self._nodes.get(pair[1])
        if node is not None and self.links.joined(pair):
            node.learn(records)

    async def reach(self, pair: Pair) -> MemoryNetwork:
        """Wait for one way's delay and return who answers there.

        Raises Unreachable; waits forever where a partition swallows what is sent.
        """
        where = hex_address(pair[1])
        if pair[0] not in self._nodes:
            raise Unreachable(f"no connection to {where}: this node was crashed")
        if not self.links.joined(pair):
            self.faults["request cut"] += 1
            if self.links.given_up(pair):
                await trio.sleep(DIAL_DEADLINE_S)
                raise Unreachable(f"no connection to {where}: no answer in {DIAL_DEADLINE_S} s")
            await trio.sleep_forever()
        await trio.sleep(self.links.delay(pair))
        node = self._nodes.get(pair[1])
        if node is None:
            raise Unreachable(f"no connection to {where}: nobody listens there")
        return node

    async def transfer(self, pair: Pair, size: int = 0) -> None:
        """Wait for *size* bytes to travel; forever where a partition has come between."""
        await trio.sleep(self.links.delay(pair) + size / BANDWIDTH)
        if not self.links.joined(pair):
            self.faults["transfer cut"] += 1
            await trio.sleep_forever()
