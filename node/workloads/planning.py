"""What a program does for a number of rows: every shape, its compute units, its memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meshd.node.workloads.errors import ProgramError
from meshd.node.workloads.operators import FREE, OPERATORS, SYM_SIZE
from meshd.node.workloads.program import Argument, Node, Program, Ref
from meshd.node.workloads.tensors import DTYPES, TensorSpec, shape_problem

PlannedValue = TensorSpec | int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known about a run before it starts."""

    rows: int
    values: tuple[PlannedValue, ...]
    """The spec of every value, or the number itself where it is one."""
    last_use: tuple[int, ...]
    """For every value the node after which it is not needed any more; -1 for unused ones."""
    units: int
    """Floating-point operations of one forward pass."""
    peak_bytes: int
    """An upper bound of the memory of a forward pass without gradients, weights included."""
    total_bytes: int
    """Memory of all values together, as a pass that keeps them for gradients needs it."""


def plan(program: Program, rows: int) -> Plan:
    """Check every shape of `program` for `rows` rows and add up what it costs.

    Nothing is allocated. Raises ProgramError naming the node that does not fit.
    """
    if rows < 1:
        raise ProgramError(f"{rows} rows cannot be computed; a shard has at least one")
    values: list[PlannedValue] = [weight.spec for weight in program.weights]
    values += [TensorSpec(c.dtype, (rows, *c.shape)) for c in program.inputs]
    last_use = _last_uses(program)
    leaving = _leaving(program, last_use)
    live = peak = sum(_nbytes(value) for value in values)
    total, count, held = live, 0, [0] * len(values)
    for at, node in enumerate(program.nodes):
        try:
            step = _plan_node(node, values)
        except ProgramError as error:
            raise ProgramError(f"node {at} ({node.operator}), {rows} rows: {error}") from error
        values += step.results
        count += step.units
        held += step.held
        live += sum(step.held)
        total += sum(step.held) + step.extra
        peak = max(peak, live + step.extra)
        live -= sum(held[index] for index in leaving.get(at, ()))
    _check_outputs(program, rows, values)
    return Plan(rows, tuple(values), tuple(last_use), count, peak, total)


def units(program: Program, rows: int, *, training: bool = False) -> int:
    """Return the compute units of `rows` rows; a training step counts a pass three times."""
    return plan(program, rows).units * (3 if training else 1)


def memory_bytes(program: Program, rows: int, *, training: bool = False) -> int:
    """Return an upper bound of what `rows` rows need, the loading of the file included."""
    return memory_of(program, plan(program, rows), training=training)


def memory_of(program: Program, planned: Plan, *, training: bool = False) -> int:
    """Return what `memory_bytes` returns, for rows that were planned already."""
    weights = [weight.nbytes for weight in program.weights]
    loading = program.size + 2 * max(weights, default=0)
    if training:
        return loading + 4 * sum(weights) + 2 * planned.total_bytes
    return loading + planned.peak_bytes


def check_program(program: Program) -> None:
    """Check shapes for the row counts that tell apart what depends on rows. ProgramError."""
    for rows in (1, 2, 3):
        plan(program, rows)


@dataclass(frozen=True, slots=True)
class _Step:
    results: list[PlannedValue]
    units: int
    held: list[int]
    """Bytes that each result keeps; 0 for views."""
    extra: int
    """Bytes that are needed while it runs only."""


def _plan_node(node: Node, values: Sequence[PlannedValue]) -> _Step:
    if node.operator == SYM_SIZE:
        source, dim = (
            _resolve(argument, kind, values)
            for argument, kind in zip(node.arguments, ("tensor", "int"), strict=True)
        )
        if not -source.rank <= dim < source.rank or node.results != 1:
            raise ProgramError(f"dimension {dim} of {source} does not exist")
        return _Step([source.shape[dim]], 0, [0], 0)
    operator = OPERATORS[node.operator]
    arguments = [
        _resolve(argument, parameter.kind, values)
        for argument, parameter in zip(node.arguments, operator.parameters, strict=True)
    ]
    result = operator.rule(*arguments)
    specs = result if isinstance(result, list) else [result]
    if len(specs) != node.results:
        raise ProgramError(f"it has {len(specs)} results, the program says {node.results}")
    for spec in specs:
        if problem := shape_problem(spec.shape):
            raise ProgramError(f"its result {spec}: {problem}")
    arrays = [*_arrays(arguments), *specs]
    width = max(DTYPES[array.dtype].size for array in arrays)
    extra = sum(array.elements for array in _arrays(arguments)) + operator.extra(arguments, specs)
    pure_view = operator.view and operator.cost is FREE
    held = [0 if pure_view else spec.nbytes for spec in specs]
    return _Step([*specs], operator.cost.count(arguments, specs), held, extra * width)


def _resolve(argument: Argument, kind: str, values: Sequence[PlannedValue]) -> Any:
    """Return an argument with specs and numbers in place of references, checked by kind."""
    if isinstance(argument, tuple):
        return [_resolve(part, kind, values) for part in argument]
    if not isinstance(argument, Ref):
        return argument
    value = values[argument.index]
    if isinstance(value, int) is not (kind in ("int", "ints")):
        raise ProgramError(f"value {argument.index} is not what a parameter of kind {kind} takes")
    return value


def _arrays(arguments: Sequence[Any]) -> list[TensorSpec]:
    flat = (part for arg in arguments for part in (arg if isinstance(arg, list) else (arg,)))
    return [part for part in flat if isinstance(part, TensorSpec)]


def _nbytes(value: PlannedValue) -> int:
    return value.nbytes if isinstance(value, TensorSpec) else 0


def _leaving(program: Program, last_use: Sequence[int]) -> dict[int, list[int]]:
    """For every node, the values whose memory goes after it: not before views of it have gone."""
    first = len(program.weights) + len(program.inputs)
    last, made, at = list(last_use), list[int](), first
    for number, node in enumerate(program.nodes):
        made.append(at)
        last[at : at + node.results] = [max(use, number) for use in last[at : at + node.results]]
        at += node.results
    for node, start in zip(reversed(program.nodes), reversed(made), strict=True):
        source = node.arguments[0] if node.arguments else None
        if node.operator in OPERATORS and OPERATORS[node.operator].view and isinstance(source, Ref):
            last[source.index] = max(last[source.index], *last[start : start + node.results])
    leaving: dict[int, list[int]] = {}
    for index in range(first, len(last)):
        leaving.setdefault(last[index], []).append(index)
    return leaving


def _last_uses(program: Program) -> list[int]:
    count = len(program.weights) + len(program.inputs)
    count += sum(node.results for node in program.nodes)
    last = [-1] * count
    for at, node in enumerate(program.nodes):
        for argument in node.arguments:
            for part in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(part, Ref):
                    last[part.index] = at
    for output in program.outputs:
        last[output.value] = len(program.nodes)
    return last


def _check_outputs(program: Program, rows: int, values: Sequence[PlannedValue]) -> None:
    for output in program.outputs:
        shape = tuple(rows if size is None else size for size in output.shape)
        found = values[output.value]
        if found != TensorSpec(output.dtype, shape):
            raise ProgramError(
                f"output {output.name!r} is {found} for {rows} rows, "
                f"the program says {TensorSpec(output.dtype, shape)}"
            )
