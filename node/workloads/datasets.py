"""Datasets: an ordered set of row chunks, each content-addressed, and a manifest that binds them.

A chunk is a canonical safetensors file with one tensor per column, rows along the first
dimension. The manifest is canonical msgpack: version, columns sorted by name, rows, rows per
chunk, then (BLAKE3 of the bytes, length) for every chunk. The dataset's id is the BLAKE3 of its
manifest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgpack
from blake3 import blake3

from meshd.node.workloads.errors import DatasetError, RowsError, TensorFileError
from meshd.node.workloads.rows import MAX_COLUMNS, RowSchema
from meshd.node.workloads.strictpack import Reader, column_problem, packed_columns
from meshd.node.workloads.tensorfile import TensorData, parse_tensors, write_tensors
from meshd.node.workloads.tensors import Column, Shape, TensorSpec

VERSION: Final = "meshd.dataset.v1"
MAX_MANIFEST: Final = 8 << 20
MAX_CHUNKS: Final = 1 << 17
MAX_CHUNK_BYTES: Final = 1 << 30
MAX_ROWS: Final = 1 << 40

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ColumnData:
    """One column to import: all rows, little-endian and row-major; shape[0] is the row count."""

    dtype: str
    shape: Shape
    data: Buffer


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk as the manifest names it, and the rows [start, stop) that it holds."""

    index: int
    digest: bytes
    size: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The table of contents of a dataset."""

    columns: tuple[Column, ...]
    rows: int
    rows_per_chunk: int
    chunks: tuple[ChunkRef, ...]
    dataset_id: bytes

    @property
    def schema(self) -> RowSchema:
        """The columns, as packed rows have them."""
        return RowSchema(self.columns)

    @property
    def size(self) -> int:
        """Bytes of all chunks together."""
        return sum(chunk.size for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A manifest and the chunks it names, as bytes ready to be stored as blobs."""

    manifest_bytes: bytes
    chunks: list[bytes]

    @property
    def dataset_id(self) -> bytes:
        """BLAKE3 of the manifest."""
        return blake3(self.manifest_bytes).digest()


def build_dataset(columns: Mapping[str, ColumnData], rows_per_chunk: int) -> Dataset:
    """Cut `columns` into chunks of `rows_per_chunk` rows and describe them.

    Raises DatasetError when columns differ in length, a name, dtype or shape is out of bounds,
    the bytes do not fit the shape, or a number is NaN or infinite.
    """
    named = sorted(columns.items())
    described = tuple(Column(name, data.dtype, tuple(data.shape[1:])) for name, data in named)
    rows = _count_rows(named)
    _check_columns(described)
    if not 1 <= rows_per_chunk <= MAX_ROWS:
        raise DatasetError(f"rows per chunk is {rows_per_chunk}; it must be at least 1")
    views = [memoryview(data.data).cast("B") for _, data in named]
    for column, view in zip(described, views, strict=True):
        if len(view) != rows * column.row_bytes:
            raise DatasetError(
                f"column {column.name!r} has {len(view)} bytes, "
                f"{rows} rows of it need {rows * column.row_bytes}"
            )
    chunks: list[bytes] = []
    for start in range(0, rows, rows_per_chunk):
        stop = min(start + rows_per_chunk, rows)
        chunks.append(_write_chunk(described, views, start, stop))
    listed = [[blake3(chunk).digest(), len(chunk)] for chunk in chunks]
    manifest = msgpack.packb([VERSION, packed_columns(described), rows, rows_per_chunk, listed])
    parse_manifest(manifest)
    return Dataset(manifest, chunks)


def parse_manifest(data: bytes) -> Manifest:
    """Return what `data` describes. Raises DatasetError unless it is a canonical manifest."""
    if len(data) > MAX_MANIFEST:
        raise DatasetError(f"the manifest has {len(data)} bytes; at most {MAX_MANIFEST}")
    reader = Reader(bytes(data), DatasetError, "dataset manifest")
    reader.array(5, 5, "parts")
    if (version := reader.text("the version")) != VERSION:
        raise reader.fail(f"version {version!r} is not known; this meshd reads {VERSION}")
    columns = reader.columns(1, MAX_COLUMNS)
    rows = reader.integer(1, MAX_ROWS, "the number of rows")
    per_chunk = reader.integer(1, MAX_ROWS, "rows per chunk")
    expected = -(-rows // per_chunk)
    chunks: list[ChunkRef] = []
    for index in range(reader.array(1, MAX_CHUNKS, "chunks")):
        reader.array(2, 2, "parts of a chunk")
        digest = reader.blob(32, "a chunk's digest")
        size = reader.integer(8, MAX_CHUNK_BYTES, "a chunk's length")
        start = index * per_chunk
        chunks.append(ChunkRef(index, digest, size, start, min(start + per_chunk, rows)))
    reader.finish()
    if len(chunks) != expected:
        raise reader.fail(f"{len(chunks)} chunks; {rows} rows by {per_chunk} need {expected}")
    if list(columns) != sorted(columns, key=lambda column: column.name):
        raise reader.fail("the columns are not sorted by name")
    listed = [[chunk.digest, chunk.size] for chunk in chunks]
    if msgpack.packb([VERSION, packed_columns(columns), rows, per_chunk, listed]) != data:
        raise reader.fail("it is not in canonical form; build it with meshd again")
    return Manifest(columns, rows, per_chunk, tuple(chunks), blake3(data).digest())


def chunks_of(manifest: Manifest, start: int, stop: int) -> tuple[ChunkRef, ...]:
    """Return the chunks that hold rows [start, stop). Raises DatasetError out of range."""
    if not 0 <= start <= stop <= manifest.rows:
        raise DatasetError(f"rows {start} to {stop} are not within the {manifest.rows} rows")
    if start == stop:
        return ()
    per_chunk = manifest.rows_per_chunk
    return manifest.chunks[start // per_chunk : (stop - 1) // per_chunk + 1]


def parse_chunk(manifest: Manifest, index: int, data: bytes) -> dict[str, memoryview]:
    """Return the columns of a chunk by name, after checking digest, form, shapes and values."""
    chunk = manifest.chunks[index]
    if len(data) != chunk.size or blake3(data).digest() != chunk.digest:
        raise DatasetError(
            f"chunk {index} has {len(data)} bytes that are not those of the manifest"
        )
    try:
        tensors = parse_tensors(data)
    except TensorFileError as error:
        raise DatasetError(f"chunk {index}: {error}") from error
    rows = chunk.stop - chunk.start
    found = {tensor.name: tensor.spec for tensor in tensors}
    expected = {c.name: TensorSpec(c.dtype, (rows, *c.shape)) for c in manifest.columns}
    if found != expected:
        raise DatasetError(f"chunk {index} holds other columns than its manifest says")
    return {tensor.name: tensor.bytes_in(data) for tensor in tensors}


def slice_rows(manifest: Manifest, chunks: Mapping[bytes, bytes], indices: Iterable[int]) -> bytes:
    """Return the rows at `indices`, in that order, packed (see rows.py).

    `chunks` maps digests to bytes; those that the indices need must be there (`chunks_of`).
    Raises DatasetError when a chunk is missing or false, or a row does not exist.
    """
    schema = manifest.schema
    opened: dict[int, dict[str, memoryview]] = {}
    packed: list[memoryview] = []
    count = 0
    for row in indices:
        if not 0 <= row < manifest.rows:
            raise DatasetError(f"row {row} does not exist; the dataset has {manifest.rows} rows")
        index, within = divmod(row, manifest.rows_per_chunk)
        if index not in opened:
            digest = manifest.chunks[index].digest
            if digest not in chunks:
                raise DatasetError(f"chunk {index} ({digest.hex()[:16]}) is missing; fetch it")
            opened[index] = parse_chunk(manifest, index, chunks[digest])
        for column in schema.columns:
            size = column.row_bytes
            packed.append(opened[index][column.name][within * size : (within + 1) * size])
        count += 1
    return schema.header(count) + b"".join(packed)


def _count_rows(named: Sequence[tuple[str, ColumnData]]) -> int:
    if not named:
        raise DatasetError("the dataset has no columns; give at least one")
    lengths = {name: data.shape[0] if data.shape else 0 for name, data in named}
    rows = next(iter(lengths.values()))
    if len(set(lengths.values())) != 1 or rows < 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DatasetError(f"every column needs the same number of rows, at least 1 ({listed})")
    return rows


def _check_columns(columns: tuple[Column, ...]) -> None:
    for column in columns:
        if problem := column_problem(column):
            raise DatasetError(problem)
    try:
        RowSchema(columns)
    except RowsError as error:
        raise DatasetError(str(error)) from error


def _write_chunk(
    columns: Sequence[Column], views: Sequence[memoryview], start: int, stop: int
) -> bytes:
    tensors = [
        TensorData(
            column.name,
            column.dtype,
            (stop - start, *column.shape),
            view[start * column.row_bytes : stop * column.row_bytes],
        )
        for column, view in zip(columns, views, strict=True)
    ]
    try:
        return write_tensors(tensors)
    except TensorFileError as error:
        raise DatasetError(f"rows {start} to {stop}: {error}") from error
