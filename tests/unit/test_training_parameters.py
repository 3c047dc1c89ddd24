"""What a program trains, and which weights are matrices: by how they are used."""

from collections.abc import Sequence

import pytest

from meshd.node.workloads.program import (
    Argument,
    Graph,
    Node,
    Output,
    Program,
    Ref,
    encode_program,
    parse_program,
)
from meshd.node.workloads.tensorfile import TensorData
from meshd.node.workloads.tensors import Column, Shape, TensorSpec
from meshd.node.workloads.training.errors import TrainingError
from meshd.node.workloads.training.parameters import trained_weights

Step = tuple[str, tuple[Argument, ...]]


def using(shape: Shape, column: Column, rank: int, *steps: Step) -> Program:
    """A program with one weight "w" (value 0), one input (value 1), steps to a rank, and a loss."""
    nodes = [Node(name, arguments) for name, arguments in steps]
    last = len(nodes) + 1
    nodes.append(Node("mean", (Ref(last), tuple(range(rank)), False)))
    graph = Graph((column,), (Output("loss", "f32", (), last + 1),), tuple(nodes), ("w",))
    data = bytes(TensorSpec("f32", shape).nbytes)
    return parse_program(encode_program(graph, [TensorData("w", "f32", shape, data)]))


X = Column("x", "f32", (6,))
IMAGE, SOUND = Column("x", "f32", (4, 8, 8)), Column("x", "f32", (4, 8))
SYMBOLS = Column("x", "i64", (4,))
WINDOW, SHORT = ((1, 1), (0, 0), (1, 1), 1), ((1,), (0,), (1,), 1)
TURNED: Step = ("transpose", (Ref(0), 0, 1))
LIFTED: list[Step] = [("unsqueeze", (Ref(1), 1)), ("unsqueeze", (Ref(2), 1))]
TIED: Step = ("linear", (Ref(2), Ref(0), None))


@pytest.mark.parametrize(
    ("program", "matrices"),
    [
        (using((5, 6), X, 2, ("linear", (Ref(1), Ref(0), None))), (1, 5, 6)),
        (using((6, 5), X, 2, TURNED, ("linear", (Ref(1), Ref(2), None))), (1, 6, 5)),
        (using((3, 6, 5), X, 4, *LIFTED, ("matmul", (Ref(3), Ref(0)))), (3, 6, 5)),
        (using((7, 4, 3, 3), IMAGE, 4, ("conv2d", (Ref(1), Ref(0), None, *WINDOW))), (1, 7, 36)),
        (using((7, 4, 3), SOUND, 3, ("conv1d", (Ref(1), Ref(0), None, *SHORT))), (1, 7, 12)),
        (using((9, 6), SYMBOLS, 3, ("embedding", (Ref(0), Ref(1), -1))), None),
        (using((9, 6), SYMBOLS, 3, ("embedding", (Ref(0), Ref(1), -1)), TIED), None),
        (using((1, 6), X, 2, ("add", (Ref(1), Ref(0), 1))), None),
        (using((6,), X, 2, ("add", (Ref(1), Ref(0), 1))), None),
    ],
    ids=[
        "linear",
        "transposed",
        "stacked",
        "conv2d",
        "conv1d",
        "embedding",
        "tied",
        "added",
        "vector",
    ],
)
def test_a_weight_is_a_matrix_by_its_use(program: Program, matrices: Sequence[int] | None) -> None:
    (weight,) = trained_weights(program)
    assert weight.matrices == matrices


def test_only_f32_is_trained() -> None:
    graph = Graph(
        (Column("x", "f64", (6,)),),
        (Output("loss", "f32", (), 4),),
        (
            Node("linear", (Ref(1), Ref(0), None)),
            Node("mean", (Ref(2), (0, 1), False)),
            Node("cast", (Ref(3), "f32")),
        ),
        ("w",),
    )
    data = encode_program(graph, [TensorData("w", "f64", (5, 6), bytes(240))])
    with pytest.raises(TrainingError, match="'w' is f64: only f32 is trained"):
        trained_weights(parse_program(data))


def test_a_program_with_nothing_to_train_says_so() -> None:
    graph = Graph(
        (X,), (Output("loss", "f32", (), 1),), (Node("mean", (Ref(0), (0, 1), False)),), ()
    )
    with pytest.raises(TrainingError, match="no trainable weight"):
        trained_weights(parse_program(encode_program(graph, [])))
