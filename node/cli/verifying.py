"""Verifies a program on its author's machine: read, planned, run twice on two numbers of rows."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import trio

from meshd.node.compute.executor import Executor, ExecutorError, InferRequest, Limits
from meshd.node.compute.forkserver import open_forkserver
from meshd.node.workloads.datasetfile import open_dataset
from meshd.node.workloads.datasets import chunks_of, slice_rows
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.planning import check_program, memory_bytes, units
from meshd.node.workloads.program import Program, parse_program
from meshd.node.workloads.rows import RowSchema, pack, rows_agree, unpack
from meshd.node.workloads.tensors import DTYPES, Column

COUNTS: Final = (2, 3)
"""The numbers of rows it is run on: two, so that what depends on their number shows."""
MEMORY: Final = 16 << 30
_FLOAT: Final = {"f16": "e", "f32": "f", "f64": "d"}


@dataclass(frozen=True)
class Check:
    """One thing that was verified, and what came out."""

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str


def verify(path: Path, data: Path | None, rows: int) -> Iterator[Check]:
    """Yield what there is to say of the program at *path*, in order; the first failure ends it.

    It is run on the first rows of the dataset *data*, without one on zeros, ones and fractions.
    Raises OSError if the file cannot be read.
    """
    raw = path.read_bytes()
    try:
        program = parse_program(raw)
        yield Check("form", "ok", f"{len(raw)} bytes, canonical, digest 0x{program.digest.hex()}")
        check_program(program)
        yield Check("shapes", "ok", f"{len(program.nodes)} nodes fit for 1, 2 and 3 rows")
        loss = trains(program)
        cost = units(program, rows, training=loss)
        needed = memory_bytes(program, rows, training=loss) / (1 << 20)
        what = "an inner step of " if loss else ""
        text = f"{what}{rows} rows: {cost} compute units, {needed:.1f} MiB at most"
        yield Check("cost", "ok", text)
        inputs = [_inputs(program, data, count) for count in COUNTS]
    except WorkloadError as error:
        yield Check("program", "fail", str(error))
        return
    if loss:
        count = len(program.graph.trainable)
        text = f"it computes a loss and trains {count} weights: it is not run here"
        yield Check("run", "ok" if count else "fail", text)
        return
    yield from trio.run(_run, raw, program, inputs)


def trains(program: Program) -> bool:
    """Return whether a program computes a loss, and no rows."""
    return any(not output.shape for output in program.outputs)


def _inputs(program: Program, data: Path | None, count: int) -> bytes:
    """Return *count* packed rows for a program; raises WorkloadError if the data does not fit."""
    schema = program.input_schema
    if data is None:
        return pack(schema, [_row(schema, at) for at in range(count)])
    dataset = open_dataset(data)
    manifest = dataset.manifest
    if manifest.rows < count:
        raise WorkloadError(f"{data} has {manifest.rows} rows; {count} are needed")
    chunks = {c.digest: dataset.read_chunk(c.index) for c in chunks_of(manifest, 0, count)}
    return slice_rows(manifest, chunks, range(count))


def _row(schema: RowSchema, seed: int) -> bytes:
    return b"".join(_column(column, seed) for column in schema.columns)


def _column(column: Column, seed: int) -> bytes:
    """Return one row of a column: zeros and ones, which are indices too; floats: fractions."""
    count = math.prod(column.shape)
    dtype = DTYPES[column.dtype]
    if dtype.kind < 2:
        places = ((at * 7 + seed) % 3 == 0 for at in range(count))
        return b"".join(int(one).to_bytes(dtype.size, "little") for one in places)
    numbers = [((at * 31 + seed * 17) % 29 - 14) / 16 for at in range(count)]
    if column.dtype == "bf16":
        wide = struct.pack(f"<{count}f", *numbers)
        return b"".join(wide[at + 2 : at + 4] for at in range(0, len(wide), 4))
    return struct.pack(f"<{count}{_FLOAT[column.dtype]}", *numbers)


async def _run(raw: bytes, program: Program, inputs: list[bytes]) -> list[Check]:
    """Run the program in two processes and compare what they find."""
    async with open_forkserver() as executor:
        try:
            found = [[await _infer(executor, raw, slot, i) for i in inputs] for slot in (0, 1)]
        except ExecutorError as error:
            hint = "; --data names rows of your own" if "index" in str(error) else ""
            return [Check("run", "fail", f"{error}{hint}")]
    if found[0] != found[1]:
        return [Check("run", "fail", "two runs on the same rows give different bits")]
    checks = [
        Check("run", "ok", f"equal bits in two processes, on {COUNTS[0]} and {COUNTS[1]} rows")
    ]
    few, more = (unpack(output).rows() for output in found[0])
    if all(rows_agree(a, b, program.output_schema) for a, b in zip(few, more, strict=False)):
        checks.append(Check("rows", "ok", "a row's result does not depend on the rows beside it"))
    else:
        text = "a row's result depends on the rows beside it: auditors would find it false"
        checks.append(Check("rows", "fail", text))
    return checks


async def _infer(executor: Executor, raw: bytes, slot: int, inputs: bytes) -> bytes:
    limits = Limits(memory_bytes=MEMORY)
    return await executor.infer(InferRequest(b"verify".ljust(32, b"\0"), slot, raw, inputs, limits))
