"""A model of a few hundred parameters, its data, and an executor with torch in this process."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    InferRequest,
    Limits,
    TrainRequest,
    TrainResult,
    admit,
)
from meshd.node.compute.toy import ToyExecutor
from meshd.node.compute.training import admit_close, admit_training
from meshd.node.workloads.datasets import ColumnData, Dataset, build_dataset
from meshd.node.workloads.export import export_program
from meshd.node.workloads.interpreter import Interpreter, infer_rows, load
from meshd.node.workloads.training.rounds import close_round
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shard import run_shard
from meshd.p2p.codec import digest

SYMBOLS, WIDTH, LENGTH = 12, 6, 3
ROWS = 96
STEPS = 4
"""Inner steps of a shard."""


class Guesser(nn.Module):
    """Guesses the next symbol from the last three: 12 vectors of six, one matrix, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(SYMBOLS, WIDTH)
        self.out = nn.Linear(LENGTH * WIDTH, SYMBOLS)

    def forward(self, t: Tensor) -> Tensor:
        """Return the logits of (rows, 3) symbols."""
        logits: Tensor = self.out(self.vectors(t).flatten(1))
        return logits


class Learner(Guesser):
    """The same with its loss."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Return the mean cross-entropy of the symbols *y*."""
        return nn.functional.cross_entropy(super().forward(t), y)


@functools.cache
def programs() -> tuple[bytes, bytes]:
    """Return the program that is trained and the one that infers, exported once."""
    torch.set_num_threads(1)  # as executors have it: equal bits
    torch.manual_seed(1)
    learner, guesser = Learner(), Guesser()
    guesser.load_state_dict(learner.state_dict())
    t = torch.randint(0, SYMBOLS, (4, LENGTH))
    training = export_program(learner, {"t": t, "y": t[:, 0]}, training=True)
    return training, export_program(guesser.eval(), {"t": t})


def dataset(*, labels: bool, rows: int = ROWS) -> Dataset:
    """Return rows whose last column, with *labels*, follows from the first symbols."""
    luck = random.Random(3)
    every = [[luck.randrange(SYMBOLS) for _ in range(LENGTH)] for _ in range(rows)]
    flat = [symbol for row in every for symbol in row]
    columns = {"t": ColumnData("i64", (rows, LENGTH), struct.pack(f"<{len(flat)}q", *flat))}
    if labels:
        right = [(row[0] + row[2]) % SYMBOLS for row in every]
        columns["y"] = ColumnData("i64", (rows,), struct.pack(f"<{rows}q", *right))
    return build_dataset(columns, rows_per_chunk=32)


_load = functools.cache(load)
_known: dict[bytes, TrainResult] = {}
_closed: dict[bytes, CloseResult] = {}


def _key(job: TrainRequest | CloseRequest, *more: bytes) -> bytes:
    plain = replace(job, job_id=b"", slot=0) if isinstance(job, TrainRequest) else job
    return digest(repr((replace(plain, job_id=b"", limits=Limits()), more)).encode())


class TorchExecutor(ToyExecutor):
    """The product's own computation, in this process and under virtual time.

    What one node computed another need not compute again here: all of it is pure.
    """

    def __init__(self, shard_s: float = 1.0) -> None:
        super().__init__(1_000_000)
        self._shard_s = shard_s

    async def infer(self, job: InferRequest) -> bytes:
        """Return the packed output rows."""
        admitted = admit(job)
        await self._spend(admitted.units, job.limits)
        return infer_rows(_load(admitted.data), admitted.rows)

    async def train(self, job: TrainRequest) -> TrainResult:
        """Return what a shard comes to."""
        await self.wait(job)
        key = _key(job)
        if key not in _known:
            _known[key] = run(job)
        return _known[key]

    async def wait(self, job: TrainRequest) -> None:
        """Let as much time pass as a shard takes."""
        steps = admit_training(job).settings.steps
        await self._spend(int(self._shard_s * self._speed * steps / STEPS), job.limits)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        """Return the state after a round."""
        await self._spend(1000, job.limits)
        key = _key(job)
        if key not in _closed:
            admitted = admit_close(job)
            closed = close_round(
                admitted.state.data,
                job.contributions,
                job.weights,
                admitted.program,
                admitted.settings,
                round_=job.round,
            )
            _closed[key] = CloseResult(closed.state, closed.gated)
        return _closed[key]


def run(
    job: TrainRequest,
    *,
    interpreter: type[Interpreter] | None = None,
    settings: TrainSettings | None = None,
) -> TrainResult:
    """Compute a shard, with another interpreter or other settings if a cheater wants it."""
    admitted = admit_training(job)
    own = _load(admitted.data)
    if interpreter is not None:
        own = interpreter(own.program, own.weights)
    done = run_shard(
        own,
        admitted.state.data,
        admitted.rows,
        settings or admitted.settings,
        seed=job.seed,
        round_=job.round,
        shard=job.shard,
    )
    return TrainResult(done.contribution, done.end_digest)


def with_weights(data: bytes, changed: Mapping[str, Tensor]) -> Interpreter:
    """Return a program's interpreter with some of its weights replaced."""
    honest = load(data)
    return Interpreter(honest.program, {**honest.weights, **changed})
