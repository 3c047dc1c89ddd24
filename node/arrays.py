"""Between a researcher's tensors and the swarm's bytes; imports torch, on the author's machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from meshd.node.workloads.datasets import ColumnData
from meshd.node.workloads.errors import DatasetError
from meshd.node.workloads.export import export_program
from meshd.node.workloads.kernels import DTYPE_NAMES, TORCH_DTYPES
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.tensorfile import parse_tensors

_EXAMPLE_ROWS: Final = 3


def export_module(
    module: nn.Module,
    rows: Mapping[str, Tensor],
    outputs: Sequence[str] | None = None,
    *,
    training: bool = False,
) -> bytes:
    """Return the program of *module*, tried on the first of *rows*; raises ExportError.

    If there are fewer than an example takes, they are repeated.
    """
    example = {
        name: torch.cat([tensor[:_EXAMPLE_ROWS]] * _EXAMPLE_ROWS)[:_EXAMPLE_ROWS]
        for name, tensor in rows.items()
    }
    return export_program(module, example, outputs=outputs, training=training)


def columns_from_tensors(rows: Mapping[str, Tensor]) -> dict[str, ColumnData]:
    """Return *rows*, tensors of shape (rows, ...), as the columns of a dataset; DatasetError."""
    columns: dict[str, ColumnData] = {}
    for name, tensor in rows.items():
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise DatasetError(
                f"column {name!r} holds {tensor.dtype}: "
                f"convert it to one of {', '.join(TORCH_DTYPES)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        columns[name] = ColumnData(
            DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), flat.numpy().data
        )
    return columns


def tensors_from_rows(data: bytes) -> dict[str, Tensor]:
    """Return packed rows as tensors of shape (rows, ...) by the names of their columns."""
    rows = unpack(data)
    return {
        column.name: _tensor(rows.column(column.name), column.dtype, (rows.count, *column.shape))
        for column in rows.schema.columns
    }


def tensors_from_safetensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file by name, as `load_state_dict` takes them."""
    return {
        tensor.name: _tensor(bytes(tensor.bytes_in(data)), tensor.dtype, tensor.shape)
        for tensor in parse_tensors(data, canonical=False)
    }


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).reshape(shape)
