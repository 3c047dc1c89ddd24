"""Shape rules of reductions and of what runs along one dimension."""

from collections.abc import Sequence

from meshd.node.workloads.shapes import Scalar, axes, axis, is_float, need, need_float
from meshd.node.workloads.shapes_moved import cat
from meshd.node.workloads.tensors import Shape, TensorSpec


def reduced(x: TensorSpec, dims: Sequence[int], keepdim: bool) -> Shape:
    """Return the shape that is left when `dims` are reduced."""
    gone = set(axes(x.rank, dims))
    need(len(dims) > 0 or x.rank == 0, "no dimension is named; name all of them to reduce all")
    if keepdim:
        return tuple(1 if at in gone else size for at, size in enumerate(x.shape))
    return tuple(size for at, size in enumerate(x.shape) if at not in gone)


def total(x: TensorSpec, dims: Sequence[int], keepdim: bool) -> TensorSpec:
    """Sums; integers and bools become i64."""
    return TensorSpec(x.dtype if is_float(x) else "i64", reduced(x, dims, keepdim))


def float_reduction(x: TensorSpec, dims: Sequence[int], keepdim: bool) -> TensorSpec:
    """Something computed from floats over dimensions that are not empty."""
    need_float(x)
    _need_elements(x, dims)
    return TensorSpec(x.dtype, reduced(x, dims, keepdim))


def extreme(x: TensorSpec, dims: Sequence[int], keepdim: bool) -> TensorSpec:
    """The largest or smallest over dimensions that are not empty."""
    _need_elements(x, dims)
    return TensorSpec(x.dtype, reduced(x, dims, keepdim))


def truth_reduction(x: TensorSpec, dims: Sequence[int], keepdim: bool) -> TensorSpec:
    """Whether any or all are not zero."""
    return TensorSpec("bool", reduced(x, dims, keepdim))


def variance(x: TensorSpec, dims: Sequence[int], correction: int, keepdim: bool) -> TensorSpec:
    """Variance over dimensions with more elements than the correction."""
    need_float(x)
    need(x.rank > 0, "a number has no variance")
    count = 1
    for at in axes(x.rank, dims):
        count *= x.shape[at]
    need(
        0 <= correction < count and x.elements > 0, f"correction {correction} for {count} elements"
    )
    return TensorSpec(x.dtype, reduced(x, dims, keepdim))


def vector_norm(x: TensorSpec, order: Scalar, dims: Sequence[int], keepdim: bool) -> TensorSpec:
    """The norm of order p over dimensions that are not empty."""
    need(order > 0, f"the order of a norm is {order!r}; it must be above 0")
    return float_reduction(x, dims, keepdim)


def argmax(x: TensorSpec, dim: int, keepdim: bool) -> TensorSpec:
    """Where the largest lies along a dimension that is not empty."""
    need(x.dtype != "bool", "bools have no largest; cast them first")
    _need_elements(x, [dim])
    return TensorSpec("i64", reduced(x, [dim], keepdim))


def along(x: TensorSpec, dim: int) -> TensorSpec:
    """Floats computed along a dimension."""
    need_float(x)
    axis(x.rank, dim)
    return x


def cumsum(x: TensorSpec, dim: int) -> TensorSpec:
    """Running sums; integers and bools become i64."""
    axis(x.rank, dim)
    return x if is_float(x) else TensorSpec("i64", x.shape)


def diff(x: TensorSpec, dim: int, prepend: TensorSpec | None) -> TensorSpec:
    """Differences of neighbours along a dimension."""
    joined = x if prepend is None else cat([prepend, x], dim)
    need(joined.rank > 0 and joined.shape[axis(joined.rank, dim)] > 0, f"{x} has no neighbours")
    need(joined.dtype == x.dtype, "what is prepended has another dtype")
    at = axis(joined.rank, dim)
    return TensorSpec(
        joined.dtype, (*joined.shape[:at], joined.shape[at] - 1, *joined.shape[at + 1 :])
    )


def topk(x: TensorSpec, k: int, dim: int, largest: bool) -> list[TensorSpec]:
    """The k largest or smallest along a dimension, and where they lie."""
    need(x.rank > 0 and x.dtype != "bool", f"{x} has no largest elements")
    at = axis(x.rank, dim)
    need(0 <= k <= x.shape[at], f"{k} of the {x.shape[at]} elements of dimension {at}")
    shape = (*x.shape[:at], k, *x.shape[at + 1 :])
    return [TensorSpec(x.dtype, shape), TensorSpec("i64", shape)]


def _need_elements(x: TensorSpec, dims: Sequence[int]) -> None:
    for at in axes(x.rank, dims):
        need(not x.shape or x.shape[at] > 0, f"dimension {at} of {x} is empty")
