"""Quantising what a shard uploads, and reading it back, with numpy; the layout is contribution.py.

The change of the weights is rounded stochastically, without bias: level = floor(x / scale + u)
with u from Philox, keyed by job seed, round, shard and weight. The fresh momentum is ternary: what
is below the threshold is 0, the rest the mean magnitude of the rest, with its sign.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from meshd.node.workloads.training.contribution import (
    DIGITS,
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    Buffer,
    Part,
)

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_TOP_BITS: Final = 15
"""The largest scale of a weight is stored between 2^14 and 2^15."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Quantised numbers: one row of small integers and one scale for each block."""

    elements: int
    levels: NDArray[np.int8]
    """(blocks, block); zero after the last element."""
    scales: F64

    def values(self) -> F64:
        """Return the numbers, flat."""
        return (self.levels * self.scales[:, None]).reshape(-1)[: self.elements]


def random_numbers(seed: bytes, round_: int, shard: int, weight: str, count: int) -> F64:
    """Return `count` numbers in [0, 1), multiples of 2^-32.

    Philox 4x64-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), its key
    the first 16 bytes of a BLAKE3 over what they are for; low half of each word first.
    """
    place = struct.pack("<QQ", round_, shard) + weight.encode()
    key = blake3(b"meshd.rounding.v1\0" + seed + place).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    words = generator.random_raw(-(-count // 2)).astype("<u8").view("<u4")[:count]
    numbers: F64 = words.astype(np.float64) / 4294967296.0
    return numbers


def pack_change(values: F64, part: Part, random: F64) -> bytes:
    """Return the bytes of a weight's change, `values` flat; `random` one number in [0, 1) each."""
    blocks = _blocked(values, part.block)
    top = (1 << (part.bits - 1)) - 1
    stored, scales, head = _stored(np.abs(blocks).max(axis=1) / top, upwards=True)
    safe = np.where(scales > 0, scales, 1.0)[:, None]
    levels = np.floor(blocks / safe + _blocked(random, part.block)).clip(-top, top)
    levels[stored == 0] = 0
    flat = levels.reshape(-1)[: part.elements].astype(np.int64)
    planes = [
        np.packbits((flat >> plane & 1).astype(np.uint8), bitorder="little").tobytes()
        for plane in range(part.bits)
    ]
    return head + b"".join(planes)


def pack_fresh(values: F64, part: Part, threshold: float) -> bytes:
    """Return the bytes of a weight's fresh momentum, `values` flat."""
    blocks = _blocked(values, part.block)
    size = np.abs(blocks)
    counts = np.full(part.blocks, part.block, np.float64)
    counts[-1] = part.elements - (part.blocks - 1) * part.block
    means = tree_sum(size.T) / counts
    on = size > (means * threshold)[:, None]
    kept = on.sum(axis=1).astype(np.float64)
    stored, _, head = _stored(tree_sum((size * on).T) / np.maximum(kept, 1.0), upwards=False)
    on[stored == 0] = False
    digits = np.where(on, np.where(blocks > 0, 1, 2), 0).reshape(-1)[: part.elements]
    padded = np.zeros(part.digit_bytes * DIGITS, np.uint8)
    padded[: part.elements] = digits
    powers = 3 ** np.arange(DIGITS, dtype=np.uint8)
    packed: NDArray[np.uint8] = (padded.reshape(-1, DIGITS) * powers).sum(axis=1).astype(np.uint8)
    return head + packed.tobytes()


def pack_bf16(values: F32) -> bytes:
    """Return finite numbers rounded to bf16, ties to even, flat."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return rounded.tobytes()


def read_bf16(data: Buffer) -> F64:
    """Return packed bf16 numbers."""
    words = np.frombuffer(data, "<u2").astype(np.uint32) << 16
    return words.view(np.float32).astype(np.float64)


def read_part(data: Buffer, part: Part) -> Digits:
    """Return the quantised numbers of a part of a contribution that was checked."""
    view = memoryview(data)
    (exponent,) = struct.unpack_from("<b", view, part.offset)
    stored = np.frombuffer(view[part.scales_at : part.digits_at], "<f2").astype(np.float64)
    packed = np.frombuffer(view[part.digits_at : part.end], np.uint8)
    levels = np.zeros(part.blocks * part.block, np.int8)
    levels[: part.elements] = _planes(packed, part) if part.bits else _digits(packed, part)
    return Digits(part.elements, levels.reshape(part.blocks, part.block), stored * 2.0**exponent)


def tree_sum(rows: F64) -> F64:
    """Return the sum over the first axis, halves added to halves: one order everywhere."""
    while len(rows) > 1:
        if len(rows) % 2:
            rows = np.concatenate([rows, np.zeros_like(rows[:1])])
        half = len(rows) // 2
        rows = rows[:half] + rows[half:]
    total: F64 = rows[0]
    return total


def _planes(packed: NDArray[np.uint8], part: Part) -> NDArray[np.int8]:
    levels = np.zeros(part.elements, np.int8)
    for plane, bits in enumerate(packed.reshape(part.bits, -1)):
        digit = np.unpackbits(bits, count=part.elements, bitorder="little").astype(np.int8)
        levels += digit * np.int8(-(1 << plane) if plane == part.bits - 1 else 1 << plane)
    return levels


def _digits(packed: NDArray[np.uint8], part: Part) -> NDArray[np.int8]:
    powers = 3 ** np.arange(DIGITS, dtype=np.uint8)
    digits = (packed[:, None] // powers % 3).astype(np.int8).reshape(-1)[: part.elements]
    digits[digits == 2] = -1
    return digits


def _blocked(values: F64, block: int) -> F64:
    padded = np.zeros(-(-len(values) // block) * block)
    padded[: len(values)] = values
    return padded.reshape(-1, block)


def _stored(scales: F64, *, upwards: bool) -> tuple[NDArray[np.float16], F64, bytes]:
    """Return scales as they are stored, what they then mean, and a part's beginning."""
    largest = float(scales.max())
    exponent = math.frexp(largest)[1] - _TOP_BITS if largest > 0 else 0
    exponent = max(LOWEST_EXPONENT, min(HIGHEST_EXPONENT, exponent))
    wanted = scales / 2.0**exponent
    stored = wanted.astype(np.float16)
    if upwards:
        short = stored.astype(np.float64) < wanted
        stored[short] = np.nextafter(stored[short], np.float16(np.inf))
    if not stored.any():
        exponent = 0
    meant = stored.astype(np.float64) * 2.0**exponent
    return stored, meant, struct.pack("<b", exponent) + stored.astype("<f2").tobytes()
