"""What the benchmark of training makes of what it saw: rounds, deaths, speed-ups, job files."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from meshd.config.job import parse_job
from meshd.node.workloads.program import parse_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of scripts/benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    return importlib.import_module


def shard(name: str, round_: int, at: float, worker: str, seconds: float) -> list[dict[str, Any]]:
    """What is noted of a shard that is assigned at *at* and goes well."""
    of = {"name": name}
    done = at + 0.2 + 0.1 + seconds + 0.02
    return [
        {"kind": "assigned", "round": round_, "shard": int(name[-1]), "worker": worker, "at": at}
        | of,
        {"kind": "computing", "round": round_, "at": at + 0.2} | of,
        {"kind": "state", "at": at + 0.3} | of,
        {"kind": "computed", "seconds": seconds, "at": done} | of,
        {"kind": "handed-in", "at": done + 0.05} | of,
        {"kind": "fetched", "at": done + 0.15} | of,
        {"kind": "committed", "at": done + 0.16} | of,
    ]


def close(round_: int, at: float) -> list[dict[str, Any]]:
    """What is noted of a round's close at *at*."""
    return [
        {"kind": "closing", "round": round_, "at": at - 0.3},
        {"kind": "combined", "round": round_, "at": at - 0.1},
        {"kind": "closed", "round": round_, "at": at},
    ]


def story() -> list[dict[str, Any]]:
    """Two rounds; in the second bob's shard takes longer than alice's."""
    return [
        *shard("a0", 0, 90.0, "alice", 1.0),
        *close(0, 100.0),
        *shard("b0", 1, 100.1, "alice", 1.0),
        *shard("b1", 1, 100.1, "bob", 2.0),
        *close(1, 103.0),
    ]


def test_a_rounds_overhead_is_what_the_slowest_workers_compute_and_transfer_leave(
    bench: Any,
) -> None:
    (only,) = bench("_rounds").read_rounds(story())
    assert only.number == 1
    assert only.slowest_s == pytest.approx(2.0 + 0.1 + 0.02 + 0.1)
    assert only.overhead_s == pytest.approx(3.0 - 2.22)


def test_the_parts_of_a_round_are_those_of_its_last_shard_and_add_up(bench: Any) -> None:
    module = bench("_rounds")
    (only,) = module.read_rounds(reversed(story()))
    parts = only.parts()
    assert tuple(parts) == module.PARTS
    assert sum(parts.values()) == pytest.approx(3.0)
    assert parts["compute"] == pytest.approx(2.0)
    assert parts["assign"] == pytest.approx(0.1)
    assert parts["close"] == pytest.approx(0.2)


def test_a_worker_with_two_shards_of_a_round_has_the_time_of_both(bench: Any) -> None:
    events = [
        *close(0, 100.0),
        *shard("b0", 1, 100.1, "alice", 1.0),
        *shard("b1", 1, 101.5, "alice", 1.0),
        *close(1, 103.5),
    ]
    (only,) = bench("_rounds").read_rounds(events)
    assert only.slowest_s == pytest.approx(2 * 1.22)


def test_a_contribution_that_is_handed_in_twice_counts_from_the_first_time(bench: Any) -> None:
    again = [{"kind": kind, "name": "b1", "at": 102.9} for kind in ("handed-in", "fetched")]
    (only,) = bench("_rounds").read_rounds([*story(), *again])
    assert only.overhead_s == pytest.approx(0.78)


def test_a_dead_workers_shard_is_followed_to_the_close_of_its_round(bench: Any) -> None:
    module = bench("_rounds")
    lost = shard("b1", 1, 100.1, "bob", 2.0)[:3]
    events = [
        *close(0, 100.0),
        *shard("b0", 1, 100.1, "alice", 1.0),
        *lost,
        {"kind": "lease-ended", "name": "b1", "at": 101.3},
        *shard("c1", 1, 101.6, "alice", 1.0),
        *close(1, 103.5),
    ]
    found = module.recovery(module.read_rounds(events), "bob", 101.0)
    assert found.noticed_s == pytest.approx(0.3)
    assert found.reissued_s == pytest.approx(0.6)
    assert found.completed_s == pytest.approx(2.5)
    assert found.beyond_s == pytest.approx(2.5 - 1.22)
    assert found.busy_s == pytest.approx(101.58 - 101.3)


def test_a_death_without_a_lease_has_no_course(bench: Any) -> None:
    module = bench("_rounds")
    rounds = module.read_rounds(story())
    assert module.recovery(rounds, "carol", 101.0) is None
    assert module.recovery(rounds, "bob", 102.9) is None


def test_a_line_that_is_half_written_is_read_when_it_is_whole(bench: Any) -> None:
    tail = bench("_rounds").Tail()
    line = json.dumps({"kind": "closed"})
    tail.feed(f"{line}\n{line[:5]}")
    assert tail.events == [{"kind": "closed"}]
    tail.feed(f"{line[5:]}\n")
    assert tail.events == [{"kind": "closed"}] * 2


def test_the_lone_workers_steps_are_interpolated_in_their_logarithm(bench: Any) -> None:
    reach = bench("_loss").steps_to_reach
    lone = {100: 2.0, 400: 1.0, 800: 0.5}
    assert reach(1.5, lone) == pytest.approx(200)
    assert reach(1.0, lone) == pytest.approx(400)
    assert reach(0.5, lone) == pytest.approx(800)


@pytest.mark.parametrize("loss", [2.1, 0.4])
def test_a_loss_that_no_lone_run_spans_is_not_extrapolated(bench: Any, loss: float) -> None:
    assert math.isnan(bench("_loss").steps_to_reach(loss, {100: 2.0, 400: 1.0, 800: 0.5}))


def test_peers_have_completed_when_the_last_survivor_has_averaged(bench: Any) -> None:
    completed = bench("_hivemind").completed
    early = [{"kind": "averaged", "at": 9.0}, {"kind": "epoch", "at": 10.5}]
    one = [*early, {"kind": "alone", "at": 11.0}, {"kind": "averaged", "at": 12.0}]
    assert completed([one, early], 10.0) is None
    assert completed([one, [*early, {"kind": "averaged", "at": 13.5}]], 10.0) == 3.5


def test_what_never_came_is_longer_than_everything_else(bench: Any) -> None:
    median_of = bench("train").median_of
    assert median_of([1.0, None, 3.0]) == 3.0
    assert median_of([1.0, None, None]) is None


def test_hivemind_is_installed_without_its_dependencies_after_torch(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = bench("_hivemind")
    monkeypatch.setattr(module, "VENV", tmp_path)
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def noted(command: list[str], **_: object) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr(module.subprocess, "run", noted)
    module.prepare()
    assert commands[1][-1].startswith("torch==")
    assert commands[2][-2:] == ["--no-deps", "hivemind==1.1.12"]
    assert "torch" not in commands[3]
    assert "installing hivemind==1.1.12" in capsys.readouterr().err
    done = len(commands)
    module.prepare()
    assert len(commands) == done


def test_hivemind_that_cannot_be_installed_is_missing_with_the_reason(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench("_hivemind")
    monkeypatch.setattr(module, "VENV", tmp_path)

    class Failed:
        returncode, stdout, stderr = 1, "", "no matching distribution"

    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(module.HivemindMissing, match="no matching distribution"):
        module.prepare()
    assert not (tmp_path / "installed").exists()


def test_the_training_job_is_one_that_would_be_taken(bench: Any) -> None:
    module = bench("_training_swarm")
    program = bench("training_table").course_of(0).program
    plan = module.Plan(workers=4, steps=16, quiet=10, kills=3)
    spec = parse_job(module.job_toml(program, plan), now=1_800_000_000.0)
    assert spec.workload == "train"
    assert (spec.train.shards, spec.train.steps, spec.train.min_share) == (4, 16, 1)
    assert spec.train.rounds == plan.rounds
    assert parse_program(program).outputs[0].name == "loss"
