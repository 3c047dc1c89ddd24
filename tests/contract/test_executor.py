"""What every Executor keeps to: the toy in virtual time and torch in processes of its own."""

import math
import struct
from pathlib import Path

import pytest
import trio

from meshd.node.compute.executor import (
    Executor,
    InferRequest,
    LimitExceeded,
    Limits,
    ShardFailed,
    admit,
)
from meshd.node.compute.toy import ToyExecutor, affine_dataset, affine_program, run_program
from meshd.node.workloads.datasets import parse_manifest, slice_rows
from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program, parse_program
from meshd.node.workloads.rows import RowSchema, f32_bytes, pack, unpack
from meshd.node.workloads.tensors import Column

PROGRAM = affine_program(width=4, steps=3)
DATASET = affine_dataset(rows=100, width=4)
X = RowSchema((Column("x", "f32", (4,)),))


@pytest.fixture(params=["toy", "forkserver"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "toy":
        return ToyExecutor(10**12)
    shared: Executor = request.getfixturevalue("shared_forkserver")
    return shared


def rows(*indices: int) -> bytes:
    manifest = parse_manifest(DATASET.manifest_bytes)
    chunks = {ref.digest: data for ref, data in zip(manifest.chunks, DATASET.chunks, strict=True)}
    return slice_rows(manifest, chunks, indices)


def job(
    program: bytes | Path = PROGRAM,
    inputs: bytes | None = None,
    *,
    slot: int = 0,
    limits: Limits | None = None,
) -> InferRequest:
    given = rows(3, 1, 4) if inputs is None else inputs
    return InferRequest(b"j" * 32, slot, program, given, limits or Limits())


def expected(request: InferRequest) -> bytes:
    admitted = admit(request)
    return run_program(admitted.program, admitted.data, admitted.rows)


async def test_rows_come_out_in_the_order_in_which_they_went_in(executor: Executor) -> None:
    output = await executor.infer(job())
    assert output == expected(job())
    single = [unpack(await executor.infer(job(inputs=rows(at)))).row(0) for at in (3, 1, 4)]
    assert unpack(output).rows() == single


async def test_the_same_request_has_the_same_answer(executor: Executor) -> None:
    assert await executor.infer(job()) == await executor.infer(job())


async def test_several_slots_compute_side_by_side(executor: Executor) -> None:
    outputs: dict[int, bytes] = {}

    async def compute(slot: int) -> None:
        outputs[slot] = await executor.infer(job(inputs=rows(slot), slot=slot))

    async with trio.open_nursery() as nursery:
        for slot in range(3):
            nursery.start_soon(compute, slot)
    assert outputs == {slot: expected(job(inputs=rows(slot))) for slot in range(3)}


async def test_a_program_may_lie_in_a_file(executor: Executor, tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(PROGRAM)
    assert await executor.infer(job(file)) == expected(job())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"", "MESHPRG1"),
        (PROGRAM[:-1], "weights"),
        (b"PK\x03\x04" + bytes(100), "can carry code"),
        (b"\x80\x04.", "unpickling runs code"),
        (Path("model.pt2"), "model.pt2 is not a program: torch.export archives are code"),
        (Path("missing"), "missing cannot be read: No such file"),
    ],
)
async def test_what_is_no_program_fails_and_the_next_one_works(
    executor: Executor, program: bytes | Path, reason: str
) -> None:
    with pytest.raises(ShardFailed, match=reason):
        await executor.infer(job(program))
    assert await executor.infer(job()) == expected(job())


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (b"", "not packed rows"),
        (pack(X, []), "no rows"),
        (pack(RowSchema((Column("x", "f32", (5,)),)), [f32_bytes([0] * 5)]), "the program reads"),
        (pack(RowSchema((Column("z", "f32", (4,)),)), [f32_bytes([0] * 4)]), "the program reads"),
        (pack(X, [struct.pack("<4f", 1, 2, math.nan, 4)]), "NaN"),
    ],
)
async def test_rows_that_the_program_does_not_read_fail(
    executor: Executor, inputs: bytes, reason: str
) -> None:
    with pytest.raises(ShardFailed, match=reason):
        await executor.infer(job(inputs=inputs))


async def test_an_answer_that_is_not_finite_fails(executor: Executor) -> None:
    nodes = tuple(Node("mul", (Ref(at), 1e38)) for at in range(2))
    graph = Graph(X.columns, (Output("y", "f32", (None, 4), 2),), nodes, ())
    with pytest.raises(ShardFailed, match="NaN, infinity"):
        await executor.infer(job(encode_program(graph, [])))
    assert await executor.infer(job()) == expected(job())


async def test_a_program_that_trains_does_not_infer(executor: Executor) -> None:
    nodes = (Node("sum", (Ref(0), (0, 1), False)),)
    graph = Graph(X.columns, (Output("loss", "f32", (), 1),), nodes, ())
    with pytest.raises(ShardFailed, match="this program trains"):
        await executor.infer(job(encode_program(graph, [])))


async def test_too_much_memory_is_refused_before_it_is_taken(executor: Executor) -> None:
    nodes = (
        Node("expand", (Ref(0), (1 << 36, -1, -1))),
        Node("amax", (Ref(1), (0,), False)),
    )
    graph = Graph(X.columns, (Output("y", "f32", (None, 4), 2),), nodes, ())
    with pytest.raises(LimitExceeded) as caught:
        await executor.infer(job(encode_program(graph, [])))
    assert (caught.value.which, caught.value.value) == ("memory_bytes", Limits().memory_bytes)


async def test_a_shard_has_a_deadline_and_the_next_one_works(executor: Executor) -> None:
    with pytest.raises(LimitExceeded) as caught:
        await executor.infer(job(limits=Limits(wall_s=1e-11)))
    assert caught.value.which == "wall_s"
    assert await executor.infer(job()) == expected(job())


async def test_a_cancelled_shard_loses_nothing_but_itself(executor: Executor) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await executor.infer(job())
    assert scope.cancelled_caught
    assert await executor.infer(job()) == expected(job())


async def test_the_speed_is_measured_once(executor: Executor) -> None:
    speed = await executor.measure()
    assert speed > 1_000_000
    assert await executor.measure() == speed


async def test_the_toy_takes_the_time_that_its_units_take(autojump_clock: trio.abc.Clock) -> None:
    units = admit(job()).units
    started = trio.current_time()
    await ToyExecutor(units_per_second=2).infer(job())
    assert trio.current_time() - started == pytest.approx(units / 2)


@pytest.mark.parametrize("which", ["wall_s", "cpu_s"])
async def test_the_toy_stops_at_its_limit(autojump_clock: trio.abc.Clock, which: str) -> None:
    limits = Limits(wall_s=7.0) if which == "wall_s" else Limits(cpu_s=7)
    started = trio.current_time()
    with pytest.raises(LimitExceeded, match=which):
        await ToyExecutor(units_per_second=1).infer(job(limits=limits))
    assert trio.current_time() - started == 7.0


@pytest.mark.parametrize(
    "node",
    [Node("exp", (Ref(0),)), Node("add", (Ref(0), 1.0, 2)), Node("amax", (Ref(0), (1,), True))],
)
async def test_the_toy_says_what_it_cannot_compute(node: Node) -> None:
    width = 1 if node.operator == "amax" else 4
    graph = Graph(X.columns, (Output("y", "f32", (None, width), 1),), (node,), ())
    with pytest.raises(ShardFailed, match="the toy executor"):
        await ToyExecutor().infer(job(encode_program(graph, [])))


def test_programs_of_the_toy_differ_by_their_seed() -> None:
    digests = {parse_program(affine_program(seed=seed)).digest for seed in range(5)}
    assert len(digests) == 5
