"""Which ATen overload computes each operator of the table: named one by one, never looked up.

Imports torch; only executors, authors and tests load it. Indices are checked here, before the
kernel sees them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from meshd.node.workloads.errors import ProgramError

_aten: Final = torch.ops.aten

Kernel = Callable[..., Any]

TORCH_DTYPES: Final = {
    "bool": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
REDUCTIONS: Final = {"none": 0, "mean": 1, "sum": 2}


def _either(array: Kernel, number: Kernel) -> Kernel:
    """One overload for an array as second operand, another one for a number."""

    def kernel(x: Tensor, other: Tensor | float) -> Any:
        return array(x, other) if isinstance(other, Tensor) else number(x, other)

    return kernel


def _scaled(overload: Kernel) -> Kernel:
    def kernel(x: Tensor, other: Any, alpha: float) -> Any:
        return overload(x, other, alpha=alpha)

    return kernel


def _div(x: Tensor, other: Any, rounding: str) -> Any:
    if rounding == "none":
        return _aten.div.Tensor(x, other)
    return _aten.div.Tensor_mode(x, other, rounding_mode=rounding)


def _where(condition: Tensor, x: Any, other: Any) -> Any:
    match isinstance(x, Tensor), isinstance(other, Tensor):
        case True, True:
            return _aten.where.self(condition, x, other)
        case True, False:
            return _aten.where.ScalarOther(condition, x, other)
        case False, True:
            return _aten.where.ScalarSelf(condition, x, other)
        case _:
            return _aten.where.Scalar(condition, x, other)


def _check_indices(indices: Tensor, size: int, *, negative: bool = False) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < (-size if negative else 0) or high >= size:
        raise ProgramError(f"indices from {low} to {high} do not fit a dimension of size {size}")


def _embedding(weight: Tensor, indices: Tensor, padding: int) -> Any:
    _check_indices(indices, weight.shape[0])
    return _aten.embedding.default(weight, indices, padding)


def _gather(x: Tensor, dim: int, index: Tensor) -> Any:
    _check_indices(index, x.shape[dim])
    return _aten.gather.default(x, dim, index)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    for dim, index in enumerate(indices):
        if index is not None:
            _check_indices(index, x.shape[dim], negative=True)
    return _aten.index.Tensor(x, indices)


def _index_select(x: Tensor, dim: int, index: Tensor) -> Any:
    _check_indices(index, x.shape[dim])
    return _aten.index_select.default(x, dim, index)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignored: int, smoothing: float
) -> Any:
    _check_indices(target[target != ignored], x.shape[1])
    return _aten.cross_entropy_loss.default(
        x, target, weight, REDUCTIONS[reduction], ignored, smoothing
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Any:
    return _aten.scaled_dot_product_attention.default(
        query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


KERNELS: Final[dict[str, Kernel]] = {
    "add": _scaled(_aten.add.Tensor),
    "sub": _scaled(_aten.sub.Tensor),
    "mul": _aten.mul.Tensor,
    "pow": _either(_aten.pow.Tensor_Tensor, _aten.pow.Tensor_Scalar),
    "maximum": _aten.maximum.default,
    "minimum": _aten.minimum.default,
    "div": _div,
    "eq": _either(_aten.eq.Tensor, _aten.eq.Scalar),
    "ne": _either(_aten.ne.Tensor, _aten.ne.Scalar),
    "lt": _either(_aten.lt.Tensor, _aten.lt.Scalar),
    "le": _either(_aten.le.Tensor, _aten.le.Scalar),
    "gt": _either(_aten.gt.Tensor, _aten.gt.Scalar),
    "ge": _either(_aten.ge.Tensor, _aten.ge.Scalar),
    "logical_and": _aten.logical_and.default,
    "logical_or": _aten.logical_or.default,
    "logical_not": _aten.logical_not.default,
    "bitwise_and": _either(_aten.bitwise_and.Tensor, _aten.bitwise_and.Scalar),
    "bitwise_or": _either(_aten.bitwise_or.Tensor, _aten.bitwise_or.Scalar),
    "bitwise_not": _aten.bitwise_not.default,
    "neg": _aten.neg.default,
    "abs": _aten.abs.default,
    "relu": _aten.relu.default,
    "exp": _aten.exp.default,
    "log": _aten.log.default,
    "sqrt": _aten.sqrt.default,
    "rsqrt": _aten.rsqrt.default,
    "reciprocal": _aten.reciprocal.default,
    "tanh": _aten.tanh.default,
    "sigmoid": _aten.sigmoid.default,
    "sin": _aten.sin.default,
    "cos": _aten.cos.default,
    "erf": _aten.erf.default,
    "silu": _aten.silu.default,
    "gelu": lambda x, approximate: _aten.gelu.default(x, approximate=approximate),
    "leaky_relu": _aten.leaky_relu.default,
    "softplus": _aten.softplus.default,
    "clamp": _aten.clamp.default,
    "where": _where,
    "masked_fill": _aten.masked_fill.Scalar,
    "tril": _aten.tril.default,
    "triu": _aten.triu.default,
    "cast": lambda x, dtype: _aten.to.dtype(x, TORCH_DTYPES[dtype]),
    "arange": lambda start, end, step, dtype: _aten.arange.start_step(
        start, end, step, dtype=TORCH_DTYPES[dtype]
    ),
    "full": lambda sizes, value, dtype: _aten.full.default(sizes, value, dtype=TORCH_DTYPES[dtype]),
    "reshape": _aten.reshape.default,
    "transpose": _aten.transpose.int,
    "permute": _aten.permute.default,
    "unsqueeze": _aten.unsqueeze.default,
    "squeeze": _aten.squeeze.dims,
    "expand": _aten.expand.default,
    "slice": _aten.slice.Tensor,
    "select": _aten.select.int,
    "split": _aten.split_with_sizes.default,
    "unbind": _aten.unbind.int,
    "detach": _aten.detach.default,
    "contiguous": _aten.contiguous.default,
    "clone": _aten.clone.default,
    "cat": _aten.cat.default,
    "stack": _aten.stack.default,
    "repeat": _aten.repeat.default,
    "pad": _aten.constant_pad_nd.default,
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "embedding": _embedding,
    "sum": _aten.sum.dim_IntList,
    "mean": _aten.mean.dim,
    "amax": _aten.amax.default,
    "amin": _aten.amin.default,
    "any": _aten.any.dims,
    "all": _aten.all.dims,
    "argmax": _aten.argmax.default,
    "var": lambda x, dims, correction, keepdim: _aten.var.correction(
        x, dims, correction=correction, keepdim=keepdim
    ),
    "vector_norm": _aten.linalg_vector_norm.default,
    "logsumexp": _aten.logsumexp.default,
    "softmax": _aten.softmax.int,
    "log_softmax": _aten.log_softmax.int,
    "cumsum": _aten.cumsum.default,
    "diff": lambda x, dim, prepend: _aten.diff.default(x, 1, dim, prepend, None),
    "topk": _aten.topk.default,
    "linear": _aten.linear.default,
    "matmul": _aten.matmul.default,
    "addmm": _aten.addmm.default,
    "conv1d": _aten.conv1d.default,
    "conv2d": _aten.conv2d.default,
    "max_pool2d": _aten.max_pool2d.default,
    "avg_pool2d": _aten.avg_pool2d.default,
    "adaptive_avg_pool2d": _aten.adaptive_avg_pool2d.default,
    "batch_norm": lambda x, weight, bias, mean, variance, epsilon: _aten.batch_norm.default(
        x, weight, bias, mean, variance, False, 0.0, epsilon, False
    ),
    "group_norm": _aten.group_norm.default,
    "layer_norm": _aten.layer_norm.default,
    "rms_norm": _aten.rms_norm.default,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "mse_loss": lambda x, target, reduction: _aten.mse_loss.default(
        x, target, REDUCTIONS[reduction]
    ),
}
