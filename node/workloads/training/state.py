"""The state of a round: weights, momenta and counters in one canonical safetensors file.

Tensors: `theta.NAME` f32, the weights; `m.NAME` f32, the averaged momentum; `outer.NAME` f32,
the outer momentum; with AdamW the second moment, `second.NAME` f32 or, for a weight of two or
more dimensions, the means of its rows and columns, `rows.NAME` and `columns.NAME`; `step` i64,
inner steps done; `norms` f64 (rounds, parts), the median norms of what the last closed rounds
accepted, newest first, 0 for none. Its BLAKE3 is the state's digest.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshd.node.workloads.errors import TensorFileError
from meshd.node.workloads.program import Program, parse_program
from meshd.node.workloads.tensorfile import (
    MAX_TENSORS,
    Buffer,
    StoredTensor,
    TensorData,
    parse_tensors,
    write_tensors,
)
from meshd.node.workloads.tensors import MAX_NAME, TensorSpec
from meshd.node.workloads.training.errors import StateError
from meshd.node.workloads.training.parameters import Trained, trained_weights
from meshd.node.workloads.training.settings import TrainSettings

THETA: Final = "theta."
MOMENTUM: Final = "m."
OUTER: Final = "outer."
SECOND: Final = "second."
ROWS: Final = "rows."
COLUMNS: Final = "columns."
STEP: Final = "step"
NORMS: Final = "norms"
_MAX_STEP: Final = 1 << 40
_MOST_OF_ENTRY: Final = 256
"""Bytes of one entry of the file's header besides its name."""


@dataclass(frozen=True, slots=True)
class State:
    """A state whose form, names, shapes and values were checked; tensors stay in its bytes."""

    data: bytes
    weights: tuple[Trained, ...]
    step: int
    """Inner steps done so far."""
    norms: tuple[tuple[float, ...], ...]
    """For each of the last closed rounds, newest first, the median norm of each part."""
    tensors: Mapping[str, StoredTensor]

    def bytes_of(self, name: str) -> memoryview:
        """Return the packed numbers of the tensor `name`, such as `theta.layer.weight`."""
        return self.tensors[name].bytes_in(self.data)


def parts_of(settings: TrainSettings) -> int:
    """Return how many parts of a contribution have a norm: weights, momentum, second moment."""
    return 3 if settings.optimizer == "adamw" else 2


def second_moments(weight: Trained) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of what AdamW keeps of the second moment of a weight."""
    if weight.table is None:
        return [(SECOND + weight.name, weight.shape)]
    rows, columns = weight.table
    return [(ROWS + weight.name, (rows,)), (COLUMNS + weight.name, (columns,))]


def initial_state(
    program_data: bytes, settings: TrainSettings, start: Mapping[str, Buffer] | None = None
) -> bytes:
    """Return the state of round 0: the program's weights, or those of `start` by name.

    `start` gives packed little-endian f32 for weights that begin elsewhere. Everything else is
    zero. Raises StateError and TrainingError.
    """
    program = parse_program(program_data)
    weights = trained_weights(program)
    given = dict(start or {})
    theta: dict[str, Buffer] = {}
    for stored in program.weights:
        if stored.name in program.graph.trainable:
            theta[stored.name] = given.pop(stored.name, stored.bytes_in(program_data))
    if given:
        raise StateError(
            f"weight {min(given)!r} is not trained by this program; it trains "
            f"{_listed([weight.name for weight in weights])}"
        )
    return pack_state(
        weights,
        settings,
        {THETA + name: data for name, data in theta.items()},
        step=0,
        norms=[[0.0] * parts_of(settings) for _ in range(settings.norm_rounds)],
    )


def pack_state(
    weights: Sequence[Trained],
    settings: TrainSettings,
    tensors: Mapping[str, Buffer],
    *,
    step: int,
    norms: Sequence[Sequence[float]],
) -> bytes:
    """Return the file of a state; a tensor that is not given is zero. Raises StateError."""
    flat = [norm for norms_of_round in norms for norm in norms_of_round]
    given = {
        STEP: struct.pack("<q", step),
        NORMS: struct.pack(f"<{len(flat)}d", *flat),
        **tensors,
    }
    try:
        return write_tensors(
            TensorData(name, spec.dtype, spec.shape, given.get(name, bytes(spec.nbytes)))
            for name, spec in _expected(weights, settings).items()
        )
    except TensorFileError as error:
        raise StateError(f"this is no state: {error}") from error


def most_state_bytes(weights: Sequence[Trained], settings: TrainSettings) -> int:
    """Return a bound, a few kilobytes above, of the length of every state of these weights."""
    return _most_bytes(_expected(weights, settings))


def parse_state(data: bytes, program: Program, settings: TrainSettings) -> State:
    """Check `data` against the format, the program's weights and the settings.

    Its length is compared before anything is read. Raises StateError, also for NaN or infinity.
    """
    weights = trained_weights(program)
    expected = _expected(weights, settings)
    if len(data) < 8 or len(data) > _most_bytes(expected):
        raise StateError(
            f"a state of {len(data)} bytes; at most {_most_bytes(expected)} fit this program"
        )
    try:
        tensors = {tensor.name: tensor for tensor in parse_tensors(data)}
    except TensorFileError as error:
        raise StateError(f"this is no state: {error}") from error
    found = {name: tensor.spec for name, tensor in tensors.items()}
    if found != expected:
        names = sorted(found.keys() ^ expected.keys()) or [
            name for name in expected if found[name] != expected[name]
        ]
        raise StateError(
            f"the state is of another program or of other settings: it differs in {_listed(names)}"
        )
    (step,) = struct.unpack("<q", tensors[STEP].bytes_in(data))
    flat = struct.unpack(f"<{expected[NORMS].elements}d", tensors[NORMS].bytes_in(data))
    if not 0 <= step <= _MAX_STEP or any(norm < 0 for norm in flat):
        raise StateError(f"the state has step {step} or negative norms; it was not made by meshd")
    for name, tensor in tensors.items():
        if name.startswith((SECOND, ROWS, COLUMNS)) and _negative(tensor.bytes_in(data)):
            raise StateError(f"the state's {name!r} has a negative mean square")
    parts = parts_of(settings)
    norms = tuple(flat[at : at + parts] for at in range(0, len(flat), parts))
    return State(data, weights, step, norms, tensors)


def result_file(state: bytes, program: Program) -> bytes:
    """Return a safetensors file of the trained weights under their author's names.

    `module.load_state_dict(safetensors.torch.load(file), strict=False)` takes it; weights that
    are tied are there once. Raises StateError.
    """
    stored = _thetas(state)
    if stored.keys() != set(program.graph.trainable):
        raise StateError("the state is of another program: it has other weights")
    return write_tensors(
        TensorData(name, "f32", tensor.shape, tensor.bytes_in(state))
        for name, tensor in stored.items()
    )


def with_weights(state: bytes, weights: bytes) -> bytes:
    """Return `state` with the weights of a safetensors file, such as an earlier job's result.

    Every trained weight must be in it, f32 and of the same shape. Raises StateError.
    """
    stored = _thetas(state)
    try:
        given = {tensor.name: tensor for tensor in parse_tensors(weights, canonical=False)}
    except TensorFileError as error:
        raise StateError(f"the weights to start from cannot be read: {error}") from error
    for name in sorted(stored.keys() | given.keys()):
        if name not in given or name not in stored or given[name].spec != stored[name].spec:
            ours = stored[name].spec if name in stored else "nothing"
            theirs = given[name].spec if name in given else "nothing"
            raise StateError(
                f"weight {name!r} is {ours} in the program and {theirs} in the weights to start "
                "from; start from a result of the same program"
            )
    every = parse_tensors(state)
    return write_tensors(
        TensorData(
            tensor.name, tensor.dtype, tensor.shape, _replaced(tensor, given, weights, state)
        )
        for tensor in every
    )


def _replaced(
    tensor: StoredTensor, given: Mapping[str, StoredTensor], weights: bytes, state: bytes
) -> memoryview:
    if tensor.name.startswith(THETA):
        return given[tensor.name.removeprefix(THETA)].bytes_in(weights)
    return tensor.bytes_in(state)


def _thetas(state: bytes) -> dict[str, StoredTensor]:
    try:
        tensors = parse_tensors(state)
    except TensorFileError as error:
        raise StateError(f"this is no state: {error}") from error
    return {
        tensor.name.removeprefix(THETA): tensor
        for tensor in tensors
        if tensor.name.startswith(THETA)
    }


def _expected(weights: Sequence[Trained], settings: TrainSettings) -> dict[str, TensorSpec]:
    """Return every tensor of a state. Raises StateError when they do not fit into one file."""
    specs: dict[str, TensorSpec] = {}
    for weight in weights:
        if len(weight.name) + len(COLUMNS) > MAX_NAME:
            raise StateError(f"weight name {weight.name[:80]!r} is too long; use fewer modules")
        for prefix in (THETA, MOMENTUM, OUTER):
            specs[prefix + weight.name] = TensorSpec("f32", weight.shape)
        if settings.optimizer == "adamw":
            for name, shape in second_moments(weight):
                specs[name] = TensorSpec("f32", shape)
    specs[STEP] = TensorSpec("i64", ())
    specs[NORMS] = TensorSpec("f64", (settings.norm_rounds, parts_of(settings)))
    if len(specs) > MAX_TENSORS:
        raise StateError(
            f"{len(weights)} trained weights are too many for one state; freeze or join some"
        )
    return specs


def _most_bytes(expected: Mapping[str, TensorSpec]) -> int:
    header = sum(len(name) + _MOST_OF_ENTRY for name in expected)
    return 16 + header + sum(spec.nbytes for spec in expected.values())


def _negative(data: memoryview) -> bool:
    """Whether any packed f32 has its sign bit set (zeros of either sign aside)."""
    return any(sign & 0x80 for sign in bytes(data[3::4])) and any(
        value < 0 for value in struct.unpack(f"<{len(data) // 4}f", data)
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:80]) for name in names[:3]) + more
