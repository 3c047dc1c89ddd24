"""States: one form, strict parsing, and weights that go in and come out under their names."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from unit.training_kit import PARSED, PROGRAM, numbers, settings, tiny_program

from meshd.node.compute.toy_training import training_program
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import f32_bytes
from meshd.node.workloads.tensorfile import TensorData, parse_tensors, write_tensors
from meshd.node.workloads.training.errors import StateError, TrainingError
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.state import (
    initial_state,
    most_state_bytes,
    parse_state,
    result_file,
    with_weights,
)

SETTINGS = settings()
STATE = initial_state(PROGRAM, SETTINGS)


def tensors_of(state: bytes) -> list[TensorData]:
    return [
        TensorData(t.name, t.dtype, t.shape, bytes(t.bytes_in(state))) for t in parse_tensors(state)
    ]


def replaced(name: str, data: bytes) -> bytes:
    """STATE with other bytes in one tensor, written without checks."""
    (place,) = [t for t in parse_tensors(STATE) if t.name == name]
    return STATE[: place.offset] + data + STATE[place.offset + place.nbytes :]


def test_a_job_begins_with_the_programs_weights_and_zeros() -> None:
    state = parse_state(STATE, PARSED, SETTINGS)
    assert state.step == 0
    assert state.norms == ((0.0, 0.0),) * 5
    for weight in PARSED.weights:
        assert state.bytes_of("theta." + weight.name) == weight.bytes_in(PROGRAM)
        assert not any(state.bytes_of("m." + weight.name))
        assert not any(state.bytes_of("outer." + weight.name))
    assert len(STATE) <= most_state_bytes(state.weights, SETTINGS) < len(STATE) + 4096


def test_a_job_may_begin_elsewhere() -> None:
    start = f32_bytes([1, 2, 3, 4, 5])
    state = parse_state(initial_state(PROGRAM, SETTINGS, {"b": start}), PARSED, SETTINGS)
    assert state.bytes_of("theta.b") == start
    assert state.bytes_of("theta.w") == PARSED.weights[2].bytes_in(PROGRAM)
    with pytest.raises(StateError, match="'c' is not trained by this program; it trains 'b'"):
        initial_state(PROGRAM, SETTINGS, {"c": start})
    with pytest.raises(StateError, match="its shape needs 20"):
        initial_state(PROGRAM, SETTINGS, {"b": start[:-4]})
    with pytest.raises(StateError, match="NaN"):
        initial_state(PROGRAM, SETTINGS, {"b": f32_bytes([math.nan] * 5)})


def test_adamw_keeps_means_of_rows_and_columns() -> None:
    adamw = settings(optimizer="adamw")
    state = parse_state(initial_state(PROGRAM, adamw), PARSED, adamw)
    shapes = {name: tensor.shape for name, tensor in state.tensors.items()}
    assert (shapes["rows.w"], shapes["columns.w"], shapes["second.b"]) == ((5,), (24,), (5,))
    assert state.norms == ((0.0, 0.0, 0.0),) * 5
    with pytest.raises(StateError, match="another program or of other settings"):
        parse_state(STATE, PARSED, adamw)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (STATE[:-1], "missing or left over"),
        (STATE + b"x", "missing or left over"),
        (STATE + bytes(1 << 20), "at most"),
        (struct.pack("<Q", 1 << 60) + STATE[8:], "claims"),
        (replaced("theta.b", f32_bytes([0, 0, math.nan, 0, 0])), "NaN"),
        (replaced("m.b", f32_bytes([0, 0, math.inf, 0, 0])), "infinity"),
        (replaced("norms", struct.pack("<10d", math.nan, *[0] * 9)), "NaN"),
        (replaced("norms", struct.pack("<10d", -1, *[0] * 9)), "negative norms"),
        (replaced("step", struct.pack("<q", -1)), "step -1"),
        (replaced("step", struct.pack("<q", 1 << 41)), "was not made by meshd"),
        (write_tensors(tensors_of(STATE)[1:]), "differs in"),
        (
            write_tensors([*tensors_of(STATE), TensorData("extra", "f32", (1,), bytes(4))]),
            "differs in 'extra'",
        ),
        (
            write_tensors(
                [
                    TensorData(t.name.replace("theta.b", "theta.c"), t.dtype, t.shape, t.data)
                    for t in tensors_of(STATE)
                ]
            ),
            "differs in 'theta.b', 'theta.c'",
        ),
        (
            write_tensors(
                [TensorData(t.name, t.dtype, t.shape[::-1], t.data) for t in tensors_of(STATE)]
            ),
            "differs in",
        ),
    ],
)
def test_bytes_that_are_no_state_of_this_job_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(StateError, match=reason):
        parse_state(data, PARSED, SETTINGS)


def test_a_negative_mean_square_is_refused() -> None:
    adamw = settings(optimizer="adamw")
    tensors = [
        TensorData(t.name, t.dtype, t.shape, f32_bytes([-1] * 5) if t.name == "rows.w" else t.data)
        for t in tensors_of(initial_state(PROGRAM, adamw))
    ]
    with pytest.raises(StateError, match=r"'rows\.w' has a negative mean square"):
        parse_state(write_tensors(tensors), PARSED, adamw)


@given(st.integers(0, len(STATE) - 1), st.integers(0, 255))
def test_changed_bytes_are_another_state_or_refused(at: int, value: int) -> None:
    changed = STATE[:at] + bytes((value,)) + STATE[at + 1 :]
    try:
        assert parse_state(changed, PARSED, SETTINGS).data == changed
    except StateError:
        assert changed != STATE


def test_the_result_loads_into_the_authors_module() -> None:
    class Author(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.zeros(5))
            self.emb = nn.Parameter(torch.zeros(8, 6))
            self.w = nn.Parameter(torch.zeros(5, 24))

    module = Author()
    module.load_state_dict(load_safetensors(result_file(STATE, PARSED)))
    assert module.w.detach().numpy().tobytes() == PARSED.weights[2].bytes_in(PROGRAM)
    with pytest.raises(StateError, match="another program"):
        result_file(STATE, parse_program(training_program()))


def test_a_job_starts_from_an_earlier_result() -> None:
    earlier = initial_state(PROGRAM, SETTINGS, {"w": numbers(5 * 24, 9)})
    assert with_weights(STATE, result_file(earlier, PARSED)) == earlier
    foreign = save_safetensors({"w": torch.zeros(5, 24)}, {"made": "elsewhere"})
    with pytest.raises(StateError, match=r"'b' is f32\[5\] in the program and nothing in"):
        with_weights(STATE, foreign)
    with pytest.raises(StateError, match="cannot be read"):
        with_weights(STATE, b"PK\x03\x04")
    whole = {"w": torch.ones(5, 24), "b": torch.ones(5), "emb": torch.ones(8, 6)}
    state = parse_state(with_weights(STATE, save_safetensors(whole)), PARSED, SETTINGS)
    assert state.bytes_of("theta.b") == f32_bytes([1] * 5)
    with pytest.raises(StateError, match=r"'w' is f32\[5,24\] in the program and f64\[5,24\]"):
        with_weights(STATE, save_safetensors({**whole, "w": torch.ones(5, 24).double()}))


def test_a_program_without_a_loss_is_no_program_to_train() -> None:
    with pytest.raises(TrainingError, match=r"'out' is f32\[None, 5\].*it has no loss"):
        initial_state(tiny_program("out"), SETTINGS)
    with pytest.raises(WorkloadError, match="can carry code"):
        initial_state(b"PK\x03\x04" + bytes(20), SETTINGS)


def test_an_embedding_is_no_matrix_and_a_factor_of_a_product_is_one() -> None:
    kinds = {weight.name: weight.matrices for weight in trained_weights(PARSED)}
    assert kinds == {"b": None, "emb": None, "w": (1, 5, 24)}
