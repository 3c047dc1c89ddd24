"""An executor for simulations: real programs of few operators, in plain Python, virtual time."""

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import trio

from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    InferRequest,
    LimitExceeded,
    Limits,
    ShardFailed,
    TrainRequest,
    TrainResult,
    admit,
)
from meshd.node.compute.toy_training import train_toy
from meshd.node.compute.training import admit_close, admit_training
from meshd.node.workloads.datasets import ColumnData, Dataset, build_dataset
from meshd.node.workloads.errors import RowsError, WorkloadError
from meshd.node.workloads.program import (
    Argument,
    Graph,
    Node,
    Output,
    Program,
    Ref,
    encode_program,
)
from meshd.node.workloads.rows import Rows, check_finite, pack_columns, unpack
from meshd.node.workloads.tensors import Column
from meshd.node.workloads.training.plain import close_plain

Floats: TypeAlias = "array[float]"

_PAIRS: Final[dict[str, Callable[[float, float], float]]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "maximum": max,
    "minimum": min,
}
_SINGLES: Final[dict[str, Callable[[float], float]]] = {
    "neg": lambda x: -x,
    "abs": abs,
    "relu": lambda x: max(x, 0.0),
}


class ToyExecutor:
    """Computes in this task; a shard takes its units divided by `units_per_second`.

    No thread, no process, no torch: deterministic under trio's virtual clocks. Programs may use
    add, sub, mul, maximum, minimum, neg, abs and relu on f32 columns; what it trains is in
    toy_training.py.
    """

    def __init__(self, units_per_second: int = 1_000_000) -> None:
        self._speed = units_per_second

    async def infer(self, job: InferRequest) -> bytes:
        """Return the packed output rows after as many (virtual) seconds as they cost."""
        admitted = admit(job)
        await self._spend(admitted.units, job.limits)
        return run_program(admitted.program, admitted.data, admitted.rows)

    async def train(self, job: TrainRequest) -> TrainResult:
        """Return what a shard of the toy's own training program comes to, after its time."""
        admitted = admit_training(job)
        await self._spend(admitted.units, job.limits)
        return train_toy(admitted, job)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        """Return the state after a round: the bytes that every executor returns."""
        admitted = admit_close(job)
        await self._spend(admitted.units, job.limits)
        try:
            state, gated = close_plain(
                admitted.state.data,
                job.contributions,
                job.weights,
                admitted.program,
                admitted.settings,
                round_=job.round,
            )
        except WorkloadError as error:
            raise ShardFailed(str(error)) from error
        return CloseResult(state, gated)

    async def _spend(self, units: int, limits: Limits) -> None:
        """Let as many (virtual) seconds pass as `units` cost."""
        seconds = units / self._speed
        for which, limit in (("wall_s", limits.wall_s), ("cpu_s", limits.cpu_s)):
            if seconds > limit:
                await trio.sleep(limit)
                raise LimitExceeded(which, limit)
        await trio.sleep(seconds)

    async def measure(self) -> int:
        """Return the speed this executor was given."""
        await trio.lowlevel.checkpoint()
        return self._speed

    async def aclose(self) -> None:
        """Do nothing: there is no process to end."""
        await trio.lowlevel.checkpoint()


def run_program(program: Program, data: bytes, rows: Rows) -> bytes:
    """Interpret a program of the toy's operators. Raises ShardFailed for any other operator."""
    values: list[Floats] = []
    for weight in program.weights:
        _need_f32(weight.name, weight.dtype)
        row = _floats(weight.bytes_in(data))
        values.append(row * rows.count)
    for column in program.inputs:
        _need_f32(column.name, column.dtype)
        values.append(_floats(rows.column(column.name)))
    for node in program.nodes:
        values.append(_step(node, values))
    columns = {
        output.name: struct.pack(f"<{len(values[output.value])}f", *values[output.value])
        for output in program.outputs
    }
    try:
        packed = pack_columns(program.output_schema, columns, rows.count)
        check_finite(unpack(packed))
    except RowsError as error:
        raise ShardFailed(str(error)) from error
    return packed


def affine_program(width: int = 4, steps: int = 1, seed: int = 0) -> bytes:
    """Return a program x -> y, both f32[width]: `steps` times a product and a sum.

    It costs 2 * width * steps units a row. Other seeds give other constants, hence other rows.
    """
    nodes: list[Node] = []
    for step in range(steps):
        factor = 0.5 + ((seed * 31 + step * 7) % 97) / 200
        shift = ((seed * 17 + step * 13) % 89) / 10
        nodes.append(Node("mul", (Ref(2 * step), factor)))
        nodes.append(Node("add", (Ref(2 * step + 1), shift, 1)))
    graph = Graph(
        inputs=(Column("x", "f32", (width,)),),
        outputs=(Output("y", "f32", (None, width), 2 * steps),),
        nodes=tuple(nodes),
        trainable=(),
    )
    return encode_program(graph, [])


def affine_dataset(rows: int, width: int = 4, rows_per_chunk: int = 64) -> Dataset:
    """Return a dataset with a column x, f32[width], whose rows are all different."""
    numbers = array("f", ((at * 37 % 1009) / 8 + at // width for at in range(rows * width)))
    data = struct.pack(f"<{len(numbers)}f", *numbers)
    return build_dataset({"x": ColumnData("f32", (rows, width), data)}, rows_per_chunk)


def _step(node: Node, values: Sequence[Floats]) -> Floats:
    if node.operator in _SINGLES:
        single = _SINGLES[node.operator]
        return array("f", (single(x) for x in _operand(node.arguments[0], values, 0)))
    if node.operator not in _PAIRS:
        known = ", ".join([*_PAIRS, *_SINGLES])
        raise ShardFailed(f"the toy executor has no operator {node.operator}; it knows {known}")
    if node.arguments[2:] not in ((), (1,)):
        raise ShardFailed(f"the toy executor knows {node.operator} with alpha 1 only")
    pair = _PAIRS[node.operator]
    first = _operand(node.arguments[0], values, 0)
    second = _operand(node.arguments[1], values, len(first))
    if len(first) != len(second):
        raise ShardFailed(f"the toy executor does not broadcast in {node.operator}")
    return array("f", (pair(x, y) for x, y in zip(first, second, strict=True)))


def _operand(argument: Argument, values: Sequence[Floats], length: int) -> Floats:
    if isinstance(argument, Ref):
        return values[argument.index]
    if isinstance(argument, (int, float)):
        return array("f", [argument]) * length
    raise ShardFailed(f"the toy executor cannot compute with {argument!r}")


def _need_f32(name: str, dtype: str) -> None:
    if dtype != "f32":
        raise ShardFailed(f"{name!r} is {dtype}; the toy executor computes with f32 only")


def _floats(data: bytes | memoryview) -> Floats:
    return array("f", struct.unpack(f"<{len(data) // 4}f", data))
