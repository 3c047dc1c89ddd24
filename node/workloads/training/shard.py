"""One shard of training: H inner steps from a public state, and what is uploaded of them.

Imports torch. A pure function of (program, state, rows, settings, seed, round, shard): the same
bytes whenever it is computed in the same numeric class, with one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meshd.node.workloads.interpreter import Interpreter
from meshd.node.workloads.kernels import TORCH_DTYPES
from meshd.node.workloads.rows import Rows
from meshd.node.workloads.training.compression import (
    F32,
    F64,
    pack_bf16,
    pack_change,
    pack_fresh,
    random_numbers,
)
from meshd.node.workloads.training.contribution import contribution_head, layout_of, state_digest
from meshd.node.workloads.training.errors import TrainingDiverged
from meshd.node.workloads.training.optimizers import InnerOptimizer
from meshd.node.workloads.training.outer import momentum_decay
from meshd.node.workloads.training.parameters import Trained, check_rows, loss_of
from meshd.node.workloads.training.settings import TrainSettings, power
from meshd.node.workloads.training.state import (
    COLUMNS,
    MOMENTUM,
    ROWS,
    SECOND,
    THETA,
    State,
    parse_state,
)

OnStep = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a shard returns."""

    contribution: bytes
    end_digest: bytes
    """Of the uncompressed end state: what an auditor's own computation is compared with."""
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EndState:
    """Weights, momentum and second moment after the inner steps, by name; f32."""

    theta: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    losses: tuple[float, ...]
    step: int

    def digest(self) -> bytes:
        """Return its digest, every bit of it."""
        parts = ((THETA, self.theta), (MOMENTUM, self.momentum), (SECOND, self.second))
        return state_digest(
            self.step,
            (
                (prefix + name, "f32", tuple(tensor.shape), _flat(tensor).tobytes())
                for prefix, tensors in parts
                for name, tensor in tensors.items()
            ),
        )


def run_shard(
    interpreter: Interpreter,
    state: bytes,
    rows: Rows,
    settings: TrainSettings,
    *,
    seed: bytes,
    round_: int,
    shard: int,
    on_step: OnStep | None = None,
) -> ShardResult:
    """Return contribution and end digest of a shard.

    `rows` are its H x B rows in order; `on_step` is told after every inner step how many are
    done. Raises TrainingError when program, state, rows and settings do not fit one another, and
    TrainingDiverged naming round, shard and step when a number becomes NaN or infinite.
    """
    parsed = parse_state(state, interpreter.program, settings)
    where = f"round {round_}, shard {shard}"
    end = run_steps(interpreter, parsed, rows, settings, where=where, on_step=on_step)
    packed = [contribution_head(end.losses)]
    for place in layout_of(parsed.weights, settings).places:
        weight = place.weight
        start, old = _stored(parsed, THETA + weight.name), _stored(parsed, MOMENTUM + weight.name)
        random = random_numbers(seed, round_, shard, weight.name, weight.elements)
        packed.append(pack_change(start - _wide(end.theta[weight.name]), place.theta, random))
        decay = power(momentum_decay(weight, settings), settings.steps)
        fresh = _wide(end.momentum[weight.name]) - old * decay
        packed.append(pack_fresh(fresh, place.momentum, settings.momentum_threshold))
        if place.second:
            packed += [pack_bf16(_flat(part)) for part in _means(end.second[weight.name], weight)]
    return ShardResult(b"".join(packed), end.digest(), end.losses)


def run_steps(
    interpreter: Interpreter,
    state: State,
    rows: Rows,
    settings: TrainSettings,
    *,
    where: str,
    on_step: OnStep | None = None,
) -> EndState:
    """Take the H inner steps of a shard, or of a worker that trains alone; nothing is compressed.

    `where` names the shard in errors. Raises as `run_shard`.
    """
    loss = loss_of(interpreter.program)
    check_rows(interpreter.program, rows, settings)
    theta = {w.name: _tensor(state, THETA + w.name) for w in state.weights}
    momentum = {w.name: _tensor(state, MOMENTUM + w.name) for w in state.weights}
    second = {w.name: _second(state, w) for w in state.weights if settings.optimizer == "adamw"}
    optimizer = InnerOptimizer(state.weights, settings, theta, momentum, second)
    losses: list[float] = []
    for at, batch in enumerate(_batches(interpreter, rows, settings)):
        step = f"{where}, step {at}"
        for tensor in theta.values():
            tensor.requires_grad_(True)
        value = interpreter(batch, theta)[loss.name]
        gradients = _gradients(value, theta)
        for tensor in theta.values():
            tensor.requires_grad_(False)
        losses.append(float(value.detach()))
        _need_finite(losses[-1], f"{step}: the loss is", settings)
        length = optimizer.step(gradients, state.step + at)
        _need_finite(length, f"{step}: the gradient's length is", settings)
        if on_step is not None:
            on_step(at + 1)
    for kind, tensors in (("weight", theta), ("momentum", momentum), ("second moment", second)):
        for name, tensor in tensors.items():
            largest = float(tensor.abs().max())
            last = f"{where}, step {settings.steps - 1}: {kind} {name!r} is"
            _need_finite(largest, last, settings)
    return EndState(theta, momentum, second, tuple(losses), state.step + settings.steps)


def _batches(
    interpreter: Interpreter, rows: Rows, settings: TrainSettings
) -> Iterator[dict[str, Tensor]]:
    whole: dict[str, Tensor] = {}
    for column in interpreter.program.inputs:
        flat = torch.frombuffer(
            bytearray(rows.column(column.name)), dtype=TORCH_DTYPES[column.dtype]
        )
        whole[column.name] = flat.reshape(rows.count, *column.shape)
    for first in range(0, rows.count, settings.batch):
        # Cloned into memory that torch aligned: alignment can change bits.
        yield {name: array[first : first + settings.batch].clone() for name, array in whole.items()}


def _gradients(loss: Tensor, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    found = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(theta.items(), found, strict=True)
    }


def _need_finite(value: float, what: str, settings: TrainSettings) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"{what} {value}: the training diverged; lower lr (now {settings.lr:g}), lengthen the "
            f"warm-up (now {settings.warmup} steps) or look for numbers out of range in the data"
        )


def _stored(state: State, name: str) -> F64:
    return np.frombuffer(state.bytes_of(name), "<f4").astype(np.float64)


def _tensor(state: State, name: str) -> Tensor:
    flat = torch.frombuffer(bytearray(state.bytes_of(name)), dtype=torch.float32)
    return flat.reshape(state.tensors[name].shape).clone()


def _second(state: State, weight: Trained) -> Tensor:
    """Return the second moment of a weight; of tables the product of their means."""
    if weight.table is None:
        return _tensor(state, SECOND + weight.name)
    rows, columns = _tensor(state, ROWS + weight.name), _tensor(state, COLUMNS + weight.name)
    product = rows[:, None] * columns / (rows.mean() + 1e-30)
    return product.reshape(weight.shape).clone()


def _means(second: Tensor, weight: Trained) -> list[Tensor]:
    if weight.table is None:
        return [second]
    table = second.reshape(weight.table)
    return [table.mean(dim=1), table.mean(dim=0)]


def _wide(tensor: Tensor) -> F64:
    return _flat(tensor).astype(np.float64)


def _flat(tensor: Tensor) -> F32:
    array: F32 = tensor.detach().contiguous().reshape(-1).numpy()
    return array
