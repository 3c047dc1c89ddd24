"""A shard: a pure function with equal bits, its optimizers, and how it fails."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from unit.training_kit import (
    INTERPRETER,
    PARSED,
    PROGRAM,
    SEED,
    batch_rows,
    settings,
    shard_of,
    tiny_program,
)

from meshd.node.workloads.errors import ProgramError
from meshd.node.workloads.interpreter import load
from meshd.node.workloads.rows import RowSchema, f32_bytes, pack, unpack
from meshd.node.workloads.tensors import Column
from meshd.node.workloads.training.compression import read_part
from meshd.node.workloads.training.contribution import layout_of
from meshd.node.workloads.training.errors import StateError, TrainingDiverged, TrainingError
from meshd.node.workloads.training.optimizers import orthogonalised
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shard import EndState, run_shard, run_steps
from meshd.node.workloads.training.state import initial_state, parse_state

OPTIMIZERS = ("scion", "adamw", "sgd")
ALL = {name: settings(optimizer=name) for name in OPTIMIZERS}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def steps_of(chosen: TrainSettings) -> EndState:
    state = parse_state(initial_state(PROGRAM, chosen), PARSED, chosen)
    return run_steps(INTERPRETER, state, batch_rows(chosen.rows), chosen, where="test")


def weights_of(chosen: TrainSettings) -> dict[str, Tensor]:
    """What the optimizers start from."""
    return {name: tensor.clone() for name, tensor in load(PROGRAM).weights.items()}


def gradients_at(theta: dict[str, Tensor], chosen: TrainSettings, step: int) -> dict[str, Tensor]:
    """Gradients by autograd over the whole program, clipped to length one."""
    rows = batch_rows(chosen.batch, step * chosen.batch)
    t = torch.tensor(struct.unpack(f"<{4 * rows.count}q", rows.column("t"))).view(-1, 4)
    y = torch.tensor(struct.unpack(f"<{rows.count}q", rows.column("y")))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    loss = INTERPRETER({"t": t, "y": y}, leaves)["loss"]
    found = torch.autograd.grad(loss, list(leaves.values()))
    length = math.sqrt(sum(float(g.square().sum()) for g in found))
    return {name: g * min(1, 1 / (length + 1e-6)) for name, g in zip(leaves, found, strict=True)}


@every_optimizer
def test_the_same_shard_has_equal_bits_in_any_order(optimizer: str) -> None:
    chosen = ALL[optimizer]
    state = initial_state(PROGRAM, chosen)
    first = [shard_of(state, chosen, shard=shard) for shard in range(4)]
    again = [shard_of(state, chosen, shard=shard) for shard in reversed(range(4))][::-1]
    assert again == first
    assert len({result.end_digest for result in first}) == 4
    padding = bytearray(13)  # other memory is taken in between
    other = run_shard(
        load(PROGRAM), state, batch_rows(chosen.rows), chosen, seed=SEED, round_=0, shard=0
    )
    assert other == first[0]
    assert len(padding) == 13


def test_rounding_depends_on_seed_round_and_shard_and_the_end_state_does_not() -> None:
    chosen = ALL["scion"]
    state, rows = initial_state(PROGRAM, chosen), batch_rows(chosen.rows)
    places = [(SEED, 0, 0), (b"z" * 32, 0, 0), (SEED, 1, 0), (SEED, 0, 1)]
    found = [
        run_shard(INTERPRETER, state, rows, chosen, seed=seed, round_=round_, shard=shard)
        for seed, round_, shard in places
    ]
    assert len({result.end_digest for result in found}) == 1
    assert len({result.contribution for result in found}) == 4


def test_scion_takes_the_steps_that_its_paper_says() -> None:
    chosen = ALL["scion"]
    theta = weights_of(chosen)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for step in range(chosen.steps):
        rate = chosen.learning_rate(step)
        for name, g in gradients_at(theta, chosen, step).items():
            beta = 0.9 if name == "w" else 0.95
            momentum[name] = beta * momentum[name] + (1 - beta) * g
            theta[name] = theta[name] * (1 - rate * 0.1)
            if name == "w":
                ahead = g + beta * (momentum[name] - g)
                u = orthogonalised(ahead[None], 5)[0]
                theta[name] = theta[name] - rate * 0.2 * math.sqrt(24) * u
            else:
                theta[name] = theta[name] - 0.5 * rate * momentum[name].sign()
    end = steps_of(chosen)
    for name, tensor in theta.items():
        torch.testing.assert_close(end.theta[name], tensor)
        torch.testing.assert_close(end.momentum[name], momentum[name])


def test_adamw_and_sgd_take_the_steps_that_torch_takes() -> None:
    for name in ("adamw", "sgd"):
        chosen = replace(ALL[name], weight_decay=0.1 if name == "adamw" else 0.0)
        theta = weights_of(chosen)
        leaves = [tensor.requires_grad_() for tensor in theta.values()]
        theirs: torch.optim.Optimizer
        if name == "adamw":
            theirs = torch.optim.AdamW(leaves, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
        else:
            theirs = torch.optim.SGD(leaves, lr=1.0, momentum=0.9)
        for step in range(chosen.steps):
            theirs.param_groups[0]["lr"] = chosen.learning_rate(step)
            fixed = {key: leaf.detach() for key, leaf in theta.items()}
            for leaf, g in zip(leaves, gradients_at(fixed, chosen, step).values(), strict=True):
                leaf.grad = g
            theirs.step()
        end = steps_of(chosen)
        for key, leaf in theta.items():
            torch.testing.assert_close(end.theta[key], leaf.detach(), rtol=1e-4, atol=1e-6)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 24), (1, 24, 8), (3, 5, 5), (1, 1, 7)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator), 5))
        assert values.min() > 0.3
        assert values.max() < 1.4


@every_optimizer
def test_training_learns(optimizer: str) -> None:
    chosen = settings(
        optimizer=optimizer, steps=100, total_steps=100, lr=0.3 if optimizer == "sgd" else 0.02
    )
    losses = steps_of(chosen).losses
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


@every_optimizer
def test_a_contribution_says_what_changed(optimizer: str) -> None:
    chosen = replace(ALL[optimizer], theta_bits=8, momentum_threshold=0.0)
    state = initial_state(PROGRAM, chosen)
    end = steps_of(chosen)
    data = shard_of(state, chosen).contribution
    before = load(PROGRAM).weights
    for place in layout_of(trained_weights(PARSED), chosen).places:
        name = place.weight.name
        change = (before[name] - end.theta[name]).reshape(-1).double().numpy()
        assert (
            np.abs(read_part(data, place.theta).values() - change).max()
            <= np.abs(change).max() / 100
        )
        fresh = end.momentum[name].reshape(-1).numpy()
        read = read_part(data, place.momentum)
        assert (np.sign(fresh) == np.sign(read.values())).all()


def test_every_step_is_told() -> None:
    chosen = ALL["scion"]
    told: list[int] = []
    rows = batch_rows(chosen.rows)
    state = initial_state(PROGRAM, chosen)
    run_shard(INTERPRETER, state, rows, chosen, seed=SEED, round_=0, shard=0, on_step=told.append)
    assert told == [1, 2, 3]


def test_numbers_out_of_range_name_round_shard_step_and_cure() -> None:
    chosen = replace(ALL["sgd"], lr=100.0, clip=0.0, warmup=0, weight_decay=10.0)
    chosen = replace(chosen, steps=200, total_steps=200)
    state = initial_state(PROGRAM, chosen)
    with pytest.raises(
        TrainingDiverged, match=r"^round 5, shard 3, step \d+: .* lower lr \(now 100\), lengthen"
    ):
        shard_of(state, chosen, round_=5, shard=3)


def test_a_last_step_that_overflows_is_noticed() -> None:
    chosen = replace(ALL["sgd"], steps=1, lr=100.0, weight_decay=10.0, warmup=0, floor=1.0)
    start = {"w": f32_bytes([3e38] * 120)}
    state = initial_state(PROGRAM, chosen, start)
    with pytest.raises(TrainingDiverged, match=r"round 0, shard 0, step 0"):
        shard_of(state, chosen)


def test_what_does_not_fit_is_refused() -> None:
    chosen = ALL["scion"]
    state, rows = initial_state(PROGRAM, chosen), batch_rows(chosen.rows)
    other = unpack(pack(RowSchema((Column("x", "f32", ()),)), [f32_bytes([1])] * chosen.rows))

    def shard(program: bytes = PROGRAM, **given: object) -> None:
        arguments = {"state": state, "rows": rows, "settings": chosen, **given}
        run_shard(load(program), **arguments, seed=SEED, round_=0, shard=0)

    with pytest.raises(TrainingError, match=r"the program reads t i64\[4\], y i64\[\], the rows"):
        shard(rows=other)
    with pytest.raises(TrainingError, match="the shard has 47 rows; 3 steps of 16 rows need 48"):
        shard(rows=batch_rows(chosen.rows - 1))
    with pytest.raises(TrainingError, match="it has no loss"):
        shard(tiny_program("out"))
    with pytest.raises(StateError, match="missing or left over"):
        shard(state=state[:-1])
    with pytest.raises(StateError, match="other settings"):
        shard(settings=ALL["adamw"])
    beyond = struct.pack("<5q", 0, 0, 0, 9, 0)
    with pytest.raises(ProgramError, match="do not fit a dimension of size 8"):
        shard(rows=unpack(pack(PARSED.input_schema, [beyond] * chosen.rows)))


def test_a_weight_that_the_loss_does_not_need_stays() -> None:
    chosen = replace(ALL["scion"], weight_decay=0.0)
    end = steps_of(chosen)
    unused = [at for at in range(8) if at not in used_symbols(chosen)]
    before = load(PROGRAM).weights["emb"]
    for at in unused:
        assert torch.equal(end.theta["emb"][at], before[at])


def used_symbols(chosen: TrainSettings) -> set[int]:
    rows = batch_rows(chosen.rows)
    return set(struct.unpack(f"<{4 * rows.count}q", rows.column("t")))
