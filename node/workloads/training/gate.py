"""The gate: which contributions of a round are accepted, decided from lengths and angles alone.

A contribution is judged by each of its parts (change of the weights, fresh momentum, and with
AdamW the second moment's length) and rejected for one is rejected for all. Pure Python on plain
floats; whoever knows the contributions computes the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from meshd.node.workloads.training.settings import TrainSettings

SLACK: Final = 1e-6
"""A decision so close to its threshold is for the contribution: machines may round otherwise."""

Gram = Sequence[Sequence[float]]
"""For each pair of contributions the dot product of one part, in float64."""


@dataclass(frozen=True, slots=True)
class PartOf:
    """One part of all contributions of a round."""

    products: Gram
    rate: float = 1.0
    """What lengths are divided by before they are held against other rounds."""
    angles: bool = True
    """Whether its direction counts, or its length only."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which contributions are accepted, and the median length of each part of those."""

    accepted: tuple[bool, ...]
    norms: tuple[float, ...]


def judge(
    parts: Sequence[PartOf], history: Sequence[Sequence[float]], settings: TrainSettings
) -> Verdict:
    """Return what the gate says of a round's contributions.

    `history` has the median lengths of the last closed rounds, one for each part, 0 for none.
    Contributions of length zero are rejected in any case. With `full_gate` or more others, a
    length must be within `norm_low` to `norm_high` times the median of the round, and the median
    cosine with the others above `min_cosine`; with fewer, lengths are held against the median of
    the history, or accepted where there is none.
    """
    count = len(parts[0].products)
    lengths = [[math.sqrt(part.products[i][i]) for i in range(count)] for part in parts]
    alive = [
        all(length[i] > 0 and math.isfinite(length[i]) for length in lengths) for i in range(count)
    ]
    here = [i for i in range(count) if alive[i]]
    accepted = list(alive)
    for at, part in enumerate(parts):
        if len(here) >= settings.full_gate:
            middle = median([lengths[at][i] for i in here])
        else:
            past = [norms[at] for norms in history if norms[at] > 0]
            middle = median(past) * part.rate if past else 0.0
        for i in here:
            if middle > 0 and not _fits(lengths[at][i] / middle, settings):
                accepted[i] = False
            if part.angles and len(here) >= settings.full_gate:
                cosine = _median_cosine(part.products, lengths[at], i, here)
                if not cosine > settings.min_cosine - SLACK:
                    accepted[i] = False
    norms = tuple(
        median([length[i] for i in range(count) if accepted[i]]) / part.rate
        if any(accepted)
        else 0.0
        for part, length in zip(parts, lengths, strict=True)
    )
    return Verdict(tuple(accepted), norms)


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2


def _fits(ratio: float, settings: TrainSettings) -> bool:
    return settings.norm_low - SLACK <= ratio <= settings.norm_high + SLACK


def _median_cosine(products: Gram, lengths: Sequence[float], i: int, here: Sequence[int]) -> float:
    return median([products[i][j] / (lengths[i] * lengths[j]) for j in here if j != i])
