"""Turns an author's torch module into a program, and proves that both compute the same bits.

Imports torch; runs on the author's machine only. `torch.export` traces the module; every traced
operator gets its one spelling of the table; asserts, devices, layouts and dead code are dropped;
in-place operators become values of their own; tied weights are stored once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from meshd.node.workloads.errors import ExportError, WorkloadError
from meshd.node.workloads.export_graph import GraphReader
from meshd.node.workloads.interpreter import Interpreter, load
from meshd.node.workloads.program import parse_program

MAX_ROWS: Final = 1 << 16


def export_program(
    module: nn.Module,
    example: Mapping[str, Tensor],
    *,
    outputs: Sequence[str] | None = None,
    training: bool = False,
) -> bytes:
    """Return the program that computes what `module(**example)` computes, bit for bit.

    `example` maps the names of forward's parameters, which become the names of the inputs, to
    arrays of shape (rows, ...) with at least two rows. The module returns an array, a tuple or
    a dict of arrays of shape (rows, ...); with `training` a scalar loss. `outputs` names them.
    The program is run against the module for two numbers of rows, with `training` gradients
    too. Raises ExportError naming the operator and the line, or the first difference.
    """
    rows = {array.shape[0] for array in example.values() if array.dim()}
    if not example or len(rows) != 1 or min(rows) < 2:
        raise ExportError("give an example with at least two rows, as many in every input")
    was_training = module.training
    module.train(training)
    try:
        traced = _trace(module, example)
        data = GraphReader(traced, outputs).program()
        if not training:
            _need_rows(data)
        _compare(module, data, example, training=training)
    finally:
        module.train(was_training)
    return data


def _trace(module: nn.Module, example: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    try:
        traced = torch.export.export(
            module, (), dict(example), dynamic_shapes={name: {0: rows} for name in example}
        )
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        text = str(error).strip()[:800]
        raise ExportError(
            f"torch cannot trace the module for any number of rows: {text}"
        ) from error
    changed = [*traced.graph_signature.buffers_to_mutate.values()]
    if changed:
        raise ExportError(
            f"the module changes its buffers {', '.join(changed[:5])}; a program has no state: "
            "call eval() or return the new value"
        )
    return traced


def _need_rows(data: bytes) -> None:
    try:
        parse_program(data).output_schema.header(1)
    except WorkloadError as error:
        raise ExportError(f"{error}; return rows, or export it for training") from error


def _compare(
    module: nn.Module, data: bytes, example: Mapping[str, Tensor], *, training: bool
) -> None:
    """Raise ExportError unless program and module agree bit for bit for two numbers of rows."""
    interpreter = load(data)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused layers compute other bits
    try:
        _compare_batches(module, interpreter, example, training=training)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _compare_batches(
    module: nn.Module, interpreter: Interpreter, example: Mapping[str, Tensor], *, training: bool
) -> None:
    rows = next(iter(example.values())).shape[0]
    for count in (rows, rows - 1):
        batch = {name: array[:count].clone() for name, array in example.items()}
        if training:
            _compare_gradients(module, interpreter, batch)
            continue
        with torch.no_grad():
            theirs = _flat_outputs(module(**batch))
            ours = list(interpreter(batch).values())
        _need_equal(interpreter, ours, theirs, count)


def _compare_gradients(
    module: nn.Module, interpreter: Interpreter, batch: Mapping[str, Tensor]
) -> None:
    names = interpreter.program.graph.trainable
    parameters = dict(module.named_parameters(remove_duplicate=False))
    theirs = _flat_outputs(module(**batch))
    weights = {name: interpreter.weights[name].clone().requires_grad_() for name in names}
    ours = list(interpreter(batch, weights).values())
    count = next(iter(batch.values())).shape[0]
    _need_equal(interpreter, ours, theirs, count)
    if ours[0].dim():
        raise ExportError("a training program returns a scalar loss first")
    expected = torch.autograd.grad(
        theirs[0], [parameters[name] for name in names], allow_unused=True
    )
    found = torch.autograd.grad(ours[0], list(weights.values()), allow_unused=True)
    for name, a, b in zip(names, found, expected, strict=True):
        if (a is None) is not (b is None) or (
            a is not None and b is not None and not torch.equal(a, b)
        ):
            raise ExportError(
                f"the gradient of {name} differs from the module's for {count} rows; "
                "a custom autograd.Function has no place in a program"
            )


def _need_equal(
    interpreter: Interpreter, ours: Sequence[Tensor], theirs: Sequence[Tensor], rows: int
) -> None:
    for output, a, b in zip(interpreter.program.outputs, ours, theirs, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            raise ExportError(
                f"output {output.name!r} differs from the module's for {rows} rows; "
                "does the module draw random numbers or keep state?"
            )


def _flat_outputs(result: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(result)
    return leaves
