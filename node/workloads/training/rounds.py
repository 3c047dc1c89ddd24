"""How a round closes: the gate, the weighted mean and the outer step make the next state.

With numpy, in float64, in one order: the same bytes on every machine. A contribution that is
malformed is gated out; it never stops the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from meshd.node.workloads.program import Program
from meshd.node.workloads.training.compression import F64, Digits, read_bf16, read_part, tree_sum
from meshd.node.workloads.training.contribution import (
    Layout,
    Part,
    check_close,
    is_sound,
    layout_of,
)
from meshd.node.workloads.training.errors import TrainingDiverged
from meshd.node.workloads.training.gate import PartOf, judge
from meshd.node.workloads.training.outer import (
    momentum_decay,
    next_momentum,
    outer_step,
    weighted_mean,
)
from meshd.node.workloads.training.settings import TrainSettings, power
from meshd.node.workloads.training.state import (
    MOMENTUM,
    OUTER,
    THETA,
    State,
    pack_state,
    parse_state,
)

_BLOCKS_AT_ONCE: Final = 4096


@dataclass(frozen=True, slots=True)
class Closed:
    """What a round came to."""

    state: bytes
    """The next state; the same one again when nothing was accepted."""
    gated: tuple[int, ...]
    """Which contributions were not accepted, by their places."""


def close_round(
    state: bytes,
    contributions: Sequence[bytes],
    weights: Sequence[int],
    program: Program,
    settings: TrainSettings,
    *,
    round_: int,
) -> Closed:
    """Return the state after a round, and which contributions the gate kept out of it.

    `weights` says how much each contribution counts: its rows. The order is that of the round's
    close and changes bits. Raises StateError and TrainingError, TrainingDiverged when the next
    state would not be finite.
    """
    parsed = parse_state(state, program, settings)
    check_close(contributions, weights)
    layout = layout_of(parsed.weights, settings)
    sound = [at for at, data in enumerate(contributions) if is_sound(data, layout)]
    accepted: list[int] = []
    norms: tuple[float, ...] = ()
    if sound:
        parts = _parts([contributions[at] for at in sound], layout, parsed, settings)
        verdict = judge(parts, parsed.norms, settings)
        accepted = [at for at, good in zip(sound, verdict.accepted, strict=True) if good]
        norms = verdict.norms
    gated = tuple(at for at in range(len(contributions)) if at not in set(accepted))
    if not accepted:
        return Closed(state, gated)
    with np.errstate(over="ignore", invalid="ignore"):
        tensors = _next_tensors(
            parsed,
            layout,
            [contributions[at] for at in accepted],
            [weights[at] for at in accepted],
            settings,
            round_,
        )
    following = pack_state(
        parsed.weights,
        settings,
        {name: values.astype("<f4").tobytes() for name, values in tensors.items()},
        step=parsed.step + settings.steps,
        norms=[norms, *parsed.norms[:-1]],
    )
    return Closed(following, gated)


def _parts(
    contributions: Sequence[bytes], layout: Layout, state: State, settings: TrainSettings
) -> list[PartOf]:
    """Return the products of every pair, for each part of a contribution."""
    count = len(contributions)
    theta = np.zeros((count, count))
    momentum = np.zeros((count, count))
    second = np.zeros(count)
    for place in layout.places:
        theta = theta + _products(contributions, place.theta)
        momentum = momentum + _products(contributions, place.momentum)
        if place.second:
            _, elements, at = place.second[0]
            means = [read_bf16(data[at : at + 2 * elements]) for data in contributions]
            each = place.weight.elements / elements
            second = second + tree_sum(np.stack(means, axis=1)) * each
    rate = settings.rate_of_shard(state.step)
    parts = [PartOf(theta.tolist(), rate), PartOf(momentum.tolist())]
    if settings.optimizer == "adamw":
        parts.append(PartOf(np.diag(second).tolist(), angles=False))
    return parts


def _products(contributions: Sequence[bytes], part: Part) -> F64:
    """Return the dot product of every pair: exact integers in a block, a fixed order over them."""
    every = [read_part(data, part) for data in contributions]
    sums: list[F64] = []
    for first in range(0, part.blocks, _BLOCKS_AT_ONCE):
        sums.append(tree_sum(_block_products(every, first)))
    return tree_sum(np.stack(sums))


def _block_products(every: Sequence[Digits], first: int) -> F64:
    chosen = slice(first, first + _BLOCKS_AT_ONCE)
    levels = np.stack([digits.levels[chosen] for digits in every], axis=1).astype(np.float32)
    scales = np.stack([digits.scales[chosen] for digits in every], axis=1)
    exact = np.matmul(levels, levels.transpose(0, 2, 1)).astype(np.float64)
    products: F64 = exact * (scales[:, :, None] * scales[:, None, :])
    return products


def _next_tensors(
    state: State,
    layout: Layout,
    contributions: Sequence[bytes],
    weights: Sequence[int],
    settings: TrainSettings,
    round_: int,
) -> dict[str, F64]:
    found: dict[str, F64] = {}
    for place in layout.places:
        name = place.weight.name
        change = weighted_mean(
            [read_part(data, place.theta).values() for data in contributions], weights
        )
        fresh = weighted_mean(
            [read_part(data, place.momentum).values() for data in contributions], weights
        )
        theta, momentum, outer = (
            np.frombuffer(state.bytes_of(prefix + name), "<f4").astype(np.float64)
            for prefix in (THETA, MOMENTUM, OUTER)
        )
        decay = power(momentum_decay(place.weight, settings), settings.steps)
        found[MOMENTUM + name] = next_momentum(momentum, fresh, decay)
        found[THETA + name], found[OUTER + name] = outer_step(
            theta, outer, change, settings, round_
        )
        for tensor, elements, at in place.second:
            means = [read_bf16(data[at : at + 2 * elements]) for data in contributions]
            found[tensor] = weighted_mean(means, weights)
    for name, values in found.items():
        if not np.isfinite(values.astype(np.float32)).all():
            raise TrainingDiverged(
                f"round {round_}: {name!r} of the next state is not finite; lower lr "
                f"(now {settings.lr:g}) or outer_lr (now {settings.outer_lr:g})"
            )
    return found
