"""Bounded channels that one node's publications fan out to: shared by the Network adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

SUBSCRIPTION_SIZE = 256
"""Items that wait in one subscription; a reader slower than that loses the newest."""


class Subscriptions(Generic[T]):
    """Who listens to which topic in this process; counts what a full channel drops."""

    def __init__(self, stats: Counter[str], *, size: int = SUBSCRIPTION_SIZE) -> None:
        self._stats = stats
        self._size = size
        self._sinks: dict[str, list[trio.MemorySendChannel[T]]] = {}

    def __contains__(self, topic: str) -> bool:
        return topic in self._sinks

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that somebody listens to."""
        return tuple(self._sinks)

    @asynccontextmanager
    async def open(self, topic: str = "") -> AsyncIterator[trio.MemoryReceiveChannel[T]]:
        """Yield a channel of what is delivered to *topic* from now on."""
        send, receive = trio.open_memory_channel[T](self._size)
        self._sinks.setdefault(topic, []).append(send)
        try:
            with receive:  # closing it this way is no checkpoint: nobody feeds a closed channel
                yield receive
        finally:
            send.close()
            remaining = self._sinks[topic]
            remaining.remove(send)
            if not remaining:
                del self._sinks[topic]

    def deliver(self, item: T, topic: str = "") -> None:
        """Hand *item* to every channel of *topic* without waiting; a full one drops it."""
        for sink in self._sinks.get(topic, ()):
            try:
                sink.send_nowait(item)
            except trio.WouldBlock:
                self._stats["dropped"] += 1
            except trio.BrokenResourceError:
                pass  # the reader closed its end early; leaving the context removes it
