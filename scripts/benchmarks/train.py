"""What training by shards is worth, and what its rounds cost.

Part `loss`, in one process: loss and bytes beside data parallel training and beside one worker
alone, and the effective speed-up. Part `swarm`, on a swarm of processes: what a round takes
beyond the slowest worker's compute and transfer, and how soon a round is complete after a worker
with a lease was killed. Part `hivemind`: the same of Hivemind 1.1.12's epochs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _hivemind import MOMENTS, WHOLE, HivemindMissing, measure, prepare
from _loss import INNER, measure_loss
from _swarm import run
from _table import options, print_table, say, write_json
from _training_swarm import Plan, figures_of, measure_swarm
from training_table import WORKERS

GOALS = {"speed_up": 2.3, "fewer_bytes": 40.0, "overhead_s": 0.5, "death_beyond_s": 2.0}
PARTS = ("loss", "swarm", "hivemind")
STEPS, SEEDS = 500, 3
COMPUTE_S = 3.0
"""Of a Hivemind peer in an epoch."""


def main() -> None:
    """Measure, print the tables, write JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--only", choices=PARTS, metavar="PART", help=" or ".join(PARTS))
    parser.add_argument("--steps", type=int, help=f"of a worker: {STEPS}; 140 with --small")
    parser.add_argument("--seeds", type=int, help=f"how many: {SEEDS}; 1 with --small")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--inner", type=int, default=16, help="steps of a swarm's shard: 16")
    parser.add_argument("--kills", type=int, help="deaths of each kind: 3; 1 with --small")
    parser.add_argument("--seconds", type=float, default=420.0, help="at most for the job: 420")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds for Hivemind to go on: 120"
    )
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    for part in PARTS:
        if chosen.only in (None, part):
            figures[part] = MEASURES[part](chosen)
            PRINTS[part](figures[part])
    write_json(chosen.json, figures)


# ---- loss ------------------------------------------------------------------------------------


def _loss(chosen: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    seeds = range(chosen.seeds or (1 if chosen.small else SEEDS))
    return measure_loss(seeds, chosen.steps or (140 if chosen.small else STEPS))


def _print_loss(figures: dict[str, Any]) -> None:
    each, median = figures["each"], figures["median"]
    names = [name for name in median if name != "seed"]
    rows = [[n, *(one[n] for one in each), median[n], GOALS.get(n)] for n in names]
    heads = [f"seed {seed}" for seed in figures["seeds"]]
    print(f"{WORKERS} workers, H = {INNER}, nats a symbol on text that no shard reads")
    print_table(["", *heads, "median", "goal"], rows)


# ---- swarm -----------------------------------------------------------------------------------


def _swarm(chosen: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(
        workers=chosen.workers,
        steps=chosen.inner,
        quiet=4 if chosen.small else 10,
        kills=_kills(chosen),
        limit_s=chosen.seconds,
    )
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
        return figures_of(run(measure_swarm, Path(folder), plan))


def _kills(chosen: argparse.Namespace) -> int:
    return int(chosen.kills or (1 if chosen.small else 3))


def _print_swarm(figures: dict[str, Any]) -> None:
    names = [name for name, value in figures.items() if isinstance(value, float)]
    print(f"a swarm of processes: {figures['rounds']} rounds, {len(figures['deaths'])} deaths")
    print_table(["", "meshd", "goal"], [[n, figures[n], GOALS.get(n)] for n in names])
    parts = figures.get("parts_s", {})
    print("a round by parts: " + ", ".join(f"{n} {s:.3f}" for n, s in parts.items()) + " s")


# ---- Hivemind --------------------------------------------------------------------------------


def _hivemind(chosen: argparse.Namespace) -> dict[str, Any]:
    try:
        prepare()
    except HivemindMissing as why:
        return {"missing": str(why)}
    return {
        "tuned": _deaths(chosen, tuned=True, times=_kills(chosen)),
        "default": _deaths(chosen, tuned=False, times=1),
        "patience_s": chosen.patience,
    }


def _deaths(chosen: argparse.Namespace, *, tuned: bool, times: int) -> dict[str, Any]:
    """Return the medians over some deaths of each kind; None: it did not go on in time."""
    found: dict[str, Any] = {}
    overheads: list[float | None] = []
    for (what, whole), moment in itertools.product(WHOLE.items(), MOMENTS):
        say(f"hivemind, {'tuned' if tuned else 'default'}: a {what} dies while {moment}")
        each = [_death(chosen, tuned, moment, whole) for _ in range(times)]
        run = [one for one in each if one is not None]
        overheads += [one["overhead_s"] for one in run]
        found[f"{what}_{moment}_s"] = median_of([one["death_completed_s"] for one in run])
        found[f"{what}_{moment}_each_s"] = [one["death_completed_s"] for one in run]
    return {"overhead_s": median_of(overheads), **found}


def _death(
    chosen: argparse.Namespace, tuned: bool, moment: str, whole: bool
) -> dict[str, float | None] | None:
    """Return what came of one death; None if the peers did not even begin, which is said."""
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as folder:
        try:
            return measure(
                Path(folder),
                peers=chosen.workers,
                compute_s=COMPUTE_S,
                tuned=tuned,
                moment=moment,
                whole=whole,
                limit_s=chosen.patience,
            )
        except HivemindMissing as why:
            say(f"not measured: {why}")
            return None


def median_of(values: list[float | None]) -> float | None:
    """Return the median of times of which None are longer than any other; None if it is one.

    NaN of nothing.
    """
    if not values:
        return float("nan")
    known = [float("inf") if value is None else value for value in values]
    median = statistics.median(known)
    return None if median == float("inf") else median


def _print_hivemind(figures: dict[str, Any]) -> None:
    if "missing" in figures:
        print(f"Hivemind is not here: {figures['missing']}")
        return
    over = f"over {figures['patience_s']:g}"
    deaths = [f"{what}_{moment}_s" for what in WHOLE for moment in MOMENTS]
    rows = [
        [name, *(over if figures[k][name] is None else figures[k][name] for k in KINDS)]
        for name in ["overhead_s", *deaths]
    ]
    print(f"Hivemind, epochs of {COMPUTE_S:g} s of sleep instead of computation")
    print_table(["", *KINDS], rows)


KINDS = ("tuned", "default")
MEASURES = {"loss": _loss, "swarm": _swarm, "hivemind": _hivemind}
PRINTS = {"loss": _print_loss, "swarm": _print_swarm, "hivemind": _print_hivemind}


if __name__ == "__main__":
    main()
