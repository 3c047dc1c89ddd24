"""A training job on a swarm of processes: what its rounds cost, and what a worker's death does."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio
from _rounds import PARTS, Recovery, Round, Tail, read_rounds, recovery
from _swarm import BenchSwarm, cap_for, open_swarm
from _table import say
from training_table import LENGTH, course_of

from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.datasets import ColumnData, build_dataset
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plan import optimizer_units
from meshd.node.workloads.training.settings import TrainSettings

VALIDATORS = 3
BATCH = 8
ROWS = 16_384
PRICE = 10**15
LOOK_S = 0.02
BACK_S = 60.0
"""A worker that was started again has so long to be back before the next one dies."""
SPARE = 60
"""Rounds for each death; what is left of the job when the last one is over is not run."""
TIMED = "_timed_training"


@dataclass(frozen=True)
class Plan:
    """What is run."""

    workers: int = 4
    steps: int = 64
    """H, inner steps of a shard."""
    quiet: int = 10
    """Rounds that are measured before anybody dies; those before the first three are not."""
    kills: int = 3
    limit_s: float = 420.0

    @property
    def rounds(self) -> int:
        """Rounds of the job."""
        return 3 + self.quiet + SPARE * self.kills


@dataclass
class Watched:
    """What the swarm's daemons have noted so far."""

    bench: BenchSwarm
    tails: dict[str, Tail] = field(default_factory=dict)
    _read: dict[str, int] = field(default_factory=dict)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return what one daemon noted, in order."""
        path = self.bench.swarm.folder / f"{name}.timings"
        if path.exists():
            with path.open() as file:
                file.seek(self._read.get(name, 0))
                self.tails.setdefault(name, Tail()).feed(file.read())
                self._read[name] = file.tell()
        return self.tails[name].events if name in self.tails else []

    def all(self) -> list[dict[str, Any]]:
        """Return what orchestrator and workers noted."""
        names = ["orchestrator", *(p.name for p in self.bench.swarm.of_role("worker"))]
        return [event for name in names for event in self.events(name)]

    def closed(self) -> int:
        """Return how many rounds are closed."""
        return sum(event["kind"] == "closed" for event in self.events("orchestrator"))

    async def until_closed(self, rounds: int) -> None:
        """Wait until so many rounds are closed."""
        while self.closed() < rounds:
            self.bench.swarm.processes.check()
            await trio.sleep(LOOK_S)

    async def until_back(self, worker: str, since: float) -> None:
        """Wait until a worker has committed to a shard that it was given after *since*."""
        while True:
            events = self.events("orchestrator")
            own = {e["name"] for e in events if e.get("worker") == worker and e["at"] > since}
            if any(e["kind"] == "committed" and e["name"] in own for e in events):
                return
            await trio.sleep(10 * LOOK_S)

    async def until_computing(self, name: str) -> None:
        """Wait until a worker begins to compute a shard."""
        before = len(self.events(name))
        while True:
            fresh = self.events(name)[before:]
            if fresh and fresh[-1]["kind"] in ("computing", "state"):
                return
            await trio.sleep(LOOK_S)


@dataclass(frozen=True)
class Measured:
    """What a run came to."""

    rounds: list[Round]
    recoveries: list[Recovery]


async def measure_swarm(folder: Path, plan: Plan) -> Measured:
    """Run a training job on a swarm of its own; kill workers one after another."""
    toml = await trio.to_thread.run_sync(make_job, folder, plan)
    died: list[tuple[str, float]] = []
    roles = {"orchestrator": TIMED, "worker": TIMED}
    async with open_swarm(folder, workers=plan.workers, validators=VALIDATORS, **roles) as bench:
        watched = Watched(bench)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run_job, bench, toml, plan.limit_s)
            with trio.move_on_after(plan.limit_s):
                await watched.until_closed(3 + plan.quiet)
                for at in range(plan.kills):
                    died.append(await _kill(watched, f"worker-{1 + at % plan.workers}"))
            nursery.cancel_scope.cancel()
        rounds = read_rounds(watched.all())
        found = [recovery(rounds, worker, at) for worker, at in died]
    quiet = [each for each in rounds if 3 <= each.number < 3 + plan.quiet]
    return Measured(quiet, [each for each in found if each is not None])


async def _run_job(bench: BenchSwarm, toml: str, limit_s: float) -> None:
    await bench.run_job(toml, limit_s=limit_s)


async def _kill(watched: Watched, name: str) -> tuple[str, float]:
    """Kill a worker that computes, start it again when the round is over, wait until it is back."""
    swarm = watched.bench.swarm
    participant = swarm.participants[name]
    await watched.until_computing(name)
    rounds = watched.closed()
    died = time.monotonic()
    swarm.processes.kill(participant.child)
    say(f"{name} killed in round {rounds}")
    await watched.until_closed(rounds + 1)
    say(f"round {rounds} closed {time.monotonic() - died:.1f} s later")
    worker = participant.address.removeprefix("0x").lower()
    await swarm.restart(name)
    began = time.monotonic()
    with trio.move_on_after(BACK_S):
        await watched.until_back(worker, began)
        say(f"{name} is back {time.monotonic() - began:.1f} s after it was ready again")
        await watched.until_closed(watched.closed() + 2)
    return worker, died


def make_job(folder: Path, plan: Plan) -> str:
    """Write program and data into *folder* and return the job's description."""
    course = course_of(0)
    (folder / "decoder.program").write_bytes(course.program)
    rows = b"".join(
        course.text[at * LENGTH : at * LENGTH + LENGTH + 1] for at in range(min(ROWS, course.rows))
    )
    count = len(rows) // (LENGTH + 1)
    column = ColumnData("u8", (count, LENGTH + 1), rows)
    write_dataset(build_dataset({"text": column}, 4096), folder / "text.data")
    return job_toml(course.program, plan)


def job_toml(program: bytes, plan: Plan) -> str:
    """Return the description of the job that trains *program*."""
    parsed = parse_program(program)
    settings = TrainSettings.fill(
        {"batch": BATCH, "steps": plan.steps, "total_steps": plan.rounds * plan.steps}
    )
    step = units(parsed, BATCH, training=True) + optimizer_units(trained_weights(parsed), settings)
    cap = cap_for(step * plan.steps * plan.workers * plan.rounds, PRICE)
    job = {
        "workload": "train",
        "program": "decoder.program",
        "data": "text.data",
        "price": "0.001",
        "cap": cap,
        "deadline": "30m",
    }
    train = {
        "rounds": plan.rounds,
        "shards": plan.workers,
        "steps": plan.steps,
        "batch": BATCH,
        "min_share": 1,
    }
    return (
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in job.items())
        + '\n[time]\nwindow = "5s"\n\n[train]\n'
        + "".join(f"{key} = {value}\n" for key, value in train.items())
    )


def figures_of(measured: Measured) -> dict[str, Any]:
    """Return medians over the measured rounds, and each death's course."""
    rounds = measured.rounds
    found: dict[str, Any] = {"rounds": len(rounds)}
    if rounds:
        parts = [each.parts() for each in rounds]
        found |= {
            "round_s": statistics.median(each.closed - each.began for each in rounds),
            "slowest_worker_s": statistics.median(each.slowest_s for each in rounds),
            "overhead_s": statistics.median(each.overhead_s for each in rounds),
            "overhead_worst_s": max(each.overhead_s for each in rounds),
            "parts_s": {part: statistics.median(each[part] for each in parts) for part in PARTS},
        }
    found["deaths"] = [asdict(each) | {"beyond_s": each.beyond_s} for each in measured.recoveries]
    for name in ("completed_s", "recompute_s", "beyond_s", "busy_s", "noticed_s"):
        found[f"death_{name}"] = _median([each[name] for each in found["deaths"]])
    return found


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
