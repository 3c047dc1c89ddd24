"""What training by shards is worth in loss, in one process: the product's own shards and rounds.

The model, the text and the runs are those of `training_table`. A lone worker is trained several
times, each time with a whole schedule of its own, so that its loss is known as a function of its
steps; the steps that it needs for the swarm's loss, over the swarm's own, are the speed-up.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from _table import say
from training_table import BATCH, WORKERS, Course, alone, course_of, swarm

INNER = 7
LR_SHARDS, LR_ALONE, LR_PARALLEL = 0.03, 0.02, 0.04
"""The best of those that docs/training.md names."""
LENGTHS = (1, 2, 2.5, 3, 4)
"""Runs of the lone worker, in multiples of the swarm's steps a worker; one is as many rows."""
RATES_ALONE: dict[float, float] = {}
"""Rates of the lone worker's runs of some lengths, where another than LR_ALONE was better."""


def measure_loss(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Return the figures of each seed, and the medians over them."""
    each = [measure_seed(course_of(seed), seed, steps) for seed in seeds]
    medians = {
        name: statistics.median(figures[name] for figures in each)
        for name in each[0]
        if isinstance(each[0][name], float)
    }
    return {"seeds": list(seeds), "median": medians, "each": each}


def measure_seed(course: Course, seed: int, steps: int) -> dict[str, Any]:
    """Return what one seed came to: losses in nats a symbol, bytes, speed-up."""
    own = steps // INNER * INNER
    say(f"seed {seed}: {own // INNER} rounds of {WORKERS} shards with H = {INNER}")
    loss, sent, gated, _ = swarm(course, steps, INNER, lr=LR_SHARDS)
    elements = sum(weight.spec.elements for weight in course.interpreter.program.weights)
    figures: dict[str, Any] = {
        "seed": seed,
        "loss_swarm": loss,
        "gated": gated,
        "bytes_a_worker": sent,
        "bytes_data_parallel": 4 * elements * own,
        "fewer_bytes": 4 * elements * own / sent,
    }
    say(f"seed {seed}: data parallel, {own} steps")
    figures["loss_data_parallel"] = alone(course, own, WORKERS * BATCH, lr=LR_PARALLEL)
    lone: dict[int, float] = {}
    for multiple in LENGTHS:
        length = round(own * multiple)
        say(f"seed {seed}: one worker alone, {length} steps")
        lone[length] = alone(course, length, BATCH, lr=RATES_ALONE.get(multiple, LR_ALONE))
    figures["loss_alone"] = lone[own]
    figures["loss_alone_equal_rows"] = lone[WORKERS * own]
    figures["alone_at"] = lone
    figures["speed_up"] = steps_to_reach(loss, lone) / own
    figures["speed_up_data_parallel"] = steps_to_reach(figures["loss_data_parallel"], lone) / own
    return figures


def steps_to_reach(loss: float, lone: Mapping[int, float]) -> float:
    """Return the steps of a lone worker that end at *loss*, from its losses at some lengths.

    Between two lengths the loss is taken as linear in the logarithm of the steps; NaN where
    *loss* lies outside of what was measured: nothing is extrapolated.
    """
    points = sorted(lone.items())
    for (fewer, higher), (more, lower) in itertools.pairwise(points):
        if higher >= loss >= lower and higher > lower:
            share = (higher - loss) / (higher - lower)
            return math.exp(math.log(fewer) + share * (math.log(more) - math.log(fewer)))
    return math.nan
