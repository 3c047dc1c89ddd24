"""What a user is told and can order, over nodes that really run (in virtual time)."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from sim.cast import finish, following, gather, log_of, received, wait_until
from sim.swarm import SimNode, Swarm, reference_rows, simulated

from meshd.config.amounts import format_mcc, parse_mcc
from meshd.node.control.api import ControlError
from meshd.node.desk import Desk
from meshd.node.workloads.rows import unpack


def desk_of(node: SimNode) -> Desk:
    """Return what answers the control API of a node."""
    assert node.node is not None
    ports = node.node.ports
    network: Any = ports.network
    chain: Any = ports.chain
    config: Any = None
    return Desk(node.node, network, chain, config, 0.0)


async def fault(answer: Any) -> ControlError:
    with pytest.raises(ControlError) as caught:
        await answer
    return caught.value


@simulated
async def test_a_job_without_workers_says_that_nobody_has_its_shards(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=0)
    job = await swarm.submit(rita, rows=16)
    desk = desk_of(rita)
    assert (await desk.job_why(job.id))["note"].startswith("its escrow is being opened")
    await wait_until(lambda: following(swarm, job) and log_of(swarm, job).position > 0)
    why = await desk.job_why(job.id)
    assert why["note"] == ""
    assert [(s["shard"], s["state"], s["worker"]) for s in why["shards"]] == [
        (0, "free", ""),
        (1, "free", ""),
    ]
    assert {n["state"] for n in why["nodes"]} <= {"silent", "no-worker"}
    await desk.job_cancel(job.id)
    await finish(swarm, job, state="cancelled")
    why = await desk.job_why(job.id)
    assert (why["note"], why["shards"], why["nodes"]) == ("stopped: what passed was paid", [], [])


@simulated
async def test_a_running_job_says_who_computes_and_who_audits(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=100)
    job = await swarm.submit(rita, rows=64)
    desk = desk_of(rita)
    seen: set[str] = set()
    while not swarm.over(rita, job.id):
        why = await desk.job_why(job.id)
        seen |= {shard["state"] for shard in why["shards"]}
        seen |= {node["state"] for node in why["nodes"] if node["state"] == "allowance"}
        await trio.sleep(0.5)
    assert seen >= {"free", "computing", "audit", "allowance"}
    await finish(swarm, job)


@simulated
async def test_a_cancelled_job_is_tried_again_on_the_same_terms(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit(rita, rows=16)
    desk = desk_of(rita)
    assert (await fault(desk.job_retry(job.id, None))).code == "usage"
    await desk.job_cancel(job.id)
    await finish(swarm, job, state="cancelled")
    again = await desk.job_retry(job.id, None)
    assert rita.node is not None
    second = rita.node.researcher.submitted[bytes.fromhex(again["id"][2:])]
    old, new = job.terms.message, second.terms.message
    moved = {"work_deadline", "settle_deadline"}
    assert new.model_dump(exclude=moved) == old.model_dump(exclude=moved)
    assert new.work_deadline - int(second.created) == old.work_deadline - int(job.created)
    assert new.settle_deadline - new.work_deadline == old.settle_deadline - old.work_deadline
    await finish(swarm, second)
    shorter = await fault(desk.job_retry(job.id, 5))
    assert "at least" in shorter.message
    rita.blobs.remove(old.program)
    assert "1 of the job's blobs" in (await fault(desk.job_retry(job.id, None))).message


@simulated
async def test_a_jobs_log_is_told_in_whole_batches_from_wherever_one_likes(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit(rita, rows=16))
    desk = desk_of(rita)
    page = await desk.job_log(job.id, 0)
    lines = page["lines"]
    assert page["next"] is None
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "job-terms"
    assert {"assignment", "lease-accept", "commitment", "attestation", "cut"} <= set(kinds)
    ended = next(line for line in lines if line["kind"] == "job-end")
    assert ended["text"] == "complete"
    later = (await desk.job_log(job.id, lines[0]["seq"]))["lines"]
    assert later == [line for line in lines if line["seq"] > lines[0]["seq"]]
    assert (await desk.job_log(job.id, 10_000))["lines"] == []


@simulated
async def test_earnings_are_what_the_chain_paid(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=2)
    job = await swarm.submit(rita, rows=32)
    desk = desk_of(swarm.nodes["wanda"])
    await wait_until(lambda: swarm.over(rita, job.id), limit_s=300)
    await finish(swarm, job)
    earned = await desk.earnings()
    paid = received(swarm, job, "wanda")
    assert paid > 0
    assert earned["paid"] == format_mcc(paid)
    assert [parse_mcc(one["amount"]) for one in earned["payments"]] == [paid]
    assert [one["job"] for one in earned["jobs"]] == ["0x" + job.id.hex()]
    assert earned["pending"] == "0"


@simulated
async def test_accepted_rows_can_be_had_before_the_job_is_over(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=1, speed=100)
    job = await swarm.submit(rita, rows=32)
    desk = desk_of(rita)
    assert (await fault(desk.job_part(job.id, 0, Path("x")))).code == "again"
    while not (parts := await desk.job_parts(job.id) if following(swarm, job) else []):
        await trio.sleep(0.5)
    assert not swarm.over(rita, job.id)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.rows"
        written = await desk.job_part(job.id, parts[0]["number"], path)
        rows = unpack(path.read_bytes()).rows()
    assert written["rows"] == 8
    assert tuple(rows) == reference_rows(32)[parts[0]["start"] : parts[0]["stop"]]
    assert (await fault(desk.job_part(job.id, 99, Path("x")))).code == "again"
    await finish(swarm, job)


# ---- training --------------------------------------------------------------------------------


@simulated
async def test_a_training_job_tells_its_rounds_and_the_weights_after_each(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=3)
    desk = desk_of(rita)
    seen: set[str] = set()
    while not swarm.over(rita, job.id):
        why = await desk.job_why(job.id)
        seen |= {shard["state"] for shard in why["shards"]}
        assert all(shard["round"] <= 3 for shard in why["shards"])
        await trio.sleep(0.5)
    assert seen >= {"computing", "audit"}
    job = await finish(swarm, job)
    detail = await desk.job_show(job.id)
    rounds = detail["rounds"]
    assert rounds is not None
    assert (rounds["done"], rounds["total"]) == (3, 3)
    assert all(loss is not None for loss in rounds["losses"])
    assert detail["shards"]["total"] == detail["shards"]["accepted"]
    assert detail["shards"]["total"] == 3 * job.terms.message.shards
    parts = await desk.job_parts(job.id)
    assert [(part["start"], part["stop"]) for part in parts] == [(0, 1), (1, 2), (2, 3)]
    with TemporaryDirectory() as folder:
        last = await desk.job_part(job.id, 2, Path(folder) / "2.safetensors")
        whole = await desk.job_result(job.id, Path(folder) / "all.safetensors")
    assert last["digest"] == whole["digest"] == detail["output"]
    assert last["rows"] == whole["rows"] == 0
