"""The demo's language model: exported, trained by shards and alone, and judged by plain torch."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshd.config.job import parse_job
from meshd.node.demo.heldout import weights_file
from meshd.node.demo.language import (
    DATA_FILE,
    HELD_OUT_FILE,
    HELD_OUT_ROWS,
    PROGRAM_FILE,
    ROUNDS,
    SHARDS,
    STEPS,
    TRAINING_ROWS,
    settings,
)
from meshd.node.demo.sourcetext import WINDOW
from meshd.node.demo.stage import COMMON
from meshd.node.demo.training import JOB
from meshd.node.workloads.datasetfile import open_dataset
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.state import initial_state, result_file


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"meshd.node.demo.{module}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Return the JSON lines that a module of the demo printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("language")
    yield folder, finish(start("language", "--out", str(folder), "--seed", "1"))[-1]
    shutil.rmtree(folder)


def test_what_is_made_fits_together(made: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = made
    assert 300_000 <= answer["parameters"] <= 500_000
    assert answer["rows"] == TRAINING_ROWS
    manifest = open_dataset(folder / DATA_FILE).manifest
    program = parse_program((folder / PROGRAM_FILE).read_bytes())
    assert manifest.rows == TRAINING_ROWS
    assert program.input_schema == manifest.schema
    assert (folder / HELD_OUT_FILE).stat().st_size == HELD_OUT_ROWS * WINDOW
    # Three passes of two operations a parameter and byte, and what attention and optimizer take.
    least = 6 * answer["parameters"] * settings().rows * (WINDOW - 1)
    assert least < answer["units_per_shard"] < 2 * least


def test_the_job_is_as_large_as_the_demo_promises() -> None:
    assert ROUNDS >= 8
    assert SHARDS >= 4
    assert settings().total_steps == ROUNDS * STEPS


def test_the_description_of_the_job_has_the_settings_that_its_cost_was_computed_with() -> None:
    common = COMMON.format(price="0.001", cap="1", orchestrator="0x" + "a1" * 20)
    spec = parse_job(common + JOB, now=0)
    given = TrainSettings.fill(spec.train.settings)
    assert given == replace(settings(), min_share=given.min_share)
    assert (spec.train.rounds, spec.train.shards) == (ROUNDS, SHARDS)


def test_losses_are_told_of_the_weights_of_each_round_and_of_one_worker_alone(
    made: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = made
    judge = start("heldout", "--dir", str(folder), "--rounds", "1", "--seed", "1")
    data = (folder / PROGRAM_FILE).read_bytes()
    first = result_file(initial_state(data, settings()), parse_program(data))
    (folder / weights_file(1)).write_bytes(first)
    lines = finish(judge)
    assert [list(line) for line in lines[:-1]] == [["round", "loss"], ["alone"], ["round", "loss"]]
    losses = lines[-1]
    assert losses["loss"] == [lines[0]["loss"], lines[2]["loss"]]
    assert losses["loss_alone"] == lines[1]["alone"]
    # The untrained model knows nothing: every byte is as likely as any other.
    assert losses["loss"][0] == pytest.approx(math.log(256), abs=0.1)
    assert losses["loss"][1] == losses["loss"][0]
    assert losses["loss_alone"] < losses["loss"][0] - 1
