"""The gate: what is rejected, what never is, and what it does when there are few."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from unit.training_kit import settings

from meshd.node.workloads.training.gate import PartOf, judge, median
from meshd.node.workloads.training.settings import TrainSettings

SETTINGS = settings()
Vector = Sequence[float]
NONE: list[list[float]] = [[0.0, 0.0]] * 5


def part_of(vectors: Sequence[Vector], rate: float = 1.0) -> PartOf:
    products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in vectors] for a in vectors]
    return PartOf(products, rate)


def accepted(
    theta: Sequence[Vector],
    momentum: Sequence[Vector] | None = None,
    history: Sequence[Sequence[float]] = NONE,
    chosen: TrainSettings = SETTINGS,
) -> list[bool]:
    parts = [part_of(theta), part_of(momentum or theta)]
    return list(judge(parts, history, chosen).accepted)


def honest(count: int, seed: int, width: int = 40) -> list[list[float]]:
    """Vectors with a common part and noise twice as long."""
    generator = random.Random(seed)
    common = [generator.gauss(0, 1) for _ in range(width)]
    return [[c + generator.gauss(0, 1.5) for c in common] for _ in range(count)]


def test_honest_contributions_are_accepted() -> None:
    for seed in range(50):
        assert all(accepted(honest(6, seed), honest(6, seed + 1000)))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.4, 2.1, 10.0, -10.0])
def test_one_bad_part_is_enough(which: int, factor: float) -> None:
    vectors = [[[1.0, 0.1 * at] for at in range(6)] for _ in range(2)]
    vectors[which][3] = [factor * x for x in vectors[which][3]]
    assert accepted(*vectors) == [True, True, True, False, True, True]


def test_lengths_at_the_threshold_and_a_hair_beyond_are_accepted() -> None:
    for factor, good in (
        (2.0, True),
        (2.0000005, True),
        (2.00001, False),
        (0.5, True),
        (0.4999, False),
    ):
        vectors = [[1.0, 0.0]] * 5 + [[factor, 0.0]]
        assert accepted(vectors)[5] is good


def test_a_right_angle_is_at_the_threshold() -> None:
    aside, against = [0.0, 1.0], [-1e-4, 1.0]
    assert accepted([[1.0, 0.0]] * 4 + [aside])[4] is True
    assert accepted([[1.0, 0.0]] * 4 + [against])[4] is False


def test_the_median_is_the_true_one() -> None:
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5
    assert median([3.0, 1.0, 2.0]) == 2.0
    # The lower of the two middle ones, 1, would reject the three.
    assert accepted([[1.0, 0]] * 3 + [[3.0, 0]] * 3) == [True] * 6


def test_half_of_the_contributions_cannot_outvote_the_other_half() -> None:
    flipped = [[1.0, 0.0]] * 4 + [[-1.0, 0.0]] * 2
    assert accepted(flipped) == [True] * 4 + [False] * 2


def test_few_contributions_have_no_angle_and_are_held_against_history() -> None:
    history = [[1.0, 1.0], [1.2, 1.0], [0.8, 1.0], [0.0, 0.0], [0.0, 0.0]]
    three = [[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]
    assert accepted(three, [[1.0, 0.0]] * 3, history) == [True, True, False]
    assert accepted(three, [[1.0, 0.0]] * 3) == [True, True, True]
    assert accepted(three, [[1.0, 0.0]] * 3, history, replace(SETTINGS, full_gate=3))[1] is False


def test_history_is_held_per_learning_rate() -> None:
    history = [[1.0, 1.0]] * 5
    slow = [part_of([[0.1, 0.0]], rate=0.1), part_of([[1.0, 0.0]])]
    verdict = judge(slow, history, SETTINGS)
    assert verdict.accepted == (True,)
    assert verdict.norms == pytest.approx((1.0, 1.0))
    assert judge([part_of([[1.0, 0.0]], rate=0.1), slow[1]], history, SETTINGS).accepted == (False,)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_nothing_and_what_is_no_number_is_rejected_and_does_not_count(bad: float) -> None:
    vectors = [[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [bad, bad], [bad, bad], [bad, bad]]
    assert accepted(vectors) == [True] * 3 + [False] * 3
    assert accepted([[bad, bad]] * 5) == [False] * 5


def test_norms_are_those_of_what_was_accepted() -> None:
    parts = [part_of([[1.0, 0.0]] * 5 + [[9.0, 0.0]]), part_of([[2.0, 0.0]] * 6)]
    assert judge(parts, NONE, SETTINGS).norms == (1.0, 2.0)
    assert judge([part_of([[0.0]]), part_of([[0.0]])], NONE, SETTINGS).norms == (0.0, 0.0)


def test_a_part_without_direction_is_judged_by_its_length() -> None:
    second = PartOf([[4.0 if i == j else 0.0 for j in range(5)] for i in range(5)], angles=False)
    others = [part_of([[1.0, 0.0]] * 5)] * 2
    history = [[0.0, 0.0, 0.0]]
    assert all(judge([*others, second], history, SETTINGS).accepted)
    long = PartOf(
        [[400.0 if i == j == 2 else 4.0 * (i == j) for j in range(5)] for i in range(5)],
        angles=False,
    )
    assert judge([*others, long], history, SETTINGS).accepted == (True, True, False, True, True)
