"""Shape rules of layers: products, convolutions, pooling, normalisation, attention, losses."""

from collections.abc import Sequence

from meshd.node.workloads.shapes import broadcast, need, need_float, need_index
from meshd.node.workloads.tensors import Shape, TensorSpec


def linear(x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None) -> TensorSpec:
    """x W^T + b over the last dimension."""
    need(x.rank >= 1 and weight.rank == 2, f"{weight} is not a matrix to apply to {x}")
    need(x.shape[-1] == weight.shape[1], f"{x} does not fit the matrix {weight}")
    need(bias is None or bias.shape == (weight.shape[0],), f"{bias} is no bias of {weight}")
    _same_float(x, weight, bias)
    return TensorSpec(x.dtype, (*x.shape[:-1], weight.shape[0]))


def matmul(x: TensorSpec, other: TensorSpec) -> TensorSpec:
    """Matrix products, the dimensions before the last two broadcast."""
    _same_float(x, other)
    need(x.rank >= 1 and other.rank >= 1, "a number has no matrix product")
    inner = other.shape[-2] if other.rank > 1 else other.shape[0]
    need(x.shape[-1] == inner, f"{x} and {other} have no matrix product")
    batch = broadcast(x.shape[:-2], other.shape[:-2])
    rows = x.shape[-2:-1] if x.rank > 1 else ()
    columns = other.shape[-1:] if other.rank > 1 else ()
    return TensorSpec(x.dtype, (*batch, *rows, *columns))


def addmm(bias: TensorSpec, x: TensorSpec, other: TensorSpec) -> TensorSpec:
    """b + x W for matrices."""
    need(x.rank == other.rank == 2, f"{x} and {other} are not both matrices")
    result = matmul(x, other)
    _same_float(bias, x)
    fits = bias.rank <= 2 and broadcast(bias.shape, result.shape) == result.shape
    need(fits, f"{bias} cannot be added to {result}")
    return result


def embedding(weight: TensorSpec, indices: TensorSpec, padding: int) -> TensorSpec:
    """Rows of a matrix, chosen by indices."""
    need_float(weight)
    need_index(indices)
    need(weight.rank == 2, f"{weight} is not a table of vectors")
    need(-1 <= padding < weight.shape[0], f"padding index {padding} is outside {weight}")
    return TensorSpec(weight.dtype, (*indices.shape, weight.shape[1]))


def conv(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> TensorSpec:
    """Convolution over all dimensions after the second (one or two of them)."""
    _same_float(x, weight, bias)
    dims = x.rank - 2
    need(weight.rank == x.rank, f"{weight} is no kernel for {x}")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0)):
        fits = len(values) == dims and all(least <= value <= 1 << 16 for value in values)
        need(fits, f"{name} {list(values)} does not fit {dims} dimensions")
    fits = len(dilation) == dims and all(1 <= value <= 1 << 16 for value in dilation)
    need(fits, f"dilation {list(dilation)} does not fit {dims} dimensions")
    channels, out = x.shape[1], weight.shape[0]
    need(groups >= 1 and channels > 0 and out > 0, f"{groups} groups of {channels} channels")
    need(channels % groups == 0 and out % groups == 0, f"{groups} groups do not divide channels")
    need(weight.shape[1] == channels // groups, f"{weight} is no kernel for {x}")
    need(bias is None or bias.shape == (out,), f"{bias} is no bias of {weight}")
    sizes = [
        _windows(x.shape[2 + at], weight.shape[2 + at], stride[at], padding[at], dilation[at])
        for at in range(dims)
    ]
    return TensorSpec(x.dtype, (x.shape[0], out, *sizes))


def conv1d(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> TensorSpec:
    """Convolution of (rows, channels, length)."""
    need(x.rank == 3, f"{x} is not (rows, channels, length)")
    return conv(x, weight, bias, stride, padding, dilation, groups)


def conv2d(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> TensorSpec:
    """Convolution of (rows, channels, height, width)."""
    need(x.rank == 4, f"{x} is not (rows, channels, height, width)")
    return conv(x, weight, bias, stride, padding, dilation, groups)


def pool2d(
    x: TensorSpec,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> TensorSpec:
    """The mean of windows of (rows, channels, height, width)."""
    return max_pool2d(x, kernel, stride, padding, (1, 1), ceil_mode)


def max_pool2d(
    x: TensorSpec,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> TensorSpec:
    """The largest of windows of (rows, channels, height, width)."""
    need_float(x)
    need(x.rank == 4 and x.elements > 0, f"{x} is not (rows, channels, height, width)")
    parts = (kernel, stride, padding, dilation)
    need(all(len(part) == 2 for part in parts), "two windows' sizes, strides, paddings are needed")
    sizes: list[int] = []
    for at in range(2):
        size, step, border = kernel[at], stride[at], padding[at]
        fits = 1 <= size <= 1 << 16 and step >= 1 and 1 <= dilation[at] <= 1 << 16
        need(fits and 0 <= 2 * border <= size, f"window {size}, stride {step}, padding {border}")
        span = x.shape[2 + at] + 2 * border - dilation[at] * (size - 1) - 1
        need(span >= 0, f"a window of {size} does not fit {x}")
        count = (span + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= x.shape[2 + at] + border:
            count -= 1
        sizes.append(count)
    return TensorSpec(x.dtype, (*x.shape[:2], *sizes))


def adaptive_pool2d(x: TensorSpec, sizes: Sequence[int]) -> TensorSpec:
    """The mean of as many windows as asked for."""
    need_float(x)
    need(x.rank == 4 and min(x.shape[1:]) > 0, f"{x} is not (rows, channels, height, width)")
    need(len(sizes) == 2 and min(sizes) > 0, f"sizes {list(sizes)} are not two positive ones")
    return TensorSpec(x.dtype, (*x.shape[:2], *sizes))


def batch_norm(
    x: TensorSpec,
    weight: TensorSpec | None,
    bias: TensorSpec | None,
    mean: TensorSpec,
    variance: TensorSpec,
    epsilon: float,
) -> TensorSpec:
    """Normalisation by given statistics, one for each channel (second dimension)."""
    need(x.rank >= 2, f"{x} has no channels")
    _same_float(x, weight, bias, mean, variance)
    _of_shape((x.shape[1],), weight, bias, mean, variance)
    need(epsilon > 0, f"epsilon {epsilon} is not above 0")
    return x


def group_norm(
    x: TensorSpec,
    groups: int,
    weight: TensorSpec | None,
    bias: TensorSpec | None,
    epsilon: float,
) -> TensorSpec:
    """Normalisation within groups of channels."""
    need(x.rank >= 2 and groups >= 1, f"{x} has no {groups} groups of channels")
    need(x.shape[1] > 0 and x.shape[1] % groups == 0, f"{groups} groups do not divide {x}")
    _same_float(x, weight, bias)
    _of_shape((x.shape[1],), weight, bias)
    need(epsilon > 0, f"epsilon {epsilon} is not above 0")
    return x


def layer_norm(
    x: TensorSpec,
    shape: Sequence[int],
    weight: TensorSpec | None,
    bias: TensorSpec | None,
    epsilon: float,
) -> TensorSpec:
    """Normalisation over the last dimensions."""
    need(0 < len(shape) <= x.rank, f"{list(shape)} is not the end of {x}")
    need(x.shape[-len(shape) :] == tuple(shape), f"{list(shape)} is not the end of {x}")
    need(min(shape) > 0, f"{list(shape)} is empty")
    _same_float(x, weight, bias)
    _of_shape(tuple(shape), weight, bias)
    need(epsilon > 0, f"epsilon {epsilon} is not above 0")
    return x


def rms_norm(
    x: TensorSpec, shape: Sequence[int], weight: TensorSpec | None, epsilon: float | None
) -> TensorSpec:
    """Division by the root of the mean square over the last dimensions."""
    return layer_norm(x, shape, weight, None, 1.0 if epsilon is None else epsilon)


def attention(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    mask: TensorSpec | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> TensorSpec:
    """Scaled dot-product attention over (rows, heads, length, width).

    Keys and values must have one length and one batch: torch reads past the end of shorter
    values. With `grouped`, several query heads share one head of keys and values.
    """
    _same_float(query, key, value)
    need(query.rank == key.rank == value.rank >= 3, f"{query}, {key}, {value} differ in rank")
    need(key.shape[:-1] == value.shape[:-1], f"keys {key} and values {value} differ in length")
    need(query.shape[-1] == key.shape[-1], f"queries {query} and keys {key} differ in width")
    need(min(query.shape) > 0 and min(key.shape) > 0 and min(value.shape) > 0, "empty attention")
    if grouped:
        need(query.rank == 4, "grouped attention needs (rows, heads, length, width)")
        heads, shared = query.shape[1], key.shape[1]
        need(query.shape[0] == key.shape[0], f"queries {query} and keys {key} differ in rows")
        need(heads % shared == 0, f"{heads} heads do not share {shared} heads of keys")
    else:
        need(query.shape[:-2] == key.shape[:-2], f"queries {query}, keys {key} differ in batch")
    if mask is not None:
        need(not causal, "give a mask or causal, not both")
        need(mask.dtype in ("bool", query.dtype), f"the mask {mask} is neither bool nor float")
        scores = (*query.shape[:-1], key.shape[-2])
        fits = 2 <= mask.rank <= len(scores) and broadcast(mask.shape, scores) == scores
        need(fits, f"the mask {mask} does not fit scores {list(scores)}")
    need(scale is None or scale > 0, f"scale {scale} is not above 0")
    return TensorSpec(query.dtype, (*query.shape[:-1], value.shape[-1]))


def cross_entropy(
    x: TensorSpec,
    target: TensorSpec,
    weight: TensorSpec | None,
    reduction: str,
    ignored: int,
    smoothing: float,
) -> TensorSpec:
    """The loss of logits (rows, classes) against class numbers (rows)."""
    _same_float(x, weight)
    need(target.dtype == "i64", f"classes are {target.dtype}; i64 is allowed")
    need(x.rank == 2 and target.shape == x.shape[:1], f"{target} are not the classes of {x}")
    need(x.shape[0] > 0 and x.shape[1] > 0, f"{x} has no classes or no rows")
    _of_shape((x.shape[1],), weight)
    need(0 <= smoothing <= 1, f"smoothing {smoothing} is not between 0 and 1")
    return TensorSpec(x.dtype, target.shape if reduction == "none" else ())


def mse_loss(x: TensorSpec, target: TensorSpec, reduction: str) -> TensorSpec:
    """The mean square of differences."""
    _same_float(x, target)
    need(x.shape == target.shape, f"{x} and {target} differ in shape")
    return TensorSpec(x.dtype, x.shape if reduction == "none" else ())


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    need(1 <= kernel <= 1 << 16 and span >= 0, f"a kernel of {kernel} does not fit size {size}")
    return span // stride + 1


def _same_float(first: TensorSpec, *others: TensorSpec | None) -> None:
    need_float(first)
    for other in others:
        fits = other is None or other.dtype == first.dtype
        need(fits, f"{other} and {first} differ in dtype; cast one of them")


def _of_shape(shape: Shape, *specs: TensorSpec | None) -> None:
    for spec in specs:
        need(spec is None or spec.shape == shape, f"{spec} does not have shape {list(shape)}")
