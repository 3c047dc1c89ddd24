"""The table of operators: its rules say what torch will do, and refuse what torch must not do."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from meshd.node.workloads import shapes, shapes_layers, shapes_moved
from meshd.node.workloads.errors import ProgramError
from meshd.node.workloads.kernels import DTYPE_NAMES, KERNELS, TORCH_DTYPES
from meshd.node.workloads.operators import OPERATORS
from meshd.node.workloads.tensors import TensorSpec

T = TensorSpec


def f(*shape: int) -> TensorSpec:
    return T("f32", shape)


def i(*shape: int) -> TensorSpec:
    return T("i64", shape)


def b(*shape: int) -> TensorSpec:
    return T("bool", shape)


PAIR = [(f(2, 3), f(3)), (f(2, 3), 0.5), (i(3), f()), (i(2, 1), i(3))]
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "add": [(x, y, 1) for x, y in PAIR] + [(b(2), i(2), 1), (f(2), f(2), 0.5)],
    "sub": [(x, y, 1) for x, y in PAIR],
    "mul": [*PAIR, (b(2), 2)],
    "pow": [(f(2, 3), 2), (f(3), f(2, 3)), (i(3), 2)],
    "maximum": [(f(2, 3), f(3)), (i(3), f(3))],
    "minimum": [(f(2, 3), f(3))],
    "div": [(*pair, "none") for pair in PAIR] + [(f(3), f(2, 3), "floor"), (f(3), 2, "trunc")],
    **{name: PAIR for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "logical_and": [(b(2), f(2, 2))],
    "logical_or": [(b(2), i(1))],
    "logical_not": [(b(2, 3),), (f(2),)],
    "bitwise_and": [(b(2, 3), b(3)), (i(2), 3)],
    "bitwise_or": [(i(2, 3), i(3))],
    "bitwise_not": [(b(2, 3),), (i(2),)],
    **{name: [(f(2, 3),), (i(3),)] for name in ("neg", "abs", "relu")},
    **{
        name: [(f(2, 3),), (i(3),)]
        for name in ("exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid")
    },
    **{name: [(f(2, 3),), (b(3),)] for name in ("sin", "cos", "erf")},
    "silu": [(f(2, 3),)],
    "gelu": [(f(2, 3), "none"), (f(3), "tanh")],
    "leaky_relu": [(f(2, 3), 0.1)],
    "softplus": [(f(2, 3), 1.0, 20.0)],
    "clamp": [(f(2, 3), 0, None), (i(3), None, 1.5), (i(3), 0, 2)],
    "where": [(b(2, 1), f(3), f(2, 3)), (b(2), f(2), 0.5), (b(2), 1, i(2)), (b(2), 1, 0.5)],
    "masked_fill": [(f(2, 3), b(3), -math.inf)],
    "tril": [(f(3, 3), 1)],
    "triu": [(b(2, 3, 3), -1)],
    "cast": [(f(2, 3), "i64"), (b(2), "f32"), (f(2), "bf16")],
    "arange": [(0, 5, 1, "i64"), (7, 1, -2, "f32")],
    "full": [([2, 3], 1, "i64"), ([], -1.5, "f32"), ([0], True, "bool")],
    "reshape": [(f(2, 6), [3, -1]), (f(4), [2, 2]), (f(1), [])],
    "transpose": [(f(2, 3, 4), 1, -1)],
    "permute": [(f(2, 3, 4), [2, 0, -2])],
    "unsqueeze": [(f(2, 3), -1), (f(2), 0)],
    "squeeze": [(f(2, 1, 3, 1), [1, -1]), (f(2, 3), [0])],
    "expand": [(f(2, 1), [4, -1, 3]), (f(), [2])],
    "slice": [(f(5, 3), 0, 1, 4, 2), (f(5), -1, -3, 1 << 62, 1), (f(5), 0, 4, 2, 1)],
    "select": [(f(5, 3), 1, -1)],
    "split": [(f(5, 3), [2, 3], 0)],
    "unbind": [(f(2, 3), 1)],
    "detach": [(f(2),)],
    "contiguous": [(f(2, 3),)],
    "clone": [(f(2, 3),)],
    "cat": [([f(2, 3), f(1, 3)], 0), ([i(2), f(3)], -1)],
    "stack": [([f(2, 3), f(2, 3)], -1)],
    "repeat": [(f(2, 3), [2, 1, 2])],
    "pad": [(f(2, 3), [1, 2], 0.0), (f(2, 3), [0, 0, 1, 0], 1)],
    "gather": [(f(4, 3), 0, i(2, 3))],
    "index": [
        (f(4, 3), [i(2, 1), i(5)]),
        (f(4, 3, 2), [i(2), None, i(2)]),
        (f(4, 3), [None, i(2)]),
    ],
    "index_select": [(f(4, 3), 1, i(2))],
    "embedding": [(f(7, 3), i(2, 2), -1), (f(7, 3), T("i32", (2,)), 0)],
    "sum": [(f(2, 3), [0], False), (b(2, 3), [0, 1], True), (f(), [], False)],
    "mean": [(f(2, 3), [-1], True)],
    "amax": [(f(2, 3), [0, 1], False)],
    "amin": [(i(2, 3), [0], False)],
    "any": [(f(2, 3), [0], False)],
    "all": [(b(2, 3), [0, 1], True)],
    "argmax": [(f(2, 3), 1, False)],
    "var": [(f(2, 3), [1], 1, True)],
    "vector_norm": [(f(2, 3), 2.0, [1], True)],
    "logsumexp": [(f(2, 3), [1], False)],
    "softmax": [(f(2, 3), -1)],
    "log_softmax": [(f(2, 3), 0)],
    "cumsum": [(f(2, 3), 1), (b(4), 0)],
    "diff": [(f(2, 3), 1, None), (i(2, 3), -1, i(2, 1))],
    "topk": [(f(2, 5), 3, 1, True)],
    "linear": [(f(2, 4, 3), f(5, 3), f(5)), (f(2, 3), f(5, 3), None)],
    "matmul": [(f(2, 3), f(3, 4)), (f(5, 1, 2, 3), f(4, 3, 2)), (f(3), f(2, 3, 4)), (f(3), f(3))],
    "addmm": [(f(4), f(2, 3), f(3, 4))],
    "conv1d": [(f(2, 4, 9), f(6, 2, 3), f(6), [2], [1], [2], 2)],
    "conv2d": [(f(2, 3, 8, 7), f(4, 3, 3, 2), None, [1, 2], [1, 0], [1, 1], 1)],
    "max_pool2d": [(f(2, 3, 7, 8), [2, 3], [2, 2], [1, 1], [1, 2], True)],
    "avg_pool2d": [(f(2, 3, 7, 8), [2, 3], [2, 2], [1, 1], False, True)],
    "adaptive_avg_pool2d": [(f(2, 3, 7, 8), [1, 2])],
    "batch_norm": [(f(2, 3, 4), f(3), f(3), f(3), f(3), 1e-5)],
    "group_norm": [(f(2, 4, 3), 2, f(4), None, 1e-5)],
    "layer_norm": [(f(2, 4, 3), [4, 3], f(4, 3), f(4, 3), 1e-5)],
    "rms_norm": [(f(2, 3), [3], f(3), None), (f(2, 3), [3], None, 1e-6)],
    "attention": [
        (f(2, 4, 5, 8), f(2, 4, 6, 8), f(2, 4, 6, 3), None, False, None, False),
        (f(2, 4, 5, 8), f(2, 2, 5, 8), f(2, 2, 5, 8), None, True, 0.5, True),
        (f(2, 4, 5, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), b(2, 1, 5, 6), False, None, False),
    ],
    "cross_entropy": [
        (f(4, 5), i(4), f(5), reduction, -100, 0.1) for reduction in ("mean", "none")
    ],
    "mse_loss": [(f(4, 5), f(4, 5), "sum")],
}
QKV = (f(1, 1, 4, 8), f(1, 1, 4, 8), f(1, 1, 4, 8))
ALL_SAMPLES = [(name, sample) for name, samples in SAMPLES.items() for sample in samples]


def made(argument: Any) -> Any:
    """Arrays in place of specs; integers are 0, which indexes every dimension that is not empty."""
    if isinstance(argument, list):
        return [made(part) for part in argument]
    if not isinstance(argument, TensorSpec):
        return argument
    if argument.dtype in ("f32", "bf16", "f16", "f64"):
        return torch.rand(argument.shape).to(TORCH_DTYPES[argument.dtype])
    return torch.zeros(argument.shape, dtype=TORCH_DTYPES[argument.dtype])


def by_rule(name: str, arguments: Sequence[Any]) -> list[TensorSpec]:
    result = OPERATORS[name].rule(*arguments)
    return result if isinstance(result, list) else [result]


def by_torch(name: str, arguments: Sequence[Any]) -> list[TensorSpec]:
    result = KERNELS[name](*(made(argument) for argument in arguments))
    arrays = list(result) if isinstance(result, (list, tuple)) else [result]
    return [TensorSpec(DTYPE_NAMES[a.dtype], tuple(a.shape)) for a in arrays]


def test_every_operator_has_a_kernel_and_a_sample() -> None:
    assert OPERATORS.keys() == KERNELS.keys() == SAMPLES.keys()


@pytest.mark.parametrize(("name", "arguments"), ALL_SAMPLES)
def test_rule_and_torch_agree_on_the_result(name: str, arguments: tuple[Any, ...]) -> None:
    assert by_rule(name, arguments) == by_torch(name, arguments)


@pytest.mark.parametrize(("name", "arguments"), ALL_SAMPLES)
def test_samples_have_an_argument_of_its_kind_for_every_parameter(
    name: str, arguments: tuple[Any, ...]
) -> None:
    kinds: dict[str, Callable[[Any], bool]] = {
        "tensor": lambda a: isinstance(a, TensorSpec),
        "tensor?": lambda a: a is None or isinstance(a, TensorSpec),
        "tensors": lambda a: all(isinstance(part, TensorSpec) for part in a),
        "tensors?": lambda a: all(isinstance(part, TensorSpec | None) for part in a),
        "operand": lambda a: isinstance(a, TensorSpec | int | float),
        "int": lambda a: type(a) is int,
        "ints": lambda a: all(type(part) is int for part in a),
        "float": lambda a: type(a) is float,
        "float?": lambda a: isinstance(a, float | None),
        "scalar": lambda a: isinstance(a, int | float),
        "scalar?": lambda a: isinstance(a, int | float | None),
        "bool": lambda a: type(a) is bool,
        "dtype": lambda a: a in TORCH_DTYPES,
    }
    parameters = OPERATORS[name].parameters
    assert len(arguments) == len(parameters)
    for argument, parameter in zip(arguments, parameters, strict=True):
        words = parameter.kind.split("|")
        assert argument in words if len(words) > 1 else kinds[parameter.kind](argument)


@pytest.mark.parametrize(("name", "arguments"), ALL_SAMPLES)
def test_units_are_integers_that_are_not_negative(name: str, arguments: tuple[Any, ...]) -> None:
    cost = OPERATORS[name].cost.count(arguments, by_rule(name, arguments))
    assert type(cost) is int
    assert cost >= 0
    assert type(OPERATORS[name].extra(arguments, by_rule(name, arguments))) is int


@pytest.mark.parametrize("name", ["linear", "matmul", "addmm", "conv1d", "conv2d"])
def test_products_count_what_torch_counts_and_their_sums(name: str) -> None:
    for arguments in SAMPLES[name]:
        results = by_rule(name, arguments)
        counter = FlopCounterMode(display=False)
        with counter:
            KERNELS[name](*(made(argument) for argument in arguments))
        has_bias = name == "addmm" or (name != "matmul" and arguments[2] is not None)
        bias = results[0].elements if has_bias else 0
        units = OPERATORS[name].cost.count(arguments, results)
        if counter.get_total_flops():  # torch counts no product of vectors
            assert units - bias == counter.get_total_flops()


def changed(draw: Callable[..., Any], argument: Any) -> Any:
    """An argument that differs a little: another size, number, dtype or length of a list."""
    if isinstance(argument, TensorSpec):
        shape = list(argument.shape)
        match draw(st.integers(0, 4)):
            case 0 if shape:
                shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 5))
            case 1 if shape:
                del shape[draw(st.integers(0, len(shape) - 1))]
            case 2:
                shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 4)))
            case 3:
                return TensorSpec(draw(st.sampled_from(["f32", "i64", "bool", "f64"])), (*shape,))
        return TensorSpec(argument.dtype, tuple(shape))
    if isinstance(argument, list):
        parts = list(argument)
        if parts and draw(st.booleans()):
            at = draw(st.integers(0, len(parts) - 1))
            parts[at] = changed(draw, parts[at])
        elif parts:
            parts.pop() if draw(st.booleans()) else parts.append(parts[0])
        return parts
    if type(argument) is int:
        return argument + draw(st.integers(-3, 3))
    if type(argument) is bool:
        return not argument
    return argument


@st.composite
def mutants(draw: Callable[..., Any]) -> tuple[str, list[Any]]:
    name, sample = draw(st.sampled_from(ALL_SAMPLES))
    arguments = list(sample)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(arguments) - 1))
        arguments[at] = changed(draw, arguments[at])
    return name, arguments


@given(mutants())
@settings(max_examples=600)
def test_what_a_rule_lets_through_torch_computes_as_the_rule_says(
    mutant: tuple[str, list[Any]],
) -> None:
    name, arguments = mutant
    try:
        expected = by_rule(name, arguments)
    except ProgramError:
        return
    with contextlib.suppress(ProgramError):  # an index into an empty dimension
        assert by_torch(name, arguments) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        # torch reads past the end of the shorter values.
        ("attention", (*QKV[:2], f(1, 1, 2, 8), None, False, None, False), "length"),
        ("attention", (f(1, 4, 4, 8), *[f(1, 3, 4, 8)] * 2, None, False, None, True), "share"),
        ("attention", (*QKV, b(4, 4), True, None, False), "both"),
        ("attention", (*QKV, b(4, 5), False, None, False), "cannot be combined"),
        ("div", (i(2), i(2), "floor"), "integers"),
        ("div", (i(2), 0, "trunc"), "integers"),
        ("index", (f(4, 3), [b(4)]), "indices are bool"),
        ("index", (f(4), [i(1), i(1)]), "2 arrays"),
        ("gather", (f(4, 3), 0, i(2, 4)), "beyond"),
        ("embedding", (f(7, 3), f(2), -1), "indices are f32"),
        ("embedding", (f(7, 3), i(2), 7), "padding"),
        ("linear", (f(2, 3), f(5, 4), None), "does not fit"),
        ("matmul", (f(2, 3), T("f64", (3, 4))), "dtype"),
        ("reshape", (f(2, 3), [-1, -1]), "more than one"),
        ("reshape", (f(0, 3), [0, -1]), "cannot take"),
        ("expand", (f(2, 3), [2, 4]), "expanded"),
        ("repeat", (f(2), [0]), "below 1"),
        ("pad", (f(2), [-1, 0], 0.0), "negative"),
        ("arange", (0, 5, 0, "i64"), "step"),
        ("arange", (5, 0, 1, "i64"), "step"),
        ("slice", (f(5), 0, 0, 5, 0), "step"),
        ("unbind", (f(1025),0), "1024"),
        ("topk", (f(3), 4, 0, True), "4 of the 3"),
        ("conv2d", (f(1, 3, 2, 2), f(4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], 1), "kernel"),
        ("conv2d", (f(1, 3, 4, 4), f(4, 3, 3, 3), None, [0, 1], [0, 0], [1, 1], 1), "stride"),
        ("max_pool2d", (f(1, 1, 4, 4), [2, 2], [1, 1], [2, 0], [1, 1], False), "padding"),
        ("cross_entropy", (f(4, 5), f(4, 5), None, "mean", -100, 0.0), "classes are f32"),
        ("layer_norm", (f(2, 3), [4], None, None, 1e-5), "end of"),
        ("add", (f(2), f(3), 1), "cannot be combined"),
        ("masked_fill", (i(2), b(2), 0.5), "fit"),
        ("full", ([2], 0.5, "i64"), "fit"),
        ("full", ([2], 2, "bool"), "fit"),
    ],
)  # fmt: skip
def test_what_must_not_reach_a_kernel_is_refused(
    name: str, arguments: tuple[Any, ...], reason: str
) -> None:
    with pytest.raises(ProgramError, match=reason):
        by_rule(name, arguments)


@given(st.data())
@settings(max_examples=200)
def test_types_are_promoted_as_torch_promotes_them(data: st.DataObject) -> None:
    specs = st.builds(
        TensorSpec, st.sampled_from(sorted(TORCH_DTYPES)), st.sampled_from([(), (2,)])
    )
    x = data.draw(specs)
    y = data.draw(specs | st.sampled_from([True, 3, 0.5]))
    expected = torch.result_type(made(x), made(y))
    assert shapes.promote(x, y) == DTYPE_NAMES[expected]


def test_rules_name_what_does_not_fit() -> None:
    with pytest.raises(ProgramError, match=r"f32\[2,3\] does not fit the matrix f32\[5,4\]"):
        shapes_layers.linear(f(2, 3), f(5, 4), None)
    with pytest.raises(ProgramError, match=r"index 5 is outside dimension 0"):
        shapes_moved.select(f(5), 0, 5)


def test_the_documentation_lists_every_operator_with_its_arguments_and_units() -> None:
    text = (Path(__file__).parents[2] / "docs" / "programs.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    documented = [row for row in rows if row.split("`")[1] in {*OPERATORS, "sym_size"}]
    expected = ["| `sym_size` | x: tensor, dim: int | 0 |"]
    for operator in OPERATORS.values():
        arguments = ", ".join(f"{p.name}: {p.kind}" for p in operator.parameters)
        escaped = arguments.replace("|", r"\|")
        expected.append(f"| `{operator.name}` | {escaped} | {operator.cost.formula} |")
    assert documented == expected
