"""Packed rows: what a shard reads and what it returns, one fixed length of bytes a row.

Layout: `MESHROW1`, u32le header length, header (msgpack: columns as name, dtype, shape of one
row; then the number of rows), then the rows. A row is its columns one after another, each
little-endian and row-major. The same rows have exactly one encoding.
"""

import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgpack

from meshd.node.workloads.errors import RowsError
from meshd.node.workloads.strictpack import Reader, column_problem, packed_columns
from meshd.node.workloads.tensors import DTYPES, Column, valid_numbers

MAGIC: Final = b"MESHROW1"
MAX_HEADER: Final = 64 << 10
MAX_COLUMNS: Final = 64
MAX_ROWS: Final = 1 << 31

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class RowSchema:
    """The columns of every row, in order.

    Raises RowsError when a column or their number is out of bounds.
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.columns) <= MAX_COLUMNS:
            raise RowsError(f"{len(self.columns)} columns; allowed are 1 to {MAX_COLUMNS}")
        if len({column.name for column in self.columns}) != len(self.columns):
            raise RowsError("two columns have the same name; names are unique")
        for column in self.columns:
            if problem := column_problem(column):
                raise RowsError(problem)

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        return sum(column.row_bytes for column in self.columns)

    def header(self, count: int) -> bytes:
        """Return the file's beginning for `count` rows."""
        body: bytes = msgpack.packb([packed_columns(self.columns), count])
        return MAGIC + struct.pack("<I", len(body)) + body

    def packed_bytes(self, count: int) -> int:
        """Return how long `count` packed rows are, header included."""
        return len(self.header(count)) + count * self.row_bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Parsed rows over the bytes they came from."""

    schema: RowSchema
    count: int
    body: memoryview

    def row(self, index: int) -> bytes:
        """Return the bytes of one row. Raises RowsError when there is no such row."""
        if not 0 <= index < self.count:
            raise RowsError(f"row {index} of {self.count} rows does not exist; count from 0")
        size = self.schema.row_bytes
        return bytes(self.body[index * size : (index + 1) * size])

    def rows(self) -> list[bytes]:
        """Return the bytes of every row."""
        return [self.row(index) for index in range(self.count)]

    def column(self, name: str) -> bytes:
        """Return one column of all rows, packed as an array of shape (rows, *shape)."""
        at = 0
        for column in self.schema.columns:
            if column.name == name:
                break
            at += column.row_bytes
        else:
            names = ", ".join(column.name for column in self.schema.columns)
            raise RowsError(f"there is no column {name!r}; the columns are {names}")
        size, stride = column.row_bytes, self.schema.row_bytes
        if size == stride:
            return bytes(self.body)
        starts = range(at, at + self.count * stride, stride) if stride else ()
        return b"".join(self.body[start : start + size] for start in starts)


def pack(schema: RowSchema, rows: Sequence[bytes]) -> bytes:
    """Return the packed form of `rows`, each of `schema.row_bytes` bytes. Raises RowsError."""
    for index, row in enumerate(rows):
        if len(row) != schema.row_bytes:
            raise RowsError(f"row {index} has {len(row)} bytes, not {schema.row_bytes}")
    return schema.header(len(rows)) + b"".join(rows)


def pack_columns(schema: RowSchema, columns: Mapping[str, Buffer], count: int) -> bytes:
    """Return the packed form of `count` rows given column by column. Raises RowsError."""
    views: list[tuple[int, memoryview]] = []
    for column in schema.columns:
        if column.name not in columns:
            raise RowsError(f"column {column.name!r} is missing")
        view = memoryview(columns[column.name]).cast("B")
        if len(view) != count * column.row_bytes:
            raise RowsError(
                f"column {column.name!r} has {len(view)} bytes, "
                f"{count} rows need {count * column.row_bytes}"
            )
        views.append((column.row_bytes, view))
    if len(views) == 1:
        return schema.header(count) + bytes(views[0][1])
    return schema.header(count) + b"".join(
        view[index * size : (index + 1) * size] for index in range(count) for size, view in views
    )


def unpack(data: Buffer) -> Rows:
    """Parse packed rows: sizes, bounds and the one canonical form; not the values. RowsError."""
    view = memoryview(data).cast("B")
    if bytes(view[:8]) != MAGIC or len(view) < 12:
        raise RowsError("these bytes are not packed rows: they do not start with MESHROW1")
    (length,) = struct.unpack_from("<I", view, 8)
    if length > min(MAX_HEADER, len(view) - 12):
        raise RowsError(f"the header of packed rows claims {length} bytes; at most {MAX_HEADER}")
    reader = Reader(bytes(view[12 : 12 + length]), RowsError, "packed rows")
    reader.array(2, 2, "parts")
    schema = RowSchema(reader.columns(1, MAX_COLUMNS))
    count = reader.integer(0, MAX_ROWS, "the number of rows")
    reader.finish()
    header = schema.header(count)
    if bytes(view[: 12 + length]) != header:
        raise RowsError("the header of packed rows is not in canonical form")
    if len(view) - len(header) != count * schema.row_bytes:
        raise RowsError(
            f"{len(view) - len(header)} bytes of rows, {count} rows need {count * schema.row_bytes}"
        )
    return Rows(schema, count, view[len(header) :])


def check_finite(rows: Rows) -> None:
    """Raise RowsError when any number in `rows` is NaN or infinite: such a shard is invalid."""
    for column in rows.schema.columns:
        if not valid_numbers(rows.column(column.name), column.dtype):
            raise RowsError(f"column {column.name!r} contains NaN, infinity or a bool above 1")


def rows_agree(a: bytes, b: bytes, schema: RowSchema, rtol: float = 1e-5) -> bool:
    """Whether two rows are the same answer, computed on machines that may round differently.

    Floats agree when they differ by at most `rtol` times the largest magnitude of their column
    in either row; integers and bools when equal. NaN and infinity never agree, not with
    themselves. Symmetric in `a` and `b`. Rows of a wrong length never agree.
    """
    if not len(a) == len(b) == schema.row_bytes:
        return False
    at = 0
    for column in schema.columns:
        ours, theirs = a[at : at + column.row_bytes], b[at : at + column.row_bytes]
        at += column.row_bytes
        if DTYPES[column.dtype].exponent is None:
            if ours != theirs:
                return False
        elif not _floats_agree(ours, theirs, column.dtype, rtol):
            return False
    return True


def floats(data: bytes, dtype: str) -> Sequence[float]:
    """Return packed little-endian floats (f16, bf16, f32, f64) as Python floats."""
    count = len(data) // DTYPES[dtype].size
    if dtype == "bf16":
        widened = bytearray(2 * len(data))
        widened[2::4], widened[3::4] = data[::2], data[1::2]
        return struct.unpack(f"<{count}f", widened)
    return struct.unpack(f"<{count}{ {'f16': 'e', 'f32': 'f', 'f64': 'd'}[dtype] }", data)


def f32_bytes(values: Sequence[float]) -> bytes:
    """Return floats rounded to float32, little-endian."""
    return struct.pack(f"<{len(values)}f", *array("f", values))


def _floats_agree(a: bytes, b: bytes, dtype: str, rtol: float) -> bool:
    if not (valid_numbers(a, dtype) and valid_numbers(b, dtype)):
        return False
    if a == b:
        return True
    ours, theirs = floats(a, dtype), floats(b, dtype)
    scale = max(max(map(math.fabs, ours)), max(map(math.fabs, theirs)))
    bound = rtol * scale
    return all(math.fabs(x - y) <= bound for x, y in zip(ours, theirs, strict=True))
