"""What lies between the nodes of a swarm in memory: time, luck and partitions."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from meshd.p2p.identity import Address

Pair = tuple[Address, Address]
"""A direction: who sees, and whom."""


PING_LOSS_S = 10.0
"""Seconds until a silent peer is given up: two pings missed."""
DIAL_DEADLINE_S = 5.0
"""Seconds that a dial into nothing takes."""
BANDWIDTH = 50e6
"""Bytes a second of a blob transfer."""


class Wire:
    """Calls that happen later, in order of time, made by one task."""

    def __init__(self) -> None:
        self._pending: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._sleep = trio.CancelScope()

    def add(self, delay_s: float, call: Callable[[], None]) -> None:
        """Make *call* after *delay_s* seconds."""
        due = trio.current_time() + delay_s
        heapq.heappush(self._pending, (due, next(self._serial), call))
        if due < self._sleep.deadline:
            self._sleep.deadline = due

    async def run(self) -> None:
        """Make the calls as they fall due, forever."""
        while True:
            due = self._pending[0][0] if self._pending else math.inf
            with trio.CancelScope(deadline=due) as self._sleep:
                await trio.sleep_forever()
            now = trio.current_time()
            while self._pending and self._pending[0][0] <= now:
                heapq.heappop(self._pending)[2]()


class Links:
    """Delays, losses and cuts between addresses, each direction with its own seeded luck."""

    def __init__(
        self, *, seed: int, latency_s: tuple[float, float], loss: float, duplicate: float
    ) -> None:
        self.faults: Counter[str] = Counter()
        self._seed = seed
        self._latency_s = latency_s
        self._loss = loss
        self._duplicate = duplicate
        self._luck: dict[Pair, random.Random] = {}
        self._group: dict[Address, int] = {}
        self._cut_since: dict[Pair, float] = {}
        self._given_up: set[Pair] = set()

    def _luck_of(self, pair: Pair) -> random.Random:
        if pair not in self._luck:
            self._luck[pair] = random.Random(f"{self._seed}/{pair[0].hex()}/{pair[1].hex()}")
        return self._luck[pair]

    def delay(self, pair: Pair) -> float:
        """Draw one way's delay in seconds."""
        return self._luck_of(pair).uniform(*self._latency_s)

    def loses(self, pair: Pair, what: str) -> bool:
        """Draw whether *what* vanishes on its way, and count it if so."""
        lost = self._luck_of(pair).random() < self._loss
        self.faults[f"{what} lost"] += lost
        return lost

    def duplicates(self, pair: Pair) -> bool:
        """Draw whether gossip arrives a second time, and count it if so."""
        twice = self._luck_of(pair).random() < self._duplicate
        self.faults["gossip duplicated"] += twice
        return twice

    def joined(self, pair: Pair) -> bool:
        """Return whether no partition lies between the two."""
        return self._group.get(pair[0], -1) == self._group.get(pair[1], -1)

    def given_up(self, pair: Pair) -> bool:
        """Return whether the first has missed the second's pings and dropped the connection."""
        return pair in self._given_up

    def give_up(self, pair: Pair) -> None:
        """Take the second for gone, until the partition between them ends."""
        self._given_up.add(pair)

    def cut_since(self, pair: Pair) -> float | None:
        """Return when the partition between the two began, on trio's clock."""
        return self._cut_since.get(pair)

    def regroup(
        self, groups: Sequence[Sequence[Address]], pairs: Sequence[Pair]
    ) -> tuple[list[Pair], list[Pair]]:
        """Cut every link between *groups*, the unnamed being one more; restore all others.

        Returns which of *pairs* were cut and which joined by it.
        """
        self._group = {a: number for number, group in enumerate(groups) for a in group}
        cut, joined = [], []
        for pair in dict.fromkeys([*pairs, *self._cut_since]):
            if self.joined(pair):
                if self._cut_since.pop(pair, None) is not None:
                    self._given_up.discard(pair)
                    joined.append(pair)
            elif pair not in self._cut_since:
                self._cut_since[pair] = trio.current_time()
                cut.append(pair)
        return cut, joined
