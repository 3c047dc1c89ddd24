"""The numbers in a dataset's rows, as JSON shows them."""

from __future__ import annotations

import math
import struct
from typing import Any, Final

from meshd.node.workloads.datasetfile import DatasetFile
from meshd.node.workloads.datasets import chunks_of, parse_chunk
from meshd.node.workloads.tensors import Column

_LETTERS: Final = {
    "bool": "?",
    "u8": "B",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "f16": "e",
    "f32": "f",
    "f64": "d",
}


def rows_of(dataset: DatasetFile, start: int, stop: int) -> list[dict[str, Any]]:
    """Return rows [start, stop) as dicts of numbers and nested lists by column.

    Raises DatasetError for chunks that are not those of the manifest.
    """
    manifest = dataset.manifest
    found: list[dict[str, Any]] = []
    for chunk in chunks_of(manifest, min(start, stop), stop):
        columns = parse_chunk(manifest, chunk.index, dataset.read_chunk(chunk.index))
        for row in range(max(start, chunk.start), min(stop, chunk.stop)):
            within = row - chunk.start
            found.append(
                {
                    column.name: _value(
                        column,
                        columns[column.name][
                            within * column.row_bytes : (within + 1) * column.row_bytes
                        ],
                    )
                    for column in manifest.columns
                }
            )
    return found


def _value(column: Column, data: memoryview) -> Any:
    numbers = _numbers(column.dtype, data)
    for size in reversed(column.shape[1:]):
        count = len(numbers) // size if size else math.prod(column.shape[:-1])
        numbers = [numbers[at * size : (at + 1) * size] for at in range(count)]
    return numbers if column.shape else numbers[0]


def _numbers(dtype: str, data: memoryview) -> list[Any]:
    """Return packed little-endian numbers; bfloat16 is the upper half of a float."""
    if dtype == "bf16":
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        wide = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))
        return list(struct.unpack(f"<{len(halves)}f", wide))
    letter = _LETTERS[dtype]
    return list(struct.unpack(f"<{len(data) // struct.calcsize('<' + letter)}{letter}", data))
