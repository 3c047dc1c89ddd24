"""What checking costs, how long it takes, and what cheaters get through.

Three parts. A swarm on this machine computes shards of 128 rows under the default terms: from
its log come an audit's cost and the time from a commitment to its attestation. In this process:
what a worker pays to commit to a shard's rows, beside computing them in plain torch. And a
simulation of 1,000 workers, 30 % of them strategic cheaters, on the real rules.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from _peers import yardstick
from _population import SCENARIOS, simulate
from _swarm import cap_for, open_swarm, run
from _table import options, print_table, say, write_json
from _timings import Timings, median, quantile

from meshd.node.compute.toy import affine_dataset, affine_program
from meshd.node.demo.sentences import collect_sentences
from meshd.node.verification.outputs import ResultPlace, open_output, output_blob
from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.rows import RowSchema, pack
from meshd.node.workloads.tensors import Column
from meshd.p2p.identity import Address
from meshd.p2p.messages import Commitment

GOALS = {"attested_p50_s": 15.0, "tracing": 0.01, "overhead": 0.05, "bad_work": 1e-3}
ROWS = 128
DIMENSIONS = 384
WIDTH = 4
STEPS = 16
PRICE_MCC = 1000
SHOWN = (
    "workers",
    "cheaters",
    "caught",
    "false_rejects",
    "shards_to_catch",
    "bad_work",
    "bad_shards",
    "overhead",
    "overhead_probation",
    "overhead_steady",
    "thrown_away",
    "paid_to_cheaters",
    "paid_for_bad",
    "cheaters_pay",
)


def main() -> None:
    """Measure, print the tables, write JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, help="of the simulation; a random one without")
    parser.add_argument("--only", choices=("swarm", "tracing", "simulation"))
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    if chosen.only in (None, "simulation"):
        seed = secrets.randbelow(10**6) if chosen.seed is None else chosen.seed
        figures["simulation"] = _simulation(seed, chosen.small)
    if chosen.only in (None, "tracing"):
        figures["tracing"] = _tracing()
    if chosen.only in (None, "swarm"):
        with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
            figures["swarm"] = run(_measure, Path(folder), chosen)
        _print_swarm(figures["swarm"])
    write_json(chosen.json, figures)


# ---- a swarm's log -------------------------------------------------------------------------


async def _measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    shards = 12 if chosen.small else 48
    limit_s = 60.0 if chosen.small else 90.0
    async with open_swarm(folder, workers=2, validators=3) as bench:
        (folder / "affine.program").write_bytes(affine_program(WIDTH, STEPS))
        write_dataset(affine_dataset(shards * ROWS, WIDTH), folder / "numbers.data")
        units = 2 * WIDTH * STEPS * shards * ROWS
        toml = (
            'program = "affine.program"\ndata = "numbers.data"\ndeadline = "20m"\n'
            f'price = "{PRICE_MCC}"\ncap = "{cap_for(units, PRICE_MCC * 10**18)}"\n'
            f'rows_per_shard = {ROWS}\n[time]\nwindow = "5s"\n'
        )
        await bench.run_job(toml, limit_s=limit_s)
        return figures_of(bench.timings())


def figures_of(timings: Timings) -> dict[str, Any]:
    """Return what a run's log says of its audits; shares are of compute units."""
    attested = timings.attested_s()
    return {
        "audits": timings.audits,
        "attested_p50_s": median(attested),
        "attested_p90_s": quantile(attested, 0.9),
        "audit_p50_s": median(timings.audit_s()),
        "recompute_p50_s": median(timings.recompute_s()),
        "open_p50_s": median(timings.open_s()),
        "overhead_probation": timings.overhead(probation=True),
        "overhead_steady": timings.overhead(probation=False),
    }


def _print_swarm(figures: dict[str, Any]) -> None:
    print(f"\na swarm's log: shards of {ROWS} rows, default terms, blocks of 1 s")
    rows = [[name, value, GOALS.get(name)] for name, value in figures.items()]
    print_table(["", "measured", "goal"], rows)


# ---- committing to rows --------------------------------------------------------------------


def _tracing() -> dict[str, float]:
    """Time a shard's root, and the check of a whole output, beside computing the shard."""
    schema = RowSchema((Column("embedding", "f32", (DIMENSIONS,)),))
    # Numbers below one: the last byte of a little-endian float holds its sign and exponent.
    row = bytes(3) + b"\x3d"
    rows = [os.urandom(2) + row[2:] + row * (DIMENSIONS - 1) for _ in range(ROWS)]
    packed = pack(schema, rows)
    seed, worker = os.urandom(32), Address(os.urandom(20))
    place = ResultPlace(os.urandom(32), 0, worker)
    commitment = Commitment(
        job_id=place.job_id,
        assignment_hash=bytes(32),
        hash_alg=1,
        trace_root=bytes(32),
        n=ROWS,
        output_root=place.root(seed, rows),
        output_bytes=len(packed),
        numeric_class=bytes(32),
    )
    blob = output_blob(seed, packed)
    root_s = _timed(lambda: place.root(seed, rows))
    check_s = _timed(lambda: open_output(place, commitment, blob, schema))
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
        sentences = Path(folder) / "sentences.txt"
        sentences.write_text("".join(f"{text}\n" for text in collect_sentences(ROWS, 0)))
        say(f"{ROWS} sentences through MiniLM in plain torch, one process")
        plain = yardstick(
            "embed-torch", python=Path(sys.executable), workers=1, rows=ROWS, sentences=sentences
        )
    figures = {
        "root_ms": 1000 * root_s,
        "check_ms": 1000 * check_s,
        "compute_ms": 1000 * plain["seconds"],
        "tracing": root_s / plain["seconds"],
    }
    print(f"\ncommitting to {ROWS} embeddings, beside computing them in plain torch")
    print_table(["", "measured", "goal"], [[n, v, GOALS.get(n)] for n, v in figures.items()])
    return figures


def _timed(work: Any, times: int = 9) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


# ---- the simulation ------------------------------------------------------------------------


def _simulation(seed: int, small: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(2) as pool:
        for scenario in SCENARIOS:
            if small:
                scenario = replace(scenario, workers=100, jobs=2)
            say(f"simulating {scenario.name}")
            found[scenario.name] = simulate(scenario, seed, run_all=pool.map).figures()
    seconds = time.monotonic() - began
    print(f"\nsimulation: 30 % strategic cheaters, seed {seed}, {seconds:.0f} s")
    rows = [[name, *(f[name] for f in found.values()), GOALS.get(name)] for name in SHOWN]
    print_table(["", *found, "goal"], rows)
    return {"seed": seed, "seconds": seconds} | found


if __name__ == "__main__":
    main()
