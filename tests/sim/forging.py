"""Contributions taken apart and put together again, for cheaters that did not compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from meshd.node.compute.executor import TrainRequest, read_program
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import pack, unpack
from meshd.node.workloads.training.contribution import (
    Layout,
    Part,
    contribution_head,
    layout_of,
    losses_of,
)
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plain import Floats, pack_change, pack_fresh, read_part
from meshd.node.workloads.training.settings import TrainSettings

Twist = Callable[[float], float]


@dataclass(frozen=True)
class Opened:
    """The numbers of a contribution, weight by weight."""

    losses: Sequence[float]
    changes: Sequence[Floats]
    fresh: Sequence[Floats]

    def each(self, change: Twist, fresh: Twist) -> Opened:
        """Return this with every number replaced."""
        return replace(
            self,
            changes=[[change(x) for x in values] for values in self.changes],
            fresh=[[fresh(x) for x in values] for values in self.fresh],
        )


def is_canary(job: TrainRequest) -> bool:
    """Return whether this is not a shard of a simulated job, whose steps are four."""
    return "steps=2" in job.settings


def layout_for(job: TrainRequest) -> Layout:
    """Return the layout of the contribution that is asked for."""
    weights = trained_weights(parse_program(read_program(job.program)))
    return layout_of(weights, TrainSettings.parse(job.settings))


def opened(contribution: bytes, layout: Layout) -> Opened:
    """Return the numbers in a contribution."""

    def values(part: Part) -> Floats:
        levels, scales = read_part(contribution, part)
        return [level * scales[at // part.block] for at, level in enumerate(levels)]

    return Opened(
        losses_of(contribution),
        [values(place.theta) for place in layout.places],
        [values(place.momentum) for place in layout.places],
    )


def closed(numbers: Opened, layout: Layout, settings: TrainSettings) -> bytes:
    """Return a well-formed contribution of these numbers."""
    packed = [contribution_head(numbers.losses)]
    for place, change, fresh in zip(layout.places, numbers.changes, numbers.fresh, strict=True):
        packed.append(pack_change(change, place.theta, [0.5] * len(change)))
        packed.append(pack_fresh(fresh, place.momentum, settings.momentum_threshold))
    return b"".join(packed)


def shortened(job: TrainRequest, steps: int) -> TrainRequest:
    """Return the request for the first *steps* steps of a shard."""
    settings = replace(TrainSettings.parse(job.settings), steps=steps)
    rows = unpack(job.inputs)
    few = pack(rows.schema, rows.rows()[: settings.rows])
    return replace(job, settings=settings.encode(), inputs=few)


def rearranged(job: TrainRequest, place_of: Callable[[int, int], int]) -> TrainRequest:
    """Return the request with other rows: those at *place_of* (place, rows of a step)."""
    batch = TrainSettings.parse(job.settings).batch
    rows = unpack(job.inputs)
    every = rows.rows()
    return replace(
        job, inputs=pack(rows.schema, [every[place_of(at, batch)] for at in range(rows.count)])
    )
