"""A tiny model, its data and a round of it, for the tests of training."""

from __future__ import annotations

import random
import struct

import torch

from meshd.node.workloads.interpreter import load
from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program, parse_program
from meshd.node.workloads.rows import Rows, f32_bytes, pack, unpack
from meshd.node.workloads.tensorfile import TensorData
from meshd.node.workloads.tensors import Column
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shard import ShardResult, run_shard

SYMBOLS, WIDTH, LENGTH, CLASSES = 8, 6, 4, 5
SEED = b"s" * 32

torch.set_num_threads(1)  # as executors have it: equal bits, and no time lost between threads


def numbers(count: int, seed: int, scale: float = 0.3) -> bytes:
    """Return packed f32 that look random and are the same everywhere."""
    generator = random.Random(seed)
    return f32_bytes([generator.uniform(-scale, scale) for _ in range(count)])


def tiny_program(loss: str = "loss", scale: float = 0.3) -> bytes:
    """Return a classifier of four symbols: an embedding, one matrix, a bias; its loss.

    With another name in place of "loss" it returns logits.
    """
    inner = LENGTH * WIDTH
    weights = [
        TensorData("b", "f32", (CLASSES,), bytes(4 * CLASSES)),
        TensorData("emb", "f32", (SYMBOLS, WIDTH), numbers(SYMBOLS * WIDTH, 1, scale)),
        TensorData("w", "f32", (CLASSES, inner), numbers(CLASSES * inner, 2, scale)),
    ]
    nodes = [
        Node("embedding", (Ref(1), Ref(3), -1)),
        Node("sym_size", (Ref(3), 0)),
        Node("reshape", (Ref(5), (Ref(6), inner))),
        Node("linear", (Ref(7), Ref(2), Ref(0))),
        Node("cross_entropy", (Ref(8), Ref(4), None, "mean", -100, 0.0)),
    ]
    output = Output("loss", "f32", (), 9)
    if loss != "loss":
        nodes, output = nodes[:-1], Output(loss, "f32", (None, CLASSES), 8)
    columns = (Column("t", "i64", (LENGTH,)), Column("y", "i64", ()))
    return encode_program(Graph(columns, (output,), tuple(nodes), ("b", "emb", "w")), weights)


PROGRAM = tiny_program()
PARSED = parse_program(PROGRAM)
INTERPRETER = load(PROGRAM)


def settings(**given: str | float) -> TrainSettings:
    """Return settings of short shards of the tiny model."""
    return TrainSettings.fill(
        {"batch": 16, "steps": 3, "total_steps": 60, "warmup": 3, "outer_warmup": 1, **given}
    )


def batch_rows(count: int, first: int = 0) -> Rows:
    """Return rows whose class follows from their first symbol; the last class is in none."""
    made: list[bytes] = []
    for at in range(first, first + count):
        generator = random.Random(at)
        symbols = [generator.randrange(SYMBOLS) for _ in range(LENGTH)]
        made.append(struct.pack(f"<{LENGTH}qq", *symbols, symbols[0] // 2))
    return unpack(pack(PARSED.input_schema, made))


def shard_of(
    state: bytes, chosen: TrainSettings, round_: int = 0, shard: int = 0, seed: bytes = SEED
) -> ShardResult:
    """Return what an honest worker makes of a shard."""
    rows = batch_rows(chosen.rows, (round_ * 8 + shard) * chosen.rows)
    return run_shard(INTERPRETER, state, rows, chosen, seed=seed, round_=round_, shard=shard)
