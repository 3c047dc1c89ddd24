"""The one table of operators: arguments, shape rule and cost of each, without any tensor library.

A compute unit is one floating-point operation as counted here, an integer that everybody
computes alike from program and shapes. In the formulas n is the number of elements of the
result, m that of the first array.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshd.node.workloads import shapes, shapes_layers, shapes_moved, shapes_reduced
from meshd.node.workloads.tensors import TensorSpec

CostFunction = Callable[[Sequence[Any], Sequence[TensorSpec]], int]


@dataclass(frozen=True, slots=True)
class Cost:
    """How many floating-point operations an operator counts for: formula in words and in code."""

    formula: str
    count: CostFunction


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument: its name and kind.

    Kinds: tensor, tensor?, tensors, tensors? (a list with gaps), operand (array or number), int,
    ints, float, float?, scalar, scalar?, bool, dtype, or words separated by `|`. A `?` allows
    nothing. Where int or ints is allowed, a value made by `sym_size` is too.
    """

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Operator:
    """An entry of the table."""

    name: str
    parameters: tuple[Parameter, ...]
    rule: Callable[..., TensorSpec | list[TensorSpec]]
    cost: Cost
    view: bool
    """Whether the result may share the memory of its first argument."""
    extra: CostFunction
    """How many elements a kernel may keep besides its arguments and results."""


FREE: Final = Cost("0", lambda args, outs: 0)


def _each(times: int) -> Cost:
    text = "n" if times == 1 else f"{times}n"
    return Cost(text, lambda args, outs: times * sum(out.elements for out in outs))


def _source(times: int) -> Cost:
    text = "m" if times == 1 else f"{times}m"
    return Cost(text, lambda args, outs: times * int(args[0].elements))


def _product(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    return 2 * outs[0].elements * int(args[0].shape[-1])


def _linear(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    return _product(args, outs) + (outs[0].elements if args[2] is not None else 0)


def _addmm(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    return _product(args[1:], outs) + outs[0].elements


def _conv(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    window: int = math.prod(args[1].shape[1:])
    return outs[0].elements * (2 * window + (1 if args[2] is not None else 0))


def _pool(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    window: int = math.prod(args[1])
    return outs[0].elements * window


def _attention(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    query, key, value = args[:3]
    scores: int = math.prod(query.shape[:-1]) * key.shape[-2]
    return scores * (2 * int(query.shape[-1]) + 2 * int(value.shape[-1]) + 5)


def _no_extra(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    return 0


def _scores(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    """Scores and their softmax, and keys and values repeated for the heads that share them."""
    query, key, value = args[:3]
    heads: int = math.prod(query.shape[:-2]) * key.shape[-2]
    return 2 * heads * int(query.shape[-2]) + heads * int(key.shape[-1] + value.shape[-1])


def _columns(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    """One row's windows side by side, and everything once more in another layout."""
    one: int = math.prod(outs[0].shape[2:]) * math.prod(args[1].shape[1:])
    return one + outs[0].elements + int(args[0].elements + args[1].elements)


def _copies(args: Sequence[Any], outs: Sequence[TensorSpec]) -> int:
    """Both factors repeated for every matrix of the result."""
    x, other = args
    batch = math.prod(outs[0].shape[:-2])
    return batch * int(math.prod(x.shape[-2:]) + math.prod(other.shape[-2:]))


EACH, MOVED, READ = _each(1), _each(1), _source(1)
PRODUCT = Cost("2nk, k the common dimension", _product)
LINEAR = Cost("2nk, k the common dimension, + n with a bias", _linear)
ADDMM = Cost("2nk + n, k the common dimension", _addmm)
CONV = Cost("2nw, w the elements of one kernel, + n with a bias", _conv)
POOL = Cost("nw, w the elements of a window", _pool)
ATTENTION = Cost("s(2e + 2v + 5), s the scores, e and v the widths of keys, values", _attention)
_REDUCTION = "none|mean|sum"
_WINDOWS = "stride:ints padding:ints dilation:ints"
_NORM = "weight:tensor? bias:tensor?"


def _op(
    name: str,
    parameters: str,
    rule: Callable[..., TensorSpec | list[TensorSpec]],
    cost: Cost,
    view: bool = False,
    extra: CostFunction = _no_extra,
) -> Operator:
    pairs = (part.split(":") for part in parameters.split())
    described = tuple(Parameter(name, kind) for name, kind in pairs)
    return Operator(name, described, rule, cost, view, extra)


def _ops(names: str, parameters: str, rule: Callable[..., Any], cost: Cost) -> list[Operator]:
    return [_op(name, parameters, rule, cost) for name in names.split()]


_ALL: Final = [
    # Element by element.
    _op("add", "x:tensor other:operand alpha:scalar", shapes.combine_scaled, EACH),
    _op("sub", "x:tensor other:operand alpha:scalar", shapes.subtract, EACH),
    _op("mul", "x:tensor other:operand", shapes.combine, EACH),
    _op("pow", "x:tensor exponent:operand", shapes.power, EACH),
    *_ops("maximum minimum", "x:tensor other:tensor", shapes.combine_two_arrays, EACH),
    _op("div", "x:tensor other:operand rounding:none|floor|trunc", shapes.divide, EACH),
    *_ops("eq ne lt le gt ge", "x:tensor other:operand", shapes.compare, EACH),
    *_ops("logical_and logical_or", "x:tensor other:tensor", shapes.logical, EACH),
    _op("logical_not", "x:tensor", shapes.same_truth, EACH),
    *_ops("bitwise_and bitwise_or", "x:tensor other:operand", shapes.bitwise, EACH),
    _op("bitwise_not", "x:tensor", shapes.bitwise_single, EACH),
    *_ops("neg abs relu", "x:tensor", shapes.same_number, EACH),
    *_ops(
        "exp log sqrt rsqrt reciprocal tanh sigmoid sin cos erf", "x:tensor", shapes.to_float, EACH
    ),
    _op("silu", "x:tensor", shapes.float_only, _each(4)),
    _op("gelu", "x:tensor approximate:none|tanh", shapes.float_only, _each(8)),
    _op("leaky_relu", "x:tensor slope:float", shapes.float_only, _each(2)),
    _op("softplus", "x:tensor beta:float threshold:float", shapes.float_only, _each(4)),
    _op("clamp", "x:tensor low:scalar? high:scalar?", shapes.clamp, _each(2)),
    _op("where", "condition:tensor x:operand other:operand", shapes.where, EACH),
    _op("masked_fill", "x:tensor mask:tensor value:scalar", shapes.masked_fill, EACH),
    *_ops("tril triu", "x:tensor diagonal:int", shapes.triangle, EACH),
    _op("cast", "x:tensor dtype:dtype", shapes.cast, MOVED),
    # Made from nothing.
    _op("arange", "start:int end:int step:int dtype:dtype", shapes.arange, EACH),
    _op("full", "sizes:ints value:scalar dtype:dtype", shapes.full, EACH),
    # Moved.
    _op("reshape", "x:tensor sizes:ints", shapes_moved.reshape, MOVED, view=True),
    _op("transpose", "x:tensor first:int second:int", shapes_moved.transpose, FREE, view=True),
    _op("permute", "x:tensor dims:ints", shapes_moved.permute, FREE, view=True),
    _op("unsqueeze", "x:tensor dim:int", shapes_moved.unsqueeze, FREE, view=True),
    _op("squeeze", "x:tensor dims:ints", shapes_moved.squeeze, FREE, view=True),
    _op("expand", "x:tensor sizes:ints", shapes_moved.expand, FREE, view=True),
    _op(
        "slice", "x:tensor dim:int start:int end:int step:int", shapes_moved.slice_, FREE, view=True
    ),
    _op("select", "x:tensor dim:int index:int", shapes_moved.select, FREE, view=True),
    _op("split", "x:tensor sizes:ints dim:int", shapes_moved.split, FREE, view=True),
    _op("unbind", "x:tensor dim:int", shapes_moved.unbind, FREE, view=True),
    _op("detach", "x:tensor", shapes.same, FREE, view=True),
    _op("contiguous", "x:tensor", shapes.same, MOVED, view=True),
    _op("clone", "x:tensor", shapes.same, MOVED),
    _op("cat", "parts:tensors dim:int", shapes_moved.cat, MOVED),
    _op("stack", "parts:tensors dim:int", shapes_moved.stack, MOVED),
    _op("repeat", "x:tensor times:ints", shapes_moved.repeat, MOVED),
    _op("pad", "x:tensor pads:ints value:scalar", shapes_moved.pad, MOVED),
    _op("gather", "x:tensor dim:int index:tensor", shapes_moved.gather, MOVED),
    _op("index", "x:tensor indices:tensors?", shapes_moved.index, MOVED),
    _op("index_select", "x:tensor dim:int index:tensor", shapes_moved.index_select, MOVED),
    _op("embedding", "weight:tensor indices:tensor padding:int", shapes_layers.embedding, MOVED),
    # Reduced.
    _op("sum", "x:tensor dims:ints keepdim:bool", shapes_reduced.total, READ),
    _op("mean", "x:tensor dims:ints keepdim:bool", shapes_reduced.float_reduction, READ),
    *_ops("amax amin", "x:tensor dims:ints keepdim:bool", shapes_reduced.extreme, READ),
    *_ops("any all", "x:tensor dims:ints keepdim:bool", shapes_reduced.truth_reduction, READ),
    _op("argmax", "x:tensor dim:int keepdim:bool", shapes_reduced.argmax, READ),
    _op(
        "var",
        "x:tensor dims:ints correction:int keepdim:bool",
        shapes_reduced.variance,
        _source(4),
    ),
    _op(
        "vector_norm",
        "x:tensor order:scalar dims:ints keepdim:bool",
        shapes_reduced.vector_norm,
        _source(2),
    ),
    _op("logsumexp", "x:tensor dims:ints keepdim:bool", shapes_reduced.float_reduction, _source(4)),
    *_ops("softmax log_softmax", "x:tensor dim:int", shapes_reduced.along, _each(5)),
    _op("cumsum", "x:tensor dim:int", shapes_reduced.cumsum, EACH),
    _op("diff", "x:tensor dim:int prepend:tensor?", shapes_reduced.diff, EACH),
    _op("topk", "x:tensor k:int dim:int largest:bool", shapes_reduced.topk, _source(8)),
    # Layers.
    _op("linear", "x:tensor weight:tensor bias:tensor?", shapes_layers.linear, LINEAR),
    _op("matmul", "x:tensor other:tensor", shapes_layers.matmul, PRODUCT, extra=_copies),
    _op("addmm", "bias:tensor x:tensor other:tensor", shapes_layers.addmm, ADDMM),
    _op(
        "conv1d",
        f"x:tensor weight:tensor bias:tensor? {_WINDOWS} groups:int",
        shapes_layers.conv1d,
        CONV,
        extra=_columns,
    ),
    _op(
        "conv2d",
        f"x:tensor weight:tensor bias:tensor? {_WINDOWS} groups:int",
        shapes_layers.conv2d,
        CONV,
        extra=_columns,
    ),
    _op(
        "max_pool2d",
        f"x:tensor kernel:ints {_WINDOWS} ceil_mode:bool",
        shapes_layers.max_pool2d,
        POOL,
    ),
    _op(
        "avg_pool2d",
        "x:tensor kernel:ints stride:ints padding:ints ceil_mode:bool count_padding:bool",
        lambda x, kernel, stride, padding, ceil_mode, count_padding: shapes_layers.pool2d(
            x, kernel, stride, padding, ceil_mode
        ),
        POOL,
    ),
    _op("adaptive_avg_pool2d", "x:tensor sizes:ints", shapes_layers.adaptive_pool2d, READ),
    _op(
        "batch_norm",
        f"x:tensor {_NORM} mean:tensor variance:tensor epsilon:float",
        shapes_layers.batch_norm,
        _each(4),
    ),
    _op(
        "group_norm",
        f"x:tensor groups:int {_NORM} epsilon:float",
        shapes_layers.group_norm,
        _each(8),
    ),
    _op(
        "layer_norm",
        f"x:tensor shape:ints {_NORM} epsilon:float",
        shapes_layers.layer_norm,
        _each(8),
    ),
    _op(
        "rms_norm",
        "x:tensor shape:ints weight:tensor? epsilon:float?",
        shapes_layers.rms_norm,
        _each(5),
    ),
    _op(
        "attention",
        "query:tensor key:tensor value:tensor mask:tensor? causal:bool scale:float? grouped:bool",
        shapes_layers.attention,
        ATTENTION,
        extra=_scores,
    ),
    _op(
        "cross_entropy",
        f"x:tensor target:tensor weight:tensor? reduction:{_REDUCTION} ignored:int smoothing:float",
        shapes_layers.cross_entropy,
        _source(6),
    ),
    _op(
        "mse_loss",
        f"x:tensor target:tensor reduction:{_REDUCTION}",
        shapes_layers.mse_loss,
        _source(3),
    ),
]

OPERATORS: Final = {operator.name: operator for operator in _ALL}
SYM_SIZE: Final = "sym_size"
"""The only operator whose result is an integer: the size of one dimension; it costs nothing."""
