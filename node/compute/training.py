"""Checks a request of training before anything is allocated for it. Pure, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.node.compute.executor import (
    CloseRequest,
    LimitExceeded,
    ShardFailed,
    TrainRequest,
    read_file,
    read_program,
)
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import Program, parse_program
from meshd.node.workloads.rows import Rows, check_finite, unpack
from meshd.node.workloads.training.contribution import Layout, check_close, layout_of
from meshd.node.workloads.training.parameters import check_rows
from meshd.node.workloads.training.plan import close_memory, optimizer_units, train_memory
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.state import State, parse_state

SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class TrainAdmission:
    """A request for a shard that was checked."""

    program: Program
    data: bytes
    """The program's file; empty if it was known already."""
    state: State
    rows: Rows
    settings: TrainSettings
    layout: Layout
    units: int


@dataclass(frozen=True, slots=True)
class CloseAdmission:
    """A request to close a round that was checked."""

    program: Program
    data: bytes
    state: State
    settings: TrainSettings
    units: int


def admit_training(request: TrainRequest, known: Program | None = None) -> TrainAdmission:
    """Check a shard's program, settings, state and rows against one another and its limits.

    Raises ShardFailed and LimitExceeded.
    """
    try:
        program, data = _program(request, known)
        settings = TrainSettings.parse(request.settings)
        state = parse_state(read_file(request.state, "state"), program, settings)
        rows = unpack(request.inputs)
        check_rows(program, rows, settings)
        check_finite(rows)
        if len(request.seed) != SEED_BYTES or not 0 <= request.round < 1 << 32 > request.shard >= 0:
            raise ShardFailed("seed, round or shard is out of bounds; take them from the terms")
        each = units(program, settings.batch, training=True)
        each += optimizer_units(state.weights, settings)
        needed = train_memory(program, state.weights, settings)
    except WorkloadError as error:
        raise ShardFailed(str(error)) from error
    if needed > request.limits.memory_bytes:
        raise LimitExceeded("memory_bytes", request.limits.memory_bytes)
    layout = layout_of(state.weights, settings)
    return TrainAdmission(program, data, state, rows, settings, layout, settings.steps * each)


def admit_close(request: CloseRequest, known: Program | None = None) -> CloseAdmission:
    """Check a round's program, settings, state and weights against its limits.

    Contributions may be anything: those that are malformed are gated out. Raises ShardFailed
    and LimitExceeded.
    """
    try:
        program, data = _program(request, known)
        settings = TrainSettings.parse(request.settings)
        state = parse_state(read_file(request.state, "state"), program, settings)
        check_close(request.contributions, request.weights)
        needed = close_memory(program, state.weights, settings, len(request.contributions))
    except WorkloadError as error:
        raise ShardFailed(str(error)) from error
    if needed > request.limits.memory_bytes:
        raise LimitExceeded("memory_bytes", request.limits.memory_bytes)
    elements = sum(weight.elements for weight in state.weights)
    cost = 8 * elements * len(request.contributions) * (1 + len(request.contributions))
    return CloseAdmission(program, data, state, settings, cost)


def _program(request: TrainRequest | CloseRequest, known: Program | None) -> tuple[Program, bytes]:
    if known is not None:
        return known, b""
    data = read_program(request.program)
    return parse_program(data), data
