"""The Executor port: what is computed within limits, and never in the daemon itself.

Inference: a program and rows in, rows out. Training: a program, a state and rows in, a
contribution out; a state and contributions in, the next state out. All of it is pure.

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


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """One shard of training: H inner steps on the packed rows, from a public state."""

    job_id: bytes
    slot: int
    program: bytes | Path
    state: bytes | Path
    """The file of the round's state (see workloads/training/state.py)."""
    inputs: bytes
    """The shard's H x B rows, packed, in the order in which it reads them."""
    settings: tuple[str, ...]
    """Every setting as `name=value` (see workloads/training/settings.py)."""
    seed: bytes
    """The job's seed, 32 bytes."""
    round: int
    shard: int
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a shard of training comes to; its losses are in the contribution."""

    contribution: bytes
    end_digest: bytes
    """Of the uncompressed state after the inner steps, 32 bytes."""


@dataclass(frozen=True, slots=True)
class CloseRequest:
    """The close of a round: its state, its contributions in order, and how much each counts."""

    job_id: bytes
    program: bytes | Path
    state: bytes | Path
    contributions: tuple[bytes, ...]
    weights: tuple[int, ...]
    """Rows behind each contribution."""
    settings: tuple[str, ...]
    round: int
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class CloseResult:
    """The next state, and the places of the contributions that the gate kept out of it."""

    state: bytes
    """The same bytes as before when every contribution was gated out."""
    gated: tuple[int, ...]


class Executor(Protocol):
    """Where shards are computed."""

    async def infer(self, job: InferRequest) -> bytes:
        """Return the packed output rows, one for each input row. Raises ExecutorError."""
        ...

    async def train(self, job: TrainRequest) -> TrainResult:
        """Return what a shard of training comes to. Raises ExecutorError.

        ShardFailed names round, shard and step when a number becomes NaN or infinite.
        """
        ...

    async def close_round(self, job: CloseRequest) -> CloseResult:
        """Return the state after a round. Raises ExecutorError; malformed contributions do not.

        The same bytes from every executor and on every machine.
        """
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
    if isinstance(source, Path):
        refuse_foreign(source.name)
    return read_file(source, "program")


def read_file(source: bytes | Path, what: str) -> bytes:
    """Return bytes that may lie in a file. Raises ShardFailed when it cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise ShardFailed(f"{what} {source} cannot be read: {error.strerror}") from error
