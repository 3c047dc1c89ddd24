"""Training for simulations, in plain Python: a vector that learns the mean of the rows it reads.

States and contributions have the real formats, so gate, gossip and audits see the real thing.
The program is real too, and the executor with torch can train it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from blake3 import blake3

from meshd.node.compute.executor import ShardFailed, TrainRequest, TrainResult
from meshd.node.compute.training import TrainAdmission
from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program
from meshd.node.workloads.tensorfile import TensorData
from meshd.node.workloads.tensors import Column
from meshd.node.workloads.training.contribution import contribution_head, state_digest
from meshd.node.workloads.training.outer import momentum_decay
from meshd.node.workloads.training.parameters import Trained
from meshd.node.workloads.training.plain import f32_of, pack_change, pack_fresh, rounded
from meshd.node.workloads.training.settings import TrainSettings, power
from meshd.node.workloads.training.state import MOMENTUM, THETA

Floats = list[float]


def training_program(width: int = 16) -> bytes:
    """Return the program that the toy trains: the mean of (x - w)^2, rows x and weights w f32."""
    nodes = (
        Node("sub", (Ref(1), Ref(0), 1)),
        Node("mul", (Ref(2), Ref(2))),
        Node("mean", (Ref(3), (0, 1), False)),
    )
    graph = Graph((Column("x", "f32", (width,)),), (Output("loss", "f32", (), 4),), nodes, ("w",))
    return encode_program(graph, [TensorData("w", "f32", (width,), bytes(4 * width))])


def train_toy(admitted: TrainAdmission, request: TrainRequest) -> TrainResult:
    """Return what a shard comes to: a pure function of the request, not equal to torch's bits.

    Raises ShardFailed for another program than `training_program`, for AdamW, and when a number
    becomes NaN or infinite.
    """
    settings, state = admitted.settings, admitted.state
    weight = _only_weight(admitted)
    start, before = f32_of(state.bytes_of(THETA + "w")), f32_of(state.bytes_of(MOMENTUM + "w"))
    run = _Run(start, before, weight, settings)
    losses: Floats = []
    width, flat = weight.elements, f32_of(admitted.rows.column("x"))
    for at in range(settings.steps):
        first = at * settings.batch * width
        batch = flat[first : first + settings.batch * width]
        try:
            losses += rounded([run.loss(batch)])
            run.step(batch, settings.learning_rate(state.step + at))
        except OverflowError as error:
            raise ShardFailed(
                f"round {request.round}, shard {request.shard}, step {at}: a number is infinite: "
                f"the training diverged; lower lr (now {settings.lr:g})"
            ) from error
    place = admitted.layout.places[0]
    decay = power(momentum_decay(weight, settings), settings.steps)
    change = rounded([a - b for a, b in zip(start, run.theta, strict=True)])
    fresh = rounded([m - decay * old for m, old in zip(run.momentum, before, strict=True)])
    contribution = (
        contribution_head(losses)
        + pack_change(change, place.theta, _random(request, width))
        + pack_fresh(fresh, place.momentum, settings.momentum_threshold)
    )
    tensors = [
        (prefix + "w", "f32", weight.shape, struct.pack(f"<{width}f", *values))
        for prefix, values in ((THETA, run.theta), (MOMENTUM, run.momentum))
    ]
    return TrainResult(contribution, state_digest(state.step + settings.steps, tensors))


@dataclass
class _Run:
    """The vector and its momentum while the inner steps are taken."""

    theta: Floats
    momentum: Floats
    weight: Trained
    settings: TrainSettings

    def loss(self, batch: Floats) -> float:
        """Return the mean square of what is left to learn."""
        width = len(self.theta)
        return sum((x - self.theta[at % width]) ** 2 for at, x in enumerate(batch)) / len(batch)

    def step(self, batch: Floats, rate: float) -> None:
        """Take one inner step, as Scion takes it for what is no matrix, or as SGD."""
        width, settings = len(self.theta), self.settings
        gradient = [
            2 * (self.theta[at] - sum(batch[at::width]) * width / len(batch)) / width
            for at in range(width)
        ]
        length = math.sqrt(sum(g * g for g in gradient))
        shorter = min(1.0, settings.clip / (length + 1e-6)) if settings.clip else 1.0
        beta = momentum_decay(self.weight, settings)
        scion = settings.optimizer == "scion"
        share = (1 - beta if scion else 1.0) * shorter
        self.momentum = rounded(
            [beta * m + share * g for m, g in zip(self.momentum, gradient, strict=True)]
        )
        kept = 1 - rate * settings.weight_decay
        if scion:
            moves = [settings.rest_scale * ((m > 0) - (m < 0)) for m in self.momentum]
        else:
            moves = self.momentum
        self.theta = rounded(
            [kept * t - rate * move for t, move in zip(self.theta, moves, strict=True)]
        )


def _only_weight(admitted: TrainAdmission) -> Trained:
    if admitted.settings.optimizer == "adamw":
        raise ShardFailed("the toy executor trains with scion or sgd only, not with adamw")
    names = [node.operator for node in admitted.program.nodes]
    weight = admitted.state.weights[0]
    if names != ["sub", "mul", "mean"] or weight.name != "w" or len(admitted.program.weights) > 1:
        raise ShardFailed("the toy executor trains its own program only; see training_program")
    return weight


def _random(request: TrainRequest, count: int) -> Floats:
    place = struct.pack("<QQ", request.round, request.shard)
    words = blake3(b"meshd.toy.v1\0" + request.seed + place).digest(4 * count)
    return [word / 2**32 for word in struct.unpack(f"<{count}I", words)]
