"""The Executor port: rows and a program in, rows out, within limits, never in the daemon itself.

ExecutorError
├── ShardFailed          the program cannot be run on these rows: the same everywhere
├── LimitExceeded        it needs more than the worker offers
├── ExecutorDied         the process went away; the next request gets a new one
└── ExecutorUnavailable  this machine cannot compute (no torch, no such user)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.planning import memory_of, plan
from meshd.node.workloads.program import Program, parse_program, refuse_foreign
from meshd.node.workloads.rows import Rows, check_finite, unpack


class ExecutorError(Exception):
    """Root of what goes wrong between a request and its rows."""


class ShardFailed(ExecutorError):
    """The program cannot be run on these rows; another machine would fail alike."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LimitExceeded(ExecutorError):
    """A shard needs more memory, time or processor time than its limits allow."""

    def __init__(self, which: str, value: float) -> None:
        super().__init__(
            f"the shard exceeds {which} = {value:g}; offer more or take smaller shards"
        )
        self.which = which
        self.value = value


class ExecutorDied(ExecutorError):
    """The process that computed has gone; nothing was lost but its shard."""


class ExecutorUnavailable(ExecutorError):
    """This machine cannot compute at all; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one shard may use."""

    memory_bytes: int = 2 << 30
    wall_s: float = 600.0
    cpu_s: int = 600
    threads: int = 1


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One shard of inference: a program and the packed rows it reads (see workloads/rows.py)."""

    job_id: bytes
    slot: int
    """Which of the worker's places computes it: one process per job and slot."""
    program: bytes | Path
    inputs: bytes
    limits: Limits = Limits()


class Executor(Protocol):
    """Where shards are computed."""

    async def infer(self, job: InferRequest) -> bytes:
        """Return the packed output rows, one for each input row. Raises ExecutorError."""
        ...

    async def measure(self) -> int:
        """Return the compute units a second of this machine, measured at the first call."""
        ...

    async def aclose(self) -> None:
        """End every process of the executor. Requests that run are ended too."""
        ...


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that was checked before anything is allocated for it."""

    program: Program
    data: bytes
    """The program's file."""
    rows: Rows
    units: int


def admit(request: InferRequest) -> Admission:
    """Check a request: its program, its rows against it, its memory against the limits.

    Pure and without torch; takes about a millisecond plus two for each megabyte of weights.
    Raises ShardFailed and LimitExceeded.
    """
    try:
        data = read_program(request.program)
        return admit_rows(parse_program(data), data, request)
    except WorkloadError as error:
        raise ShardFailed(str(error)) from error


def admit_rows(program: Program, data: bytes, request: InferRequest) -> Admission:
    """Check a request's rows and limits against a program that was parsed before.

    Raises WorkloadError and LimitExceeded.
    """
    rows = unpack(request.inputs)
    if rows.schema != program.input_schema:
        wanted = ", ".join(
            f"{c.name} {c.dtype}{list(c.shape)}" for c in program.input_schema.columns
        )
        given = ", ".join(f"{c.name} {c.dtype}{list(c.shape)}" for c in rows.schema.columns)
        raise ShardFailed(f"the program reads {wanted}; the rows have {given}")
    check_finite(rows)
    schema = program.output_schema
    planned = plan(program, max(rows.count, 1))
    if rows.count < 1:
        raise ShardFailed("there are no rows to compute; a shard has at least one")
    needed = memory_of(program, planned) + 2 * schema.packed_bytes(rows.count)
    if needed > request.limits.memory_bytes:
        raise LimitExceeded("memory_bytes", request.limits.memory_bytes)
    return Admission(program, data, rows, planned.units)


def read_program(source: bytes | Path) -> bytes:
    """Return a program's file. Raises ShardFailed when it cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        refuse_foreign(source.name)
        return source.read_bytes()
    except OSError as error:
        raise ShardFailed(f"program {source} cannot be read: {error.strerror}") from error
