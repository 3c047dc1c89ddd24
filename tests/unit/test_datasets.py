"""Datasets: cut into chunks, addressed by content, read back row by row, refused when false."""

import json
import struct

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from meshd.node.workloads.datasets import (
    ColumnData,
    Dataset,
    build_dataset,
    chunks_of,
    parse_chunk,
    parse_manifest,
    slice_rows,
)
from meshd.node.workloads.errors import DatasetError, TensorFileError
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.tensorfile import TensorData, parse_tensors, write_tensors


def numbers(rows: int, per_chunk: int = 4) -> Dataset:
    """Rows of (id, x[2]): id = the row, x = (row / 2, -row)."""
    ids = struct.pack(f"<{rows}q", *range(rows))
    xs = struct.pack(f"<{2 * rows}f", *(v for at in range(rows) for v in (at / 2, -at)))
    columns = {"x": ColumnData("f32", (rows, 2), xs), "id": ColumnData("i64", (rows,), ids)}
    return build_dataset(columns, per_chunk)


def by_digest(dataset: Dataset) -> dict[bytes, bytes]:
    return {blake3(chunk).digest(): chunk for chunk in dataset.chunks}


def repacked(dataset: Dataset, at: int, value: object) -> bytes:
    parts = msgpack.unpackb(dataset.manifest_bytes)
    parts[at] = value
    packed: bytes = msgpack.packb(parts)
    return packed


@given(st.integers(1, 40), st.integers(1, 50), st.data())
def test_any_rows_in_any_order_come_back(rows: int, per_chunk: int, data: st.DataObject) -> None:
    dataset = numbers(rows, per_chunk)
    manifest = parse_manifest(dataset.manifest_bytes)
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=10))
    packed = unpack(slice_rows(manifest, by_digest(dataset), wanted))
    assert packed.schema == manifest.schema
    assert [struct.unpack("<qff", row) for row in packed.rows()] == [
        (row, row / 2, -row) for row in wanted
    ]


def test_the_manifest_says_where_the_rows_lie() -> None:
    dataset = numbers(10, 4)
    manifest = parse_manifest(dataset.manifest_bytes)
    assert [(c.start, c.stop) for c in manifest.chunks] == [(0, 4), (4, 8), (8, 10)]
    assert [c.index for c in chunks_of(manifest, 3, 9)] == [0, 1, 2]
    assert [c.index for c in chunks_of(manifest, 4, 8)] == [1]
    assert chunks_of(manifest, 5, 5) == ()
    assert manifest.dataset_id == dataset.dataset_id
    assert manifest.size == sum(map(len, dataset.chunks))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 11), (5, 4)])
def test_rows_outside_of_the_dataset_have_no_chunks(start: int, stop: int) -> None:
    with pytest.raises(DatasetError, match="10 rows"):
        chunks_of(parse_manifest(numbers(10).manifest_bytes), start, stop)


def test_the_same_columns_make_the_same_dataset() -> None:
    assert numbers(10).manifest_bytes == numbers(10).manifest_bytes
    assert numbers(10).dataset_id != numbers(11).dataset_id


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, "no columns"),
        ({"x": ColumnData("f32", (0,), b"")}, "at least 1"),
        ({"x": ColumnData("f32", (), b"abcd")}, "at least 1"),
        ({"x": ColumnData("f32", (1,), b"abc")}, "3 bytes"),
        ({"x": ColumnData("f33", (1,), b"abcd")}, "f33"),
        ({"../x": ColumnData("i32", (1,), b"abcd")}, "letters"),
        ({"x": ColumnData("f32", (1,), struct.pack("<f", float("nan")))}, "NaN"),
        ({"x": ColumnData("bool", (1,), b"\x02")}, "bool"),
        (
            {"x": ColumnData("u8", (1,), b"a"), "y": ColumnData("u8", (2,), b"ab")},
            "same number of rows",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, ColumnData], reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        build_dataset(columns, 4)


def test_a_missing_chunk_is_named() -> None:
    dataset = numbers(10)
    manifest = parse_manifest(dataset.manifest_bytes)
    with pytest.raises(DatasetError, match=r"chunk 2 .* is missing"):
        slice_rows(manifest, dict(list(by_digest(dataset).items())[:2]), [9])


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_does_not_exist_is_refused(row: int) -> None:
    dataset = numbers(10)
    with pytest.raises(DatasetError, match="does not exist"):
        slice_rows(parse_manifest(dataset.manifest_bytes), by_digest(dataset), [row])


def test_a_false_chunk_is_refused() -> None:
    dataset = numbers(10)
    manifest = parse_manifest(dataset.manifest_bytes)
    false = bytearray(dataset.chunks[0])
    false[-1] ^= 1
    with pytest.raises(DatasetError, match="not those of the manifest"):
        parse_chunk(manifest, 0, bytes(false))


def test_a_chunk_with_other_columns_than_promised_is_refused() -> None:
    other = write_tensors([TensorData("x", "f32", (4, 2), bytes(32))])
    dataset = numbers(4)
    manifest = parse_manifest(repacked(dataset, 4, [[blake3(other).digest(), len(other)]]))
    with pytest.raises(DatasetError, match="other columns"):
        parse_chunk(manifest, 0, other)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, "meshd.dataset.v2", "version"),
        (1, [["x", "f32", [2]], ["id", "i64", []]], "sorted"),
        (1, [["x", "f32", [2]], ["x", "f32", [2]]], "same name"),
        (1, [["x", "f32", [2], 1]], "parts of a column"),
        (1, [["x", "f32", [-2]]], "-2"),
        (1, [["x", "f32", [2.0]]], "2.0"),
        (1, [["x", "f32", {}]], "list"),
        (2, 0, "number of rows"),
        (2, True, "number of rows"),
        (2, 13, "chunks"),
        (3, 0, "rows per chunk"),
        (4, [[b"\0" * 31, 100]] * 3, "32 bytes"),
        (4, [], "chunks"),
        (4, [[b"\0" * 32, 7]] * 3, "length"),
    ],
)
def test_a_manifest_with_a_wrong_part_is_refused(at: int, value: object, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        parse_manifest(repacked(numbers(10), at, value))


def test_a_second_encoding_of_a_manifest_is_refused() -> None:
    data = numbers(10).manifest_bytes
    spelled_longer = b"\xdc\x00\x05" + data[1:]
    with pytest.raises(DatasetError, match="canonical"):
        parse_manifest(spelled_longer)
    with pytest.raises(DatasetError, match="left over"):
        parse_manifest(data + b"\xc0")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    with pytest.raises(DatasetError):
        parse_manifest(data)


# The safetensors form that chunks and weights share.

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensor_file(header: object, body: bytes = bytes(8), *, text: bytes | None = None) -> bytes:
    encoded = text if text is not None else json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + body


def test_tensors_come_back_in_one_order_whatever_order_they_were_given() -> None:
    parts = [
        TensorData("b", "u8", (3,), b"xyz"),
        TensorData("c", "f32", (2,), bytes(8)),
        TensorData("a", "i64", (), bytes(8)),
    ]
    data = write_tensors(parts)
    assert data == write_tensors(parts[::-1])
    assert [t.name for t in parse_tensors(data)] == ["a", "c", "b"]
    assert bytes(parse_tensors(data)[2].bytes_in(data)) == b"xyz"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims"),
        (tensor_file({"a": GOOD}) + b"x", "left over"),
        (tensor_file({"a": GOOD}, bytes(7)), "missing"),
        (tensor_file({"a": {**GOOD, "data_offsets": [1, 9]}}, bytes(9)), "gap"),
        (tensor_file({"a": GOOD, "b": GOOD}), "overlaps"),
        (tensor_file({"a": {**GOOD, "data_offsets": [0, 4]}}), "miss its size"),
        (tensor_file({"a": {**GOOD, "data_offsets": [8, 0]}}), "miss its size"),
        (tensor_file({"a": {**GOOD, "data_offsets": [True, 8]}}), "not two integers"),
        (tensor_file({"a": {**GOOD, "dtype": "F8"}}), "F8"),
        (tensor_file({"a": {**GOOD, "dtype": ["F32"]}}), "F32"),
        (tensor_file({"a": {**GOOD, "shape": [2.0]}}), "2.0"),
        (tensor_file({"a": {**GOOD, "more": 1}}), "exactly"),
        (tensor_file({"../a": GOOD}), "letters"),
        (tensor_file({"a..b": GOOD}), "letters"),
        (tensor_file({"": GOOD}), "characters"),
        (tensor_file({"__metadata__": {"a": "b"}}, b""), "exactly"),
        (tensor_file([1]), "not a JSON object"),
        (tensor_file({"a": GOOD}, struct.pack("<2f", 1, float("nan"))), "NaN"),
        (tensor_file({"a": GOOD}, struct.pack("<2f", 1, float("inf"))), "infinity"),
        (tensor_file({"b": {**GOOD, "data_offsets": [0, 8]}}, text=b'{"a":1,"a":2}'), "twice"),
        (tensor_file(None, text=b'{"a":NaN}'), "NaN"),
        (tensor_file(None, text=b'{"a":"\\ud800'), "JSON"),
        (tensor_file(None, text=b"\xff\xfe{}"), "JSON"),
        (tensor_file(None, text=b"[" * 100_000), "more than"),
        (tensor_file(None, text=b"{" * 100_000), "more than"),
        (tensor_file(None, text=b" " * 10_000 + b"{}", body=b""), "canonical"),
        (
            tensor_file(
                {
                    "b": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                    "a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]},
                },
                bytes(16),
            ),
            "canonical",
        ),
    ],
)
def test_safetensors_that_others_accept_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(TensorFileError, match=reason):
        parse_tensors(data)


def test_a_file_with_a_hundred_thousand_empty_tensors_is_refused() -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    with pytest.raises(TensorFileError):
        parse_tensors(tensor_file({f"t{at}": empty for at in range(100_000)}, b""))


def test_an_author_may_import_a_foreign_file_that_is_not_canonical() -> None:
    header = {"__metadata__": {"format": "pt"}, "a": GOOD}
    with pytest.raises(TensorFileError):
        parse_tensors(tensor_file(header))
    assert [t.name for t in parse_tensors(tensor_file(header), canonical=False)] == ["a"]


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_is_another_file_or_refused(at: int, value: int) -> None:
    data = bytearray(
        write_tensors([TensorData("a", "f32", (2,), bytes(8)), TensorData("b", "u8", (), b"x")])
    )
    data[at % len(data)] = value
    try:
        tensors = parse_tensors(bytes(data))
    except TensorFileError:
        return
    parts = [TensorData(t.name, t.dtype, t.shape, t.bytes_in(data)) for t in tensors]
    assert write_tensors(parts) == bytes(data)
