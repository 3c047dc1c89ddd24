"""Packed rows: one form, bounded, and when two rows are the same answer."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.node.workloads.errors import RowsError
from meshd.node.workloads.rows import (
    RowSchema,
    check_finite,
    f32_bytes,
    floats,
    pack,
    pack_columns,
    rows_agree,
    unpack,
)
from meshd.node.workloads.tensors import Column

VECTOR = RowSchema((Column("y", "f32", (4,)),))
MIXED = RowSchema((Column("label", "i64", ()), Column("y", "f32", (2,))))


def mixed_row(label: int, *values: float) -> bytes:
    return struct.pack("<q", label) + f32_bytes(values)


def test_rows_come_back_as_they_were_packed() -> None:
    rows = [mixed_row(at, at / 2, -at) for at in range(5)]
    unpacked = unpack(pack(MIXED, rows))
    assert unpacked.schema == MIXED
    assert unpacked.rows() == rows
    assert unpacked.column("label") == struct.pack("<5q", *range(5))
    assert floats(unpacked.column("y"), "f32")[2:4] == (0.5, -1.0)


def test_rows_packed_by_column_are_the_same_bytes() -> None:
    rows = [mixed_row(at, at / 2, -at) for at in range(5)]
    unpacked = unpack(pack(MIXED, rows))
    columns = {name: unpacked.column(name) for name in ("y", "label")}
    assert pack_columns(MIXED, columns, 5) == pack(MIXED, rows)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_row_that_does_not_exist_is_refused(index: int) -> None:
    rows = unpack(pack(MIXED, [mixed_row(0, 0, 0)] * 5))
    with pytest.raises(RowsError, match="does not exist"):
        rows.row(index)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "MESHROW1"),
        (b"MESHROW1" + b"\xff" * 4, "claims"),
        (pack(VECTOR, [])[:-1], "claims"),
        (pack(VECTOR, [f32_bytes([0] * 4)]) + b"x", "bytes of rows"),
        (pack(VECTOR, [f32_bytes([0] * 4)])[:-1], "bytes of rows"),
    ],
)
def test_bytes_that_are_no_rows_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(RowsError, match=reason):
        unpack(data)


def test_a_second_encoding_of_the_same_header_is_refused() -> None:
    data = pack(VECTOR, [])
    # The number of rows, 0, spelled with two bytes in place of one.
    other = data[:8] + struct.pack("<I", len(data) - 12 + 1) + data[12:-1] + b"\xcc\x00"
    with pytest.raises(RowsError, match="canonical"):
        unpack(other)


@pytest.mark.parametrize(
    "columns",
    [
        (),
        (Column("y", "f32", ()), Column("y", "f32", ())),
        (Column("../y", "f32", ()),),
        (Column("y", "f31", ()),),
        (Column("y", "f32", (0,)),),
        (Column("y", "f32", (1 << 41,)),),
        (Column("y", "f32", (1,) * 9),),
    ],
)
def test_schemas_out_of_bounds_are_refused(columns: tuple[Column, ...]) -> None:
    with pytest.raises(RowsError):
        RowSchema(columns)


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_refused(data: bytes) -> None:
    for candidate in (data, b"MESHROW1" + data):
        try:
            unpack(candidate)
        except RowsError:
            continue


@given(st.integers(0, 80), st.integers(0, 255))
def test_changed_bytes_are_other_rows_or_refused(at: int, value: int) -> None:
    data = bytearray(pack(MIXED, [mixed_row(7, 1.5, 2.5), mixed_row(8, 0, 1)]))
    at %= len(data)
    changed = data[at] != value
    data[at] = value
    try:
        rows = unpack(bytes(data))
    except RowsError:
        return
    assert pack(rows.schema, rows.rows()) == bytes(data)
    assert changed or rows.schema == MIXED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_invalid(bad: float) -> None:
    row = struct.pack("<4f", 1, 2, bad, 4)
    with pytest.raises(RowsError, match="NaN"):
        check_finite(unpack(pack(VECTOR, [f32_bytes([1, 2, 3, 4]), row])))


def test_the_largest_finite_numbers_are_valid() -> None:
    check_finite(unpack(pack(VECTOR, [f32_bytes([3.4028234e38, -3.4028234e38, 1e-45, 0])])))


def test_rows_agree_within_the_tolerance_of_their_largest_number() -> None:
    a = f32_bytes([100.0, 0.5, 0.001, 0.0])
    assert rows_agree(a, f32_bytes([100.0, 0.5009, 0.0019, -0.0009]), VECTOR)
    assert not rows_agree(a, f32_bytes([100.0, 0.5011, 0.001, 0.0]), VECTOR)


def test_a_huge_number_does_not_widen_its_own_tolerance() -> None:
    assert not rows_agree(f32_bytes([1, 2, 3, 4]), f32_bytes([1, 2, 3, 1e30]), VECTOR)


def test_integers_agree_only_when_equal() -> None:
    assert rows_agree(mixed_row(3, 1, 2), mixed_row(3, 1, 2.000001), MIXED)
    assert not rows_agree(mixed_row(3, 1, 2), mixed_row(4, 1, 2), MIXED)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_agree_with_nothing_not_even_themselves(bad: float) -> None:
    row = struct.pack("<4f", 1, bad, 3, 4)
    assert not rows_agree(row, row, VECTOR)
    assert not rows_agree(f32_bytes([1, 2, 3, 4]), row, VECTOR)


def test_rows_of_a_wrong_length_never_agree() -> None:
    assert not rows_agree(b"", b"", VECTOR)
    assert not rows_agree(f32_bytes([1, 2, 3]), f32_bytes([1, 2, 3]), VECTOR)


@pytest.mark.parametrize(("dtype", "data"), [("bf16", b"\x80\x3f"), ("f16", b"\x00\x3c")])
def test_half_precision_is_read_as_what_it_means(dtype: str, data: bytes) -> None:
    assert floats(data, dtype) == (1.0,)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4))
def test_agreement_is_symmetric_and_every_finite_row_agrees_with_itself(row: list[float]) -> None:
    a, b = f32_bytes(row), f32_bytes([x * (1 + 1e-5) for x in row])
    assert rows_agree(a, a, VECTOR)
    assert rows_agree(a, b, VECTOR) == rows_agree(b, a, VECTOR)
