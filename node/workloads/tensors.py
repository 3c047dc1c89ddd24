"""Types of numbers and shapes of arrays, without any tensor library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

MAX_RANK: Final = 8
MAX_ELEMENTS: Final = 1 << 40
MAX_NAME: Final = 256

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DType:
    """A type of numbers: its short name, size in bytes, and place in type promotion."""

    name: str
    safetensors: str
    size: int
    kind: int
    """0 bool, 1 integer, 2 floating point: the higher one wins when operands are mixed."""
    exponent: tuple[int, int] | None = None
    """For floats: which bits of the last byte and of the last but one hold the exponent."""


_TABLE: Final = (
    DType("bool", "BOOL", 1, 0),
    DType("u8", "U8", 1, 1),
    DType("i8", "I8", 1, 1),
    DType("i16", "I16", 2, 1),
    DType("i32", "I32", 4, 1),
    DType("i64", "I64", 8, 1),
    DType("f16", "F16", 2, 2, (0x7C, 0x00)),
    DType("bf16", "BF16", 2, 2, (0x7F, 0x80)),
    DType("f32", "F32", 4, 2, (0x7F, 0x80)),
    DType("f64", "F64", 8, 2, (0x7F, 0xF0)),
)
DTYPES: Final = {dtype.name: dtype for dtype in _TABLE}
SAFETENSORS_DTYPES: Final = {dtype.safetensors: dtype.name for dtype in _TABLE}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape of an array, nothing of its values."""

    dtype: str
    shape: Shape

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes, packed."""
        return self.elements * DTYPES[self.dtype].size

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Column:
    """A named part of every row: the same dtype and shape in each of them."""

    name: str
    dtype: str
    shape: Shape

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].size


def name_problem(name: object) -> str | None:
    """Say why `name` may not name a column or weight, or None when it may.

    Letters, digits, `_`, `-` and single dots between them; at most 256 characters.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        return f"a name has 1 to {MAX_NAME} characters"
    parts = name.split(".")
    if not all(part.replace("_", "a").replace("-", "a").isalnum() for part in parts):
        return "a name has letters, digits, '_', '-' and single dots between them only"
    return None if name.isascii() else "a name is plain ASCII"


def shape_problem(shape: Sequence[object]) -> str | None:
    """Say why `shape` is out of bounds, or None when it is not."""
    if len(shape) > MAX_RANK:
        return f"it has {len(shape)} dimensions; at most {MAX_RANK} are allowed"
    total = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            return f"size {size!r} is not an integer from 0 to 2^40"
        total *= size
    return None if total <= MAX_ELEMENTS else f"it has {total} elements; at most 2^40 are allowed"


def valid_numbers(data: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Whether packed little-endian numbers are finite, and bools are 0 or 1.

    Linear time for any content: exponents that are all ones are found by byte planes.
    """
    view = memoryview(data).cast("B")
    if dtype == "bool":
        return not bytes(view).strip(b"\x00\x01")
    exponent = DTYPES[dtype].exponent
    if exponent is None or not len(view):
        return True
    high_mask, low_mask = exponent
    step = DTYPES[dtype].size
    high = bytes(view[step - 1 :: step]).translate(_is_full(high_mask))
    if not low_mask or b"\x01" not in high:
        return b"\x01" not in high
    low = bytes(view[step - 2 :: step]).translate(_is_full(low_mask))
    return not int.from_bytes(high, "little") & int.from_bytes(low, "little")


@cache
def _is_full(mask: int) -> bytes:
    return bytes(int(byte & mask == mask) for byte in range(256))
