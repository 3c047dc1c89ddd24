"""How fast shards that cost nothing go through: one operator on one row, signed all the way.

`p50_ms` runs from an assignment sent to its signed commitment received, `shards_per_s` counts
receipts of audited shards after a warm-up, `receipt_p50_s` from the assignment to the receipt.
Yardsticks in the same run: the same work through Ray and through Dask, which check nothing;
`p50_ms` is there a task sent to its result received, one at a time.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _peers import PROFILER, VENV, prepare, yardstick
from _profile import largest_costs, print_costs
from _swarm import BenchSwarm, cap_for, open_swarm, run
from _table import options, print_table, say, write_json
from _timings import Timings, median, quantile, steady_rate

from meshd.node.compute.toy import affine_dataset
from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program
from meshd.node.workloads.tensors import Column

GOALS = {"p50_ms": 50.0, "shards_per_s": 100.0}
PROFILED = ("orchestrator", "worker-1", "validator-1")
WIDTH = 4
PRICE = "1000"
TERMS = {
    "rows_per_shard": 1,
    "audit.rows": 1,
    "audit.second_share": "0.1",
    "audit.budget": "1",
    "audit.retention": 8,
    "audit.silence": 10,
    "pay.max_unsettled": 4096,
    "time.lag": 3,
    "time.window": "5s",
}


def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--shards", type=int, help="2000; 200 with --small")
    parser.add_argument("--seconds", type=float, help="at most for the job: 120; 60 with --small")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--validators", type=int, default=3)
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="write folded stacks of one process a role there",
    )
    parser.add_argument("--no-yardsticks", action="store_true", help="leave Ray and Dask out")
    chosen = parser.parse_args()
    shards = chosen.shards or (200 if chosen.small else 2000)
    if chosen.profile:
        prepare(PROFILER)
    yardsticks = {} if chosen.no_yardsticks else _yardsticks(chosen.workers, shards)
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
        timings, cpu_s = run(_measure, Path(folder), shards, chosen)
    figures: dict[str, Any] = {"meshd": figures_of(timings, cpu_s), **yardsticks}
    _print(figures, shards, chosen.workers, chosen.validators)
    if chosen.profile:
        for name in PROFILED:
            print_costs(name, largest_costs(_stacks(chosen.profile, name).read_text()))
    write_json(chosen.json, figures | {"shards": shards, "workers": chosen.workers, "terms": TERMS})


def figures_of(timings: Timings, cpu_s: dict[str, float]) -> dict[str, Any]:
    """Return what a run came to; *cpu_s* are the processor seconds that each role used in it."""
    committed = max(len(timings.dispatch_s()), 1)
    per_shard = {f"cpu_ms_{role}": 1000 * used / committed for role, used in cpu_s.items()}
    return {
        "p50_ms": 1000 * median(timings.dispatch_s()),
        "p90_ms": 1000 * quantile(timings.dispatch_s(), 0.9),
        "shards_per_s": steady_rate(timings.paid_at()),
        "commitments_per_s": steady_rate(timings.committed_at()),
        "receipt_p50_s": median(timings.receipt_s()),
        "receipts": timings.receipts,
        "audits": timings.audits,
        "commitments": committed,
        "cpu_ms_a_shard": sum(per_shard.values()),
        **per_shard,
    }


def _print(figures: dict[str, Any], shards: int, workers: int, validators: int) -> None:
    print(f"{shards} shards of one row, {workers} workers, {validators} validators; ", end="")
    print("terms " + ", ".join(f"{name} = {value}" for name, value in TERMS.items()))
    names = list(figures["meshd"])
    systems = list(figures)
    rows = [
        [name, *(figures[system].get(name) for system in systems), GOALS.get(name)]
        for name in names
    ]
    print_table(["", *systems, "goal"], rows)


def _yardsticks(workers: int, tasks: int) -> dict[str, Any]:
    found = {}
    for name in ("ray", "dask"):
        say(f"{name}: {tasks} tasks")
        found[name] = yardstick(f"dispatch-{name}", workers=workers, tasks=tasks)
    return found


async def _measure(
    folder: Path, shards: int, chosen: argparse.Namespace
) -> tuple[Timings, dict[str, float]]:
    limit_s = chosen.seconds or (60.0 if chosen.small else 120.0)
    async with open_swarm(folder, workers=chosen.workers, validators=chosen.validators) as bench:
        (folder / "negate.program").write_bytes(one_operator_program())
        write_dataset(affine_dataset(shards, WIDTH), folder / "numbers.data")
        before = bench.cpu_s()
        with _profiled(bench, chosen.profile):
            await bench.run_job(job_toml(shards), limit_s=limit_s)
        used = {role: seconds - before.get(role, 0.0) for role, seconds in bench.cpu_s().items()}
        return bench.timings(), used


def one_operator_program() -> bytes:
    """Return the program y = -x on f32[4]."""
    column = Column("x", "f32", (WIDTH,))
    output = Output("y", "f32", (None, WIDTH), 1)
    graph = Graph((column,), (output,), (Node("neg", (Ref(0),)),), ())
    return encode_program(graph, [])


def job_toml(shards: int) -> str:
    """Return the job's description."""
    cap = cap_for(WIDTH * shards, 1000 * 10**18)
    named = {"program": "negate.program", "data": "numbers.data", "deadline": "20m"}
    keys: dict[str, object] = {**named, "price": PRICE, "cap": cap, **TERMS}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items())


@contextmanager
def _profiled(bench: BenchSwarm, out: Path | None) -> Iterator[None]:
    """Record where one process of each role spends its time, if asked to."""
    if out is None:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    profilers = []
    for name in PROFILED:
        pid = bench.swarm.participants[name].child.pid
        command = [str(VENV / "bin" / "py-spy"), "record", "--pid", str(pid), "--threads"]
        flags = ["--format", "raw", "--output", str(_stacks(out, name)), "--rate", "50"]
        quiet = subprocess.DEVNULL
        profilers.append(
            subprocess.Popen([*command, *flags, "-d", "unlimited"], stdout=quiet, stderr=quiet)
        )
    try:
        yield
    finally:
        for profiler in profilers:
            profiler.send_signal(signal.SIGINT)  # it writes what it has
            profiler.wait(30)


def _stacks(folder: Path, name: str) -> Path:
    return folder / f"{name}.folded"


if __name__ == "__main__":
    main()
