"""The plan of a training job: its rows, costs and digests, and terms that contradict it."""

from __future__ import annotations

from typing import Any

import pytest
from unit.training_kit import PARSED, PROGRAM, batch_rows, settings, shard_of, tiny_program

from meshd.node.workloads.datasets import ColumnData, Dataset, build_dataset, parse_manifest
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.errors import SettingsError, TrainingError
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plan import (
    MAX_SHARDS,
    TrainPlan,
    close_memory,
    optimizer_units,
)
from meshd.node.workloads.training.state import initial_state
from meshd.p2p.messages import JobTerms

SETTINGS = settings(total_steps=15)
ROWS = 100


def dataset() -> Dataset:
    packed = batch_rows(ROWS)
    columns = {
        "t": ColumnData("i64", (ROWS, 4), packed.column("t")),
        "y": ColumnData("i64", (ROWS,), packed.column("y")),
    }
    return build_dataset(columns, 16)


DATA = dataset()
MANIFEST = parse_manifest(DATA.manifest_bytes)
CHUNKS = {ref.digest: data for ref, data in zip(MANIFEST.chunks, DATA.chunks, strict=True)}


def terms(**given: Any) -> JobTerms:
    values: dict[str, Any] = {
        "workload": "train",
        "program": PARSED.digest,
        "data": MANIFEST.dataset_id,
        "rows": ROWS,
        "shards": 4,
        "rounds": 5,
        "rows_per_shard": SETTINGS.rows,
        "hyperparameters": SETTINGS.encode(),
        "seed": b"s" * 32,
    }
    return JobTerms.model_construct(**{**values, **given})


def plan(**given: Any) -> TrainPlan:
    return TrainPlan(terms(**given), PARSED, MANIFEST)


def test_the_shards_of_an_epoch_read_every_row_once() -> None:
    whole = plan()
    read = [row for r in range(5) for j in range(4) for row in whole.rows(r, j)]
    assert len(read) == 5 * 4 * SETTINGS.rows
    assert sorted(read[:ROWS]) == sorted(read[ROWS : 2 * ROWS]) == list(range(ROWS))
    assert whole.canary_rows() == whole.rows(0, 0)[: 2 * SETTINGS.batch]


@pytest.mark.parametrize(("round_", "shard"), [(5, 0), (-1, 0), (0, 4), (0, -1)])
def test_there_are_no_other_shards(round_: int, shard: int) -> None:
    with pytest.raises(TrainingError, match="there is no shard"):
        plan().rows(round_, shard)


def test_inputs_come_in_the_order_in_which_they_are_read() -> None:
    whole = plan()
    rows = [*whole.rows(1, 2), 3, 3]
    needed = whole.chunks(rows)
    assert len({digest for digest, _ in needed}) == len(needed) <= len(MANIFEST.chunks)
    assert all(len(CHUNKS[digest]) == size for digest, size in needed)
    packed = unpack(whole.inputs({digest: CHUNKS[digest] for digest, _ in needed}, rows))
    assert packed.rows() == [batch_rows(ROWS).row(row) for row in rows]


def test_a_shard_costs_its_passes_and_its_optimizer() -> None:
    inner = 3 * units(PARSED, SETTINGS.batch)
    weights = trained_weights(PARSED)
    elements = sum(weight.elements for weight in weights)
    a, b = 5, 24
    optimizer = 12 * elements + 5 * (4 * a * a * b + 2 * a * a * a)
    assert optimizer_units(weights, SETTINGS) == optimizer
    assert plan().units(0) == plan().units(3) == 3 * (inner + optimizer)
    assert optimizer_units(weights, settings(optimizer="sgd")) == 12 * elements


def test_lengths_are_those_of_real_files() -> None:
    whole = plan()
    state = initial_state(PROGRAM, SETTINGS)
    assert len(shard_of(state, SETTINGS).contribution) == whole.contribution_bytes
    assert len(state) <= whole.state_bytes_limit
    assert whole.memory_bytes > len(state) + whole.contribution_bytes
    assert close_memory(PARSED, whole.weights, SETTINGS, 4) > 5 * whole.contribution_bytes


def test_the_input_hash_binds_everything() -> None:
    whole = plan()
    digests = {
        whole.input_hash(0, 0, bytes(32)),
        whole.input_hash(1, 0, bytes(32)),
        whole.input_hash(0, 1, bytes(32)),
        whole.input_hash(0, 0, b"x" * 32),
        plan(program=bytes(32)).input_hash(0, 0, bytes(32)),
        plan(data=bytes(32)).input_hash(0, 0, bytes(32)),
        plan(seed=bytes(32)).input_hash(0, 0, bytes(32)),
        plan(hyperparameters=settings(total_steps=15, lr=0.01).encode()).input_hash(
            0, 0, bytes(32)
        ),
        plan(shards=3).input_hash(0, 0, bytes(32)),
    }
    assert len(digests) == 9
    assert whole.input_hash(0, 0, bytes(32)) == plan().input_hash(0, 0, bytes(32))


@pytest.mark.parametrize(
    ("given_", "error", "reason"),
    [
        ({"rows": 99}, TrainingError, "the terms say 99 rows, the dataset has 100"),
        ({"rows_per_shard": 47}, TrainingError, "a shard 47 rows; 3 steps of 16 rows read 48"),
        ({"rounds": 4}, TrainingError, "total_steps is 15; 4 rounds of 3 steps make 12"),
        ({"shards": 0}, TrainingError, "5 rounds of 0 shards"),
        ({"shards": MAX_SHARDS + 1}, TrainingError, "1 to 1024 shards"),
        ({"rounds": 0}, TrainingError, "0 rounds of 4 shards"),
        ({"hyperparameters": ()}, SettingsError, "is missing"),
    ],
)
def test_terms_that_contradict_the_job_are_refused(
    given_: dict[str, Any], error: type[WorkloadError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        plan(**given_)


def test_data_that_does_not_fit_the_program_is_refused() -> None:
    other = build_dataset({"x": ColumnData("f32", (ROWS, 1), bytes(4 * ROWS))}, 10)
    with pytest.raises(TrainingError, match=r"reads t i64\[4\], y i64\[\], the dataset has x f32"):
        TrainPlan(terms(), PARSED, parse_manifest(other.manifest_bytes))
    with pytest.raises(TrainingError, match="it has no loss"):
        TrainPlan(terms(), parse_program(tiny_program("out")), MANIFEST)
