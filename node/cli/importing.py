"""Reads an author's own files as the columns of a dataset."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from meshd.node.workloads.datasets import ColumnData
from meshd.node.workloads.errors import DatasetError
from meshd.node.workloads.tensorfile import parse_tensors

_LONGEST_LINE: Final = 16 << 20


def read_columns(path: Path) -> dict[str, ColumnData]:
    """Return the columns in the file at *path*, by its ending: .safetensors, .npz or .jsonl.

    Raises DatasetError for another ending and for contents that are not columns of numbers;
    OSError if it cannot be read.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DatasetError(
            f"{path.name} is not a file that can be added: use one of {', '.join(_READERS)}"
        )
    return reader(path)


def _read_safetensors(path: Path) -> dict[str, ColumnData]:
    data = path.read_bytes()
    return {
        tensor.name: ColumnData(tensor.dtype, tensor.shape, tensor.bytes_in(data))
        for tensor in parse_tensors(data, canonical=False)
    }


def _read_npz(path: Path) -> dict[str, ColumnData]:
    import zipfile

    import numpy

    columns: dict[str, ColumnData] = {}
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                dtype = _NUMPY_DTYPES.get(array.dtype.name)
                if dtype is None:
                    raise DatasetError(
                        f"{path.name}: array {name!r} holds {array.dtype}: convert it to one of "
                        f"{', '.join(_NUMPY_DTYPES)}"
                    )
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                columns[name] = ColumnData(dtype, array.shape, little.tobytes())
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{path.name} is no archive of plain arrays: {error}: write it with numpy.savez"
        ) from error
    return columns


def _read_jsonl(path: Path) -> dict[str, ColumnData]:
    """One object a line, the same names in each; whole numbers become i64, others f32."""
    values: dict[str, list[Any]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    count = 0
    for count, row in enumerate(_json_rows(path), start=1):
        if count == 1:
            values = {name: [] for name in row}
        if row.keys() != values.keys():
            raise DatasetError(
                f"{path.name} line {count} has the keys {sorted(row)}, line 1 has {sorted(values)}"
            )
        for name, value in row.items():
            shape = _flatten(value, values[name], f"{path.name} line {count}, {name!r}")
            if shapes.setdefault(name, shape) != shape:
                raise DatasetError(
                    f"{path.name} line {count}: {name!r} has the shape {list(shape)}, in line 1 "
                    f"{list(shapes[name])}: pad the rows to equal shapes"
                )
    return {
        name: _packed(name, flat, (count, *shapes[name]), path) for name, flat in values.items()
    }


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{path.name} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DatasetError(f"{path.name} line {number} is not an object of columns")
            yield row


def _flatten(value: Any, flat: list[Any], where: str) -> tuple[int, ...]:
    """Append the numbers of nested lists to *flat* and return their shape."""
    if not isinstance(value, list):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DatasetError(f"{where} is {value!r:.40}: only numbers and lists of them")
        if not math.isfinite(value):
            raise DatasetError(f"{where} is {value}: only finite numbers are allowed")
        flat.append(value)
        return ()
    shapes = {_flatten(part, flat, where) for part in value}
    if len(shapes) > 1:
        raise DatasetError(f"{where} is a ragged list: pad its parts to equal lengths")
    return (len(value), *(shapes.pop() if shapes else ()))


def _packed(name: str, flat: list[Any], shape: tuple[int, ...], path: Path) -> ColumnData:
    is_float = any(isinstance(value, float) for value in flat)
    dtype, letter = ("f32", "f") if is_float else ("i64", "q")
    try:
        return ColumnData(dtype, shape, struct.pack(f"<{len(flat)}{letter}", *flat))
    except (struct.error, OverflowError) as error:
        raise DatasetError(f"{path.name}: {name!r} does not fit into {dtype}: {error}") from error


_NUMPY_DTYPES: Final = {
    "bool": "bool",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
}
_READERS: Final[dict[str, Callable[[Path], dict[str, ColumnData]]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".jsonl": _read_jsonl,
}
