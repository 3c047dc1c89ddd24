"""The demo's cheater: what it hands in passes for work, and is not."""

import math
from dataclasses import replace

import pytest

from meshd.node.compute.executor import CloseRequest, TrainRequest, TrainResult
from meshd.node.compute.toy import ToyExecutor, affine_dataset
from meshd.node.compute.toy_training import training_program
from meshd.node.demo.cheater import CheatingExecutor
from meshd.node.workloads.datasets import parse_manifest, slice_rows
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.training.contribution import check_contribution, layout_of, losses_of
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plain import read_part
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shuffle import rows_of
from meshd.node.workloads.training.state import initial_state

WIDTH = 16
PROGRAM = training_program(WIDTH)
SETTINGS = TrainSettings.fill(
    {"batch": 2, "steps": 8, "total_steps": 64, "warmup": 2, "optimizer": "sgd"}
)
LAYOUT = layout_of(trained_weights(parse_program(PROGRAM)), SETTINGS)
DATASET = affine_dataset(rows=100, width=WIDTH)
SEED = b"s" * 32


def job(settings: TrainSettings = SETTINGS, shard: int = 0) -> TrainRequest:
    manifest = parse_manifest(DATASET.manifest_bytes)
    chunks = {ref.digest: data for ref, data in zip(manifest.chunks, DATASET.chunks, strict=True)}
    first = shard * SETTINGS.rows
    indices = rows_of(SEED, rows=100, first=first, count=settings.rows)
    rows = slice_rows(manifest, chunks, indices)
    state = initial_state(PROGRAM, SETTINGS)
    return TrainRequest(b"t" * 32, 0, PROGRAM, state, rows, settings.encode(), SEED, 0, shard)


class Watched(ToyExecutor):
    """The toy, which notes how many steps it was asked for."""

    def __init__(self) -> None:
        super().__init__(10**12)
        self.steps: list[int] = []

    async def train(self, job: TrainRequest) -> TrainResult:
        self.steps.append(TrainSettings.parse(job.settings).steps)
        return await super().train(job)


def length(result: TrainResult) -> float:
    levels, scales = read_part(result.contribution, LAYOUT.places[0].theta)
    each = LAYOUT.places[0].theta.block
    return math.hypot(*(level * scales[at // each] for at, level in enumerate(levels)))


async def test_a_quarter_of_the_steps_is_never_computed_and_the_change_is_as_long() -> None:
    toy = Watched()
    honest = await toy.train(job())
    cheated = await CheatingExecutor(toy).train(job())
    assert toy.steps == [8, 6]
    check_contribution(cheated.contribution, LAYOUT)
    assert cheated.end_digest != honest.end_digest
    assert cheated.contribution != honest.contribution
    losses = losses_of(cheated.contribution)
    assert losses[:6] == losses_of(honest.contribution)[:6]
    assert losses[6:] == (losses[5], losses[5])
    assert length(cheated) == pytest.approx(length(honest), rel=0.3)


async def test_the_gate_lets_what_was_extrapolated_into_the_round() -> None:
    toy = Watched()
    honest = [await toy.train(job(shard=shard)) for shard in (0, 1, 2)]
    cheated = await CheatingExecutor(toy).train(job(shard=3))
    contributions = tuple(each.contribution for each in [*honest, cheated])
    closed = await toy.close_round(
        CloseRequest(
            b"t" * 32,
            PROGRAM,
            job().state,
            contributions,
            (SETTINGS.rows,) * 4,
            SETTINGS.encode(),
            0,
        )
    )
    assert closed.gated == ()


async def test_the_canary_is_computed_honestly_so_the_cheater_gets_work() -> None:
    toy = Watched()
    canary = replace(job(SETTINGS.of_canary()), settings=SETTINGS.of_canary().encode())
    assert await CheatingExecutor(toy).train(canary) == await toy.train(canary)
