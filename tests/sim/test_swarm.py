"""Seeded swarms with cheaters, crashes and broken networks: money and output are always right."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
from sim.scenarios import run_seed, scenario_of

LONG = range(1000, 4000)
Record = Callable[[str, object], None]


def play(seed: int) -> Counter[str]:
    """Run one seed and return its figures; say how to repeat it where it fails."""
    began = time.process_time()
    try:
        run = run_seed(seed)
    except Exception as error:
        error.add_note(f"{scenario_of(seed)}")
        error.add_note(
            "replay: .venv/bin/pytest tests/sim/test_swarm.py -k one_job --sim-log "
            f"--sim-seed {seed}"
        )
        raise
    figures = Counter({"seeds": 1, f"state: {run.state}": 1})
    figures["virtual ms"] = int(run.virtual_s * 1000)
    figures["ms"] = int((time.process_time() - began) * 1000)
    figures.update({f"fault: {name}": count for name, count in run.faults.items()})
    return figures


def test_one_job_ends_right_whoever_cheats_and_whatever_breaks(
    seed: int, record_property: Record
) -> None:
    record_property("simulation", dict(play(seed)))


@pytest.mark.long
def test_thousands_of_seeds_end_right(record_property: Record) -> None:
    figures: Counter[str] = Counter()
    for seed in LONG:
        figures.update(play(seed))
    record_property("simulation", dict(figures))


def test_a_seed_is_the_same_run_again() -> None:
    assert run_seed(7) == run_seed(7)
