"""Contributions: quantised as promised, strict, bounded, and the same in plain Python."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.training_kit import PARSED, PROGRAM, SEED, settings, shard_of

from meshd.node.workloads.training import plain
from meshd.node.workloads.training.compression import (
    F64,
    pack_bf16,
    pack_change,
    pack_fresh,
    random_numbers,
    read_bf16,
    read_part,
)
from meshd.node.workloads.training.contribution import (
    Part,
    check_contribution,
    contribution_head,
    layout_of,
    losses_of,
    state_digest,
)
from meshd.node.workloads.training.errors import ContributionError
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.state import initial_state

SETTINGS = settings()
STATE = initial_state(PROGRAM, SETTINGS)
LAYOUT = layout_of(trained_weights(PARSED), SETTINGS)
SOUND = shard_of(STATE, SETTINGS).contribution
W = LAYOUT.places[2]
B = LAYOUT.places[0]
RANDOM = [0.7548518001567572, 0.0873250849545002, 0.473946908256039]


def sample(count: int, seed: int = 0) -> F64:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=count)


def changed(at: int, data: bytes) -> bytes:
    return SOUND[:at] + data + SOUND[at + len(data) :]


def test_a_contribution_takes_0_59_bytes_a_parameter() -> None:
    n = 1 << 20
    theta = Part(n, 128, 3, 0)
    momentum = Part(n, 1024, 0, theta.end)
    assert momentum.end / n == pytest.approx(0.5926, abs=1e-3)


def test_its_length_follows_from_shapes_and_settings() -> None:
    assert len(SOUND) == LAYOUT.size
    assert len(losses_of(SOUND)) == SETTINGS.steps
    check_contribution(SOUND, LAYOUT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (SOUND[:-1], "these weights and settings make"),
        (SOUND + b"\0", "these weights and settings make"),
        (SOUND * 100, "these weights and settings make"),
        (changed(0, b"X"), "do not start with MESHCON1"),
        (changed(8, struct.pack("<I", 2)), "not of 3 steps"),
        (changed(8, struct.pack("<I", 0)), "claims 0 steps"),
        (changed(8, struct.pack("<I", 1 << 31)), "claims 2147483648 steps"),
        (changed(12, struct.pack("<f", math.nan)), r"loss .* NaN"),
        (changed(16, struct.pack("<f", math.inf)), r"loss .* NaN or infinite"),
        (changed(W.theta.offset, struct.pack("<b", 116)), "exponent 116 of weight 'w'"),
        (changed(W.momentum.offset, struct.pack("<b", -127)), "exponent -127"),
        (changed(W.theta.scales_at, struct.pack("<e", math.nan)), "negative, NaN"),
        (changed(W.theta.scales_at, struct.pack("<e", math.inf)), "negative, NaN"),
        (changed(W.theta.scales_at, struct.pack("<e", -1.0)), "negative, NaN"),
        (changed(W.momentum.scales_at, struct.pack("<e", -0.0)), "negative, NaN"),
        (changed(W.theta.scales_at, bytes(2)), "scales nothing"),
        (changed(B.theta.scales_at, bytes(2)), "scales nothing"),
        (changed(B.theta.offset, bytes(3)), "has scale 0 and numbers"),
        (changed(W.momentum.offset, bytes(3)), "has scale 0 and numbers"),
        (changed(W.theta.digits_at, bytes(30) + b"\xff" * 15), "below the lowest level"),
        (changed(W.momentum.digits_at, b"\xf3"), "not five digits"),
    ],
)
def test_bytes_that_are_no_contribution_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ContributionError, match=reason):
        check_contribution(data, LAYOUT)


def test_digits_after_the_last_element_are_refused() -> None:
    part = next(p.momentum for p in LAYOUT.places if p.momentum.elements % 5)
    left = part.elements % 5
    with pytest.raises(ContributionError, match="digits after the last element of weight 'emb'"):
        check_contribution(changed(part.end - 1, bytes((3**left,))), LAYOUT)
    data = bytearray(SOUND)
    data[B.theta.digits_at] |= 1 << 5
    with pytest.raises(ContributionError, match="bits after the last element"):
        check_contribution(bytes(data), LAYOUT)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_changed_bytes_are_read_or_refused(at: int, value: int) -> None:
    data = changed(at, bytes((value,)))
    try:
        check_contribution(data, LAYOUT)
    except ContributionError:
        return
    for place in LAYOUT.places:
        for part in (place.theta, place.momentum):
            assert np.isfinite(read_part(data, part).values()).all()


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    for candidate in (data, b"MESHCON1" + data, (b"MESHCON1" + data).ljust(LAYOUT.size, b"\xff")):
        with pytest.raises(ContributionError):
            check_contribution(candidate, LAYOUT)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_unbiased_and_at_most_one_level_off(bits: int) -> None:
    values = sample(1000)
    part = Part(1000, 128, bits, 0)
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    total = np.zeros(1000)
    for seed in range(200):
        random = random_numbers(bytes((seed,)), 0, 0, "w", 1000)
        read = read_part(pack_change(values, part, random), part).values()
        assert np.abs(read - values).max() <= step * 1.001
        total += read
    assert np.abs(total / 200 - values).max() < 0.25 * step
    assert abs((total / 200 - values).mean()) < 0.01 * step


def test_the_fresh_momentum_keeps_what_is_above_the_threshold() -> None:
    values = np.array([0, 1, -2, 0.1, 3, -0.5, 0, 0] * 2)
    part = Part(16, 8, 0, 0)
    read = read_part(pack_fresh(values, part, 0.7), part)
    assert read.levels.tolist() == [[0, 1, -1, 0, 1, 0, 0, 0]] * 2
    assert read.scales == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e38])
def test_numbers_of_any_size_are_kept(scale: float) -> None:
    values = sample(300, 3) * scale
    for part in (Part(300, 128, 8, 0), Part(300, 128, 0, 0)):
        if part.bits:
            data = pack_change(values, part, random_numbers(SEED, 0, 0, "w", 300))
        else:
            data = pack_fresh(values, part, 0.7)
        read = read_part(data, part).values()
        bound = 0.02 if part.bits else 3.0
        assert np.abs(read - values).max() <= bound * scale * 3
        assert bool(read.any()) is (scale > 0)


def test_a_block_of_zeros_beside_others_stays_zero() -> None:
    values = np.concatenate([np.zeros(128), sample(128), 1e-9 * sample(44)])
    part = Part(300, 128, 3, 0)
    read = read_part(pack_change(values, part, np.full(300, 0.999)), part)
    assert not read.values()[:128].any()
    assert len(pack_change(values, part, np.zeros(300))) == part.end


@pytest.mark.parametrize("elements", [1, 5, 8, 127, 128, 129, 300])
@pytest.mark.parametrize("bits", [0, 2, 3, 4])
def test_plain_python_writes_and_reads_the_same_bytes(elements: int, bits: int) -> None:
    part = Part(elements, 16, bits, 0)
    values = sample(elements, elements) * 0.01
    values[: elements // 3] = 0
    random = random_numbers(SEED, 1, 2, "w", elements)
    numbers = values.tolist()
    if bits:
        ours, theirs = (
            pack_change(values, part, random),
            plain.pack_change(numbers, part, random.tolist()),
        )
    else:
        ours, theirs = pack_fresh(values, part, 0.7), plain.pack_fresh(numbers, part, 0.7)
    assert ours == theirs
    assert len(ours) == part.end
    read = read_part(ours, part)
    levels, scales = plain.read_part(ours, part)
    assert read.levels.reshape(-1)[:elements].tolist() == levels
    assert read.scales.tolist() == scales


def test_random_numbers_are_the_same_everywhere_and_differ_by_place() -> None:
    assert random_numbers(SEED, 1, 2, "w", 3).tolist() == RANDOM
    places = [(SEED, 1, 2, "w"), (SEED, 2, 2, "w"), (SEED, 1, 3, "w"), (SEED, 1, 2, "v")]
    assert len({tuple(random_numbers(*place, 3).tolist()) for place in places}) == 4
    many = random_numbers(SEED, 0, 0, "w", 100_000)
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.01)


def test_bf16_is_rounded_to_even() -> None:
    values = np.float32([0, 1, 1 + 2**-8, 1 + 3 * 2**-8, 3.1415927, 1e-30])
    read = read_bf16(pack_bf16(values))
    assert read[:4].tolist() == [0, 1, 1, 1.015625]
    assert read == pytest.approx(values.astype(float), rel=2**-8)


def test_a_states_digest_binds_step_names_shapes_and_numbers() -> None:
    one = ("a", "f32", (2,), bytes(8))
    digests = {
        state_digest(0, [one]),
        state_digest(1, [one]),
        state_digest(0, [("b", "f32", (2,), bytes(8))]),
        state_digest(0, [("a", "i32", (2,), bytes(8))]),
        state_digest(0, [("a", "f32", (1, 2), bytes(8))]),
        state_digest(0, [("a", "f32", (2,), bytes(7) + b"\1")]),
        state_digest(0, [one, ("b", "f32", (2,), bytes(8))]),
    }
    assert len(digests) == 7
    two = ("b", "f32", (), bytes(4))
    assert state_digest(0, [two, one]) == state_digest(0, [one, two])


def test_losses_are_read_without_anything_else() -> None:
    assert losses_of(contribution_head([1.5, 0.25])) == (1.5, 0.25)
    with pytest.raises(ContributionError, match="claims 2 steps"):
        losses_of(contribution_head([1.5, 0.25])[:-1])
