"""What training by shards costs in loss: the table of docs/training.md, in one process.

A language model of about 109,000 parameters on the source text of the standard library, through
the program, the shards and the rounds that a swarm runs: J simulated shards a round, beside one
worker alone and beside data parallel training that sends every gradient in fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshd.node.workloads.export import export_program
from meshd.node.workloads.interpreter import Interpreter, load
from meshd.node.workloads.rows import Rows, pack, unpack
from meshd.node.workloads.training.rounds import close_round
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shard import run_shard, run_steps
from meshd.node.workloads.training.shuffle import rows_of
from meshd.node.workloads.training.state import THETA, State, initial_state, parse_state

WIDTH, LAYERS, HEADS, LENGTH = 64, 2, 4, 64
SYMBOLS = 97
WORKERS, BATCH = 4, 8
TEXT_BYTES = 12_000_000
HELD_OUT_BATCHES, HELD_OUT_ROWS = 48, 32


class Block(nn.Module):
    """One layer of the decoder, normalised before attention and before the two products."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def matrix(out: int, into: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(out, into, generator=generator) * scale * into**-0.5)

        end = 1 / math.sqrt(2 * LAYERS)
        self.first, self.second = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.qkv, self.mix = matrix(3 * WIDTH, WIDTH), matrix(WIDTH, WIDTH, end)
        self.up, self.down = matrix(4 * WIDTH, WIDTH), matrix(WIDTH, 4 * WIDTH, end)

    def forward(self, h: Tensor) -> Tensor:
        normed = functional.rms_norm(h, (WIDTH,), self.first)
        parts = functional.linear(normed, self.qkv).view(-1, LENGTH, 3, HEADS, WIDTH // HEADS)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + functional.linear(mixed.transpose(1, 2).reshape(-1, LENGTH, WIDTH), self.mix)
        normed = functional.rms_norm(h, (WIDTH,), self.second)
        wide = functional.gelu(functional.linear(normed, self.up))
        return h + functional.linear(wide, self.down)


class Decoder(nn.Module):
    """A decoder over 97 symbols; returns the loss of every next symbol."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.symbols = nn.Parameter(torch.randn(SYMBOLS, WIDTH, generator=generator) * 0.05)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH, generator=generator) * 0.05)
        self.blocks = nn.ModuleList([Block(generator) for _ in range(LAYERS)])
        self.norm = nn.Parameter(torch.ones(WIDTH))

    def forward(self, text: Tensor) -> Tensor:
        symbols = text.long()
        h = functional.embedding(symbols[:, :-1], self.symbols) + self.places
        for block in self.blocks:
            h = block(h)
        h = functional.rms_norm(h, (WIDTH,), self.norm)
        logits = functional.linear(h, self.symbols) * 0.25
        return functional.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())


@dataclass(frozen=True)
class Course:
    """What all runs of one seed share."""

    interpreter: Interpreter
    program: bytes
    schema_of: Rows
    text: bytes
    held_out: bytes
    seed: bytes

    @property
    def rows(self) -> int:
        """Windows of the text; each begins with the last symbol of the one before."""
        return (len(self.text) - 1) // LENGTH

    def batch(self, first: int, count: int) -> Rows:
        """Return `count` rows of the shuffled data from position `first`."""
        chosen = rows_of(self.seed, rows=self.rows, first=first, count=count)
        windows = [self.text[row * LENGTH : row * LENGTH + LENGTH + 1] for row in chosen]
        return unpack(pack(self.schema_of.schema, windows))

    def held_out_loss(self, state: State | dict[str, Tensor]) -> float:
        """Return the loss on text that no shard reads, in nats a symbol."""
        theta = _weights(state) if isinstance(state, State) else state
        total = 0.0
        stride = (len(self.held_out) - 1) // LENGTH // (HELD_OUT_BATCHES * HELD_OUT_ROWS)
        at = 0
        with torch.no_grad():
            for _ in range(HELD_OUT_BATCHES):
                windows: list[bytes] = []
                for _ in range(HELD_OUT_ROWS):
                    windows.append(self.held_out[at : at + LENGTH + 1])
                    at += stride * LENGTH
                batch = torch.frombuffer(bytearray(b"".join(windows)), dtype=torch.uint8)
                outputs = self.interpreter({"text": batch.view(-1, LENGTH + 1)}, theta)
                total += float(next(iter(outputs.values())))
        return total / HELD_OUT_BATCHES


def source_text() -> bytes:
    """Return the standard library's source as symbols: printable ASCII, newline, anything else."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [*root.glob("*.py"), *root.glob("*/*.py")]
    names = [file.relative_to(root).as_posix() for file in files]
    left_out = ("site-packages", "idlelib", "test")
    chosen = [n for n in names if not any(p.startswith(left_out) for p in n.split("/"))]
    chosen.sort(key=lambda name: hashlib.sha1(name.encode()).hexdigest())
    text = bytearray()
    for name in chosen:
        text += (root / name).read_bytes()
        if len(text) > TEXT_BYTES:
            break
    table = bytes(b - 32 if 32 <= b < 127 else 95 if b == 10 else 96 for b in range(256))
    return bytes(text).translate(table)


def course_of(seed: int) -> Course:
    """Return the model of a seed as a program, and the text."""
    text = source_text()
    edge = len(text) - len(text) // 20
    example = torch.zeros((4, LENGTH + 1), dtype=torch.uint8)
    program = export_program(Decoder(seed), {"text": example}, outputs=["loss"], training=True)
    interpreter = load(program)
    empty = unpack(pack(interpreter.program.input_schema, []))
    key = hashlib.sha256(f"seed {seed}".encode()).digest()
    return Course(interpreter, program, empty, text[:edge], text[edge:], key)


def alone(course: Course, steps: int, batch: int, **given: str | float) -> float:
    """Return the held-out loss after `steps` steps of one worker, nothing compressed."""
    settings = TrainSettings.fill({"steps": steps, "total_steps": steps, "batch": batch, **given})
    state = parse_state(
        initial_state(course.program, settings), course.interpreter.program, settings
    )
    rows = course.batch(0, settings.rows)
    end = run_steps(course.interpreter, state, rows, settings, where="alone")
    return course.held_out_loss(dict(end.theta))


def swarm(
    course: Course, steps: int, inner: int, **given: str | float
) -> tuple[float, int, int, list[float]]:
    """Return the held-out loss of rounds of shards, bytes a worker sends, how many were gated."""
    rounds = steps // inner
    settings = TrainSettings.fill(
        {"steps": inner, "total_steps": rounds * inner, "batch": BATCH, **given}
    )
    program = course.interpreter.program
    state = initial_state(course.program, settings)
    sent = gated = 0
    curve: list[float] = []
    for round_ in range(rounds):
        contributions: list[bytes] = []
        for shard in range(WORKERS):
            rows = course.batch((round_ * WORKERS + shard) * settings.rows, settings.rows)
            done = run_shard(
                course.interpreter,
                state,
                rows,
                settings,
                seed=course.seed,
                round_=round_,
                shard=shard,
            )
            contributions.append(done.contribution)
        sent += len(contributions[0])
        weights = [settings.rows] * WORKERS
        closed = close_round(state, contributions, weights, program, settings, round_=round_)
        state, gated = closed.state, gated + len(closed.gated)
        if (round_ + 1) % max(1, rounds // 5) == 0:
            curve.append(course.held_out_loss(parse_state(state, program, settings)))
    return course.held_out_loss(parse_state(state, program, settings)), sent, gated, curve


def _weights(state: State) -> dict[str, Tensor]:
    return {
        weight.name: torch.frombuffer(
            bytearray(state.bytes_of(THETA + weight.name)), dtype=torch.float32
        ).reshape(weight.shape)
        for weight in state.weights
    }


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    name: str
    title: str
    optimizer: str
    lr: float
    inner: int = 0
    """Inner steps of a shard; 0 for a run that is not cut into shards."""
    batch: int = BATCH
    bits: int = 3


RUNS = (
    Run("sync", "Scion data parallel, fp32", "scion", 0.04, batch=WORKERS * BATCH),
    Run("h7", "shards, H = 7, 3 bits", "scion", 0.03, inner=7),
    Run("h10", "shards, H = 10, 4 bits", "scion", 0.03, inner=10, bits=4),
    Run("alone", "one Scion worker alone", "scion", 0.02),
    Run("adamw-h7", "AdamW in shards, H = 7, 3 bits", "adamw", 0.008, inner=7),
    Run("adamw-alone", "one AdamW worker alone", "adamw", 0.004),
)


def measure(course: Course, run: Run, steps: int, lr: float | None) -> dict[str, object]:
    """Return the figures of one run."""
    started = time.process_time()
    given: dict[str, str | float] = {"optimizer": run.optimizer, "lr": lr or run.lr}
    elements = sum(w.spec.elements for w in course.interpreter.program.weights)
    figures: dict[str, object] = {"run": run.name, "lr": given["lr"]}
    if run.inner:
        loss, sent, gated, curve = swarm(course, steps, run.inner, theta_bits=run.bits, **given)
        fewer = 4 * elements * (steps // run.inner * run.inner) / sent
        figures |= {"bytes": sent, "fewer": round(fewer, 1), "gated": gated}
        figures["curve"] = [round(value, 3) for value in curve]
    else:
        loss = alone(course, steps, run.batch, **given)
    seconds = round(time.process_time() - started, 1)
    return figures | {"loss": round(loss, 4), "seconds": seconds}


def chosen_runs(names: list[str]) -> Iterator[Run]:
    """Yield the runs to measure, all without names."""
    for run in RUNS:
        if not names or run.name in names:
            yield run


def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=[], choices=[run.name for run in RUNS])
    parser.add_argument("--lr", type=float, help="another learning rate for all runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.nice(5)
    found: list[dict[str, object]] = []
    print(f"{'seed':>4}  {'':32}{'lr':>7}{'loss':>8}{'fewer bytes':>13}{'gated':>7}{'cpu s':>8}")
    for seed in options.seeds:
        course = course_of(seed)
        for run in chosen_runs(options.runs):
            figures = {"seed": seed, **measure(course, run, options.steps, options.lr)}
            found.append(figures)
            fewer, gated = figures.get("fewer", ""), figures.get("gated", "")
            line = f"{seed:>4}  {run.title:32}{figures['lr']:>7}{figures['loss']:>8}"
            print(f"{line}{fewer!s:>13}{gated!s:>7}{figures['seconds']:>8}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
