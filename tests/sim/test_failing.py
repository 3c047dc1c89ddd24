"""Jobs that no machine can go on with: they end early, by name, and pay what passed."""

from __future__ import annotations

import re
from collections.abc import Collection

import trio
from sim import adversaries as bad
from sim.cast import finish, gather, log_of, received
from sim.swarm import Swarm, simulated

from meshd.ledger.audits import Status
from meshd.node.compute.executor import InferRequest, ShardFailed, TrainRequest, TrainResult
from meshd.node.compute.toy import ToyExecutor
from meshd.node.kinds.kind import AUDIT_SLOT
from meshd.node.workloads.datasets import parse_manifest
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.settings import TrainSettings
from meshd.p2p.messages import JobEndReason

STEPS = 4
WORK_S = 600
"""Long enough that no job here ends because its deadline is near."""


class Diverging(bad.Wrapped):
    """A machine like all others: in some shards of a round a number becomes NaN."""

    def __init__(self, round_: int, shards: Collection[int], speed: int = 1000) -> None:
        super().__init__(ToyExecutor(speed))
        self._round, self._shards = round_, shards

    async def train(self, job: TrainRequest) -> TrainResult:
        done = await super().train(job)
        canary = TrainSettings.parse(job.settings).steps < STEPS
        if job.round == self._round and (-1 if canary else job.shard) in self._shards:
            raise ShardFailed(
                f"round {job.round}, shard {job.shard}, step 3: the loss is NaN: lower lr"
            )
        return done


def machines(round_: int, *shards: int) -> dict[str, dict[str, object]]:
    """Give every machine of the swarm the same fault."""
    workers = ("wanda", "will", "walt")
    keepers = ("oscar", "victor", "vera", "vince", "rita")
    special = {name: {"executor": Diverging(round_, shards)} for name in workers}
    return special | {n: {"executor": Diverging(round_, shards, 1_000_000)} for n in keepers}


@simulated
async def test_training_that_diverges_ends_by_round_and_shard_and_pays_what_passed(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, **machines(2, 0, 1, 2, 3))
    began = swarm.seconds
    job = await swarm.submit_training(rita, rounds=5, work_s=WORK_S)
    job = await finish(swarm, job, state="failed")
    assert swarm.seconds - began < 200
    state = log_of(swarm, job)
    assert state.end is not None
    assert state.end.message.reason == JobEndReason.FAILED
    assert re.match(r"round 2, shard \d, step 3: the loss is NaN: lower lr", job.detail)
    assert "what passed was paid, the rest is back" in job.detail
    assert len(state.rounds.closes) == 2
    assert len(state.works) >= 8
    assert {work.outcome for work in state.works.values()} == {Status.ACCEPTED}
    for name in ("wanda", "will", "walt"):
        assert received(swarm, job, name) > 0, name


@simulated
async def test_a_shard_that_fails_everywhere_does_not_keep_its_round_from_closing(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, **machines(1, 2))
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3, work_s=WORK_S))
    held = [len(close.message.commitments) for close in log_of(swarm, job).rounds.closes]
    assert held == [4, 3, 4]


@simulated
async def test_training_whose_first_steps_diverge_ends_by_name_with_no_work_done(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, **machines(0, -1))
    job = await swarm.submit_training(rita, rounds=5, work_s=WORK_S)
    job = await finish(swarm, job, state="failed")
    assert "step 3: the loss is NaN: lower lr" in job.detail
    assert not log_of(swarm, job).works


@simulated
async def test_workers_that_only_say_that_a_shard_fails_do_not_end_the_job(swarm: Swarm) -> None:
    """Two of three do; the orchestrator computes it, finds nothing, and the third goes on."""
    special = {n: {"executor": Diverging(1, (2,))} for n in ("wanda", "will")}
    rita = await gather(swarm, **special)
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3, work_s=WORK_S))
    state = log_of(swarm, job)
    assert len(state.rounds.closes) == 3
    worker = [w for w in state.works.values() if w.number == 4 + 2]
    assert [w.worker for w in worker] == [swarm.nodes["walt"].address]


class Refusing(bad.Wrapped):
    """A machine like all others: the program cannot be run on the rows of the last shard."""

    def __init__(self, speed: int = 1000) -> None:
        super().__init__(ToyExecutor(speed))

    async def infer(self, job: InferRequest) -> bytes:
        done = await super().infer(job)
        if job.slot != AUDIT_SLOT and unpack(job.inputs).count == 3:
            raise ShardFailed("row 2: an index of 50000 is out of range")
        return done


@simulated
async def test_inference_on_rows_that_no_machine_can_compute_ends_and_pays_the_rest(
    swarm: Swarm,
) -> None:
    names = ("oscar", "victor", "vera", "vince", "rita", "wanda", "will", "walt")
    rita = await gather(swarm, **{name: {"executor": Refusing()} for name in names})
    began = swarm.seconds
    job = await swarm.submit(rita, rows=35, work_s=WORK_S)
    job = await finish(swarm, job, state="failed")
    assert swarm.seconds - began < 200
    assert job.detail.startswith("row 2: an index of 50000 is out of range; what passed was paid")
    state = log_of(swarm, job)
    assert [state.shard_done(shard) is not None for shard in range(5)] == [True] * 4 + [False]
    assert len([r for r in state.book.receipts if r.receipt_kind == "work"]) == 4


# ---- blobs -----------------------------------------------------------------------------------


@simulated
async def test_a_chunk_that_nobody_serves_ends_the_job_at_its_deadline_by_name(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=2, work_s=150, settle_s=60)
    manifest = parse_manifest(rita.blobs.read(job.terms.message.data))
    gone = manifest.chunks[1].digest
    rita.blobs.remove(gone)
    job = await finish(swarm, job, state="failed")
    assert f"chunk 1 of its data (blob {gone.hex()})" in job.detail
    assert "nobody else served it: submit the job's description again" in job.detail
    assert swarm.ledger.escrow(job.id).refunded > 0
    assert all(swarm.nodes[name].up for name in ("oscar", "wanda", "will", "walt"))


@simulated
async def test_data_that_is_away_for_a_while_is_waited_for(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=2, work_s=WORK_S)
    manifest = parse_manifest(rita.blobs.read(job.terms.message.data))
    chunks = [rita.blobs.read(chunk.digest) for chunk in manifest.chunks]
    for chunk in manifest.chunks:
        rita.blobs.remove(chunk.digest)
    await trio.sleep(100)
    for data in chunks:
        rita.blobs.put(data)
    job = await finish(swarm, job)
    assert len(log_of(swarm, job).rounds.closes) == 2
