"""Closing a round: what the state becomes, what is kept out, and that many rounds train."""

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from unit.training_kit import INTERPRETER, PARSED, PROGRAM, batch_rows, settings, shard_of

from meshd.node.workloads.training.compression import pack_change, pack_fresh, read_part
from meshd.node.workloads.training.contribution import Layout, Part, layout_of
from meshd.node.workloads.training.errors import TrainingDiverged, TrainingError
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plain import close_plain
from meshd.node.workloads.training.rounds import Closed, close_round
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shard import run_steps
from meshd.node.workloads.training.state import State, initial_state, parse_state

SETTINGS = settings()
STATE = initial_state(PROGRAM, SETTINGS)
LAYOUT = layout_of(trained_weights(PARSED), SETTINGS)
HONEST = [shard_of(STATE, SETTINGS, shard=shard).contribution for shard in range(5)]


def closed(
    contributions: list[bytes],
    state: bytes = STATE,
    chosen: TrainSettings = SETTINGS,
    round_: int = 0,
    weights: list[int] | None = None,
) -> Closed:
    counts = weights or [chosen.rows] * len(contributions)
    return close_round(state, contributions, counts, PARSED, chosen, round_=round_)


def tensor(state: bytes, name: str, chosen: TrainSettings = SETTINGS) -> np.ndarray:
    data = parse_state(state, PARSED, chosen).bytes_of(name)
    return np.frombuffer(data, "<f4").astype(np.float64)


def change(data: bytes, part: Part) -> np.ndarray:
    return read_part(data, part).values()


def rewritten(data: bytes, layout: Layout, which: str, change_: Callable[..., object]) -> bytes:
    """A contribution with all numbers of one kind of part changed."""
    out = bytearray(data)
    for place in layout.places:
        part: Part = getattr(place, which)
        values = np.asarray(change_(read_part(data, part).values()))
        packed = (
            pack_change(values, part, np.full(part.elements, 0.5))
            if part.bits
            else pack_fresh(values, part, 0.0)
        )
        out[part.offset : part.end] = packed
    return bytes(out)


def test_the_mean_change_and_momentum_enter_the_state() -> None:
    result = closed(HONEST, weights=[1, 2, 3, 4, 5])
    assert result.gated == ()
    for place in LAYOUT.places:
        name = place.weight.name
        mean = (
            sum(w * change(d, place.theta) for w, d in zip(range(1, 6), HONEST, strict=True)) / 15
        )
        fresh = (
            sum(w * change(d, place.momentum) for w, d in zip(range(1, 6), HONEST, strict=True))
            / 15
        )
        np.testing.assert_allclose(
            tensor(result.state, "theta." + name), tensor(STATE, "theta." + name) - mean, atol=1e-7
        )
        np.testing.assert_allclose(tensor(result.state, "m." + name), fresh, rtol=1e-6)
        assert not tensor(result.state, "outer." + name).any()
    assert parse_state(result.state, PARSED, SETTINGS).step == SETTINGS.steps


def test_momentum_decays_by_what_each_weight_keeps() -> None:
    first = closed(HONEST).state
    later = [shard_of(first, SETTINGS, 1, shard).contribution for shard in range(5)]
    second = closed(later, first, round_=1).state
    for place, beta in zip(LAYOUT.places, (0.95, 0.95, 0.9), strict=True):
        name = "m." + place.weight.name
        fresh = sum(change(data, place.momentum) for data in later) / 5
        np.testing.assert_allclose(
            tensor(second, name), beta**3 * tensor(first, name) + fresh, atol=1e-8
        )


def test_outer_momentum_is_off_in_the_first_rounds_and_then_nesterovs() -> None:
    without = closed(HONEST, round_=0).state
    assert closed(HONEST, chosen=replace(SETTINGS, outer_momentum=0.0), round_=9).state == without
    place = LAYOUT.places[2]
    start = tensor(STATE, "theta.w")
    mean = sum(change(data, place.theta) for data in HONEST) / 5
    one = closed(HONEST, round_=1).state
    np.testing.assert_allclose(tensor(one, "outer.w"), mean, rtol=1e-6)
    np.testing.assert_allclose(tensor(one, "theta.w"), start - mean - 0.3 * mean, atol=1e-7)
    half = closed(HONEST, chosen=replace(SETTINGS, outer_lr=0.5)).state
    np.testing.assert_allclose(tensor(half, "theta.w"), start - 0.5 * mean, atol=1e-7)


def flipped(values: np.ndarray) -> np.ndarray:
    return -values


def noise(values: np.ndarray) -> np.ndarray:
    drawn = np.random.Generator(np.random.PCG64(1)).normal(size=values.size)
    return 10 * drawn * np.linalg.norm(values) / np.linalg.norm(drawn)


def with_nan(data: bytes) -> bytes:
    at = LAYOUT.places[1].theta.scales_at
    return data[:at] + b"\x00\x7e" + data[at + 2 :]


BAD = {
    "flip": lambda d: rewritten(
        rewritten(d, LAYOUT, "theta", flipped), LAYOUT, "momentum", flipped
    ),
    "momentum flip": lambda d: rewritten(d, LAYOUT, "momentum", flipped),
    "weights flip": lambda d: rewritten(d, LAYOUT, "theta", flipped),
    "noise x10": lambda d: rewritten(d, LAYOUT, "theta", noise),
    "momentum noise x10": lambda d: rewritten(d, LAYOUT, "momentum", noise),
    "zero": lambda d: rewritten(
        rewritten(d, LAYOUT, "theta", np.zeros_like), LAYOUT, "momentum", np.zeros_like
    ),
    "zero momentum": lambda d: rewritten(d, LAYOUT, "momentum", np.zeros_like),
    "NaN": with_nan,
    "truncated": lambda d: d[:-1],
    "longer": lambda d: d + b"\0",
    "nothing": lambda d: b"",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("at", range(5))
def test_what_is_bad_is_gated_out_and_counts_for_nothing(name: str, at: int) -> None:
    attacked = [*HONEST]
    attacked[at] = BAD[name](HONEST[at])
    result = closed(attacked)
    assert result.gated == (at,)
    assert result.state == closed([d for i, d in enumerate(HONEST) if i != at]).state


@pytest.mark.parametrize("optimizer", ["scion", "adamw", "sgd"])
def test_honest_contributions_are_never_gated(optimizer: str) -> None:
    chosen = settings(optimizer=optimizer, total_steps=75, batch=32)
    state = initial_state(PROGRAM, chosen)
    for round_ in range(25):
        found = [shard_of(state, chosen, round_, shard).contribution for shard in range(4)]
        result = closed(found, state, chosen, round_)
        assert result.gated == ()
        state = result.state


def test_rounds_of_adamw_average_the_second_moment() -> None:
    chosen = settings(optimizer="adamw")
    state = initial_state(PROGRAM, chosen)
    done = [shard_of(state, chosen, shard=shard) for shard in range(4)]
    after = closed([result.contribution for result in done], state, chosen).state
    ends = [
        run_steps(
            INTERPRETER,
            parse_state(state, PARSED, chosen),
            batch_rows(chosen.rows, shard * chosen.rows),
            chosen,
            where="",
        )
        for shard in range(4)
    ]
    rows = sum(end.second["w"].mean(dim=1).numpy() for end in ends) / 4
    np.testing.assert_allclose(tensor(after, "rows.w", chosen), rows, rtol=0.01)
    vector = sum(end.second["b"].numpy() for end in ends) / 4
    np.testing.assert_allclose(tensor(after, "second.b", chosen), vector, rtol=0.01)


def test_an_empty_accepted_set_leaves_the_state() -> None:
    result = closed([b"", BAD["zero"](HONEST[0])])
    assert (result.state, result.gated) == (STATE, (0, 1))


def test_fewer_than_four_are_held_against_the_last_rounds() -> None:
    two = closed(HONEST[:2])
    assert two.gated == ()
    huge = rewritten(HONEST[2], LAYOUT, "theta", lambda v: 50 * v)
    assert closed([HONEST[0], huge]).gated == ()  # nothing to hold it against
    state = two.state
    for round_ in (1, 2):
        found = [shard_of(state, SETTINGS, round_, shard).contribution for shard in range(3)]
        assert closed([found[0], BAD["noise x10"](found[1])], state, round_=round_).gated == (1,)
        result = closed(found, state, round_=round_)
        assert result.gated == ()
        state = result.state
    norms = parse_state(state, PARSED, SETTINGS).norms
    assert [norm[0] > 0 for norm in norms] == [True, True, True, False, False]


def test_the_next_state_must_be_finite() -> None:
    huge = initial_state(PROGRAM, SETTINGS, {"b": struct.pack("<5f", *[-3.4e38] * 5)})
    big = [rewritten(d, LAYOUT, "theta", lambda v: np.full_like(v, 3e37)) for d in HONEST]
    with pytest.raises(TrainingDiverged, match=r"round 4: 'theta.b' .*lower lr \(now 0.02\)"):
        closed(big, huge, round_=4)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, 1, 1], [1, 1 << 60]])
def test_every_contribution_has_a_weight(weights: list[int]) -> None:
    with pytest.raises(TrainingError, match="has a weight"):
        closed(HONEST[:2], weights=weights)


def test_the_order_is_part_of_what_is_computed_and_the_same_order_gives_the_same_bytes() -> None:
    assert closed(HONEST) == closed([*HONEST])
    parsed: State = parse_state(closed(HONEST).state, PARSED, SETTINGS)
    assert parsed.step == 3


@pytest.mark.parametrize("optimizer", ["scion", "sgd"])
def test_plain_python_closes_a_round_to_the_same_bytes(optimizer: str) -> None:
    chosen = settings(optimizer=optimizer, theta_block=16, momentum_block=24)
    state = initial_state(PROGRAM, chosen)
    for round_ in range(3):
        found = [shard_of(state, chosen, round_, shard).contribution for shard in range(5)]
        found.insert(2, b"")
        weights = [3, 1, 1, 4, 1, 5]
        ours = closed(found, state, chosen, round_, weights)
        theirs = close_plain(state, found, weights, PARSED, chosen, round_=round_)
        assert (ours.state, ours.gated) == theirs
        state = ours.state
