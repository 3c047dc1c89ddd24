"""The interpreter: what a program says, bit for bit, and nothing that its rules refuse."""

import math
import struct

import pytest
import torch
from torch import Tensor

from meshd.node.workloads.errors import ProgramError
from meshd.node.workloads.interpreter import infer_rows, load
from meshd.node.workloads.program import Argument, Graph, Node, Output, Ref, encode_program
from meshd.node.workloads.rows import RowSchema, pack_columns, rows_agree, unpack
from meshd.node.workloads.tensorfile import TensorData
from meshd.node.workloads.tensors import Column

TABLE = TensorData("table", "f32", (5, 2), struct.pack("<10f", *range(10)))


def raw(array: Tensor) -> bytes:
    return array.contiguous().numpy().tobytes()


def program(
    inputs: dict[str, tuple[str, tuple[int, ...]]],
    output: tuple[str, tuple[int | None, ...]],
    *nodes: tuple[str, tuple[Argument, ...]],
    weights: tuple[TensorData, ...] = (),
    value: int | None = None,
) -> bytes:
    """A program whose last value is its output."""
    columns = tuple(Column(name, dtype, shape) for name, (dtype, shape) in inputs.items())
    last = len(weights) + len(inputs) + len(nodes) - 1
    graph = Graph(
        columns,
        (Output("y", output[0], output[1], last if value is None else value),),
        tuple(Node(operator, arguments) for operator, arguments in nodes),
        tuple(weight.name for weight in weights),
    )
    return encode_program(graph, weights)


AFFINE = program(
    {"x": ("f32", (2,))},
    ("f32", (None, 2)),
    ("mul", (Ref(0), 3.0)),
    ("add", (Ref(1), 0.1, 1)),
)
LOOKUP = program(
    {"ids": ("i64", (3,))},
    ("f32", (None, 3, 2)),
    ("embedding", (Ref(0), Ref(1), -1)),
    weights=(TABLE,),
)
LOSS = program(
    {"x": ("f32", (4,)), "y": ("i64", ())},
    ("f32", ()),
    ("cross_entropy", (Ref(0), Ref(1), None, "mean", -100, 0.0)),
)


def packed_ids(*rows: tuple[int, int, int]) -> bytes:
    schema = RowSchema((Column("ids", "i64", (3,)),))
    flat = [number for row in rows for number in row]
    return pack_columns(schema, {"ids": struct.pack(f"<{len(flat)}q", *flat)}, len(rows))


def test_rows_are_computed_as_torch_computes_them() -> None:
    x = torch.randn(7, 2)
    schema = RowSchema((Column("x", "f32", (2,)),))
    rows = unpack(pack_columns(schema, {"x": raw(x)}, 7))
    output = unpack(infer_rows(load(AFFINE), rows))
    assert output.count == 7
    assert output.column("y") == raw(x * 3.0 + 0.1)
    assert rows_agree(output.row(3), raw((x * 3.0 + 0.1)[3]), output.schema)


def test_rows_are_looked_up_in_the_programs_own_weights() -> None:
    output = unpack(infer_rows(load(LOOKUP), unpack(packed_ids((0, 4, 2), (1, 1, 1)))))
    assert struct.unpack("<6f", output.row(0)) == (0, 1, 8, 9, 4, 5)


@pytest.mark.parametrize("ids", [(0, 5, 2), (0, -1, 2), (1 << 40, 0, 0)])
def test_an_index_outside_of_the_table_never_reaches_the_kernel(ids: tuple[int, int, int]) -> None:
    with pytest.raises(ProgramError, match="do not fit a dimension of size 5"):
        infer_rows(load(LOOKUP), unpack(packed_ids(ids)))


@pytest.mark.parametrize("label", [4, -1])
def test_a_class_that_does_not_exist_is_refused(label: int) -> None:
    with pytest.raises(ProgramError, match="size 4"):
        load(LOSS)({"x": torch.zeros(2, 4), "y": torch.tensor([0, label])})


def test_an_ignored_class_is_not_looked_up() -> None:
    loss = load(LOSS)({"x": torch.zeros(2, 4), "y": torch.tensor([0, -100])})["y"]
    assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"z": torch.zeros(3, 2)},
        {"x": torch.zeros(3, 2), "z": torch.zeros(3, 2)},
        {"x": torch.zeros(3, 3)},
        {"x": torch.zeros(3, 2, dtype=torch.float64)},
        {"x": torch.zeros(0, 2)},
        {"x": torch.tensor(1.0)},
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ProgramError):
        load(AFFINE)(inputs)


def test_inputs_of_different_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ProgramError, match="one number of rows"):
        load(LOSS)({"x": torch.zeros(2, 4), "y": torch.zeros(3, dtype=torch.int64)})


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_computed() -> None:
    data = program(
        {"x": ("f32", (2,))},
        ("f32", (None, 2)),
        ("log", (Ref(0),)),
        ("reshape", (Ref(0), (3, 2))),
        ("add", (Ref(1), Ref(2), 1)),
    )
    assert load(data)({"x": torch.ones(3, 2)})["y"].shape == (3, 2)
    with pytest.raises(ProgramError, match=r"node 1 \(reshape\), 4 rows"):
        load(data)({"x": torch.ones(4, 2)})


@pytest.mark.parametrize("x", [-1.0, 0.0])
def test_an_output_that_is_not_finite_is_an_error(x: float) -> None:
    data = program({"x": ("f32", ())}, ("f32", (None,)), ("log", (Ref(0),)))
    schema = RowSchema((Column("x", "f32", ()),))
    rows = unpack(pack_columns(schema, {"x": struct.pack("<2f", 1.0, x)}, 2))
    with pytest.raises(ProgramError, match=r"output column 'y' contains NaN"):
        infer_rows(load(data), rows)


def test_infinity_inside_of_a_program_is_allowed() -> None:
    data = program(
        {"x": ("f32", (4,)), "keep": ("bool", (4,))},
        ("f32", (None, 4)),
        ("logical_not", (Ref(1),)),
        ("masked_fill", (Ref(0), Ref(2), -math.inf)),
        ("softmax", (Ref(3), 1)),
    )
    keep = torch.tensor([[True, True, False, False]])
    found = load(data)({"x": torch.zeros(1, 4), "keep": keep})["y"]
    assert found.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_gradients_flow_through_the_weights_that_are_given() -> None:
    interpreter = load(LOOKUP)
    table = interpreter.weights["table"].clone().requires_grad_()
    output = interpreter({"ids": torch.tensor([[0, 4, 4]])}, {"table": table})["y"]
    (gradient,) = torch.autograd.grad(output.sum(), [table])
    assert gradient.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0], [2, 2]]
    assert not interpreter.weights["table"].requires_grad


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ProgramError, match="value 0"):
        load(LOOKUP)({"ids": torch.tensor([[0, 4, 4]])}, {"table": torch.zeros(9, 2)})


def test_the_number_of_rows_can_be_read_and_used() -> None:
    data = program(
        {"x": ("f32", (2,))},
        ("f32", (None,)),
        ("sym_size", (Ref(0), 0)),
        ("arange", (0, Ref(1), 1, "f32")),
    )
    assert load(data)({"x": torch.zeros(5, 2)})["y"].tolist() == [0, 1, 2, 3, 4]


def test_an_operator_with_several_results_gives_each_a_number() -> None:
    columns = (Column("x", "f32", (5,)),)
    nodes = (Node("split", (Ref(0), (2, 3), 1), 2), Node("topk", (Ref(2), 1, 1, True), 2))
    outputs = (Output("best", "f32", (None, 1), 3), Output("where", "i64", (None, 1), 4))
    found = load(encode_program(Graph(columns, outputs, nodes, ()), []))(
        {"x": torch.tensor([[9.0, 9, 1, 7, 3]])}
    )
    assert (found["best"].item(), found["where"].item()) == (7.0, 1)


def test_an_input_may_be_an_output() -> None:
    data = program({"x": ("f32", (2,))}, ("f32", (None, 2)), value=0)
    x = torch.randn(3, 2)
    assert torch.equal(load(data)({"x": x})["y"], x)


def test_only_programs_are_loaded() -> None:
    with pytest.raises(ProgramError, match="no program"):
        load(b"\x80\x04.")
