"""Shape rules of operators that move elements: views, joins, and choices by index."""

from collections.abc import Sequence

from meshd.node.workloads.shapes import Scalar, axes, axis, broadcast, need, need_index, promote
from meshd.node.workloads.tensors import TensorSpec


def reshape(x: TensorSpec, sizes: Sequence[int]) -> TensorSpec:
    """Another shape with as many elements; one size may be -1."""
    need(all(size >= -1 for size in sizes), f"sizes {list(sizes)} are negative")
    unknown = [at for at, size in enumerate(sizes) if size == -1]
    need(len(unknown) <= 1, f"sizes {list(sizes)} leave more than one open")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    result = list(sizes)
    if unknown:
        need(known > 0 and x.elements % known == 0, f"{x} cannot take shape {list(sizes)}")
        result[unknown[0]] = x.elements // known
    else:
        need(known == x.elements, f"{x} cannot take shape {list(sizes)}")
    return TensorSpec(x.dtype, tuple(result))


def transpose(x: TensorSpec, first: int, second: int) -> TensorSpec:
    """Two dimensions exchanged."""
    a, b = axis(x.rank, first), axis(x.rank, second)
    sizes = list(x.shape)
    if sizes:
        sizes[a], sizes[b] = sizes[b], sizes[a]
    return TensorSpec(x.dtype, tuple(sizes))


def permute(x: TensorSpec, dims: Sequence[int]) -> TensorSpec:
    """All dimensions in another order."""
    order = axes(x.rank, dims)
    need(len(order) == x.rank, f"{list(dims)} does not name all dimensions of {x}")
    return TensorSpec(x.dtype, tuple(x.shape[at] for at in order))


def unsqueeze(x: TensorSpec, dim: int) -> TensorSpec:
    """A dimension of size one more."""
    at = axis(x.rank + 1, dim)
    return TensorSpec(x.dtype, (*x.shape[:at], 1, *x.shape[at:]))


def squeeze(x: TensorSpec, dims: Sequence[int]) -> TensorSpec:
    """Without those of the named dimensions that have size one."""
    gone = {at for at in axes(x.rank, dims) if x.shape and x.shape[at] == 1}
    return TensorSpec(x.dtype, tuple(s for at, s in enumerate(x.shape) if at not in gone))


def expand(x: TensorSpec, sizes: Sequence[int]) -> TensorSpec:
    """Dimensions of size one repeated; -1 keeps a size."""
    ahead = len(sizes) - x.rank
    need(ahead >= 0, f"{x} cannot be expanded to {list(sizes)}")
    result: list[int] = []
    for at, size in enumerate(sizes):
        own = x.shape[at - ahead] if at >= ahead else None
        size = own if size == -1 and own is not None else size
        need(size >= 0 and own in (None, 1, size), f"{x} cannot be expanded to {list(sizes)}")
        result.append(size)
    return TensorSpec(x.dtype, tuple(result))


def repeat(x: TensorSpec, times: Sequence[int]) -> TensorSpec:
    """Copies side by side."""
    need(len(times) >= x.rank, f"{list(times)} names fewer dimensions than {x} has")
    need(all(count >= 1 for count in times), f"{list(times)} has counts below 1")
    sizes = (1,) * (len(times) - x.rank) + x.shape
    return TensorSpec(x.dtype, tuple(s * t for s, t in zip(sizes, times, strict=True)))


def slice_(x: TensorSpec, dim: int, start: int, end: int, step: int) -> TensorSpec:
    """Elements start to before end of one dimension; negative ends count from the back."""
    need(x.rank > 0 and step >= 1, f"{x} cannot be sliced with step {step}")
    at = axis(x.rank, dim)
    count = len(range(*slice(start, end, step).indices(x.shape[at])))
    return TensorSpec(x.dtype, (*x.shape[:at], count, *x.shape[at + 1 :]))


def select(x: TensorSpec, dim: int, index: int) -> TensorSpec:
    """One element of a dimension, which disappears."""
    need(x.rank > 0, "a number has no element to select")
    at = axis(x.rank, dim)
    need(-x.shape[at] <= index < x.shape[at], f"index {index} is outside dimension {at} of {x}")
    return TensorSpec(x.dtype, x.shape[:at] + x.shape[at + 1 :])


def cat(parts: Sequence[TensorSpec], dim: int) -> TensorSpec:
    """Arrays joined along a dimension."""
    need(len(parts) > 0 and parts[0].rank > 0, "there is nothing to join")
    at = axis(parts[0].rank, dim)
    first = parts[0].shape
    for part in parts:
        fits = part.rank == len(first) and all(
            size == first[other] for other, size in enumerate(part.shape) if other != at
        )
        need(fits, f"{part} cannot be joined to {parts[0]} along dimension {at}")
    total = sum(part.shape[at] for part in parts)
    return TensorSpec(promote(*parts), (*first[:at], total, *first[at + 1 :]))


def stack(parts: Sequence[TensorSpec], dim: int) -> TensorSpec:
    """Arrays of one shape along a new dimension."""
    need(len(parts) > 0, "there is nothing to stack")
    need(len({part.shape for part in parts}) == 1, "only arrays of one shape can be stacked")
    at = axis(parts[0].rank + 1, dim)
    shape = parts[0].shape
    return TensorSpec(promote(*parts), (*shape[:at], len(parts), *shape[at:]))


def split(x: TensorSpec, sizes: Sequence[int], dim: int) -> list[TensorSpec]:
    """One array cut along a dimension."""
    need(x.rank > 0, "a number cannot be split")
    at = axis(x.rank, dim)
    fits = all(size >= 0 for size in sizes) and sum(sizes) == x.shape[at]
    need(fits, f"sizes {list(sizes)} do not add up to dimension {at} of {x}")
    return [TensorSpec(x.dtype, (*x.shape[:at], size, *x.shape[at + 1 :])) for size in sizes]


def unbind(x: TensorSpec, dim: int) -> list[TensorSpec]:
    """All elements of a dimension, one by one."""
    need(x.rank > 0, "a number cannot be taken apart")
    at = axis(x.rank, dim)
    need(x.shape[at] <= 1024, f"{x} would come apart into more than 1024 pieces")
    return [TensorSpec(x.dtype, x.shape[:at] + x.shape[at + 1 :])] * x.shape[at]


def pad(x: TensorSpec, pads: Sequence[int], value: Scalar) -> TensorSpec:
    """A border of one value; pairs of widths from the last dimension backwards."""
    need(len(pads) % 2 == 0 and len(pads) // 2 <= x.rank, f"pads {list(pads)} do not fit {x}")
    need(all(width >= 0 for width in pads), f"pads {list(pads)} are negative; slice instead")
    need(promote(x, value) == x.dtype, f"{value!r} does not fit into {x.dtype}")
    sizes = list(x.shape)
    for at in range(len(pads) // 2):
        sizes[-1 - at] += pads[2 * at] + pads[2 * at + 1]
    return TensorSpec(x.dtype, tuple(sizes))


def gather(x: TensorSpec, dim: int, index: TensorSpec) -> TensorSpec:
    """Elements along a dimension, chosen by an array of indices."""
    need(index.dtype == "i64", f"indices are {index.dtype}; gather needs i64")
    need(x.rank == index.rank > 0, f"{index} does not index {x}: other number of dimensions")
    at = axis(x.rank, dim)
    for other, (size, bound) in enumerate(zip(index.shape, x.shape, strict=True)):
        need(other == at or size <= bound, f"{index} reaches beyond dimension {other} of {x}")
    return TensorSpec(x.dtype, index.shape)


def index(x: TensorSpec, indices: Sequence[TensorSpec | None]) -> TensorSpec:
    """Elements chosen by one array of indices for each of the named dimensions."""
    need(0 < len(indices) <= x.rank, f"{len(indices)} arrays of indices for {x}")
    named = [at for at, part in enumerate(indices) if part is not None]
    need(len(named) > 0, "no dimension is indexed")
    arrays = [part for part in indices if part is not None]
    for part in arrays:
        need_index(part)
    chosen = broadcast(*(part.shape for part in arrays))
    kept = [size for at, size in enumerate(x.shape) if at not in named]
    together = named[-1] - named[0] + 1 == len(named)
    ahead = named[0] if together else 0
    return TensorSpec(x.dtype, (*kept[:ahead], *chosen, *kept[ahead:]))


def index_select(x: TensorSpec, dim: int, index: TensorSpec) -> TensorSpec:
    """Slices of a dimension, chosen by a list of indices."""
    need_index(index)
    need(x.rank > 0 and index.rank == 1, f"{index} is not a list of indices into {x}")
    at = axis(x.rank, dim)
    return TensorSpec(x.dtype, (*x.shape[:at], index.shape[0], *x.shape[at + 1 :]))
