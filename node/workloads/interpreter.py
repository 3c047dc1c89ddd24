"""Runs a program with torch: every shape is checked before its kernel, nothing else can run.

Imports torch; only executors, authors and tests load it. Gradients flow through it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meshd.node.workloads.errors import ProgramError, RowsError
from meshd.node.workloads.kernels import DTYPE_NAMES, KERNELS, TORCH_DTYPES
from meshd.node.workloads.operators import SYM_SIZE
from meshd.node.workloads.planning import Plan, plan
from meshd.node.workloads.program import Argument, Buffer, Node, Program, Ref, parse_program
from meshd.node.workloads.rows import Rows, check_finite, pack_columns, unpack
from meshd.node.workloads.tensors import TensorSpec

Value = Tensor | int


def load(data: Buffer) -> "Interpreter":
    """Return the program in `data`, ready to run. Raises ProgramError for anything else."""
    program = parse_program(data)
    weights = {
        weight.name: _tensor(weight.bytes_in(data), weight.spec) for weight in program.weights
    }
    return Interpreter(program, weights)


class Interpreter:
    """A program and its weights.

    Weights are copied from the file into memory that torch aligned: alignment can change bits.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.program = program
        self.weights = dict(weights)
        self._plans: dict[int, Plan] = {}

    def __call__(
        self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs by name for `inputs` by name, each of shape (rows, *row shape).

        `weights` replaces some of the program's own, in training for example; autograd follows
        those that require gradients. Raises ProgramError when a shape, dtype or index does not
        fit; nothing is computed with it then.
        """
        used = {**self.weights, **(weights or {})}
        values: list[Value | None] = [used[weight.name] for weight in self.program.weights]
        rows = {_rows_of(name, array) for name, array in inputs.items()}
        if inputs.keys() != {column.name for column in self.program.inputs} or len(rows) != 1:
            names = ", ".join(column.name for column in self.program.inputs)
            raise ProgramError(f"the program needs the inputs {names}, of one number of rows")
        values += [inputs[column.name] for column in self.program.inputs]
        planned = self.plan(rows.pop())
        for index, value in enumerate(values):
            _check_value(f"value {index}", value, planned.values[index])
        self._run(values, planned)
        outputs: dict[str, Tensor] = {}
        for output in self.program.outputs:
            result = values[output.value]
            assert isinstance(result, Tensor)
            outputs[output.name] = result
        return outputs

    def plan(self, rows: int) -> Plan:
        """Return the checked shapes for a number of rows; those of the last few are kept."""
        if rows not in self._plans:
            while len(self._plans) >= 4:
                self._plans.pop(next(iter(self._plans)))
            self._plans[rows] = plan(self.program, rows)
        return self._plans[rows]

    def _run(self, values: list[Value | None], planned: Plan) -> None:
        first = len(values)
        for at, node in enumerate(self.program.nodes):
            start = len(values)
            for result in _compute(node, values):
                _check_value(f"node {at} ({node.operator})", result, planned.values[len(values)])
                values.append(result)
            touched = {*_references(node), *range(start, len(values))}
            for index in touched:
                if index >= first and planned.last_use[index] <= at:
                    values[index] = None


def infer_rows(interpreter: Interpreter, rows: Rows) -> bytes:
    """Return the packed output rows of packed input rows.

    Raises ProgramError, also when an output contains NaN or infinity: such a shard is invalid.
    """
    inputs = {
        column.name: _tensor(
            rows.column(column.name), TensorSpec(column.dtype, (rows.count, *column.shape))
        )
        for column in interpreter.program.inputs
    }
    with torch.no_grad():
        outputs = interpreter(inputs)
    columns = {name: _packed(array) for name, array in outputs.items()}
    packed = pack_columns(interpreter.program.output_schema, columns, rows.count)
    try:
        check_finite(unpack(packed))
    except RowsError as error:
        raise ProgramError(f"output {error}") from error
    return packed


def _compute(node: Node, values: list[Value | None]) -> list[Value]:
    arguments = [_resolve(argument, values) for argument in node.arguments]
    if node.operator == SYM_SIZE:
        return [int(arguments[0].shape[arguments[1]])]
    result = KERNELS[node.operator](*arguments)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _resolve(argument: Argument, values: list[Value | None]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.index]
    if isinstance(argument, tuple):
        return [_resolve(part, values) for part in argument]
    return argument


def _references(node: Node) -> list[int]:
    flat = (
        part
        for argument in node.arguments
        for part in (argument if isinstance(argument, tuple) else (argument,))
    )
    return [part.index for part in flat if isinstance(part, Ref)]


def _check_value(what: str, value: Value | None, expected: TensorSpec | int) -> None:
    found: TensorSpec | int | None = None if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value.dtype in DTYPE_NAMES:
        found = TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape))
    if found != expected:
        raise ProgramError(f"{what} is {found}, its rule says {expected}")


def _rows_of(name: str, array: Tensor) -> int:
    if array.dim() < 1:
        raise ProgramError(f"input {name!r} has no dimension for the rows")
    return int(array.shape[0])


def _tensor(data: bytes | memoryview, spec: TensorSpec) -> Tensor:
    if not len(data):
        return torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    flat = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[spec.dtype])
    return flat.reshape(spec.shape).clone()


def _packed(array: Tensor) -> bytes:
    flat = array.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
