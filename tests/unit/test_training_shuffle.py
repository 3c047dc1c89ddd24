"""The shuffle: every data epoch is a permutation, another one for every seed and epoch."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.node.workloads.training.errors import TrainingError
from meshd.node.workloads.training.shuffle import rows_of

SEED = bytes(range(32))
FIXED = [746, 733, 179, 177, 130, 336, 895, 162, 697, 691]
FIXED_LARGE = [538810070501, 777860352148, 993229638060]


@given(st.integers(1, 300), st.binary(max_size=32))
def test_every_epoch_has_every_row_once(rows: int, seed: bytes) -> None:
    found = rows_of(seed, rows=rows, first=0, count=3 * rows)
    for epoch in range(3):
        assert sorted(found[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(st.integers(1, 1000), st.integers(0, 5000), st.integers(0, 50))
def test_any_part_is_a_part_of_the_whole(rows: int, first: int, count: int) -> None:
    part = rows_of(SEED, rows=rows, first=first, count=count)
    whole = rows_of(SEED, rows=rows, first=max(0, first - 3), count=count + 3)
    assert part == whole[len(whole) - count :] if first >= 3 else True


def test_epochs_and_seeds_differ() -> None:
    found = rows_of(SEED, rows=1000, first=0, count=2000)
    other = rows_of(b"other", rows=1000, first=0, count=1000)
    assert len({tuple(found[:1000]), tuple(found[1000:]), tuple(other), tuple(range(1000))}) == 4


def test_rows_are_spread() -> None:
    found = rows_of(SEED, rows=10_000, first=0, count=1000)
    halves = sum(row < 5000 for row in found)
    assert 420 < halves < 580
    steps = [b - a for a, b in pairwise(found)]
    assert len(set(steps)) > 900


def test_the_same_rows_everywhere() -> None:
    assert rows_of(SEED, rows=1000, first=995, count=10) == FIXED
    assert rows_of(SEED, rows=1 << 40, first=0, count=3) == FIXED_LARGE


def test_a_huge_dataset_needs_no_memory() -> None:
    found = rows_of(SEED, rows=(1 << 40) - 1, first=1 << 50, count=100)
    assert len(set(found)) == 100
    assert all(0 <= row < (1 << 40) - 1 for row in found)


@pytest.mark.parametrize(
    ("rows", "first", "count"),
    [(0, 0, 1), (1 << 41, 0, 1), (5, -1, 1), (5, 0, -1), (5, 0, 1 << 32)],
)
def test_numbers_out_of_bounds_are_refused(rows: int, first: int, count: int) -> None:
    with pytest.raises(TrainingError):
        rows_of(SEED, rows=rows, first=first, count=count)
