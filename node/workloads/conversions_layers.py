"""How exported layers, attention and losses are spelled in the table (author's side)."""

from typing import Any

from meshd.node.workloads.errors import ExportError
from meshd.node.workloads.export_builder import Bound, Builder, Conversion
from meshd.node.workloads.program import Ref


def dropout(build: Builder, call: Bound, meta: Any) -> Any:
    """Return the input itself where nothing is dropped."""
    if call["train"] and call["p"] > 0:
        raise ExportError(
            f"dropout with p = {call['p']} draws random numbers; set p = 0 or call eval()"
        )
    return call["input"]


def convolution(operator: str, dims: int) -> Conversion:
    """Return the conversion of convolutions over `dims` dimensions."""

    def convert(build: Builder, call: Bound, meta: Any) -> Ref:
        windows = [_repeated(call[name], dims) for name in ("stride", "padding", "dilation")]
        source = (call["input"], call["weight"], call["bias"])
        return build.add(operator, *source, *windows, call["groups"])

    return convert


def pool(build: Builder, call: Bound, meta: Any) -> Ref:
    """Largest or mean of windows, sizes written out."""
    kernel = _repeated(call["kernel_size"], 2)
    stride = _repeated(call["stride"], 2) if call["stride"] else kernel
    padding = _repeated(call["padding"], 2)
    if "dilation" in call:
        dilation = _repeated(call["dilation"], 2)
        windows = (kernel, stride, padding, dilation)
        return build.add("max_pool2d", call["self"], *windows, call["ceil_mode"])
    if call["divisor_override"] is not None:
        raise ExportError("avg_pool2d with a divisor is not in the table; multiply afterwards")
    last = (call["ceil_mode"], call["count_include_pad"])
    return build.add("avg_pool2d", call["self"], kernel, stride, padding, *last)


def _repeated(values: Any, count: int) -> list[int]:
    listed = [values] if isinstance(values, int) else list(values)
    return listed * count if len(listed) == 1 else listed


def batch_norm(build: Builder, call: Bound, meta: Any) -> Ref:
    """By the statistics that the module carries."""
    if call["training"] or call["running_mean"] is None:
        raise ExportError("batch_norm in training mode changes buffers; call eval() or use groups")
    norms = (call["weight"], call["bias"], call["running_mean"], call["running_var"])
    return build.add("batch_norm", call["input"], *norms, float(call["eps"]))


def rms_norm(build: Builder, call: Bound, meta: Any) -> Ref:
    """By the root of the mean square."""
    return build.add(
        "rms_norm", call["input"], call["normalized_shape"], call["weight"], call["eps"]
    )


def attention(build: Builder, call: Bound, meta: Any) -> Ref:
    """Scaled dot-product attention without dropout."""
    if call["dropout_p"] > 0:
        raise ExportError("attention with dropout draws random numbers; set it to 0")
    inputs = (call["query"], call["key"], call["value"], call["attn_mask"])
    return build.add("attention", *inputs, call["is_causal"], call["scale"], call["enable_gqa"])


def cross_entropy(build: Builder, call: Bound, meta: Any) -> Ref:
    """Logits against class numbers."""
    reduction = ("none", "mean", "sum")[call["reduction"]]
    source = (call["self"], call["target"], call["weight"])
    smoothing = float(call["label_smoothing"])
    return build.add("cross_entropy", *source, reduction, call["ignore_index"], smoothing)


def mse_loss(build: Builder, call: Bound, meta: Any) -> Ref:
    """The mean square of differences."""
    reduction = ("none", "mean", "sum")[call["reduction"]]
    return build.add("mse_loss", call["self"], call["target"], reduction)


def addmm(build: Builder, call: Bound, meta: Any) -> Ref:
    """b + x W without factors."""
    if call["beta"] != 1 or call["alpha"] != 1:
        raise ExportError("addmm with alpha or beta is not in the table; multiply first")
    return build.add("addmm", call["self"], call["mat1"], call["mat2"])


def embedding(build: Builder, call: Bound, meta: Any) -> Ref:
    """Rows of a table, dense gradients."""
    if call["scale_grad_by_freq"] or call["sparse"]:
        raise ExportError("embedding with sparse or scaled gradients is not in the table")
    return build.add("embedding", call["weight"], call["indices"], call["padding_idx"])
