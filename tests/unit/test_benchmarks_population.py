"""The simulated swarm of the audit benchmark: who is caught, what is paid, and that it repeats."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def population(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_population")


def scenario(population: Any, workload: str, **over: Any) -> Any:
    small = {"strategies": (population.BOLD,), "workers": 10, "jobs": 1, "shards_each": 12}
    return population.Scenario("small", workload, **(small | over))


@pytest.mark.parametrize("workload", ["infer", "train"])
def test_honest_workers_are_all_paid_and_none_is_rejected(population: Any, workload: str) -> None:
    tally = population.simulate(scenario(population, workload, cheaters=0.0), 1)
    assert (tally.false_rejects, tally.caught, tally.bad_shards, tally.void_units) == (0, 0, 0, 0)
    assert tally.shards == 120
    assert 0 < tally.audit_units < tally.units
    assert tally.paid > 0


def test_bold_cheaters_are_caught_and_get_nothing_for_what_they_invent(population: Any) -> None:
    tally = population.simulate(scenario(population, "infer"), 2)
    assert tally.caught == tally.cheaters == 3
    assert (tally.false_rejects, tally.paid_to_cheaters, tally.paid_for_bad) == (0, 0, 0)
    assert tally.shards == 120  # what they spoilt was computed again by others


def test_in_training_closed_rounds_stay_and_the_span_is_not_paid(population: Any) -> None:
    tally = population.simulate(scenario(population, "train"), 3)
    assert tally.caught == tally.cheaters == 3
    assert tally.paid_for_bad == 0
    assert tally.bad_shards > 0


def test_a_caught_cheater_stays_away_unless_identities_are_free(population: Any) -> None:
    here = scenario(population, "infer")
    assert population.simulate(here, 4).caught == 3
    assert population.simulate(replace(here, reborn=True), 4).caught > 3


def test_sleepers_are_audited_less_once_they_are_past_probation(population: Any) -> None:
    strategies = population.STRATEGIC
    here = scenario(population, "infer", strategies=strategies, shards_each=30)
    figures = population.simulate(here, 5).figures()
    assert figures["false_rejects"] == 0
    assert 0 < figures["overhead_steady"] < figures["overhead_probation"]


def test_the_same_seed_gives_the_same_figures_and_another_one_others(population: Any) -> None:
    here = scenario(population, "infer", strategies=population.STRATEGIC, shards_each=20)
    assert population.simulate(here, 6) == population.simulate(here, 6)
    assert population.simulate(here, 6) != population.simulate(here, 7)


def test_jobs_may_run_in_a_pool_with_the_same_result(population: Any) -> None:
    def backwards(run: Any, numbers: Any) -> Any:
        return reversed([run(number) for number in reversed(numbers)])

    here = scenario(population, "infer", jobs=2, workers=20)
    assert population.simulate(here, 8, run_all=backwards) == population.simulate(here, 8)
