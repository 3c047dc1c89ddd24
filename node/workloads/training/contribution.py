"""The file that a shard uploads: losses, quantised change of the weights, fresh momentum.

Layout: `MESHCON1`, u32le H, f32 losses[H]; then for every trained weight in the order of names
three parts. Weights: i8 exponent, fp16 scales (one a block), then `theta_bits` bit planes of
two's complement, plane 0 first, ceil(n / 8) bytes each, little-endian bits. Momentum: i8
exponent, fp16 scales, then ternary digits (0, 1, and 2 for -1), five to a byte, the first least.
Second moment (AdamW): bf16 numbers. A value is digit x scale x 2^exponent. The length follows
from shapes and settings; the lowest level of two's complement, digits beyond 242, anything after
the last element, digits in a block of scale 0, NaN and infinity are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from meshd.node.workloads.tensors import DTYPES, Shape, valid_numbers
from meshd.node.workloads.training.errors import ContributionError, TrainingError
from meshd.node.workloads.training.parameters import Trained
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.state import second_moments

MAGIC: Final = b"MESHCON1"
MAX_STEPS: Final = 10_000
MAX_CONTRIBUTIONS: Final = 4096
LOWEST_EXPONENT: Final = -126
HIGHEST_EXPONENT: Final = 115
DIGITS: Final = 5
_HEAD: Final = len(MAGIC) + 4
_TERNARY: Final = 3**DIGITS
_DTYPE_CODES: Final = {name: code for code, name in enumerate(DTYPES)}

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """The quantised numbers of one weight: where they lie, counted from the file's start."""

    elements: int
    block: int
    bits: int
    """Bit planes; 0 for ternary digits."""
    offset: int

    @property
    def blocks(self) -> int:
        """How many scales there are."""
        return -(-self.elements // self.block)

    @property
    def scales_at(self) -> int:
        """Where the scales begin."""
        return self.offset + 1

    @property
    def digits_at(self) -> int:
        """Where planes or digits begin."""
        return self.scales_at + 2 * self.blocks

    @property
    def digit_bytes(self) -> int:
        """Bytes of one plane, or of all ternary digits."""
        return -(-self.elements // (8 if self.bits else DIGITS))

    @property
    def end(self) -> int:
        """Where the next part begins."""
        return self.digits_at + self.digit_bytes * (self.bits or 1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parts of one weight lie."""

    weight: Trained
    theta: Part
    momentum: Part
    second: tuple[tuple[str, int, int], ...]
    """AdamW: name in the state, elements, offset."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in every contribution of a program with these settings."""

    steps: int
    places: tuple[Place, ...]
    size: int


def layout_of(weights: Sequence[Trained], settings: TrainSettings) -> Layout:
    """Return the layout of contributions for these weights and settings."""
    at = _HEAD + 4 * settings.steps
    places: list[Place] = []
    for weight in weights:
        theta = Part(weight.elements, settings.theta_block, settings.theta_bits, at)
        momentum = Part(weight.elements, settings.momentum_block, 0, theta.end)
        at = momentum.end
        second: list[tuple[str, int, int]] = []
        if settings.optimizer == "adamw":
            for name, shape in second_moments(weight):
                second.append((name, math.prod(shape), at))
                at += 2 * math.prod(shape)
        places.append(Place(weight, theta, momentum, tuple(second)))
    return Layout(settings.steps, tuple(places), at)


def contribution_head(losses: Sequence[float]) -> bytes:
    """Return the beginning of a contribution with the losses of its inner steps."""
    return MAGIC + struct.pack(f"<I{len(losses)}f", len(losses), *losses)


def losses_of(data: Buffer) -> tuple[float, ...]:
    """Return the loss of each inner step. Raises ContributionError."""
    view = memoryview(data)
    if len(view) < _HEAD or bytes(view[: len(MAGIC)]) != MAGIC:
        raise ContributionError("these bytes are no contribution: they do not start with MESHCON1")
    (steps,) = struct.unpack_from("<I", view, len(MAGIC))
    if not 1 <= steps <= min(MAX_STEPS, (len(view) - _HEAD) // 4):
        raise ContributionError(f"the contribution claims {steps} steps; at most {MAX_STEPS}")
    packed = view[_HEAD : _HEAD + 4 * steps]
    if not valid_numbers(packed, "f32"):
        raise ContributionError("a loss of the contribution is NaN or infinite")
    return struct.unpack(f"<{steps}f", packed)


def check_contribution(data: Buffer, layout: Layout) -> None:
    """Check that `data` is a contribution of this layout. Raises ContributionError.

    Its length is compared before anything is read; time and memory are linear in it.
    """
    view = memoryview(data)
    if len(view) != layout.size:
        raise ContributionError(
            f"the contribution has {len(view)} bytes; these weights and settings make {layout.size}"
        )
    if len(losses_of(view)) != layout.steps:
        raise ContributionError(f"the contribution is not of {layout.steps} steps")
    for place in layout.places:
        what = f"of weight {place.weight.name!r}"
        for part in (place.theta, place.momentum):
            _check_scales(view, part, what)
            if part.bits:
                _check_planes(view, part, what)
            else:
                _check_digits(view, part, what)
        for name, elements, offset in place.second:
            packed = view[offset : offset + 2 * elements]
            if not valid_numbers(packed, "bf16") or max(packed[1::2], default=0) & 0x80:
                raise ContributionError(f"{name!r} of the contribution is negative or not finite")


def check_close(contributions: Sequence[bytes], weights: Sequence[int]) -> None:
    """Raise TrainingError unless every contribution has a weight of at least 1."""
    if not 1 <= len(contributions) <= MAX_CONTRIBUTIONS:
        raise TrainingError(
            f"{len(contributions)} contributions; a round closes with 1 to {MAX_CONTRIBUTIONS}"
        )
    if len(weights) != len(contributions) or not all(1 <= w < 1 << 53 for w in weights):
        raise TrainingError("every contribution has a weight, the number of its rows, from 1")


def is_sound(data: bytes, layout: Layout) -> bool:
    """Whether `data` is a contribution of this layout at all."""
    try:
        check_contribution(data, layout)
    except ContributionError:
        return False
    return True


def state_digest(step: int, tensors: Iterable[tuple[str, str, Shape, Buffer]]) -> bytes:
    """Return the digest of tensors (name, dtype, shape, packed bytes) after `step` inner steps.

    BLAKE3 over `meshd.state.v1`, the step (u64le) and every tensor's digest in the order of
    names; a tensor's is BLAKE3 over `meshd.tensor.v1`, its name's length (u16le), dtype, rank,
    name, sizes (u64le) and numbers.
    """
    hasher = blake3(b"meshd.state.v1\0" + struct.pack("<Q", step))
    for name, dtype, shape, data in sorted(tensors, key=lambda tensor: tensor[0]):
        head = struct.pack("<HBB", len(name), _DTYPE_CODES[dtype], len(shape)) + name.encode()
        sizes = struct.pack(f"<{len(shape)}Q", *shape)
        hasher.update(blake3(b"meshd.tensor.v1\0" + head + sizes).update(data).digest())
    return hasher.digest()


def _check_scales(view: memoryview, part: Part, what: str) -> None:
    (exponent,) = struct.unpack_from("<b", view, part.offset)
    if not LOWEST_EXPONENT <= exponent <= HIGHEST_EXPONENT:
        raise ContributionError(f"the exponent {exponent} {what} is out of bounds")
    scales = view[part.scales_at : part.digits_at]
    if not valid_numbers(scales, "f16") or max(scales[1::2]) & 0x80:
        raise ContributionError(f"a scale {what} is negative, NaN or infinite")
    packed = bytes(scales)
    if not any(packed) and exponent:
        raise ContributionError(f"the exponent {what} scales nothing; it must be 0")
    for block in _zero_blocks(packed):
        first = block * part.block
        if not _is_zero(view, part, first, min(part.elements, first + part.block)):
            raise ContributionError(f"block {block} {what} has scale 0 and numbers all the same")


def _zero_blocks(scales: bytes) -> list[int]:
    at, found = -1, list[int]()
    while (at := scales.find(b"\0\0", at + 1)) >= 0:
        if at % 2 == 0:
            found.append(at // 2)
            at += 1
    return found


def _is_zero(view: memoryview, part: Part, first: int, last: int) -> bool:
    """Whether the digits [first, last) are all zero."""
    if part.bits:
        ranges = (
            (part.digits_at + plane * part.digit_bytes + first // 8, -(-(last - first) // 8))
            for plane in range(part.bits)
        )
        return not any(any(view[at : at + count]) for at, count in ranges)
    digits = view[part.digits_at + first // DIGITS : part.digits_at + -(-last // DIGITS)]
    inner = digits[1:-1]
    if any(inner):
        return False
    return not any(
        digits[(at - first // DIGITS * DIGITS) // DIGITS] // 3 ** (at % DIGITS) % 3
        for at in (
            *range(first, min(first + DIGITS, last)),
            *range(max(first, last - DIGITS), last),
        )
    )


def _check_planes(view: memoryview, part: Part, what: str) -> None:
    """Refuse the level below the lowest allowed one, and bits after the last element."""
    size = part.digit_bytes
    planes = [
        bytes(view[part.digits_at + at * size : part.digits_at + (at + 1) * size])
        for at in range(part.bits)
    ]
    rest = 0
    for plane in planes[:-1]:
        rest |= int.from_bytes(plane, "little")
    if int.from_bytes(planes[-1], "little") & ~rest:
        raise ContributionError(f"a number {what} is below the lowest level")
    if part.elements % 8 and any(plane[-1] >> (part.elements % 8) for plane in planes):
        raise ContributionError(f"there are bits after the last element {what}")


def _check_digits(view: memoryview, part: Part, what: str) -> None:
    digits = bytes(view[part.digits_at : part.end])
    if max(digits) >= _TERNARY:
        raise ContributionError(f"the momentum {what} has a byte that is not five digits")
    left = part.elements % DIGITS
    if left and digits[-1] >= 3**left:
        raise ContributionError(f"there are digits after the last element {what}")
