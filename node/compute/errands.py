"""What a request becomes for a child process: one frame, the length of its reply, its reading."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    InferRequest,
    ShardFailed,
    TrainRequest,
    TrainResult,
    admit,
    admit_rows,
)
from meshd.node.compute.framing import Kind, pack_fields
from meshd.node.compute.training import admit_close, admit_training
from meshd.node.workloads.errors import RowsError, WorkloadError
from meshd.node.workloads.program import Program
from meshd.node.workloads.rows import check_finite, unpack
from meshd.node.workloads.training.contribution import check_contribution
from meshd.node.workloads.training.errors import TrainingError
from meshd.node.workloads.training.state import parse_state

T = TypeVar("T")
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Errand(Generic[T]):
    """A request that was admitted, ready to be sent."""

    program: Program
    data: bytes
    """The program's file; empty if the child has it."""
    kind: Kind
    payload: tuple[bytes, ...]
    expected: int
    """Bytes of the reply, known before it is computed."""
    read: Callable[[bytes], T]
    """Checks the reply as if a stranger had sent it. Raises ShardFailed."""


def errand_of_rows(job: InferRequest, known: Program | None) -> Errand[bytes]:
    """Return the errand of a shard of inference. Raises ShardFailed and LimitExceeded."""
    try:
        admission = admit(job) if known is None else admit_rows(known, b"", job)
    except WorkloadError as error:
        raise ShardFailed(str(error)) from error
    schema, count = admission.program.output_schema, admission.rows.count

    def read(output: bytes) -> bytes:
        try:
            rows = unpack(output)
            check_finite(rows)
        except RowsError as error:
            raise ShardFailed(f"the executor returned what are no rows: {error}") from error
        if rows.schema != schema or rows.count != count:
            raise ShardFailed("the executor returned other rows than the program makes")
        return output

    payload = (struct.pack("<I", job.limits.cpu_s), job.inputs)
    expected = schema.packed_bytes(count)
    return Errand(admission.program, admission.data, Kind.ROWS, payload, expected, read)


def errand_of_shard(job: TrainRequest, known: Program | None) -> Errand[TrainResult]:
    """Return the errand of a shard of training. Raises ShardFailed and LimitExceeded."""
    admission = admit_training(job, known)

    def read(reply: bytes) -> TrainResult:
        contribution = reply[_DIGEST_BYTES:]
        try:
            check_contribution(contribution, admission.layout)
        except TrainingError as error:
            raise ShardFailed(f"the executor returned no contribution: {error}") from error
        return TrainResult(contribution, reply[:_DIGEST_BYTES])

    fields = [
        _lines(job.settings),
        job.seed,
        struct.pack("<QQ", job.round, job.shard),
        admission.state.data,
        job.inputs,
    ]
    payload = (struct.pack("<I", job.limits.cpu_s), pack_fields(fields))
    expected = _DIGEST_BYTES + admission.layout.size
    return Errand(admission.program, admission.data, Kind.TRAIN, payload, expected, read)


def errand_of_close(job: CloseRequest, known: Program | None) -> Errand[CloseResult]:
    """Return the errand of a round's close. Raises ShardFailed and LimitExceeded."""
    admission = admit_close(job, known)
    count, before = len(job.contributions), admission.state.data

    def read(reply: bytes) -> CloseResult:
        flags, state = reply[:count], reply[count:]
        gated = tuple(at for at, flag in enumerate(flags) if flag)
        try:
            step = parse_state(state, admission.program, admission.settings).step
        except TrainingError as error:
            raise ShardFailed(f"the executor returned no state: {error}") from error
        done = admission.settings.steps if len(gated) < count else 0
        if step != admission.state.step + done:
            raise ShardFailed(f"the executor returned a state after {step} steps")
        return CloseResult(state, gated)

    fields = [
        _lines(job.settings),
        struct.pack(f"<Q{count}Q", job.round, *job.weights),
        before,
        *job.contributions,
    ]
    payload = (struct.pack("<I", job.limits.cpu_s), pack_fields(fields))
    # Every state of a job has the same names and shapes, hence the same length.
    expected = count + len(before)
    return Errand(admission.program, admission.data, Kind.CLOSE, payload, expected, read)


def _lines(settings: Sequence[str]) -> bytes:
    return "\n".join(settings).encode()
