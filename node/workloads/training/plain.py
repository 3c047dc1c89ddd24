"""Contributions and closing a round in plain Python, for simulations with tiny models.

The formats are those of contribution.py and state.py; `close_plain` returns the bytes that
`rounds.close_round` returns. No numpy, no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from meshd.node.workloads.program import Program
from meshd.node.workloads.training.contribution import (
    DIGITS,
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    Layout,
    Part,
    check_close,
    is_sound,
    layout_of,
)
from meshd.node.workloads.training.errors import (
    TrainingDiverged,
    TrainingError,
)
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

_TOP_BITS: Final = 15
Floats = list[float]


def pack_change(values: Sequence[float], part: Part, random: Sequence[float]) -> bytes:
    """Return the bytes of a weight's change; `random` has a number in [0, 1) for each value."""
    top = (1 << (part.bits - 1)) - 1
    blocks = _blocks(values, part.block)
    head, scales = _stored([max(map(abs, block)) / top for block in blocks], upwards=True)
    planes = [bytearray(part.digit_bytes) for _ in range(part.bits)]
    for at, value in enumerate(values):
        scale = scales[at // part.block]
        level = math.floor(value / scale + random[at]) if scale else 0
        for plane, bits in enumerate(planes):
            bits[at // 8] |= (max(-top, min(top, level)) >> plane & 1) << at % 8
    return head + b"".join(planes)


def pack_fresh(values: Sequence[float], part: Part, threshold: float) -> bytes:
    """Return the bytes of a weight's fresh momentum."""
    kept: list[bool] = []
    means: Floats = []
    for block in _blocks(values, part.block):
        sizes = [abs(value) for value in block]
        empty = [0.0] * (part.block - len(sizes))
        floor = _tree_sum(sizes + empty) / len(block) * threshold
        on = [size > floor for size in sizes]
        chosen = [size * above for size, above in zip(sizes, on, strict=True)]
        means.append(_tree_sum(chosen + empty) / max(sum(on), 1))
        kept += on
    head, scales = _stored(means, upwards=False)
    packed = bytearray(part.digit_bytes)
    for at, value in enumerate(values):
        if kept[at] and scales[at // part.block]:
            packed[at // DIGITS] += (1 if value > 0 else 2) * 3 ** (at % DIGITS)
    return head + bytes(packed)


def read_part(data: bytes, part: Part) -> tuple[list[int], Floats]:
    """Return the levels and the scales of a part of a contribution that was checked."""
    (exponent,) = struct.unpack_from("<b", data, part.offset)
    stored = struct.unpack(f"<{part.blocks}e", data[part.scales_at : part.digits_at])
    packed, size = data[part.digits_at : part.end], part.digit_bytes
    levels: list[int] = []
    for at in range(part.elements):
        if part.bits:
            bits = [packed[plane * size + at // 8] >> at % 8 & 1 for plane in range(part.bits)]
            level = sum(bit << plane for plane, bit in enumerate(bits))
            levels.append(level - (bits[-1] << part.bits))
        else:
            levels.append((0, 1, -1)[packed[at // DIGITS] // 3 ** (at % DIGITS) % 3])
    return levels, [scale * 2.0**exponent for scale in stored]


def close_plain(
    state: bytes,
    contributions: Sequence[bytes],
    weights: Sequence[int],
    program: Program,
    settings: TrainSettings,
    *,
    round_: int,
) -> tuple[bytes, tuple[int, ...]]:
    """Return the next state and who was gated out, as `rounds.close_round` does. Not for AdamW."""
    if settings.optimizer == "adamw":
        raise TrainingError("plain Python closes no rounds of AdamW; use the executor with torch")
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
    gated = tuple(at for at in range(len(contributions)) if at not in accepted)
    if not accepted:
        return state, gated
    chosen = [contributions[at] for at in accepted]
    tensors = _next_tensors(
        parsed, layout, chosen, [weights[at] for at in accepted], settings, round_
    )
    following = pack_state(
        parsed.weights,
        settings,
        tensors,
        step=parsed.step + settings.steps,
        norms=[norms, *parsed.norms[:-1]],
    )
    return following, gated


def f32_of(data: bytes | memoryview) -> Floats:
    """Return packed f32 numbers."""
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def rounded(values: Sequence[float]) -> Floats:
    """Return numbers rounded to f32. Raises OverflowError beyond its range."""
    return f32_of(struct.pack(f"<{len(values)}f", *values))


def _parts(
    contributions: Sequence[bytes], layout: Layout, state: State, settings: TrainSettings
) -> list[PartOf]:
    count = len(contributions)
    found: list[PartOf] = []
    for which, rate in (("theta", settings.rate_of_shard(state.step)), ("momentum", 1.0)):
        total = [[0.0] * count for _ in range(count)]
        for place in layout.places:
            part = place.theta if which == "theta" else place.momentum
            every = [read_part(data, part) for data in contributions]
            for i in range(count):
                for j in range(count):
                    total[i][j] = total[i][j] + _product(every[i], every[j], part)
        found.append(PartOf(total, rate))
    return found


def _product(a: tuple[list[int], Floats], b: tuple[list[int], Floats], part: Part) -> float:
    sums: Floats = []
    for block in range(part.blocks):
        span = slice(block * part.block, (block + 1) * part.block)
        exact = sum(x * y for x, y in zip(a[0][span], b[0][span], strict=True))
        sums.append(float(exact) * (a[1][block] * b[1][block]))
    return _tree_sum(sums)


def _next_tensors(
    state: State,
    layout: Layout,
    contributions: Sequence[bytes],
    weights: Sequence[int],
    settings: TrainSettings,
    round_: int,
) -> Mapping[str, bytes]:
    found: dict[str, Floats] = {}
    for place in layout.places:
        name = place.weight.name
        changes = [_values(data, place.theta) for data in contributions]
        fresh = [_values(data, place.momentum) for data in contributions]
        decay = power(momentum_decay(place.weight, settings), settings.steps)
        theta, momentum, outer = (
            f32_of(state.bytes_of(prefix + name)) for prefix in (THETA, MOMENTUM, OUTER)
        )
        for at in range(place.weight.elements):
            change = weighted_mean([values[at] for values in changes], weights)
            mean = weighted_mean([values[at] for values in fresh], weights)
            momentum[at] = next_momentum(momentum[at], mean, decay)
            theta[at], outer[at] = outer_step(theta[at], outer[at], change, settings, round_)
        found |= {THETA + name: theta, MOMENTUM + name: momentum, OUTER + name: outer}
    try:
        return {name: struct.pack(f"<{len(v)}f", *v) for name, v in found.items()}
    except OverflowError as error:
        raise TrainingDiverged(
            f"round {round_}: the next state is not finite; lower lr (now {settings.lr:g})"
        ) from error


def _values(data: bytes, part: Part) -> Floats:
    levels, scales = read_part(data, part)
    return [level * scales[at // part.block] for at, level in enumerate(levels)]


def _blocks(values: Sequence[float], block: int) -> list[Sequence[float]]:
    return [values[at : at + block] for at in range(0, len(values), block)]


def _stored(scales: Floats, *, upwards: bool) -> tuple[bytes, Floats]:
    """Return a part's beginning and what its scales, as stored, mean."""
    largest = max(scales)
    exponent = math.frexp(largest)[1] - _TOP_BITS if largest > 0 else 0
    exponent = max(LOWEST_EXPONENT, min(HIGHEST_EXPONENT, exponent))
    stored: list[bytes] = []
    for scale in scales:
        wanted = scale / 2.0**exponent
        half = struct.pack("<e", wanted)
        if upwards and struct.unpack("<e", half)[0] < wanted:
            half = (int.from_bytes(half, "little") + 1).to_bytes(2, "little")
        stored.append(half)
    packed = b"".join(stored)
    if not any(packed):
        exponent = 0
    meant = [scale * 2.0**exponent for scale in struct.unpack(f"<{len(stored)}e", packed)]
    return struct.pack("<b", exponent) + packed, meant


def _tree_sum(values: Sequence[float]) -> float:
    row = list(values) or [0.0]
    while len(row) > 1:
        if len(row) % 2:
            row.append(0.0)
        half = len(row) // 2
        row = [a + b for a, b in zip(row[:half], row[half:], strict=True)]
    return row[0]
