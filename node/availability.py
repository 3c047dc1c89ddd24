"""Whether this node takes new work: paused by its user, about to leave, or out of room."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog
import trio

from meshd.node.store import StoreError

log = structlog.get_logger()

LEAVE_S = 3.0
"""Seconds that everything has that is to be done before the node leaves."""

REST_S = 30.0
"""Seconds without new leases after something could not be kept here."""

Step = Callable[[], Awaitable[None]]
T = TypeVar("T")


class Availability:
    """What roles ask before they take on more, and where they say what leaving takes.

    A node that is not `open` finishes what it has: a worker withdraws its offers and computes
    the shards whose leases it holds. Before it leaves it hands those back.
    """

    def __init__(self) -> None:
        self.paused = False
        self.leaving = False
        self.trouble = ""
        """Why nothing could be kept here lately."""
        self._rests_until = -math.inf
        self.changes = 0
        """How often it was paused, resumed or left."""
        self._changed = trio.Event()
        self._steps: dict[int, Step] = {}
        self._number = 0

    @property
    def open(self) -> bool:
        """Whether new leases may be taken."""
        return not self.paused and not self.leaving

    @property
    def resting(self) -> bool:
        """Whether something could not be kept here within the last REST_S: the disk is full."""
        return trio.current_time() < self._rests_until

    @property
    def taking(self) -> bool:
        """Whether it is open and has room."""
        return self.open and not self.resting

    def rest(self, why: Exception) -> None:
        """Take no new leases for a while, since nothing can be kept here."""
        self.trouble = str(why)
        self._rests_until = trio.current_time() + REST_S
        log.error("no shards for a while: nothing can be kept here", why=self.trouble)

    async def until_kept(self, step: Callable[[], Awaitable[T]]) -> T:
        """Return what *step* comes to; try again as long as the disk refuses what it brings."""
        while True:
            try:
                return await step()
            except (OSError, StoreError) as error:
                self.rest(error)
            await trio.sleep(REST_S)

    def pause(self) -> None:
        """Take no new leases from now on."""
        self.paused = True
        self._notify()

    def resume(self) -> None:
        """Take leases again."""
        self.paused = False
        self._notify()

    async def changed(self, deadline_s: float, since: int | None = None) -> None:
        """Wait until it was paused, resumed or left, *deadline_s* at most.

        With *since* a former `changes`: returns at once if that has happened meanwhile.
        """
        with trio.move_on_after(deadline_s):
            while since is None or since == self.changes:
                since = self.changes
                await self._changed.wait()

    @contextmanager
    def before_leaving(self, step: Step) -> Iterator[None]:
        """While open, *step* is one of those that `leave` takes."""
        self._number += 1
        number = self._number
        self._steps[number] = step
        try:
            yield
        finally:
            del self._steps[number]

    async def leave(self, deadline_s: float = LEAVE_S) -> bool:
        """Take nothing more and take every step, side by side; return whether all were in time.

        For good: a node that left is started again.
        """
        self.leaving = True
        self._notify()
        with trio.move_on_after(deadline_s) as scope:
            async with trio.open_nursery() as nursery:
                for step in list(self._steps.values()):
                    nursery.start_soon(step)
        if scope.cancelled_caught:
            log.warning("left before everything was handed back", seconds=deadline_s)
        return not scope.cancelled_caught

    def _notify(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = trio.Event()
