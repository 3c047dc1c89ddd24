"""Compares the job's output with plain torch: the same sentences, one process, no swarm.

Runs as a process of its own, `python -m meshd.node.demo.reference --stage compute --dir DIR`,
while the swarm works; `--stage compare --output FILE` follows when the job has ended. Plain
means: from the text on, with the transformers module itself, in batches that are padded to
their longest sentence only, so that neither the program, its interpreter nor the dataset takes
part.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Final

from meshd.node.demo.errors import ComparisonError
from meshd.node.demo.model import (
    DIMENSIONS,
    OUTPUT,
    TEXT_FILE,
    answer,
    go_offline,
    load_encoder,
    tokenize,
    write_whole,
)
from meshd.node.workloads.errors import RowsError
from meshd.node.workloads.rows import RowSchema, check_finite, floats, unpack
from meshd.node.workloads.tensors import Column, valid_numbers

REFERENCE_FILE: Final = "reference.f32"
"""Rows of 384 little-endian float32, in the order of the sentences."""
NICENESS: Final = 5
"""Above the swarm's executors (10), below everything that has to be in time."""

_BATCH: Final = 32
_SCHEMA: Final = RowSchema((Column(OUTPUT, "f32", (DIMENSIONS,)),))


@dataclass(frozen=True)
class Computed:
    """How much was computed, and how long it took."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class Compared:
    """How far the job's output is from plain torch, over all rows and numbers."""

    rows: int
    max_abs_diff: float
    seconds: float


def compute(directory: Path, torch_threads: int = 1) -> Computed:
    """Write the embeddings of the sentences in *directory* to `reference.f32`.

    Raises OSError if there are none.
    """
    import torch
    from torch.nn import functional

    started = time.monotonic()
    torch.set_num_threads(torch_threads)
    texts = (directory / TEXT_FILE).read_text().splitlines()
    encoder = load_encoder()
    embeddings = torch.empty(len(texts), DIMENSIONS)
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with torch.inference_mode():
        for start in range(0, len(texts), _BATCH):
            batch = by_length[start : start + _BATCH]
            columns = tokenize([texts[index] for index in batch], pad=False)
            hidden = encoder(**columns).last_hidden_state
            mask = columns["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            embeddings[batch] = functional.normalize(mean, p=2, dim=1)
    write_whole(directory / REFERENCE_FILE, embeddings.numpy().astype("<f4").tobytes())
    return Computed(len(texts), round(time.monotonic() - started, 3))


def compare(directory: Path, output: Path) -> Compared:
    """Return how far the packed rows in *output* are from `reference.f32`, row by row.

    Needs no torch. Raises ComparisonError if the two cannot be compared: another number of
    rows or columns, a file that is missing or malformed, or a number that is not finite.
    """
    started = time.monotonic()
    try:
        reference = (directory / REFERENCE_FILE).read_bytes()
        rows = unpack(output.read_bytes())
        check_finite(rows)
    except OSError as error:
        raise ComparisonError(
            f"{error.filename} cannot be read: {error.strerror}: run --stage compute and the job"
        ) from error
    except RowsError as error:
        raise ComparisonError(f"{output} is not the job's output: {error}") from error
    if rows.schema != _SCHEMA:
        raise ComparisonError(f"{output} has other columns than {OUTPUT!r} f32[{DIMENSIONS}]")
    if len(reference) != rows.count * _SCHEMA.row_bytes:
        raise ComparisonError(
            f"{output} has {rows.count} rows, {REFERENCE_FILE} has "
            f"{len(reference) / _SCHEMA.row_bytes:g}: compute both from the same sentences"
        )
    if not valid_numbers(reference, "f32"):
        raise ComparisonError(f"{REFERENCE_FILE} contains NaN or infinity: compute it again")
    ours, theirs = (array("d", floats(data, "f32")) for data in (rows.column(OUTPUT), reference))
    largest = max(map(abs, map(sub, ours, theirs)), default=0.0)
    return Compared(rows.count, largest, round(time.monotonic() - started, 3))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; its last line of output is the JSON of `Computed` or `Compared`."""
    parser = argparse.ArgumentParser(
        prog="python -m meshd.node.demo.reference", description=__doc__
    )
    parser.add_argument("--stage", choices=("compute", "compare"), required=True)
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the job's output")
    parser.add_argument("--torch-threads", type=int, default=1, metavar="T")
    options = parser.parse_args(arguments)
    if options.stage == "compare" and options.output is None:
        parser.error("--stage compare needs --output FILE")
    os.nice(NICENESS)
    go_offline(options.torch_threads)
    if options.stage == "compute":
        return answer(lambda: compute(options.dir, options.torch_threads))
    return answer(lambda: compare(options.dir, options.output))


if __name__ == "__main__":
    sys.exit(main())
