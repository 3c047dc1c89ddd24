"""Tells how well the training job goes: losses on held-out text, and of one worker alone.

Runs as a process of its own, `python -m meshd.node.demo.heldout --dir DIR --rounds N`, while the
swarm trains, and prints a line of JSON for each loss. The lone worker takes as many steps of the
same optimizer as a worker of the swarm does in all rounds, at the learning rate that suits one.
Losses are those of the torch module itself with the weights loaded into it: neither the
program, its interpreter nor the dataset takes part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshd.node.demo.language import (
    BATCH,
    DATA_FILE,
    HELD_OUT_FILE,
    PROGRAM_FILE,
    STEPS,
    new_model,
    settings,
)
from meshd.node.demo.model import answer, go_offline
from meshd.node.demo.sourcetext import WINDOW
from meshd.node.workloads.datasetfile import open_dataset
from meshd.node.workloads.datasets import slice_rows
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.shuffle import rows_of
from meshd.node.workloads.training.state import initial_state, parse_state

if TYPE_CHECKING:
    from torch import Tensor, nn

LONE_LEARNING_RATE: Final = 0.02
"""The best of 0.01, 0.02 and 0.04 for a lone worker."""
NICENESS: Final = 10
"""As the swarm's executors: no round waits because of it."""
_EVALUATED_AT_ONCE: Final = 32
_POLL_S: Final = 0.2


@dataclass(frozen=True)
class Losses:
    """Held-out losses in nats per byte: before the first round, after each, and alone."""

    loss: list[float]
    loss_alone: float
    seconds: float


def weights_file(round_: int) -> str:
    """Return the name of the file with the weights after a round, counted from 1."""
    return f"round-{round_}.safetensors"


def follow(directory: Path, rounds: int, seed: int, tell: Callable[[str], object]) -> Losses:
    """Return all losses of a job in *directory*; *tell* gets each as a line, when it is known.

    Waits for the weights of each round, which are to be moved there when they are complete.
    Raises WorkloadError and OSError.
    """
    from meshd.node.arrays import tensors_from_safetensors

    started = time.monotonic()
    judge = Judge(directory, seed)
    losses = [judge.loss()]
    tell(json.dumps({"round": 0, "loss": losses[0]}))
    judge.load(train_alone(directory, rounds))
    alone = judge.loss()
    tell(json.dumps({"alone": alone}))
    for round_ in range(1, rounds + 1):
        path = directory / weights_file(round_)
        while not path.exists():
            time.sleep(_POLL_S)
        judge.load(tensors_from_safetensors(path.read_bytes()))
        losses.append(judge.loss())
        tell(json.dumps({"round": round_, "loss": losses[-1]}))
    return Losses(losses, alone, round(time.monotonic() - started, 3))


class Judge:
    """The model and the text that nobody trains on."""

    def __init__(self, directory: Path, seed: int) -> None:
        import torch

        text = bytearray((directory / HELD_OUT_FILE).read_bytes())
        self._rows = torch.frombuffer(text, dtype=torch.uint8).reshape(-1, WINDOW)
        self._model: nn.Module = new_model(seed).eval()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights, all of them."""
        self._model.load_state_dict(dict(weights))

    def loss(self) -> float:
        """Return the mean loss over every held-out byte, in nats."""
        import torch

        total = 0.0
        with torch.inference_mode():
            for first in range(0, len(self._rows), _EVALUATED_AT_ONCE):
                rows = self._rows[first : first + _EVALUATED_AT_ONCE]
                total += float(self._model(window=rows)) * len(rows)
        return total / len(self._rows)


def train_alone(directory: Path, rounds: int) -> dict[str, Tensor]:
    """Return the weights after as many steps as the rounds have for each worker.

    With the optimizer of the swarm, its batch and its schedule, from the same first weights.
    """
    import torch

    from meshd.node.workloads.interpreter import load
    from meshd.node.workloads.training.shard import run_steps

    torch.set_num_threads(1)
    data = (directory / PROGRAM_FILE).read_bytes()
    program = parse_program(data)
    dataset = open_dataset(directory / DATA_FILE)
    steps = rounds * STEPS
    alone = replace(settings(), steps=steps, total_steps=steps, lr=LONE_LEARNING_RATE)
    state = parse_state(initial_state(data, alone), program, alone)
    indices = rows_of(bytes(32), rows=dataset.manifest.rows, first=0, count=steps * BATCH)
    chunks = {chunk.digest: dataset.read_chunk(chunk.index) for chunk in dataset.manifest.chunks}
    rows = unpack(slice_rows(dataset.manifest, chunks, indices))
    return dict(run_steps(load(data), state, rows, alone, where="alone").theta)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its last line of output is the JSON of `Losses`."""
    parser = argparse.ArgumentParser(prog="python -m meshd.node.demo.heldout", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, required=True, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args(arguments)
    os.nice(NICENESS)
    go_offline(torch_threads=1)

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    return answer(lambda: follow(options.dir, options.rounds, options.seed, tell))


if __name__ == "__main__":
    sys.exit(main())
