"""How a round's mean changes the state: the same arithmetic on single floats and on arrays.

Additions, multiplications and divisions in float64, one after another, rounded to float32 at the
end: the next state has the same bits on every machine. Numbers are floats or float64 arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshd.node.workloads.training.parameters import Trained
from meshd.node.workloads.training.settings import TrainSettings


def momentum_decay(weight: Trained, settings: TrainSettings) -> float:
    """Return beta, what a weight's momentum is multiplied with in every inner step."""
    if settings.optimizer == "scion" and weight.matrices is None:
        return settings.beta_rest
    return settings.beta


def weighted_mean(values: Sequence[Any], weights: Sequence[int]) -> Any:
    """Return the mean of `values`, added up in their order."""
    total = values[0] * float(weights[0])
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * float(weight)
    return total / float(sum(weights))


def next_momentum(momentum: Any, fresh: Any, decay: float) -> Any:
    """Return beta^H m + the mean fresh part; `decay` is beta^H."""
    return momentum * decay + fresh


def outer_step(
    theta: Any, outer: Any, change: Any, settings: TrainSettings, round_: int
) -> tuple[Any, Any]:
    """Return the weights and the outer momentum after a round.

    `change` is the mean of the weights before minus after the inner steps. Nesterov momentum,
    after `outer_warmup` rounds without.
    """
    if round_ < settings.outer_warmup or settings.outer_momentum == 0:
        return theta - change * settings.outer_lr, outer
    outer = outer * settings.outer_momentum + change
    return theta - (change + outer * settings.outer_momentum) * settings.outer_lr, outer
