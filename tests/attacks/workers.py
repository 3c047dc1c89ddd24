"""Workers that cheat in what they compute, with torch: wrappers around an honest executor."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
import trio
from attacks.tiny import SYMBOLS, TorchExecutor, run, with_weights
from sim.adversaries import Training, Wrapped
from sim.forging import Opened, closed, layout_for, opened, rearranged
from torch import Tensor

from meshd.node.compute.executor import InferRequest, TrainRequest, TrainResult, admit, read_file
from meshd.node.workloads.interpreter import Interpreter, infer_rows, load
from meshd.node.workloads.rows import pack, unpack
from meshd.node.workloads.training.contribution import Layout
from meshd.node.workloads.training.settings import TrainSettings
from meshd.p2p.codec import digest

Others = Callable[[TrainRequest], list[bytes]]
"""Returns what others have contributed to the round of a request so far."""
PATIENCE_S = 8.0
"""Seconds that a copier waits for what it copies."""


class Noise(Training):
    """Computes nothing: random numbers of about the right size."""

    def __init__(self, inner: TorchExecutor, seed: int = 0) -> None:
        super().__init__(inner)
        self._random = random.Random(seed)

    async def cheat(self, job: TrainRequest) -> TrainResult:
        await trio.sleep(0.1)
        layout, settings = layout_for(job), TrainSettings.parse(job.settings)
        size = 0.5 * settings.lr * settings.steps * settings.rest_scale

        def some(count: int, most: float) -> list[float]:
            return [self._random.uniform(-most, most) for _ in range(count)]

        counts = [place.weight.elements for place in layout.places]
        numbers = Opened(
            losses=[2.0] * settings.steps,
            changes=[some(count, size) for count in counts],
            fresh=[some(count, 0.05) for count in counts],
        )
        return TrainResult(closed(numbers, layout, settings), self._random.randbytes(32))


class Rearranging(Training):
    """Reads other rows than its shard's."""

    def __init__(self, inner: TorchExecutor, place_of: Callable[[int, int], int]) -> None:
        super().__init__(inner)
        self._place_of = place_of

    async def cheat(self, job: TrainRequest) -> TrainResult:
        return await self._inner.train(rearranged(job, self._place_of))


def first_batch(at: int, batch: int) -> int:
    """Return the row of the first step, whichever step it is."""
    return at % batch


def half_batch(at: int, batch: int) -> int:
    """Return a row of the first half of its own step."""
    return at - at % batch + at % batch % (batch // 2)


class Mislabelling(Training):
    """Trains on a wrong label in one row of the shard."""

    async def cheat(self, job: TrainRequest) -> TrainResult:
        rows = unpack(job.inputs)
        every = rows.rows()
        (label,) = struct.unpack("<q", every[0][-8:])
        every[0] = every[0][:-8] + struct.pack("<q", (label + 1) % SYMBOLS)
        return await self._inner.train(replace(job, inputs=pack(rows.schema, every)))


class Altering(Training):
    """Computes a shard with another interpreter or other settings."""

    def __init__(
        self,
        inner: TorchExecutor,
        *,
        interpreter: type[Interpreter] | None = None,
        settings: type[TrainSettings] | None = None,
    ) -> None:
        super().__init__(inner)
        self._torch = inner
        self._interpreter, self._settings = interpreter, settings

    async def cheat(self, job: TrainRequest) -> TrainResult:
        await self._torch.wait(job)
        given = TrainSettings.parse(job.settings)
        other = None
        if self._settings is not None:
            other = self._settings(**{f.name: getattr(given, f.name) for f in fields(given)})
        return run(job, interpreter=self._interpreter, settings=other)


class Halved(Interpreter):
    """Computes with weights rounded to bf16."""

    def __call__(
        self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        less = {n: w.to(torch.bfloat16).to(torch.float32) for n, w in (weights or {}).items()}
        return super().__call__(inputs, less)


class Louder(Interpreter):
    """The gradient of the second step is ten times too long; its loss looks right."""

    _step = 0

    def __call__(
        self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        found = super().__call__(inputs, weights)
        self._step += 1
        if self._step != 2:
            return found
        return {name: v + 9 * (v - v.detach()) for name, v in found.items()}


class Hastier(TrainSettings):
    """The learning rate of the second step of a shard is 1 % too high."""

    __slots__ = ()

    def learning_rate(self, step: int) -> float:
        rate = super().learning_rate(step)
        return rate * 1.01 if step % self.steps == 1 else rate


class Outdated(Training):
    """Goes on from the first state that it fetched, not from its round's."""

    def __init__(self, inner: TorchExecutor) -> None:
        super().__init__(inner)
        self._state: bytes | None = None

    async def cheat(self, job: TrainRequest) -> TrainResult:
        if self._state is None:
            self._state = read_file(job.state, "state")
        return await self._inner.train(replace(job, state=self._state))


class Copying(Training):
    """Waits for another contribution to its round and hands that in."""

    def __init__(self, inner: TorchExecutor, others: Others) -> None:
        super().__init__(inner)
        self._others = others

    async def cheat(self, job: TrainRequest) -> TrainResult:
        held = await self._wait(job, 1)
        if not held:
            return await self._inner.train(job)
        return TrainResult(held[0], bytes(digest(held[0])))

    async def _wait(self, job: TrainRequest, count: int) -> list[bytes]:
        with trio.move_on_after(PATIENCE_S):
            while len(self._others(job)) < count:
                await trio.sleep(0.1)
        held = self._others(job)
        return held if len(held) >= count else []


class LittleIsEnough(Copying):
    """Hands in the mean of the others less one standard deviation (Baruch et al. 2019)."""

    async def cheat(self, job: TrainRequest) -> TrainResult:
        held = await self._wait(job, 3)
        if not held:
            return await self._inner.train(job)
        layout = layout_for(job)
        numbers = [opened(data, layout) for data in held]
        worst = Opened(
            losses=numbers[0].losses,
            changes=[_lower([n.changes[at] for n in numbers]) for at in range(len(layout.places))],
            fresh=[_lower([n.fresh[at] for n in numbers]) for at in range(len(layout.places))],
        )
        settings = TrainSettings.parse(job.settings)
        return TrainResult(closed(worst, layout, settings), bytes(32))


def _lower(every: list[list[float]]) -> list[float]:
    means = [sum(values) / len(values) for values in zip(*every, strict=True)]
    spreads = [
        (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
        for values, mean in zip(zip(*every, strict=True), means, strict=True)
    ]
    return [mean - spread for mean, spread in zip(means, spreads, strict=True)]


Bomb = Callable[[bytes, Layout], bytes]


class Bombing(Training):
    """Contributes bytes that are no contribution."""

    def __init__(self, inner: TorchExecutor, bomb: Bomb) -> None:
        super().__init__(inner)
        self._bomb = bomb

    async def cheat(self, job: TrainRequest) -> TrainResult:
        honest = await self._inner.train(job)
        return replace(honest, contribution=self._bomb(honest.contribution, layout_for(job)))


def nan(contribution: bytes, layout: Layout) -> bytes:
    """Return a contribution with a NaN in place of its first scale."""
    at = layout.places[0].theta.scales_at
    return contribution[:at] + b"\x00\x7e" + contribution[at + 2 :]


def too_long(contribution: bytes, _: Layout) -> bytes:
    """Return a contribution that is a megabyte longer."""
    return contribution + bytes(1 << 20)


# ---- inference ---------------------------------------------------------------------------


class Substituting(Wrapped):
    """Infers with another model: some weights of it changed."""

    def __init__(self, inner: TorchExecutor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner)
        self._change = change

    async def infer(self, job: InferRequest) -> bytes:
        await super().infer(job)
        admitted = admit(job)
        name = max(load(admitted.data).weights, key=lambda n: n.endswith("out.weight"))
        changed = {name: self._change(load(admitted.data).weights[name])}
        return infer_rows(with_weights(admitted.data, changed), admitted.rows)


def shifted(weight: Tensor) -> Tensor:
    """Return a layer as a little more training would have left it."""
    return weight + 0.01


def int8(weight: Tensor) -> Tensor:
    """Return a matrix that was stored in 8 bits."""
    scale = weight.abs().max() / 127
    return torch.round(weight / scale) * scale


class Truncating(Wrapped):
    """Computes the first half of every shard and fills the rest with its last row."""

    async def infer(self, job: InferRequest) -> bytes:
        rows = unpack(await super().infer(job))
        every, half = rows.rows(), max(1, rows.count // 2)
        return pack(rows.schema, every[:half] + [every[half - 1]] * (rows.count - half))


class Infinite(Wrapped):
    """Answers with NaN."""

    async def infer(self, job: InferRequest) -> bytes:
        rows = unpack(await super().infer(job))
        poison = struct.pack("<f", float("nan"))
        return pack(rows.schema, [poison + row[4:] for row in rows.rows()])
