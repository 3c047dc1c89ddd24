"""What a researcher's node still knows of its jobs after it was started again."""

from __future__ import annotations

import trio
from sim.cast import finish, following, gather, log_of, wait_until
from sim.swarm import Swarm, simulated

from meshd.node import answers
from meshd.node.submitted import JobState, SubmittedJob
from meshd.p2p.messages import LeaseEndReason


async def told(swarm: Swarm, job: SubmittedJob) -> tuple[object, ...]:
    """Return what the researcher's user is told of a job."""
    node = swarm.nodes["rita"].node
    assert node is not None
    found = node.researcher.submitted[job.id]
    view = await node.researcher.view_of(found)
    assert view is not None
    state = view.state
    return (
        found.counts,
        answers.receipt_infos(state),
        answers.worker_shares(state),
        answers.audit_infos(state),
        answers.log_page(view.log.batches, 0)["lines"],
    )


@simulated
async def test_an_ended_jobs_receipts_and_log_are_there_after_a_restart(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit(rita, rows=32))
    before = await told(swarm, job)
    for name in ("oscar", "victor", "vera", "vince"):
        swarm.kill(swarm.nodes[name])  # nobody is left who could serve the log
    await swarm.restart(rita, after_s=5)
    known = swarm.job(rita, job.id)
    assert known is not None
    assert known.view is None  # nothing is read before somebody asks
    assert (known.counts.accepted, known.counts.total) == (4, 4)
    after = await told(swarm, job)
    assert after == before
    assert before[1]


@simulated
async def test_an_ended_training_jobs_rounds_are_there_after_a_restart(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    before = await told(swarm, job)
    await swarm.restart(rita, after_s=1)
    assert await told(swarm, job) == before
    assert answers.rounds_info(log_of(swarm, job)) is not None


@simulated
async def test_a_cancelled_jobs_log_is_there_after_a_restart(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=100)
    job = await swarm.submit(rita)
    await wait_until(lambda: following(swarm, job) and bool(log_of(swarm, job).works))
    assert rita.node is not None
    await rita.node.researcher.cancel(job.id)
    await finish(swarm, job, state="cancelled")
    before = await told(swarm, job)
    await swarm.restart(rita, after_s=1)
    assert await told(swarm, job) == before


@simulated
async def test_a_job_that_never_began_has_no_log_after_a_restart(swarm: Swarm) -> None:
    rita = await gather(swarm, validators=0, workers=0)
    job = await swarm.submit(rita, rows=8)
    await swarm.wait_over(rita, job.id, limit_s=200)
    await swarm.restart(rita, after_s=1)
    assert rita.node is not None
    known = rita.node.researcher.submitted[job.id]
    assert known.state in (JobState.FAILED, JobState.CANCELLED)
    assert await rita.node.researcher.view_of(known) is None
    assert known.counts.accepted == 0


@simulated
async def test_a_damaged_entry_on_disk_ends_the_log_before_it(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit(rita, rows=16))
    await swarm.restart(rita, after_s=1)
    await rita.store.execute(
        "update entry set raw=zeroblob(length(raw)) where rowid in "
        "(select rowid from entry where job_id=? order by term, seq, place limit 1 offset 3)",
        (job.id,),
    )
    assert rita.node is not None
    view = await rita.node.researcher.view_of(rita.node.researcher.submitted[job.id])
    assert view is not None
    assert view.state.end is None
    assert not view.state.book.receipts


# ---- pausing and leaving ---------------------------------------------------------------------


@simulated
async def test_a_paused_worker_gets_no_more_shards_until_it_resumes(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=2, speed=100)
    wanda = swarm.nodes["wanda"]
    assert wanda.node is not None
    wanda.node.ports.availability.pause()
    job = await swarm.submit(rita, rows=64)
    await wait_until(lambda: following(swarm, job) and len(log_of(swarm, job).works) >= 3)
    assert wanda.address not in log_of(swarm, job).workers
    wanda.node.ports.availability.resume()
    job = await finish(swarm, job)
    record = log_of(swarm, job).workers[wanda.address]
    assert record.halvings == 0
    assert record.accepted > 0


@simulated
async def test_a_worker_that_leaves_hands_its_shards_back_at_once(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=2, speed=20)
    wanda = swarm.nodes["wanda"]
    job = await swarm.submit(rita, rows=32)
    await wait_until(
        lambda: (
            following(swarm, job)
            and any(
                lease.open and lease.accept
                for lease in log_of(swarm, job).workers[wanda.address].leases
            )
            if following(swarm, job) and wanda.address in log_of(swarm, job).workers
            else False
        )
    )
    assert wanda.node is not None
    began = trio.current_time()
    assert await wanda.node.ports.availability.leave()
    assert trio.current_time() - began < 3
    swarm.kill(wanda)
    job = await finish(swarm, job)
    record = log_of(swarm, job).workers[wanda.address]
    assert LeaseEndReason.HANDED_BACK in [lease.ended for lease in record.leases]
    assert record.halvings == 0
