"""One cheater in a swarm of honest nodes, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from attacks.tiny import ROWS, STEPS, TorchExecutor, dataset, programs
from sim.swarm import SETTLE_IN_S, SimNode, Swarm, simulate

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.node.compute.executor import Executor, TrainRequest
from meshd.node.submitted import SubmittedJob
from meshd.p2p.messages import Commitment
from meshd.p2p.network import Network

BATCH, SHARDS, ROUNDS, SPAN = 16, 4, 5, 4
WORKERS = ("wanda", "will", "walt", "wendy")
VALIDATORS = ("victor", "vera", "vince", "viola", "vito")
CHEATER = "mallory"


@dataclass(frozen=True)
class Part:
    """What one cheater is made of: its executor, what stands before its network, its role."""

    role: str = "worker"
    executor: Callable[[Swarm, TorchExecutor], Executor] | None = None
    wrap: Callable[[Swarm, SimNode, Network], Network] | None = None
    factory: Any = None
    workload: str = "train"
    terms: dict[str, Any] = field(default_factory=dict)
    accomplices: tuple[str, ...] = ()
    """Validators that do the same."""
    shard_s: float = 1.0
    """Seconds of a shard of training."""
    with_worker: Part | None = None
    """A cheating worker that the cheater is to be tried with."""


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    state: str
    """Of the job."""
    shards: int
    """What the cheater delivered; until it was caught, if it was."""
    caught: str
    """How it was found; empty: it was not."""
    gated: int
    """How many of its contributions the gate kept out."""
    entered: int
    """How many entered a round."""
    refused: bool
    """Whether nothing that it delivered was ever logged."""
    paid_shards: int
    paid_audits: int
    received: int
    earned: int
    """What an honest worker was paid at most."""
    log: JobState | None


def play(part: Part, seed: int = 0) -> Result:
    """Play one job with the cheater in it to its end."""

    async def scenario(swarm: Swarm) -> Result:
        await _cast(swarm, part)
        rita = swarm.nodes["rita"]
        await trio.sleep(SETTLE_IN_S)
        job = await _submit(swarm, rita, part)
        await swarm.wait_over(rita, job.id, limit_s=900)
        with trio.move_on_after(300):
            while swarm.ledger.escrow(job.id).held:
                await trio.sleep(5)
        assert swarm.ledger.imbalances() == []
        assert swarm.network.handler_errors == []
        return _result(swarm, job)

    return simulate(scenario, seed=seed)


async def _cast(swarm: Swarm, part: Part) -> None:
    async def add(name: str, *roles: str) -> None:
        given = part
        honest = TorchExecutor(part.shard_s)
        cheats = name == CHEATER or name in part.accomplices
        if name == "worse" and part.with_worker is not None:
            given, cheats = part.with_worker, True
        special: dict[str, Any] = {"executor": honest}
        if cheats and given.executor is not None:
            special["executor"] = given.executor(swarm, honest)
        if cheats and given.wrap is not None:
            wrap = given.wrap
            special["wrap"] = lambda node, net: wrap(swarm, node, net)
        if cheats and given.factory is not None:
            special["factory"] = given.factory
        await swarm.add(name, *roles, **special)

    orchestrator = CHEATER if part.role == "orchestrator" else "oscar"
    validators = list(VALIDATORS[: 5 if part.accomplices else 3])
    if part.role == "validator":
        validators[0] = CHEATER
    await add(orchestrator, "orchestrator", "aggregator")
    for name in validators:
        await add(name, "validator")
    if part.role == "worker":
        await add(CHEATER, "worker")  # the first to be given a shard
    for name in WORKERS[: 3 if part.role == "worker" else 4]:
        await add(name, "worker")
    if part.with_worker is not None:
        await add("worse", "worker")
    await add("rita")


async def _submit(swarm: Swarm, rita: SimNode, part: Part) -> SubmittedJob:
    training, inference = programs()
    terms: dict[str, Any] = {
        "span_shards": 4,
        "probation_span_shards": 1,
        "work_s": 240,
        "settle_s": 100,
        **part.terms,
    }
    if part.workload == "train":
        given = {"rounds": ROUNDS, "shards": SHARDS, "rows": ROWS, **terms}
        settings = {"warmup": 2, "outer_warmup": 1}
        return await swarm.submit_training(
            rita, steps=STEPS, batch=BATCH, program=training, settings=settings,
            dataset=dataset(labels=True), **given,
        )  # fmt: skip
    rows = ROWS
    given = {"rows": rows, "rows_per_shard": 8, "probation_rows": 8, "audit_rows": 8, **terms}
    return await swarm.submit(
        rita, program=inference, dataset=dataset(labels=False, rows=rows), **given
    )


def others_of(swarm: Swarm, job: TrainRequest) -> list[bytes]:
    """Return what others contributed to the round of *job*; contributions are public."""
    own = swarm.nodes[CHEATER].address
    held = []
    for worker, name in swarm.wiretap.contributions(job.job_id, job.round):
        blobs = swarm.by_address(worker).blobs
        if worker != own and name in blobs:
            held.append(blobs.read(name))
    return held


def commitments_of_others(swarm: Swarm) -> list[Commitment]:
    """Return every commitment that others gossiped so far."""
    own = swarm.nodes[CHEATER].address
    return [message for worker, message in swarm.wiretap.commitments() if worker != own]


def _result(swarm: Swarm, job: SubmittedJob) -> Result:
    over = swarm.job(swarm.nodes["rita"], job.id)
    assert over is not None
    state = over.view.state if over.view is not None else None
    address = swarm.nodes[CHEATER].address
    claimed = swarm.ledger.state().claimed
    received = claimed.get((job.id, address), 0)
    earned = max(
        (claimed.get((job.id, swarm.nodes[n].address), 0) for n in WORKERS if n in swarm.nodes),
        default=0,
    )
    if state is None:
        return Result(over.state.value, 0, "", 0, 0, True, 0, 0, received, earned, None)
    record = state.workers.get(address)
    works = record.works if record is not None else []
    own = {work.hash for work in works}
    closes = [close.message for close in state.rounds.closes]
    gated = [close.commitments[at] for close in closes for at in close.gated]
    entered = [name for close in closes for name in close.commitments]
    reasons = [
        s.reason
        for s in state.subjects.values()
        if s.worker == address and s.status is Status.REJECTED
    ]
    receipts = [r for r in state.book.receipts if r.signer == address]
    return Result(
        state=over.state.value,
        shards=len(works),
        caught=reasons[0] if reasons else "",
        gated=sum(name in own for name in gated),
        entered=sum(name in own for name in entered) - sum(name in own for name in gated),
        refused=not works,
        paid_shards=sum(r.receipt_kind == "work" for r in receipts),
        paid_audits=sum(r.receipt_kind == "audit" for r in receipts),
        received=received,
        earned=earned,
        log=state,
    )
