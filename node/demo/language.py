"""Makes what the demo's training job computes: a small language model of bytes, and its text.

Runs as a process of its own, `python -m meshd.node.demo.language --out DIR`, since torch is
loaded here and in `heldout` only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshd.node.demo.model import answer, go_offline, write_whole
from meshd.node.demo.sourcetext import CONTEXT, WINDOW, collect_source_text
from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.datasets import ColumnData, build_dataset
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plan import optimizer_units
from meshd.node.workloads.training.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH: Final = 96
HEADS: Final = 4
LAYERS: Final = 3
BYTES: Final = 256

ROUNDS: Final = 10
SHARDS: Final = 4
"""Of one round."""
STEPS: Final = 16
"""Inner steps of one shard."""
BATCH: Final = 16
"""Rows of one inner step."""
WARMUP: Final = 16
"""Inner steps over which the learning rate rises."""
LEARNING_RATE: Final = 0.02
"""Of the swarm's workers."""
OUTER_WARMUP: Final = 3
"""Rounds without outer momentum: fewer than by default, in so short a job."""
TRAINING_ROWS: Final = ROUNDS * SHARDS * STEPS * BATCH
"""Every row is read once."""
HELD_OUT_ROWS: Final = 256
ROWS_PER_CHUNK: Final = 1024

PROGRAM_FILE: Final = "language.program"
DATA_FILE: Final = "source.data"
HELD_OUT_FILE: Final = "heldout.bytes"
INPUT: Final = "window"


@dataclass(frozen=True)
class Made:
    """What was written, and how large it is."""

    program: str
    data: str
    rows: int
    parameters: int
    units_per_shard: int
    """Compute units (floating-point operations) of a shard of one round."""
    seconds: float


def make(directory: Path, seed: int) -> Made:
    """Write program, dataset and held-out rows into *directory*.

    Raises SourceTextError if the machine has too little text, ExportError if the model cannot
    be exported bit for bit.
    """
    import torch

    from meshd.node.workloads.export import export_program

    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    text = collect_source_text(TRAINING_ROWS, HELD_OUT_ROWS, seed)
    column = ColumnData("u8", (TRAINING_ROWS, WINDOW), text.training)
    write_whole(directory / HELD_OUT_FILE, text.held_out)
    write_dataset(build_dataset({INPUT: column}, ROWS_PER_CHUNK), directory / DATA_FILE)
    model = new_model(seed)
    example = torch.frombuffer(bytearray(text.training[: 3 * WINDOW]), dtype=torch.uint8)
    program = export_program(model, {INPUT: example.reshape(3, WINDOW)}, training=True)
    write_whole(directory / PROGRAM_FILE, program)
    return Made(
        program=str(directory / PROGRAM_FILE),
        data=str(directory / DATA_FILE),
        rows=TRAINING_ROWS,
        units_per_shard=_units_per_shard(program),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=round(time.monotonic() - started, 3),
    )


def settings() -> TrainSettings:
    """Return the settings of the job, those of the swarm's workers."""
    return TrainSettings.fill(
        {
            "batch": BATCH,
            "steps": STEPS,
            "total_steps": ROUNDS * STEPS,
            "warmup": WARMUP,
            "lr": LEARNING_RATE,
            "outer_warmup": OUTER_WARMUP,
        }
    )


def _units_per_shard(data: bytes) -> int:
    program = parse_program(data)
    each = units(program, BATCH, training=True)
    return STEPS * (each + optimizer_units(trained_weights(program), settings()))


def new_model(seed: int) -> nn.Module:
    """Return the model as it is before training: forward takes rows and returns nats per byte."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """Attention to the bytes before, then a layer for each place by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.attention_norm = nn.LayerNorm(WIDTH)
            self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.join = nn.Linear(WIDTH, WIDTH, bias=False)
            self.norm = nn.LayerNorm(WIDTH)
            self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
            self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            """Return as many vectors as come in, (rows, bytes, width)."""
            rows, length, _ = x.shape
            parts = self.query_key_value(self.attention_norm(x))
            heads = parts.reshape(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(
                heads[0], heads[1], heads[2], is_causal=True
            )
            x = x + self.join(seen.transpose(1, 2).reshape(rows, length, WIDTH))
            hidden: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
            return hidden

    class LanguageModel(nn.Module):
        """A decoder-only transformer of bytes."""

        def __init__(self) -> None:
            super().__init__()
            self.byte = nn.Embedding(BYTES, WIDTH)
            self.place = nn.Embedding(CONTEXT, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.LayerNorm(WIDTH)
            self.next_byte = nn.Linear(WIDTH, BYTES, bias=False)

        def forward(self, window: Tensor) -> Tensor:
            """Return the mean loss of predicting each byte of (rows, 129) but the first."""
            text = window.long()
            x = self.byte(text[:, :-1]) + self.place.weight
            for block in self.blocks:
                x = block(x)
            logits = self.next_byte(self.norm(x))
            return functional.cross_entropy(logits.reshape(-1, BYTES), text[:, 1:].reshape(-1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel()
        for parameter in (model.byte.weight, model.place.weight):
            nn.init.normal_(parameter, std=0.05)
        nn.init.normal_(model.next_byte.weight, std=0.02)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its last line of output is the JSON of `Made`."""
    parser = argparse.ArgumentParser(prog="python -m meshd.node.demo.language", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args(arguments)
    go_offline(torch_threads=1)
    return answer(lambda: make(options.out, options.seed))


if __name__ == "__main__":
    sys.exit(main())
