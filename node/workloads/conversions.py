"""How each exported ATen overload is spelled in the table of operators (author's side).

A conversion gets the call's arguments by their schema names and a `Builder`, and returns the
value that stands for the result. What has no conversion cannot be exported.
"""

from typing import Any, Final

import torch

from meshd.node.workloads import conversions_layers as layers
from meshd.node.workloads.errors import ExportError
from meshd.node.workloads.export_builder import Bound, Builder, Conversion
from meshd.node.workloads.program import Ref

END: Final = (1 << 63) - 1


def _direct(operator: str, *names: str, **fixed: object) -> Conversion:
    """The same operator with the schema's arguments `names`, in the table's order."""

    def convert(build: Builder, call: Bound, meta: Any) -> Ref:
        for name, value in fixed.items():
            if call[name] != value:
                raise ExportError(f"{operator} with {name} = {call[name]!r} is not in the table")
        return build.add(operator, *(call[name] for name in names))

    return convert


def _floats(operator: str, *names: str) -> Conversion:
    """As `_direct`, numbers after the first argument made floats."""

    def convert(build: Builder, call: Bound, meta: Any) -> Ref:
        return build.add(operator, call["self"], *(float(call[name]) for name in names))

    return convert


def _same(build: Builder, call: Bound, meta: Any) -> Any:
    return call["self"]


def _rounded(build: Builder, call: Bound, meta: Any) -> Ref:
    return build.add("div", call["self"], call["other"], call.get("rounding_mode") or "none")


def _rsub(build: Builder, call: Bound, meta: Any) -> Ref:
    if call["alpha"] != 1:
        raise ExportError("rsub with alpha is not in the table; multiply first")
    return build.add("add", build.add("neg", call["self"]), call["other"], 1)


def _cast(build: Builder, call: Bound, meta: Any) -> Any:
    source = call["self"]
    if source.meta.dtype == meta.dtype:
        return build.add("clone", source) if call.get("copy") else source
    return build.add("cast", source, meta.dtype)


def _filled(value: float | bool) -> Conversion:
    return lambda build, call, meta: build.add(
        "full", build.sizes(meta.shape), _fitting(value, meta.dtype), meta.dtype
    )


def _full(name: str) -> Conversion:
    return lambda build, call, meta: build.add(
        "full", build.sizes(meta.shape), _fitting(call[name], meta.dtype), meta.dtype
    )


def _fitting(value: Any, dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


def _arange(build: Builder, call: Bound, meta: Any) -> Ref:
    bounds = [call.get("start", 0), call["end"], call.get("step", 1)]
    if any(isinstance(bound, float) for bound in bounds):
        raise ExportError("arange with fractions is not in the table; scale an integer range")
    return build.add("arange", *(build.size(bound) for bound in bounds), meta.dtype)


def _reshape(build: Builder, call: Bound, meta: Any) -> Ref:
    return build.add("reshape", call["self"], build.sizes(meta.shape, open_ok=True))


def _expand(build: Builder, call: Bound, meta: Any) -> Ref:
    return build.add("expand", call["self"], build.sizes(meta.shape))


def _slice(build: Builder, call: Bound, meta: Any) -> Any:
    start = build.size(0 if call["start"] is None else call["start"])
    end = build.size(END if call["end"] is None else call["end"])
    if start == 0 and end == END and call["step"] == 1:
        return call["self"]
    return build.add("slice", call["self"], call["dim"], start, end, call["step"])


def _narrow(build: Builder, call: Bound, meta: Any) -> Ref:
    start = call["start"]
    return build.add("slice", call["self"], call["dim"], start, start + call["length"], 1)


def _pieces(build: Builder, call: Bound, meta: Any) -> list[Ref]:
    dim = call["dim"]
    sizes = build.sizes([piece.shape[dim] for piece in meta])
    first = build.add("split", call["self"], sizes, dim, results=len(sizes))
    return [Ref(first.index + at) for at in range(len(sizes))]


def _unbind(build: Builder, call: Bound, meta: Any) -> list[Ref]:
    first = build.add("unbind", call["self"], call["dim"], results=len(meta))
    return [Ref(first.index + at) for at in range(len(meta))]


def _topk(build: Builder, call: Bound, meta: Any) -> list[Ref]:
    arguments = (call["self"], build.size(call["k"]), call["dim"], call["largest"])
    first = build.add("topk", *arguments, results=2)
    return [first, Ref(first.index + 1)]


def _squeeze(build: Builder, call: Bound, meta: Any) -> Ref:
    dims = call.get("dim")
    if dims is None:
        dims = [at for at, size in enumerate(call["self"].meta.shape) if size == 1]
    return build.add("squeeze", call["self"], [dims] if isinstance(dims, int) else dims)


def _transposed(build: Builder, call: Bound, meta: Any) -> Any:
    return build.add("transpose", call["self"], 0, 1) if meta.dim() == 2 else call["self"]


def _clone(build: Builder, call: Bound, meta: Any) -> Ref:
    layout = call.get("memory_format")
    if layout in (None, torch.preserve_format):
        return build.add("clone", call["self"])
    return _contiguous(build, call, meta)


def _contiguous(build: Builder, call: Bound, meta: Any) -> Ref:
    if call["memory_format"] not in (0, torch.contiguous_format):
        raise ExportError(f"layout {call['memory_format']} is not in the table; drop it")
    return build.add("contiguous", call["self"])


def _pad(build: Builder, call: Bound, meta: Any) -> Ref:
    if call.get("mode", "constant") != "constant":
        raise ExportError(f"pad with mode {call['mode']!r} is not in the table; use constant")
    value = _fitting(call["value"] or 0, meta.dtype)
    return build.add("pad", call["self"], build.sizes(call["pad"]), value)


def _masked_fill_array(build: Builder, call: Bound, meta: Any) -> Ref:
    return build.add("where", call["mask"], call["value"], call["self"])


def _reduce(operator: str) -> Conversion:
    """A reduction over some or all dimensions, after a cast when a dtype is given."""

    def convert(build: Builder, call: Bound, meta: Any) -> Ref:
        source = call["self"]
        rank = source.meta.dim()
        if call.get("dtype") not in (None, source.meta.dtype):
            source = build.add("cast", source, call["dtype"])
        dims = call.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        return build.add(operator, source, dims or list(range(rank)), call.get("keepdim", False))

    return convert


def _variance(build: Builder, call: Bound, meta: Any) -> Ref:
    dims = call.get("dim") or list(range(call["self"].meta.dim()))
    correction = call.get("correction", call.get("unbiased", True))
    correction = 1 if correction is None else int(correction)
    return build.add("var", call["self"], dims, correction, call.get("keepdim", False))


def _norm(build: Builder, call: Bound, meta: Any) -> Ref:
    if call["dtype"] not in (None, call["self"].meta.dtype):
        raise ExportError("a norm with a dtype is not in the table; cast first")
    dims = call["dim"] or list(range(call["self"].meta.dim()))
    return build.add("vector_norm", call["self"], call["ord"], dims, call["keepdim"])


def _argmax(build: Builder, call: Bound, meta: Any) -> Ref:
    if call["dim"] is None:
        raise ExportError("argmax over everything is not in the table; name a dimension")
    return build.add("argmax", call["self"], call["dim"], call["keepdim"])


def _along(operator: str) -> Conversion:
    def convert(build: Builder, call: Bound, meta: Any) -> Ref:
        source = call["self"]
        if call["dtype"] not in (None, source.meta.dtype):
            source = build.add("cast", source, call["dtype"])
        return build.add(operator, source, call["dim"])

    return convert


def _diff(build: Builder, call: Bound, meta: Any) -> Ref:
    if call["n"] != 1 or call["append"] is not None:
        raise ExportError("diff is in the table once and without append; apply it again")
    return build.add("diff", call["self"], call["dim"], call["prepend"])


def _range_of(build: Builder, parts: Any) -> Any:
    return [build.size(part) for part in parts]


def _table() -> dict[str, Conversion]:
    pair = ("self", "other")
    named: dict[str, Conversion] = {}
    for name in ("add", "sub"):
        for kind in ("Tensor", "Scalar"):
            named[f"{name}.{kind}"] = _direct(name, *pair, "alpha")
    for name in ("mul", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or"):
        named[f"{name}.Tensor"] = named[f"{name}.Scalar"] = _direct(name, *pair)
    for dunder, name in (("__and__", "bitwise_and"), ("__or__", "bitwise_or")):
        named[f"{dunder}.Tensor"] = named[f"{dunder}.Scalar"] = _direct(name, *pair)
    for kind in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode"):
        named[f"div.{kind}"] = _rounded
    for kind in ("Tensor", "Scalar"):
        named[f"rsub.{kind}"] = _rsub
        named[f"pow.Tensor_{kind}"] = _direct("pow", "self", "exponent")
    for name in ("maximum", "minimum", "logical_and", "logical_or"):
        named[f"{name}.default"] = _direct(name, *pair)
    named |= {"max.other": _direct("maximum", *pair), "min.other": _direct("minimum", *pair)}
    singles = "neg abs relu exp log sqrt rsqrt reciprocal tanh sigmoid sin cos erf silu"
    for name in [*singles.split(), "logical_not", "bitwise_not", "detach"]:
        named[f"{name}.default"] = _direct(name, "self")
    for name in ("self", "ScalarOther", "ScalarSelf", "Scalar"):
        named[f"where.{name}"] = _direct("where", "condition", "self", "other")
    for name in ("alias", "lift_fresh_copy"):
        named[f"{name}.default"] = _same
    for name in ("dtype", "device", "dtype_layout", "other"):
        named[f"to.{name}"] = _cast
    named["_to_copy.default"] = named["type_as.default"] = _cast
    for name in ("default", "start", "start_step"):
        named[f"arange.{name}"] = _arange
    for name in ("zeros", "zeros_like", "new_zeros"):
        named[f"{name}.default"] = _filled(0)
    for name in ("ones", "ones_like", "new_ones"):
        named[f"{name}.default"] = _filled(1)
    for name in ("full", "full_like", "new_full"):
        named[f"{name}.default"] = _full("fill_value")
    named["scalar_tensor.default"] = _full("s")
    views = "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int"
    for name in [*views.split(), "view_as.default", "reshape_as.default"]:
        named[name] = _reshape
    for name in ("split.Tensor", "split.sizes", "split_with_sizes.default", "chunk.default"):
        named[name] = _pieces
    for name in ("dim", "dims", "default"):
        named[f"squeeze.{name}"] = _squeeze
    reductions = "sum.dim_IntList sum.default mean.dim mean.default amax.default amin.default"
    reductions += " any.default any.dim any.dims all.default all.dim all.dims logsumexp.default"
    for name in reductions.split():
        named[name] = _reduce(name.split(".")[0])
    for name in ("var.correction", "var.default", "var.dim"):
        named[name] = _variance
    for name in ("matmul.default", "mm.default", "bmm.default"):
        named[name] = _direct("matmul", "self", "mat2" if name[:2] in ("mm", "bm") else "other")
    for name in ("tril", "triu"):
        named[f"{name}.default"] = _direct(name, "self", "diagonal")
    return named


CONVERSIONS: Final[dict[str, Conversion]] = {
    **_table(),
    "gelu.default": _direct("gelu", "self", "approximate"),
    "leaky_relu.default": _floats("leaky_relu", "negative_slope"),
    "softplus.default": _floats("softplus", "beta", "threshold"),
    "square.default": lambda build, call, meta: build.add("pow", call["self"], 2),
    "clamp.default": _direct("clamp", "self", "min", "max"),
    "clamp_min.default": lambda build, call, meta: build.add(
        "clamp", call["self"], call["min"], None
    ),
    "clamp_max.default": lambda build, call, meta: build.add(
        "clamp", call["self"], None, call["max"]
    ),
    "masked_fill.Scalar": _direct("masked_fill", "self", "mask", "value"),
    "masked_fill.Tensor": _masked_fill_array,
    "dropout.default": layers.dropout,
    "transpose.int": _direct("transpose", "self", "dim0", "dim1"),
    "t.default": _transposed,
    "numpy_T.default": _transposed,
    "permute.default": _direct("permute", "self", "dims"),
    "unsqueeze.default": _direct("unsqueeze", "self", "dim"),
    "expand.default": _expand,
    "expand_as.default": _expand,
    "slice.Tensor": _slice,
    "narrow.default": _narrow,
    "select.int": _direct("select", "self", "dim", "index"),
    "unbind.int": _unbind,
    "clone.default": _clone,
    "contiguous.default": _contiguous,
    "cat.default": _direct("cat", "tensors", "dim"),
    "concat.default": _direct("cat", "tensors", "dim"),
    "stack.default": _direct("stack", "tensors", "dim"),
    "repeat.default": lambda build, call, meta: build.add(
        "repeat", call["self"], _range_of(build, call["repeats"])
    ),
    "constant_pad_nd.default": _pad,
    "pad.default": _pad,
    "gather.default": _direct("gather", "self", "dim", "index", sparse_grad=False),
    "index.Tensor": _direct("index", "self", "indices"),
    "index_select.default": _direct("index_select", "self", "dim", "index"),
    "embedding.default": layers.embedding,
    "linalg_vector_norm.default": _norm,
    "argmax.default": _argmax,
    "softmax.int": _along("softmax"),
    "log_softmax.int": _along("log_softmax"),
    "cumsum.default": _along("cumsum"),
    "diff.default": _diff,
    "topk.default": _topk,
    "linear.default": _direct("linear", "input", "weight", "bias"),
    "addmm.default": layers.addmm,
    "conv1d.default": layers.convolution("conv1d", 1),
    "conv2d.default": layers.convolution("conv2d", 2),
    "max_pool2d.default": layers.pool,
    "avg_pool2d.default": layers.pool,
    "adaptive_avg_pool2d.default": _direct("adaptive_avg_pool2d", "self", "output_size"),
    "batch_norm.default": layers.batch_norm,
    "group_norm.default": _direct("group_norm", "input", "num_groups", "weight", "bias", "eps"),
    "layer_norm.default": _direct(
        "layer_norm", "input", "normalized_shape", "weight", "bias", "eps"
    ),
    "rms_norm.default": layers.rms_norm,
    "scaled_dot_product_attention.default": layers.attention,
    "cross_entropy_loss.default": layers.cross_entropy,
    "mse_loss.default": layers.mse_loss,
}
