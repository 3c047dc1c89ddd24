"""Which of our own lines a process spent its time in, from py-spy's folded stacks (pure)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from _table import print_table

OURS = ("node/", "ledger/", "p2p/", "config/")
_FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^()]+):(?P<line>\d+)\)")


@dataclass(frozen=True)
class Cost:
    """A function of ours, its most expensive line, and the shares of all samples in both."""

    place: str
    function: str
    share: float
    own_share: float
    """Share of the samples in which no other function of ours was called from it."""


def largest_costs(folded: str, most: int = 25) -> list[Cost]:
    """Return our functions by their share of the samples, those called included.

    A line of *folded* is `frame;frame;... samples`, the outermost frame first, a frame
    `function (file:line)`.
    """
    total = 0
    inclusive: Counter[tuple[str, str]] = Counter()
    lines: dict[tuple[str, str], Counter[str]] = {}
    own: Counter[tuple[str, str]] = Counter()
    for text in folded.splitlines():
        stack, _, count = text.rpartition(" ")
        samples = int(count)
        total += samples
        frames = [found for part in stack.split(";") if (found := _ours(part)) is not None]
        for function, file, line in {(f, p): (f, p, n) for f, p, n in frames}.values():
            inclusive[function, file] += samples
            lines.setdefault((function, file), Counter())[line] += samples
        if frames:
            own[frames[-1][0], frames[-1][1]] += samples
    return [
        Cost(
            place=f"{file}:{lines[function, file].most_common(1)[0][0]}",
            function=function,
            share=samples / total,
            own_share=own[function, file] / total,
        )
        for (function, file), samples in inclusive.most_common(most)
    ]


def _ours(part: str) -> tuple[str, str, str] | None:
    found = _FRAME.fullmatch(part.strip())
    if found is None or not found["file"].startswith(OURS):
        return None
    return found["function"], found["file"], found["line"]


def print_costs(name: str, costs: list[Cost]) -> None:
    """Print the costs of a process, in percent of its busy samples."""
    print(f"\n{name}: percent of its busy samples")
    rows = [[c.function, c.place, 100 * c.share, 100 * c.own_share] for c in costs]
    print_table(["function", "place", "with callees", "alone"], rows)
