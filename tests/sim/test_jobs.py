"""Jobs without a cheater: what crashes, cancels, deadlines and small committees lead to."""

from __future__ import annotations

import trio
from sim.cast import (
    CountingExecutor,
    check_whole_output,
    finish,
    following,
    gather,
    log_of,
    received,
    wait_until,
)
from sim.invariants import Cast
from sim.swarm import SimNode, Swarm, simulated

from meshd.ledger.audits import Status
from meshd.node.submitted import SubmittedJob
from meshd.p2p.messages import JobEnd, JobEndReason


@simulated
async def test_an_honest_job_delivers_the_right_rows_and_pays_everybody(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit(rita))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    assert all(len(leases) == 1 for leases in state.shards.values())
    assert all(finding.reveal for work in state.works.values() for finding in work.findings)
    for name in ("oscar", "victor", "vera", "vince", "wanda", "will", "walt"):
        assert received(swarm, job, name) > 0, name
    assert swarm.seconds < 90


@simulated
async def test_a_killed_workers_shard_goes_to_another_attempt(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=40)
    job = await swarm.submit(rita, rows=32)
    wanda = swarm.nodes["wanda"]
    await wait_until(
        lambda: (
            following(swarm, job)
            and any(
                lease.accept and lease.open and lease.assignment.message.worker == wanda.address
                for lease in log_of(swarm, job).leases.values()
            )
        )
    )
    swarm.kill(wanda)
    job = await finish(swarm, job, cast=Cast(troubled=frozenset({"wanda"})))
    check_whole_output(swarm, job)
    ended = [
        (shard, lease)
        for shard, leases in log_of(swarm, job).shards.items()
        for lease in leases
        if lease.ended is not None
    ]
    assert ended
    for shard, lease in ended:
        assert lease.assignment.message.worker == wanda.address
        work = log_of(swarm, job).shard_done(shard)
        assert work is not None
        assert work.assignment.message.attempt == lease.assignment.message.attempt + 1
        assert work.worker != wanda.address


@simulated
async def test_a_restarted_worker_hands_in_what_it_had_computed(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=1)
    job = await swarm.submit(rita, rows=32)
    await wait_until(lambda: following(swarm, job) and bool(log_of(swarm, job).works))
    await swarm.restart(swarm.nodes["wanda"], after_s=3)
    job = await finish(swarm, job, cast=Cast(troubled=frozenset({"wanda"})))
    check_whole_output(swarm, job)


@simulated
async def test_an_orchestrator_that_restarts_lets_nothing_accepted_be_computed_again(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, speed=200)
    job = await swarm.submit(rita, rows=64)
    await wait_until(
        lambda: (
            following(swarm, job)
            and sum(w.status is Status.ACCEPTED for w in log_of(swarm, job).works.values()) >= 2
        )
    )
    state = log_of(swarm, job)
    before = {name: work for name, work in state.works.items() if work.status is Status.ACCEPTED}
    await swarm.restart(swarm.nodes["oscar"], after_s=9)
    job = await finish(swarm, job)
    check_whole_output(swarm, job)
    after = log_of(swarm, job)
    for name, work in before.items():
        assert after.works[name].status is Status.ACCEPTED
        shard = work.assignment.message.shard
        assert len(after.shards[shard]) == len(state.shards[shard])


@simulated
async def test_an_orchestrator_killed_again_and_again_still_ends_the_job(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=200)
    job = await swarm.submit(rita, rows=32)
    for _ in range(6):
        await trio.sleep(5.3)
        await swarm.restart(swarm.nodes["oscar"], after_s=1.7)
    job = await finish(swarm, job)
    check_whole_output(swarm, job)


@simulated
async def test_a_restarted_validator_goes_on_where_it_was(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit(rita)
    for name in ("victor", "vera", "vince"):
        await trio.sleep(6)
        await swarm.restart(swarm.nodes[name], after_s=4)
    job = await finish(swarm, job)
    check_whole_output(swarm, job)


@simulated
async def test_a_restarted_researcher_learns_how_its_job_ended(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit(rita, rows=16)
    await wait_until(lambda: following(swarm, job))
    swarm.kill(rita)
    await trio.sleep(80)  # everything is settled by now
    await swarm.start(rita)
    job = await finish(swarm, job)
    check_whole_output(swarm, job)


# ---- cancelling, deadlines -------------------------------------------------------------------


@simulated
async def test_a_job_cancelled_before_its_start_is_refunded(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit(rita)
    assert rita.node is not None
    await trio.sleep(1)
    await rita.node.researcher.cancel(job.id)
    await finish(swarm, job, state="cancelled")
    sums = swarm.ledger.escrow(job.id)
    assert sums.paid == 0
    assert sums.refunded == sums.deposited - sums.burnt


@simulated
async def test_a_job_cancelled_after_its_start_pays_what_passed(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=100)
    job = await swarm.submit(rita)
    await wait_until(
        lambda: (
            following(swarm, job)
            and any(w.status is Status.ACCEPTED for w in log_of(swarm, job).works.values())
        )
    )
    assert rita.node is not None
    await rita.node.researcher.cancel(job.id)
    job = await finish(swarm, job, state="cancelled")
    state = log_of(swarm, job)
    assert state.end is not None
    assert state.end.message.reason == JobEndReason.STOPPED
    accepted = [w for w in state.works.values() if w.status is Status.ACCEPTED]
    assert accepted
    paid = [r for r in state.book.receipts if r.receipt_kind == "work"]
    assert len(paid) == len(accepted)
    assert swarm.ledger.escrow(job.id).refunded > 0


@simulated
async def test_a_job_cancelled_before_anything_passed_is_refunded_at_once(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=10)
    job = await swarm.submit(rita)
    await wait_until(lambda: following(swarm, job))
    assert rita.node is not None
    await rita.node.researcher.cancel(job.id)
    job = await finish(swarm, job, state="cancelled")
    assert swarm.ledger.escrow(job.id).paid == 0
    assert swarm.seconds < 90


@simulated
async def test_members_settle_what_passed_when_the_orchestrator_is_gone(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=100)
    job = await swarm.submit(rita, work_s=90, settle_s=100)
    await wait_until(
        lambda: (
            following(swarm, job)
            and any(w.status is Status.ACCEPTED for w in log_of(swarm, job).works.values())
        )
    )
    swarm.kill(swarm.nodes["oscar"])
    job = await finish(swarm, job, state="failed")
    assert log_of(swarm, job).end is None
    assert swarm.ledger.escrow(job.id).paid > 0
    accepted = [w for w in log_of(swarm, job).works.values() if w.status is Status.ACCEPTED]
    for work in accepted:
        assert received(swarm, job, swarm.by_address(work.worker).name) > 0


@simulated
async def test_members_settle_when_the_orchestrator_dies_between_end_and_cut(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit(rita, rows=16, work_s=100, settle_s=100)
    oscar = swarm.nodes["oscar"]
    await wait_until(lambda: following(swarm, job))
    followed = swarm.job(rita, job.id)
    assert followed is not None
    view = followed.view
    assert view is not None
    await wait_until(lambda: any(isinstance(e.message, JobEnd) for e in view.certified_entries()))
    swarm.kill(oscar)
    await swarm.wait_over(rita, job.id, limit_s=300)
    over = swarm.job(rita, job.id)
    assert over is not None
    await finish(swarm, job, state=over.state.value)  # its output may have died with it
    for work in log_of(swarm, job).works.values():
        assert received(swarm, job, swarm.by_address(work.worker).name) > 0


@simulated
async def test_a_job_that_cannot_be_done_in_time_ends_with_what_passed(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=1, speed=10)
    job = await finish(swarm, await swarm.submit(rita, work_s=160), state="failed")
    state = log_of(swarm, job)
    assert state.end is not None
    assert state.end.message.reason == JobEndReason.DEADLINE
    assert swarm.ledger.escrow(job.id).paid > 0


# ---- committees ------------------------------------------------------------------------------


@simulated
async def test_a_committee_of_one_decides_alone(swarm: Swarm) -> None:
    rita = await gather(swarm, validators=1)
    job = await finish(swarm, await swarm.submit(rita))
    check_whole_output(swarm, job)


@simulated
async def test_a_committee_of_one_that_restarts_goes_on(swarm: Swarm) -> None:
    rita = await gather(swarm, validators=1)
    job = await swarm.submit(rita)
    await trio.sleep(15)
    await swarm.restart(swarm.nodes["victor"], after_s=2)
    await trio.sleep(10)
    await swarm.restart(swarm.nodes["oscar"], after_s=2)
    job = await finish(swarm, job)
    check_whole_output(swarm, job)


@simulated
async def test_the_orchestrator_may_be_the_only_validator(swarm: Swarm) -> None:
    await swarm.add("oscar", "orchestrator", "aggregator", "validator")
    rita = await gather_rest(swarm)
    job = await finish(swarm, await swarm.submit(rita))
    check_whole_output(swarm, job)


async def gather_rest(swarm: Swarm) -> SimNode:
    """Add workers and a researcher."""
    for name in ("wanda", "will"):
        await swarm.add(name, "worker", executor=CountingExecutor())
    rita = await swarm.add("rita")
    await trio.sleep(12)
    return rita


@simulated
async def test_without_validators_the_deposit_comes_back(swarm: Swarm) -> None:
    rita = await gather(swarm, validators=0)
    job = await finish(swarm, await swarm.submit(rita), state="failed")
    assert "no committee" in job.detail
    assert swarm.ledger.escrow(job.id).paid == 0


@simulated
async def test_without_workers_the_job_fails_and_the_deposit_comes_back(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=0)
    job = await finish(swarm, await swarm.submit(rita, work_s=90), state="failed")
    assert swarm.ledger.escrow(job.id).paid == 0


# ---- settlements in parts --------------------------------------------------------------------


@simulated
async def test_a_small_epoch_limit_is_met_by_several_cuts(swarm: Swarm) -> None:
    rita = await gather(swarm)
    limit = 3 * 8 * 32 * 10**12
    job = await finish(swarm, await swarm.submit(rita, epoch_limit=limit))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    assert state.book.epoch >= 3
    assert len([r for r in state.book.receipts if r.receipt_kind == "work"]) == 8


@simulated
async def test_workers_at_their_limit_are_settled_and_go_on(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=1, validators=1)
    terms = {"max_unsettled": 4, "retention": 2, "work_s": 400}
    job = await finish(swarm, await swarm.submit(rita, rows=48, rows_per_shard=4, **terms))
    check_whole_output(swarm, job)
    assert log_of(swarm, job).book.epoch >= 2


@simulated
async def test_two_jobs_share_all_workers(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=300)
    first = await swarm.submit(rita, rows=32)
    second = await swarm.submit(rita, rows=24)
    for job in (first, second):
        check_whole_output(swarm, await finish(swarm, job))


# ---- terms of the log ------------------------------------------------------------------------


async def wait_leased(swarm: Swarm, job: SubmittedJob) -> None:
    """Wait until every worker computes and none has committed."""
    await wait_until(
        lambda: (
            following(swarm, job)
            and sum(lease.accept is not None for lease in log_of(swarm, job).leases.values()) >= 3
        )
    )
    assert not log_of(swarm, job).works


@simulated
async def test_a_head_certified_too_late_begins_a_term_and_loses_nothing(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=50)
    job = await swarm.submit(rita)
    await wait_leased(swarm, job)
    cut_off = [swarm.nodes[name].address for name in ("victor", "vera", "vince")]
    swarm.network.partition([cut_off])
    await trio.sleep(9)
    swarm.network.heal()
    job = await finish(swarm, job, cast=Cast(troubled=frozenset({"wanda", "will", "walt"})))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    assert state.term >= 1
    assert all(len(leases) == 1 for leases in state.shards.values()), "something was lost"


@simulated
async def test_what_a_lost_head_held_is_audited_under_both_beacons(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=50)
    job = await swarm.submit(rita, second_audit_share=0)
    await wait_leased(swarm, job)
    # One member signs, the others are too late: the head is lost, and the vote lists it.
    swarm.network.partition([[swarm.nodes[name].address for name in ("vera", "vince")]])
    await trio.sleep(14)
    swarm.network.heal()
    job = await finish(swarm, job)
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    assert state.term >= 1
    twice = [work for work in state.works.values() if work.lost_beacons]
    assert twice
    for work in twice:
        beacons = {finding.challenge.message.beacon_height for finding in work.findings}
        assert beacons == {work.beacon_height, work.lost_beacons[0]}
