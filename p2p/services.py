"""Who answers which request on this node: shared by the Network adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from meshd.p2p.codec import CodecError, Domain, Signed
from meshd.p2p.messages import Message
from meshd.p2p.network import Handler, RequestRefused


class Services:
    """The open handlers, one a message class.

    *wall* returns Unix seconds; what has expired by it is refused.
    """

    def __init__(self, domain: Domain, wall: Callable[[], float]) -> None:
        self._domain = domain
        self._wall = wall
        self._handlers: dict[str, Handler] = {}

    @asynccontextmanager
    async def open(self, model: type[Message], handler: Handler) -> AsyncIterator[None]:
        """Answer requests of *model* by *handler* while open; raises ValueError if another does."""
        if model.kind in self._handlers:
            raise ValueError(f"requests of {model.kind!r} already have a handler on this node")
        self._handlers[model.kind] = handler
        try:
            yield
        finally:
            del self._handlers[model.kind]

    async def answer(self, raw: bytes) -> Signed[Message] | None:
        """Return the handler's answer to the request frame *raw*.

        Raises CodecError for bytes that are no message of this network, RequestRefused where it
        has expired, nobody serves it or the handler says no, and whatever else the handler
        raises.
        """
        request = self._domain.open(raw)
        kind = request.message.kind
        if request.expired(self._wall()):
            raise RequestRefused(f"the {kind} expired at {request.expires}: check the clocks")
        handler = self._handlers.get(kind)
        if handler is None:
            raise RequestRefused(f"this peer does not answer {kind!r}")
        return await handler(request)


class Turns:
    """One at a time for each key: who comes second finds the first one's work done."""

    def __init__(self) -> None:
        self._locks: dict[bytes, trio.Lock] = {}

    @asynccontextmanager
    async def of(self, key: bytes) -> AsyncIterator[None]:
        """Wait for the turn at *key* and hold it."""
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._locks.get(key) is lock:
                del self._locks[key]


def open_fresh(domain: Domain, raw: bytes, now: float) -> Signed[Message]:
    """Return the message in *raw*; raises CodecError as `Domain.open`, and if it has expired."""
    signed = domain.open(raw)
    if signed.expired(now):
        raise CodecError(f"{signed.message.kind}: expired at {signed.expires}, now is {now:.0f}")
    return signed
