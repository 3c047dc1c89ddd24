"""Reading msgpack piece by piece against a schema, so that nothing unexpected is allocated."""

from typing import Any, Final

import msgpack

from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.tensors import (
    DTYPES,
    MAX_NAME,
    MAX_RANK,
    Column,
    Shape,
    name_problem,
    shape_problem,
)

REF_CODE: Final = 1


class Reader:
    """A cursor over msgpack bytes. Every method names what it expects; all raise `error`.

    Containers inside a leaf are impossible: arrays are opened by `array`, with a bound.
    """

    def __init__(self, data: bytes, error: type[WorkloadError], what: str) -> None:
        self._error = error
        self._what = what
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(len(data), 1),
            max_array_len=0,
            max_map_len=0,
            max_str_len=MAX_NAME,
            max_bin_len=64,
            max_ext_len=4,
            strict_map_key=True,
            raw=False,
        )
        self._unpacker.feed(data)

    def fail(self, problem: str) -> WorkloadError:
        """Return the error to raise for a problem of this input."""
        return self._error(f"{self._what}: {problem}")

    def array(self, least: int, most: int, of: str) -> int:
        """Open an array and return its length, between `least` and `most` inclusive."""
        try:
            length: int = self._unpacker.read_array_header()
        except (ValueError, msgpack.UnpackException) as error:
            raise self.fail(f"a list of {of} was expected") from error
        if not least <= length <= most:
            raise self.fail(f"{length} {of}; allowed are {least} to {most}")
        return length

    def leaf(self, of: str) -> Any:
        """Return None, a bool, int, float, str, bytes or msgpack.ExtType."""
        try:
            return self._unpacker.unpack()
        except (ValueError, msgpack.UnpackException) as error:
            raise self.fail(f"{of} was expected: {error or 'the bytes end too early'}") from error

    def integer(self, low: int, high: int, of: str) -> int:
        """Return an integer between `low` and `high` inclusive."""
        value = self.leaf(of)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(f"{of} is {value!r}; an integer from {low} to {high} is allowed")
        return value

    def text(self, of: str) -> str:
        """Return a string of at most 256 bytes."""
        value = self.leaf(of)
        if not isinstance(value, str):
            raise self.fail(f"{of} is {value!r}; a string is allowed")
        return value

    def blob(self, size: int, of: str) -> bytes:
        """Return exactly `size` bytes."""
        value = self.leaf(of)
        if not isinstance(value, bytes) or len(value) != size:
            raise self.fail(f"{of} is not {size} bytes")
        return value

    def columns(self, least: int, most: int) -> tuple[Column, ...]:
        """Return a list of (name, dtype, shape of one row), names unique."""
        found: list[Column] = []
        for _ in range(self.array(least, most, "columns")):
            self.array(3, 3, "parts of a column")
            name, dtype = self.text("a column's name"), self.text("a column's dtype")
            found.append(Column(name, dtype, self.shape(f"column {name!r}")))
            if problem := column_problem(found[-1]):
                raise self.fail(problem)
        if len({column.name for column in found}) != len(found):
            raise self.fail("two columns have the same name; names are unique")
        return tuple(found)

    def shape(self, of: str) -> Shape:
        """Return a shape of at most eight dimensions."""
        sizes = tuple(
            self.integer(0, 1 << 40, f"a size of {of}")
            for _ in range(self.array(0, MAX_RANK, f"sizes of {of}"))
        )
        if problem := shape_problem(sizes):
            raise self.fail(f"{of}: {problem}")
        return sizes

    def finish(self) -> None:
        """Check that nothing is left over."""
        try:
            self._unpacker.skip()
        except msgpack.OutOfData:
            return
        except (ValueError, msgpack.UnpackException) as error:
            raise self.fail("bytes are left over at the end") from error
        raise self.fail("bytes are left over at the end")


def column_problem(column: Column) -> str | None:
    """Say what is wrong with a column, or None."""
    if problem := name_problem(column.name):
        return f"column name {column.name[:80]!r}: {problem}"
    if column.dtype not in DTYPES:
        return f"column {column.name!r} has dtype {column.dtype[:80]!r}; known: {', '.join(DTYPES)}"
    if problem := shape_problem(column.shape):
        return f"column {column.name!r}: {problem}"
    if 0 in column.shape:
        return f"column {column.name!r} has shape {list(column.shape)}: a row of it would be empty"
    return None


def packed_columns(columns: tuple[Column, ...]) -> list[list[object]]:
    """Return what `Reader.columns` reads, ready for msgpack."""
    return [[column.name, column.dtype, list(column.shape)] for column in columns]
