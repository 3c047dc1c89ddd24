"""The Network port: what the roles see of the swarm. Adapters: `memory`, `libp2p`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import Capability, Message

Handler: TypeAlias = Callable[[Signed[Message]], Awaitable[Signed[Message] | None]]
"""Answers a request; None acknowledges it; raising RequestRefused tells the asker why."""


class NetworkError(Exception):
    """Root of what the swarm can do to a caller.

    NetworkError
    ├── Unreachable       no connection to the peer can be had
    ├── RequestTimeout    the peer did not answer in time
    ├── RequestRefused    the peer answered no; the text is its reason
    └── BlobUnavailable   no holder served the blob, or only wrong or oversized bytes
    """


class Unreachable(NetworkError):
    """No connection to the peer can be had."""


class RequestTimeout(NetworkError):
    """The peer did not answer in time."""


class RequestRefused(NetworkError):
    """The peer answered no; the text is its reason."""


class BlobUnavailable(NetworkError):
    """No holder served the blob, or only wrong or oversized bytes."""


@dataclass(frozen=True)
class Peer:
    """A peer that is connected now."""

    address: Address
    peer_id: str
    multiaddrs: tuple[str, ...]
    latency_s: float | None


@dataclass(frozen=True)
class Departure:
    """A connection to a peer was lost (closed, or two pings missed)."""

    address: Address


class Network(Protocol):
    """One node's view of the swarm; parties are named by address, never by host or port."""

    @property
    def domain(self) -> Domain:
        """The network whose messages are accepted."""
        ...

    @property
    def address(self) -> Address:
        """This node."""
        ...

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        """Gossip on *topic*; own subscriptions hear it too. Best effort: loss is normal."""
        ...

    def subscribe(
        self, topic: str
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Signed[Message]]]:
        """Open a bounded subscription (256 messages; the newest is dropped, counted, when full).

        Everything that arrives is well signed, of this network and not expired.
        """
        ...

    def departures(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Departure]]:
        """Open a bounded subscription of lost connections."""
        ...

    def serve(self, model: type[Message], handler: Handler) -> AbstractAsyncContextManager[None]:
        """While open, answer requests of *model*; one handler a model."""
        ...

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        """Send *signed* to *to* and return its answer (None: acknowledged).

        Raises Unreachable, RequestTimeout or RequestRefused.
        """
        ...

    async def fetch(
        self,
        digest: bytes,
        *,
        max_bytes: int,
        holders: Sequence[Address],
        deadline_s: float = 120.0,
    ) -> None:
        """Bring the blob *digest* into this node's blob store, from any of *holders*.

        Checked on arrival. Returns at once if it is there. Raises BlobUnavailable, and OSError if
        it cannot be kept here.
        """
        ...

    async def advertise(self, capability: Signed[Capability]) -> None:
        """Put this node's capability where others find it, instead of the former one."""
        ...

    def capabilities(self) -> Sequence[Signed[Capability]]:
        """Return the unexpired capabilities known now, this node's included."""
        ...

    def peers(self) -> Sequence[Peer]:
        """Return who is connected now."""
        ...
