"""MiniLM over 4,096 sentences: two workers of a swarm, every shard audited.

Yardsticks in the same run, on the same padded sentences: a plain torch loop in two processes,
and two Ray actors that hold the model. Both are warm when their time begins and check nothing.
`rows_per_s` runs from the first assignment to the last shard's acceptance, `steady_rows_per_s`
counts the commitments of the second half, when leases no longer grow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio
from _peers import prepare, yardstick
from _swarm import BenchSwarm, cap_for, open_swarm, run
from _table import options, print_table, say, write_json
from _timings import Timings, median, steady_rate

from meshd.node.demo.model import DATA_FILE, PROGRAM_FILE, TEXT_FILE
from meshd.node.demo.processes import open_processes
from meshd.node.demo.sentences import collect_sentences
from meshd.node.demo.swarm import last_json

GOAL = 0.95
"""Of Ray's rows a second."""
ROWS_PER_SHARD = 128
PRICE = 10**15
SEED = 0
MODEL = "meshd.node.demo.model"


def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, help="4096; 1024 with --small")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="at most for the job: 150")
    parser.add_argument("--no-yardsticks", action="store_true", help="leave torch and Ray out")
    chosen = parser.parse_args()
    rows = chosen.rows or (1024 if chosen.small else 4096)
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
        figures: dict[str, Any] = {}
        if not chosen.no_yardsticks:
            figures |= _yardsticks(Path(folder), 256 if chosen.small else 1024, chosen.workers)
        timings = run(_measure, Path(folder), rows, chosen)
    figures = {"meshd": figures_of(timings, ROWS_PER_SHARD), **figures}
    if "ray" in figures:
        fastest = figures["ray"]["rows_per_s"]
        figures["of_ray"] = figures["meshd"]["rows_per_s"] / fastest
        figures["steady_of_ray"] = figures["meshd"]["steady_rows_per_s"] / fastest
    _print(figures, rows, chosen.workers)
    write_json(chosen.json, figures | {"rows": rows, "workers": chosen.workers})


def figures_of(timings: Timings, rows_per_shard: int) -> dict[str, Any]:
    """Return what a run came to."""
    accepted = sum(course.accepted for course in timings.courses)
    seconds = timings.span_s()
    return {
        "rows_per_s": accepted * rows_per_shard / seconds,
        "steady_rows_per_s": rows_per_shard * steady_rate(timings.committed_at()),
        "seconds": seconds,
        "shards": accepted,
        "audits": timings.audits,
        "shard_p50_s": median(timings.dispatch_s()),
        "attested_p50_s": median(timings.attested_s()),
    }


def _print(figures: dict[str, Any], rows: int, workers: int) -> None:
    print(f"{rows} rows in shards of {ROWS_PER_SHARD}, {workers} workers, 3 validators")
    systems = [name for name in ("meshd", "torch", "ray") if name in figures]
    names = list(figures["meshd"])
    print_table(["", *systems], [[n, *(figures[s].get(n) for s in systems)] for n in names])
    for name in ("of_ray", "steady_of_ray"):
        if name in figures:
            print(f"{name}: {figures[name]:.3f} (goal {GOAL})")


def _yardsticks(folder: Path, rows: int, workers: int) -> dict[str, Any]:
    prepare()
    sentences = folder / f"yardstick-{TEXT_FILE}"
    sentences.write_text("".join(f"{text}\n" for text in collect_sentences(rows, SEED)))
    same: dict[str, Any] = {"workers": workers, "rows": rows, "sentences": sentences}
    say(f"{rows} rows through plain torch in {workers} processes")
    plain = yardstick("embed-torch", python=Path(sys.executable), **same)
    say(f"{rows} rows through {workers} Ray actors")
    return {"torch": plain, "ray": yardstick("embed-ray", **same)}


async def _measure(folder: Path, rows: int, chosen: argparse.Namespace) -> Timings:
    made: dict[str, object] = {}
    async with open_processes(folder) as processes, trio.open_nursery() as nursery:
        arguments = ["--out", str(folder), "--sentences", str(rows), "--seed", str(SEED)]

        async def make() -> None:
            made.update(last_json(await processes.run("model", [MODEL, *arguments])))

        nursery.start_soon(make)
        async with open_swarm(folder, workers=chosen.workers, validators=3) as bench:
            while not made:
                processes.check()
                await trio.sleep(0.2)
            await _embed(bench, made, rows, chosen.seconds or 150.0)
            return bench.timings()


async def _embed(bench: BenchSwarm, made: dict[str, object], rows: int, limit_s: float) -> None:
    units = made["units_per_shard_of_128"]
    assert isinstance(units, int)
    cap = cap_for(units * -(-rows // ROWS_PER_SHARD), PRICE)
    toml = (
        f'program = "{PROGRAM_FILE}"\ndata = "{DATA_FILE}"\ndeadline = "20m"\n'
        f'price = "0.001"\ncap = "{cap}"\nrows_per_shard = {ROWS_PER_SHARD}\n'
        '[time]\nwindow = "5s"\n'
    )
    await bench.run_job(toml, limit_s=limit_s)


if __name__ == "__main__":
    main()
