"""What a program trains: its weights in order, and which of them Scion treats as matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshd.node.workloads.operators import OPERATORS
from meshd.node.workloads.program import Argument, Node, Output, Program, Ref
from meshd.node.workloads.rows import Rows
from meshd.node.workloads.tensors import Column, Shape
from meshd.node.workloads.training.errors import TrainingError
from meshd.node.workloads.training.settings import TrainSettings

_FACTORS: Final[Mapping[str, tuple[int, ...]]] = {
    "linear": (1,),
    "matmul": (0, 1),
    "addmm": (1, 2),
    "conv1d": (1,),
    "conv2d": (1,),
}
"""For each product, which arguments are its factors."""
_KERNELS: Final = ("conv1d", "conv2d")
_PASSED_ON: Final = frozenset(
    {name for name, operator in OPERATORS.items() if operator.view} | {"cast", "clone"}
)


@dataclass(frozen=True, slots=True)
class Trained:
    """A weight that training changes."""

    name: str
    shape: Shape
    matrices: tuple[int, int, int] | None
    """How many matrices of which (n, k) Scion sees in it; None for anything else."""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def table(self) -> tuple[int, int] | None:
        """Rows and columns over which AdamW averages its second moment; None below rank 2."""
        if len(self.shape) < 2 or not self.elements:
            return None
        return self.shape[0], self.elements // self.shape[0]


def trained_weights(program: Program) -> tuple[Trained, ...]:
    """Return what `program` trains, by name.

    A weight of two or more dimensions is a matrix if the program uses it, as it is or through
    views, as a factor of a product (linear, matmul, addmm, conv) and nowhere as the table of an
    `embedding`. Kernels are seen as (n, channels x window). Raises TrainingError if the program
    has no loss, nothing to train, or weights that are not f32.
    """
    loss_of(program)
    names = set(program.graph.trainable)
    found: list[Trained] = []
    products, kernels, tables = _uses(program)
    for index, weight in enumerate(program.weights):
        if weight.name not in names:
            continue
        if weight.dtype != "f32":
            raise TrainingError(
                f"weight {weight.name!r} is {weight.dtype}: only f32 is trained; "
                "export the module after .float(), or freeze it"
            )
        if not math.prod(weight.shape):
            raise TrainingError(f"weight {weight.name!r} is empty: freeze it or take it out")
        factor = index in products | kernels and index not in tables
        found.append(
            Trained(
                weight.name,
                weight.shape,
                _matrices(weight.shape, index in kernels) if factor else None,
            )
        )
    if not found:
        raise TrainingError(
            "the program has no trainable weight: export the module with requires_grad on"
        )
    return tuple(sorted(found, key=lambda trained: trained.name))


def loss_of(program: Program) -> Output:
    """Return the output that is minimised: the first. TrainingError unless it is one f32."""
    loss = program.outputs[0]
    if loss.shape or loss.dtype != "f32":
        raise TrainingError(
            f"the program's first output {loss.name!r} is {loss.dtype}{list(loss.shape)}, "
            "not one f32 number: it has no loss; export a module that returns its loss, "
            "with training=True"
        )
    return loss


def check_rows(program: Program, rows: Rows, settings: TrainSettings) -> None:
    """Raise TrainingError unless `rows` are what a shard of `program` reads, H x B of them."""
    schema = program.input_schema
    if rows.schema != schema:
        raise TrainingError(
            f"the program reads {described(schema.columns)}, the rows have "
            f"{described(rows.schema.columns)}: import the data with the program's columns"
        )
    if rows.count != settings.rows:
        raise TrainingError(
            f"the shard has {rows.count} rows; {settings.steps} steps of {settings.batch} rows "
            f"need {settings.rows}"
        )


def described(columns: Sequence[Column]) -> str:
    """Return columns as errors name them."""
    return ", ".join(f"{c.name} {c.dtype}{list(c.shape)}" for c in columns)


def _matrices(shape: Shape, kernel: bool) -> tuple[int, int, int] | None:
    if len(shape) < 2:
        return None
    if kernel:
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _uses(program: Program) -> tuple[set[int], set[int], set[int]]:
    """Return the weights that are factors of products, kernels, and tables of vectors."""
    source: dict[int, int] = {index: index for index in range(len(program.weights))}
    products, kernels, tables = set[int](), set[int](), set[int]()
    at = len(program.weights) + len(program.inputs)
    for node in program.nodes:
        if node.operator in _FACTORS:
            used = _weights([node.arguments[place] for place in _FACTORS[node.operator]], source)
            (kernels if node.operator in _KERNELS else products).update(used)
        if node.operator == "embedding":
            tables.update(_weights(node.arguments[:1], source))
        _pass_on(node, at, source)
        at += node.results
    return products, kernels, tables


def _pass_on(node: Node, at: int, source: dict[int, int]) -> None:
    first = node.arguments[0] if node.arguments else None
    if node.operator in _PASSED_ON and isinstance(first, Ref) and first.index in source:
        for result in range(at, at + node.results):
            source[result] = source[first.index]


def _weights(arguments: Iterable[Argument], source: Mapping[int, int]) -> set[int]:
    return {
        source[argument.index]
        for argument in arguments
        if isinstance(argument, Ref) and argument.index in source
    }
