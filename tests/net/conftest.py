"""Nodes on real sockets of the loopback interface, started and stopped in any order."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import Address, Identity
from meshd.p2p.libp2p import Libp2pNetwork, NetworkSettings, open_network
from meshd.p2p.messages import Capability, Message, OutputAck

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@dataclass
class Node:
    """A running node."""

    network: Libp2pNetwork
    blobs: BlobStore
    identity: Identity
    _stop: trio.Event
    _stopped: trio.Event
    address: Address = field(init=False)
    multiaddr: str = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.identity.address
        self.multiaddr = self.network.multiaddrs[0]

    async def stop(self) -> None:
        """Shut down in order."""
        self._stop.set()
        with trio.fail_after(30):
            await self._stopped.wait()


@dataclass
class Kit:
    """What tests of the libp2p adapter need."""

    nursery: trio.Nursery
    folder: Path
    domain: Domain = field(default_factory=lambda: Domain("net-test", 31337))
    nodes: list[Node] = field(default_factory=list)

    async def start(
        self,
        number: int,
        bootstrap: Sequence[str] = (),
        *,
        listen: str = LOOPBACK,
        settings: NetworkSettings | None = None,
        advertise: bool = True,
    ) -> Node:
        """Start a node with the identity of *number*."""
        identity = Identity(number.to_bytes(32, "big"))
        settings = settings or NetworkSettings(lan=True, handshakes_per_address=64)
        node: Node = await self.nursery.start(self._run, identity, bootstrap, listen, settings)
        self.nodes.append(node)
        if advertise:
            await node.network.advertise(self.capability(node))
        return node

    async def _run(
        self,
        identity: Identity,
        bootstrap: Sequence[str],
        listen: str,
        settings: NetworkSettings,
        task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        stop, stopped = trio.Event(), trio.Event()
        blobs = BlobStore(self.folder / identity.address.hex())
        async with open_network(
            identity, self.domain, blobs, listen=[listen], bootstrap=bootstrap, settings=settings
        ) as network:
            task_status.started(Node(network, blobs, identity, stop, stopped))
            await stop.wait()
        stopped.set()

    def capability(self, node: Node) -> Signed[Capability]:
        """The record of *node*."""
        message = Capability(
            roles=("worker",),
            addresses=node.network.multiaddrs,
            device="cpu",
            memory_bytes=1,
            units_per_second=1,
            ask=1,
            issued=int(time.time()),
        )
        return self.domain.sign(node.identity, message, expires=int(time.time()) + 600)

    def word(self, identity: Identity, number: int = 0) -> Signed[Message]:
        """A small message, told apart by its number."""
        message = OutputAck(job_id=bytes(32), shard=number, output_root=bytes(32))
        return self.domain.sign(identity, message, expires=int(time.time()) + 60)

    async def echo(self, request: Signed[Message]) -> Signed[Message]:
        """A handler that answers a request with itself."""
        return request

    async def assert_serves(self, node: Node, asker: Node) -> None:
        """Fail unless *node* still answers *asker*."""
        async with node.network.serve(OutputAck, self.echo):
            asked = self.word(asker.identity)
            assert await asker.network.request(node.address, asked) == asked

    async def eventually(self, condition: Callable[[], object], *, within_s: float = 30) -> None:
        """Wait until *condition* holds."""
        with trio.fail_after(within_s):
            while not condition():
                await trio.sleep(0.02)


@pytest.fixture
async def kit(nursery: trio.Nursery, tmp_path: Path) -> Awaitable[Kit]:
    """Yield a Kit; what it started is stopped at the end."""
    made = Kit(nursery, tmp_path)
    yield made
    for node in made.nodes:
        if not node._stopped.is_set():
            await node.stop()
