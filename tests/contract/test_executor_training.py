"""What every Executor keeps to when it trains: the toy in virtual time and torch in processes."""

import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    Executor,
    InferRequest,
    LimitExceeded,
    Limits,
    ShardFailed,
    TrainRequest,
    TrainResult,
)
from meshd.node.compute.framing import FramingError, pack_fields, parse_fields
from meshd.node.compute.toy import ToyExecutor, affine_dataset, affine_program
from meshd.node.compute.toy_training import training_program
from meshd.node.compute.training import admit_training
from meshd.node.workloads.datasets import parse_manifest, slice_rows
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import RowSchema, f32_bytes, pack
from meshd.node.workloads.tensors import Column
from meshd.node.workloads.training.contribution import losses_of
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shuffle import rows_of
from meshd.node.workloads.training.state import initial_state, parse_state

WIDTH = 16
PROGRAM = training_program(WIDTH)
SETTINGS = TrainSettings.fill(
    {"batch": 2, "steps": 3, "total_steps": 36, "warmup": 3, "outer_warmup": 1, "optimizer": "sgd"}
)
STATE = initial_state(PROGRAM, SETTINGS)
DATASET = affine_dataset(rows=100, width=WIDTH)
SEED = b"s" * 32
SHARDS = 4


@pytest.fixture(params=["toy", "forkserver"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "toy":
        return ToyExecutor(10**12)
    shared: Executor = request.getfixturevalue("shared_forkserver")
    return shared


def rows(round_: int, shard: int) -> bytes:
    manifest = parse_manifest(DATASET.manifest_bytes)
    chunks = {ref.digest: data for ref, data in zip(manifest.chunks, DATASET.chunks, strict=True)}
    count = SETTINGS.rows
    first = (round_ * SHARDS + shard) * count
    return slice_rows(manifest, chunks, rows_of(SEED, rows=100, first=first, count=count))


def job(shard: int = 0, round_: int = 0, state: bytes | Path = STATE) -> TrainRequest:
    return TrainRequest(
        b"t" * 32,
        0,
        PROGRAM,
        state,
        rows(round_, shard),
        SETTINGS.encode(),
        SEED,
        round_,
        shard,
    )


def closing(*contributions: bytes, state: bytes | Path = STATE, round_: int = 0) -> CloseRequest:
    weights = (SETTINGS.rows,) * len(contributions)
    return CloseRequest(
        b"t" * 32, PROGRAM, state, contributions, weights, SETTINGS.encode(), round_
    )


async def one_round(executor: Executor, state: bytes, round_: int) -> CloseResult:
    done = [await executor.train(job(shard, round_, state)) for shard in range(SHARDS)]
    request = closing(*(result.contribution for result in done), state=state, round_=round_)
    return await executor.close_round(request)


async def test_a_shard_is_a_pure_function_of_its_request(executor: Executor) -> None:
    first = await executor.train(job(shard=1))
    others = [await executor.train(job(shard=shard)) for shard in (0, 2, 3)]
    assert await executor.train(job(shard=1)) == first
    assert len({first.end_digest, *(other.end_digest for other in others)}) == 4
    assert len(losses_of(first.contribution)) == SETTINGS.steps


async def test_another_seed_rounds_otherwise_and_ends_in_the_same_state(executor: Executor) -> None:
    ours = await executor.train(job())
    theirs = await executor.train(replace(job(), seed=b"z" * 32))
    assert ours.end_digest == theirs.end_digest
    assert ours.contribution != theirs.contribution


async def first_loss(executor: Executor, state: bytes) -> float:
    return losses_of((await executor.train(job(state=state))).contribution)[0]


async def test_rounds_follow_one_another_and_the_loss_falls(executor: Executor) -> None:
    state = STATE
    for round_ in range(12):
        closed = await one_round(executor, state, round_)
        assert closed.gated == ()
        state = closed.state
    assert await first_loss(executor, state) < await first_loss(executor, STATE)
    parsed = parse_state(state, parse_program(PROGRAM), SETTINGS)
    assert parsed.step == 12 * SETTINGS.steps
    assert all(norm > 0 for norms in parsed.norms for norm in norms)


async def test_state_and_program_may_lie_in_files(executor: Executor, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(STATE)
    (tmp_path / "program").write_bytes(PROGRAM)
    request = replace(job(), state=tmp_path / "state", program=tmp_path / "program")
    done = await executor.train(request)
    assert done == await executor.train(job())
    close = closing(done.contribution, state=tmp_path / "state")
    assert await executor.close_round(close) == await executor.close_round(
        closing(done.contribution)
    )
    with pytest.raises(ShardFailed, match=r"state .*missing cannot be read"):
        await executor.train(replace(job(), state=tmp_path / "missing"))


async def test_both_executors_close_a_round_to_the_same_bytes(
    shared_forkserver: Executor,
) -> None:
    toy, state = ToyExecutor(10**12), STATE
    for round_ in range(4):
        done = [await toy.train(job(shard, round_, state)) for shard in range(SHARDS)]
        found = [result.contribution for result in done]
        request = closing(*found, found[0][:-1], b"", state=state, round_=round_)
        ours, theirs = await toy.close_round(request), await shared_forkserver.close_round(request)
        assert ours == theirs
        assert ours.gated == (4, 5)
        state = ours.state


async def test_what_is_no_contribution_is_gated_out(executor: Executor) -> None:
    sound = (await executor.train(job())).contribution
    closed = await executor.close_round(closing(b"", sound, b"MESHCON1" + bytes(100)))
    assert closed.gated == (0, 2)
    assert closed.state == (await executor.close_round(closing(sound))).state


async def test_a_round_without_any_accepted_contribution_leaves_the_state(
    executor: Executor,
) -> None:
    closed = await executor.close_round(closing(b"", b"x"))
    assert (closed.state, closed.gated) == (STATE, (0, 1))


async def test_a_round_needs_contributions_and_their_weights(executor: Executor) -> None:
    with pytest.raises(ShardFailed, match="0 contributions; a round closes with 1"):
        await executor.close_round(closing())
    with pytest.raises(ShardFailed, match="has a weight"):
        await executor.close_round(replace(closing(b""), weights=(0,)))


def changed(**settings: str | float) -> tuple[str, ...]:
    lines = dict(line.split("=") for line in SETTINGS.encode())
    lines.update({name: str(value) for name, value in settings.items()})
    return tuple(f"{name}={value}" for name, value in sorted(lines.items()))


BAD_ROWS = pack(RowSchema((Column("x", "f32", (WIDTH,)),)), [f32_bytes([math.nan] * WIDTH)] * 6)
OTHER = pack(RowSchema((Column("y", "f32", (1,)),)), [f32_bytes([0])] * 6)
FEW = pack(RowSchema((Column("x", "f32", (WIDTH,)),)), [f32_bytes([0] * WIDTH)] * 5)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (replace(job(), program=affine_program(WIDTH)), "not one f32 number: it has no loss"),
        (replace(job(), program=b""), "MESHPRG1"),
        (replace(job(), state=STATE[:-1]), "this is no state"),
        (replace(job(), state=b""), "a state of 0 bytes"),
        (replace(job(), state=STATE + bytes(1 << 16)), "a state of"),
        (replace(job(), inputs=BAD_ROWS), "NaN"),
        (replace(job(), inputs=OTHER), "the program reads x"),
        (replace(job(), inputs=FEW), "3 steps of 2 rows need 6"),
        (replace(job(), inputs=b""), "not packed rows"),
        (replace(job(), settings=()), "'optimizer' is missing"),
        (replace(job(), settings=changed(steps=0)), "steps is 0; a whole number from 1 to 10000"),
        (replace(job(), settings=changed(batch=0)), "batch is 0; a whole number from 1"),
        (replace(job(), settings=changed(lr="1e-3")), "write a decimal number"),
        (replace(job(), seed=b""), "out of bounds"),
    ],
)
async def test_what_cannot_be_trained_fails_and_the_next_shard_works(
    executor: Executor, request_: TrainRequest, reason: str
) -> None:
    with pytest.raises(ShardFailed, match=reason):
        await executor.train(request_)
    assert len((await executor.train(job())).end_digest) == 32


async def test_a_number_that_becomes_infinite_names_round_shard_step_and_cure(
    executor: Executor,
) -> None:
    huge = struct.pack(f"<{WIDTH}f", *[3e38] * WIDTH)
    schema = RowSchema((Column("x", "f32", (WIDTH,)),))
    request = replace(job(shard=2, round_=7), inputs=pack(schema, [huge] * SETTINGS.rows))
    with pytest.raises(ShardFailed, match=r"round 7, shard 2, step 0.*lower lr \(now 0\.05\)"):
        await executor.train(request)


async def test_a_shard_of_training_has_a_deadline_and_a_memory(executor: Executor) -> None:
    for limits, which in (
        (Limits(wall_s=1e-11), "wall_s"),
        (Limits(memory_bytes=1000), "memory_bytes"),
    ):
        with pytest.raises(LimitExceeded) as caught:
            await executor.train(replace(job(), limits=limits))
        assert caught.value.which == which
        with pytest.raises(LimitExceeded) as caught:
            await executor.close_round(replace(closing(b""), limits=limits))
        assert caught.value.which == which
    assert len((await executor.train(job())).end_digest) == 32


async def test_a_cancelled_shard_of_training_loses_nothing_but_itself(executor: Executor) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await executor.train(job())
    assert scope.cancelled_caught
    assert isinstance(await executor.train(job()), TrainResult)


async def test_inference_and_training_share_an_executor(executor: Executor) -> None:
    schema = RowSchema((Column("x", "f32", (4,)),))
    infer = InferRequest(b"j" * 32, 0, affine_program(), pack(schema, [f32_bytes([1, 2, 3, 4])]))
    before = await executor.infer(infer)
    await executor.train(job())
    assert await executor.infer(infer) == before
    with pytest.raises(ShardFailed, match="this program trains"):
        await executor.infer(replace(infer, program=PROGRAM, inputs=rows(0, 0)))


async def test_the_toy_takes_the_time_that_training_takes(autojump_clock: trio.abc.Clock) -> None:
    units = admit_training(job()).units
    started = trio.current_time()
    await ToyExecutor(units_per_second=100).train(
        replace(job(), limits=Limits(1 << 30, 1e9, 10**9))
    )
    assert trio.current_time() - started == pytest.approx(units / 100)


async def test_the_toy_says_what_it_does_not_train() -> None:
    settings = TrainSettings.fill({"batch": 2, "steps": 3, "total_steps": 36, "optimizer": "adamw"})
    request = replace(job(), settings=settings.encode(), state=initial_state(PROGRAM, settings))
    with pytest.raises(ShardFailed, match="not with adamw"):
        await ToyExecutor(10**12).train(request)
    with pytest.raises(ShardFailed, match="closes no rounds of AdamW"):
        await ToyExecutor(10**12).close_round(
            replace(closing(b""), settings=settings.encode(), state=request.state)
        )


def test_the_daemons_side_of_training_needs_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, meshd.node.compute.toy, meshd.node.compute.forkserver\n"
        "import meshd.node.workloads.training.plan\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_fields_come_back_and_what_is_cut_off_does_not() -> None:
    packed = pack_fields([b"", b"abc", bytes(9)])
    assert parse_fields(memoryview(packed)) == [b"", b"abc", bytes(9)]
    for data in (b"", packed[:-1], packed + b"x", struct.pack("<IQ", 1, 1 << 60)):
        with pytest.raises(FramingError, match="payload"):
            parse_fields(memoryview(data))
