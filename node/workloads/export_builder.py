"""Collects the nodes of a program while an exported graph is read (author's side)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshd.node.workloads.errors import ExportError
from meshd.node.workloads.kernels import DTYPE_NAMES
from meshd.node.workloads.program import Argument, Node, Ref


@dataclass(frozen=True, slots=True)
class Traced:
    """A value of the graph being exported: its number, and what torch knows about it."""

    ref: Ref
    meta: torch.Tensor


@dataclass
class Builder:
    """Collects nodes in order and numbers their results."""

    first: int
    rows: Any
    """The symbol that stands for the number of rows in exported shapes."""
    rows_source: Ref
    nodes: list[Node] = field(default_factory=list)
    count: int = 0
    _rows_ref: Ref | None = None

    def add(self, operator: str, *arguments: object, results: int = 1) -> Ref:
        """Append a node and return its (first) result."""
        self.nodes.append(Node(operator, tuple(map(_argument, arguments)), results))
        self.count += results
        return Ref(self.first + self.count - results)

    def size(self, size: Any, *, open_ok: bool = False) -> Ref | int:
        """Return a size of an exported shape: a number, the rows, or -1 for an expression."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression == self.rows:
            if self._rows_ref is None:
                self._rows_ref = self.add("sym_size", self.rows_source, 0)
            return self._rows_ref
        if expression.is_number:
            return int(expression)
        if open_ok:
            return -1
        raise ExportError(
            f"a size is {expression}, computed from the number of rows; only the rows themselves "
            "and fixed sizes are allowed: reshape so that other sizes are fixed"
        )

    def sizes(self, shape: Sequence[Any], *, open_ok: bool = False) -> list[Ref | int]:
        """Return all sizes of a shape; with `open_ok` one of them may be an expression."""
        found = [self.size(size, open_ok=open_ok) for size in shape]
        if found.count(-1) > 1:
            raise ExportError("two sizes are computed from the number of rows; fix one of them")
        return found


Bound = dict[str, Any]
"""A call's arguments by their schema names."""
Conversion = Callable[[Builder, Bound, Any], Any]
"""From a call and what torch knows of its result to the value that stands for it."""


def _argument(value: object) -> Argument:
    if isinstance(value, Traced):
        return value.ref
    if isinstance(value, (list, tuple)):
        return tuple(_argument(part) for part in value)
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if value is None or isinstance(value, (Ref, bool, int, float, str)):
        return value
    raise ExportError(f"argument {value!r} has no place in a program")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the table's name of a dtype. Raises ExportError for those it does not have."""
    if dtype not in DTYPE_NAMES:
        raise ExportError(f"{dtype} is not a dtype of programs; use one of {list(DTYPE_NAMES)}")
    return DTYPE_NAMES[dtype]
