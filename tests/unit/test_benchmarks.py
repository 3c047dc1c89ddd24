"""What the benchmarks make of what they saw: figures from logs, profiles, tables, job files."""

import importlib
import json
import math
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from meshd.config.job import parse_job
from meshd.node.workloads.program import parse_program
from meshd.p2p.messages import AuditKind, AuditResult

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of scripts/benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    return importlib.import_module


def story(name: str, at: float, *, second: bool = False, rows: int = 8) -> list[dict[str, Any]]:
    """What a timed orchestrator notes of one shard that goes well, assigned at *at*."""
    kind = AuditKind.SECOND if second else AuditKind.FIRST
    audited = {"audit": kind, "of": f"c{name}"}
    return [
        {"kind": "assignment", "name": name, "shard": 0, "worker": "w", "units": 100}
        | {"came": at - 0.5, "logged": at},
        {"kind": "lease-accept", "name": f"l{name}", "came": at + 0.1, "logged": at + 0.1},
        {"kind": "commitment", "name": f"c{name}", "of": name, "came": at + 0.25},
        {"kind": "challenge", "name": f"h{name}", "rows": rows, "came": at + 6} | audited,
        {"kind": "verdict-commit", "name": f"v{name}", "of": f"h{name}", "came": at + 7},
        {"kind": "attestation", "name": f"a{name}", "units": 10, "result": AuditResult.ACCEPTED}
        | {"came": at + 9}
        | audited,
        {"kind": "receipts", "paid": [["work", f"c{name}"], ["audit", "x"]], "came": at + 20},
    ]


def lines(*stories: Iterable[dict[str, Any]]) -> list[str]:
    return [json.dumps(event) + "\n" for events in stories for event in events]


def test_a_shards_times_run_from_its_assignment_being_on_disk(bench: Any) -> None:
    timings = bench("_timings").read_timings(lines(story("1", 100.0), story("2", 101.0)))
    assert timings.dispatch_s() == [0.25, 0.25]
    assert timings.attested_s() == [8.75, 8.75]
    assert timings.receipt_s() == [20.0, 20.0]
    assert (timings.audit_s(), timings.recompute_s(), timings.open_s()) == ([3, 3], [1, 1], [2, 2])
    assert (timings.audits, timings.receipts, timings.span_s()) == (2, 4, 10.0)


def test_a_shard_that_nobody_answered_for_has_no_times(bench: Any) -> None:
    timings = bench("_timings").read_timings(lines(story("1", 100.0)[:1]))
    assert timings.dispatch_s() == timings.attested_s() == timings.receipt_s() == []


def test_a_line_that_is_still_being_written_is_left_for_later(bench: Any) -> None:
    noted = lines(story("1", 100.0))
    timings = bench("_timings").read_timings([*noted[:-1], noted[-1][:20]])
    assert timings.receipts == 0
    assert len(timings.dispatch_s()) == 1


def test_a_second_audit_counts_as_work_and_not_as_the_time_to_be_attested(bench: Any) -> None:
    again = [e for e in story("1", 103.0, second=True) if e["kind"] in ("challenge", "attestation")]
    timings = bench("_timings").read_timings(lines(story("1", 100.0)[:-1], again))
    assert timings.attested_s() == [8.75]
    assert timings.overhead(probation=True) == 20 / 100


def test_a_receipt_that_is_entered_again_in_a_new_term_is_one(bench: Any) -> None:
    events = story("1", 100.0)
    timings = bench("_timings").read_timings(lines(events, [events[-1] | {"came": 150.0}]))
    assert timings.receipt_s() == [20.0]


def test_overhead_is_told_apart_by_how_many_rows_were_drawn(bench: Any) -> None:
    timings = bench("_timings").read_timings(
        lines(story("1", 100.0, rows=8), story("2", 101.0, rows=2), story("3", 102.0, rows=2))
    )
    assert timings.overhead(probation=True) == pytest.approx(0.1)
    assert timings.overhead(probation=False) == pytest.approx(0.1)
    only = bench("_timings").read_timings(lines(story("1", 100.0)))
    assert math.isnan(only.overhead(probation=False))


def test_the_steady_rate_leaves_out_the_warm_up_and_the_end(bench: Any) -> None:
    slow = [float(at) for at in range(50)]
    fast = [50 + at / 10 for at in range(50)]
    rate = bench("_timings").steady_rate
    assert rate([*slow, *fast]) == pytest.approx(10.0)
    assert rate([*slow, *fast[:-5], 500, 500, 500, 500, 500]) == pytest.approx(10.0)


def test_a_rate_of_lumps_counts_each_from_the_lump_before(bench: Any) -> None:
    times = [float(at) for at in range(0, 40, 4) for _ in range(16)]
    assert bench("_timings").steady_rate(times) == pytest.approx(4.0)


@pytest.mark.parametrize("times", [[], [1.0], [2.0, 2.0, 2.0]])
def test_a_rate_of_too_little_is_zero(bench: Any, times: list[float]) -> None:
    assert bench("_timings").steady_rate(times) == 0.0


def test_quantiles_of_nothing_are_no_number(bench: Any) -> None:
    module = bench("_timings")
    assert math.isnan(module.median([]))
    assert math.isnan(module.quantile([], 0.9))
    assert module.quantile([5, 1, 3], 0.9) == 5


def test_the_largest_costs_name_our_functions_with_their_dearest_line(bench: Any) -> None:
    folded = (
        "MainThread;run (trio/run.py:1);cut (ledger/settlement.py:110);sum (x.py:3) 6\n"
        "MainThread;run (trio/run.py:1);cut (ledger/settlement.py:108) 1\n"
        "MainThread;run (trio/run.py:1);append (node/log/author.py:70);"
        "cut (ledger/settlement.py:110) 2\n"
        "MainThread;run (trio/run.py:1) 1\n"
    )
    cut, append = bench("_profile").largest_costs(folded)
    assert (cut.function, cut.place, cut.share) == ("cut", "ledger/settlement.py:110", 0.9)
    assert (append.place, append.share, append.own_share) == ("node/log/author.py:70", 0.2, 0.0)


def test_a_table_aligns_its_columns_and_shows_what_is_missing(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("_table").print_table(
        ["", "meshd", "ray"], [["p50_ms", 49.04, 1.5], ["shards", 20000.4, None]]
    )
    assert capsys.readouterr().out.splitlines() == [
        "        meshd  ray",
        "p50_ms     49  1.5",
        "shards  20000    -",
    ]


def test_the_one_operator_job_is_one_that_would_be_taken(bench: Any) -> None:
    module = bench("dispatch")
    spec = parse_job(module.job_toml(2000), now=1_800_000_000.0)
    assert (spec.rows_per_shard, spec.audit_rows, spec.time.lag) == (1, 1, 3)
    (node,) = parse_program(module.one_operator_program()).nodes
    assert node.operator == "neg"


def test_a_prepared_environment_is_not_prepared_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = bench("_peers")
    monkeypatch.setattr(peers, "VENV", tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / "installed").write_text("\n".join(peers.PACKAGES))
    monkeypatch.setattr(peers, "_run", lambda command: pytest.fail(f"ran {command}"))
    assert peers.prepare() == python


def test_a_missing_package_is_installed_alone_and_under_the_constraints(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = bench("_peers")
    monkeypatch.setattr(peers, "VENV", tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / "installed").write_text("ray==2.60.0\n")
    commands: list[list[str]] = []
    monkeypatch.setattr(peers, "_run", commands.append)
    peers.prepare(("ray==2.60.0", "py-spy==0.4.3"))
    (command,) = commands
    assert command[-3:] == ["-c", str(ROOT / "constraints.txt"), "py-spy==0.4.3"]
    assert "installing py-spy==0.4.3" in capsys.readouterr().err
    assert (tmp_path / "installed").read_text().split() == ["py-spy==0.4.3", "ray==2.60.0"]


@pytest.mark.parametrize("name", ["nothing", "_timed", "../checks/sizes"])
def test_what_is_no_benchmark_is_refused_with_the_list_of_those_there_are(name: str) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "bench", name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    listed = done.stderr.split("there are:")[1].split()
    assert {"audit", "dispatch", "embed", "idle"} <= set(listed)
    assert not any(each.startswith("_") for each in listed)
