"""Seeded swarms with cheaters, crashes and broken networks: money and output are always right."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from sim.scenarios import run_seed, scenario_of


def play(seed: int, figures: Counter[str]) -> None:
    """Run one seed and add up what it was; say how to repeat it where it fails."""
    began = time.process_time()
    try:
        run = run_seed(seed)
    except BaseException as error:
        error.add_note(f"{scenario_of(seed)}")
        error.add_note(
            "replay: .venv/bin/pytest tests/sim/test_swarm.py -k one_job "
            f"--sim-seed {seed} --sim-log"
        )
        raise
    figures["seeds"] += 1
    figures["virtual ms"] += int(run.virtual_s * 1000)
    figures["ms"] += int((time.process_time() - began) * 1000)
    figures[f"state: {run.state}"] += 1
    figures.update({f"fault: {name}": count for name, count in run.faults.items()})


def test_one_job_ends_right_whoever_cheats_and_whatever_breaks(
    seed: int, figures: Counter[str]
) -> None:
    play(seed, figures)


@pytest.mark.long
def test_thousands_of_seeds_end_right(figures: Counter[str]) -> None:
    for seed in range(1000, 4000):
        play(seed, figures)


def test_a_seed_is_the_same_run_again() -> None:
    first, second = run_seed(7), run_seed(7)
    assert first == second
