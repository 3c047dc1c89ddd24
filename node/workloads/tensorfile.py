"""The one canonical form of safetensors bytes, and a parser stricter than the library's.

Layout: u64le header length, a JSON header without white space, padded with spaces to a multiple
of eight, then the tensors without gaps, those with larger elements first, then by name.
Source: https://github.com/huggingface/safetensors (format section).
"""

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshd.node.workloads.errors import TensorFileError
from meshd.node.workloads.tensors import (
    DTYPES,
    SAFETENSORS_DTYPES,
    Shape,
    TensorSpec,
    name_problem,
    shape_problem,
    valid_numbers,
)

MAX_HEADER: Final = 2 << 20
MAX_TENSORS: Final = 4096

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor inside a file: where its bytes lie, counted from the file's first byte."""

    name: str
    dtype: str
    shape: Shape
    offset: int

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return TensorSpec(self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.spec.nbytes

    def bytes_in(self, data: Buffer) -> memoryview:
        """Its bytes in the file they were parsed from."""
        return memoryview(data)[self.offset : self.offset + self.nbytes]


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor to be written: little-endian, row-major, packed bytes."""

    name: str
    dtype: str
    shape: Shape
    data: Buffer


def write_tensors(tensors: Iterable[TensorData]) -> bytes:
    """Return the canonical file that holds `tensors`, whatever their order.

    Raises TensorFileError on a bad name, shape, dtype, size, a repeated name, NaN or infinity.
    """
    ordered = sorted(tensors, key=lambda t: file_order(t.dtype, t.name))
    header = _encode_header(ordered)
    parts: list[Buffer] = [struct.pack("<Q", len(header)), header]
    for tensor in ordered:
        _check_name_and_shape(tensor.name, tensor.dtype, tensor.shape)
        expected = TensorSpec(tensor.dtype, tensor.shape).nbytes
        if len(memoryview(tensor.data).cast("B")) != expected:
            raise TensorFileError(
                f"tensor {tensor.name!r} has {len(tensor.data)} bytes, its shape needs {expected}"
            )
        parts.append(tensor.data)
    written = b"".join(parts)
    parse_tensors(written)
    return written


def parse_tensors(data: Buffer, *, start: int = 0, canonical: bool = True) -> list[StoredTensor]:
    """Return the tensors of the safetensors file in `data` from byte `start` to the end.

    With `canonical=False` (author's side only) a foreign file's `__metadata__`, order and white
    space are accepted; sizes, offsets, names and values are checked all the same.
    Raises TensorFileError.
    """
    view = memoryview(data)[start:]
    entries, body = _read_header(view, canonical=canonical)
    tensors = _place(entries, start + body, start + len(view))
    if canonical:
        ordered = sorted(tensors, key=lambda t: file_order(t.dtype, t.name))
        if [t.name for t in ordered] != [t.name for t in tensors] or bytes(
            view[8:body]
        ) != _encode_header(tensors):
            raise TensorFileError("the header is not in canonical form; write it with meshd again")
    for tensor in tensors:
        if not valid_numbers(tensor.bytes_in(data), tensor.dtype):
            raise TensorFileError(
                f"tensor {tensor.name!r} contains NaN, infinity or a bool that is neither 0 nor 1"
            )
    return tensors


def _read_header(view: memoryview, *, canonical: bool) -> tuple[dict[str, Any], int]:
    if len(view) < 8:
        raise TensorFileError(f"{len(view)} bytes are too few for a safetensors file")
    (length,) = struct.unpack_from("<Q", view)
    if not 2 <= length <= min(MAX_HEADER, len(view) - 8):
        raise TensorFileError(
            f"the header claims {length} bytes; at most {MAX_HEADER} and no more than the file"
        )
    text = bytes(view[8 : 8 + length])
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b"[") > 2 * MAX_TENSORS + 2:
        raise TensorFileError(f"the header lists more than {MAX_TENSORS} tensors; use fewer")
    try:
        entries = json.loads(
            text.decode("utf-8", "strict"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"the header is not JSON that can be read: {error}") from error
    if not isinstance(entries, dict):
        raise TensorFileError("the header is not a JSON object")
    if not canonical:
        entries.pop("__metadata__", None)
    return entries, 8 + length


def _place(entries: dict[str, Any], body: int, end: int) -> list[StoredTensor]:
    found: list[StoredTensor] = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise TensorFileError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        shape, offsets = entry["shape"], entry["data_offsets"]
        if dtype is None or not isinstance(shape, list) or not isinstance(offsets, list):
            raise TensorFileError(
                f"tensor {name!r} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}"
            )
        _check_name_and_shape(name, dtype, shape)
        if len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
            raise TensorFileError(f"tensor {name!r} has offsets {offsets!r}, not two integers")
        begin, stop = offsets
        if begin < 0 or stop - begin != TensorSpec(dtype, tuple(shape)).nbytes:
            raise TensorFileError(f"tensor {name!r} has offsets {offsets!r} that miss its size")
        found.append(StoredTensor(name, dtype, tuple(shape), body + begin))
    found.sort(key=lambda t: (t.offset, t.nbytes))
    at = body
    for tensor in found:
        if tensor.offset != at:
            raise TensorFileError(f"tensor {tensor.name!r} leaves a gap or overlaps another")
        at += tensor.nbytes
    if at != end:
        raise TensorFileError(f"{end - at} bytes are missing or left over after the last tensor")
    # Empty tensors share an offset: the order inside the file is then the canonical one.
    return sorted(found, key=lambda t: (t.offset, t.nbytes, file_order(t.dtype, t.name)))


def _check_name_and_shape(name: str, dtype: str, shape: Sequence[object]) -> None:
    if problem := name_problem(name):
        raise TensorFileError(f"tensor name {name[:80]!r}: {problem}")
    if dtype not in DTYPES:
        raise TensorFileError(f"tensor {name!r} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if problem := shape_problem(shape):
        raise TensorFileError(f"tensor {name!r}: {problem}")


def _encode_header(tensors: Sequence[TensorData] | Sequence[StoredTensor]) -> bytes:
    entries: dict[str, object] = {}
    at = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise TensorFileError(f"tensor {tensor.name!r} appears twice; names are unique")
        if tensor.dtype not in DTYPES:
            raise TensorFileError(f"tensor {tensor.name!r} has unknown dtype {tensor.dtype!r}")
        stop = at + TensorSpec(tensor.dtype, tensor.shape).nbytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype].safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    if len(entries) > MAX_TENSORS:
        raise TensorFileError(f"{len(entries)} tensors; at most {MAX_TENSORS} fit in a file")
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def file_order(dtype: str, name: str) -> tuple[int, str]:
    """Return the sort key of a tensor in a file: larger elements first, then by name."""
    size = DTYPES[dtype].size if dtype in DTYPES else 0
    return (-size, name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TensorFileError(f"key {twice[:80]!r} appears twice in the header; keys are unique")
    return entries


def _refuse_constant(text: str) -> float:
    raise TensorFileError(f"the header contains {text}, which is not JSON")
