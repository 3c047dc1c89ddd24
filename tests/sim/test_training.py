"""Training jobs: rounds that go on whoever dies, and that are audited, paid and replayed."""

from __future__ import annotations

from typing import Any

import trio
from sim import adversaries as bad
from sim.cast import (
    WORKERS,
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
from sim.swarm import Swarm, simulated

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.ledger.rounds import accepted
from meshd.ledger.works import Work
from meshd.node.compute.toy import ToyExecutor
from meshd.node.submitted import SubmittedJob
from meshd.p2p.messages import AuditKind, JobEndReason

SHARD_S = 1.92
"""Seconds that a shard of four steps takes a worker of the usual speed."""
FAST: dict[str, Any] = {"executor": ToyExecutor(1_000_000)}
KEEPERS: dict[str, Any] = dict.fromkeys(("oscar", "victor", "vera", "vince"), FAST)
"""Whoever closes rounds and computes closes: in next to no time."""


def troubled(*names: str) -> Cast:
    return Cast(troubled=frozenset(names))


def cheating(*names: str) -> Cast:
    return Cast(dishonest=frozenset(names))


def executor_of(swarm: Swarm, name: str) -> CountingExecutor:
    executor = swarm.nodes[name].executor
    assert isinstance(executor, CountingExecutor)
    return executor


def open_round(swarm: Swarm, job: SubmittedJob) -> int:
    """Return how many rounds the orchestrator has said to be closed."""
    node = swarm.nodes["oscar"].node
    view = node.jobs.known_view(job.id) if node is not None else None
    if view is None:
        return 0
    closes = view.closes.newest()
    return max((c.message.round + 1 for c in closes if accepted(c.message)), default=0)


async def wait_round(swarm: Swarm, job: SubmittedJob, round_: int) -> None:
    """Wait until round *round_* is open."""
    await wait_until(lambda: open_round(swarm, job) >= round_)


async def wait_computing(swarm: Swarm, round_: int, *names: str) -> str:
    """Wait until one of *names* (any worker, if none) computes a shard of *round_*; say who."""
    found: list[str] = []
    looked_at = [n for n in names or WORKERS if n in swarm.nodes and swarm.nodes[n].up]

    def computing() -> bool:
        found[:] = [
            name
            for name in looked_at
            if any(r == round_ for r, _ in executor_of(swarm, name).running)
        ]
        return bool(found)

    await wait_until(computing)
    return found[0]


def works_by(swarm: Swarm, state: JobState, name: str) -> list[Work]:
    record = state.workers.get(swarm.nodes[name].address)
    return record.works if record is not None else []


def rounds_of(swarm: Swarm, state: JobState, name: str) -> list[int]:
    """Return the rounds that a worker contributed to, one for each contribution."""
    return [work.assignment.message.round for work in works_by(swarm, state, name)]


def gated_by(swarm: Swarm, state: JobState, name: str) -> int:
    """Return how many contributions of a worker the gate kept out."""
    own = {work.hash for work in works_by(swarm, state, name)}
    closes = [close.message for close in state.rounds.closes]
    return sum(close.commitments[at] in own for close in closes for at in close.gated)


@simulated
async def test_an_honest_training_job_closes_every_round_and_pays_everybody(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit_training(rita))
    state = log_of(swarm, job)
    assert len(state.rounds.closes) == 4
    assert all(not close.message.gated for close in state.rounds.closes)
    losses = [float(close.message.loss) for close in state.rounds.closes]
    assert losses[-1] < losses[0]
    assert all(span.status is Status.ACCEPTED for span in state.subjects.values())
    for name in ("oscar", "victor", "vera", "vince", "wanda", "will", "walt"):
        assert received(swarm, job, name) > 0, name


# ---- workers come and go ---------------------------------------------------------------------


@simulated
async def test_a_round_completes_within_two_seconds_and_a_shard_of_a_workers_death(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, workers=5, **KEEPERS)
    job = await swarm.submit_training(rita, rounds=3)
    dead: list[str] = []
    for round_ in (1, 2):
        await wait_round(swarm, job, round_)
        name = await wait_computing(swarm, round_)
        await trio.sleep(SHARD_S / 2)
        swarm.kill(swarm.nodes[name])
        dead.append(name)
        died = swarm.seconds
        await wait_round(swarm, job, round_ + 1)
        assert swarm.seconds - died <= SHARD_S + 2
    job = await finish(swarm, job, cast=troubled(*dead))
    state = log_of(swarm, job)
    again = [leases for leases in state.shards.values() if len(leases) > 1]
    assert len(again) == 2
    for leases in again:
        assert len({lease.assignment.message.worker for lease in leases}) == 2


@simulated
async def test_a_worker_that_joins_in_a_round_contributes_to_it_or_to_the_next(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, workers=2)
    job = await swarm.submit_training(rita, shards=6, rounds=5)
    await wait_round(swarm, job, 2)
    joined = open_round(swarm, job)
    await swarm.add("zoe", "worker", executor=CountingExecutor())
    job = await finish(swarm, job)
    rounds = rounds_of(swarm, log_of(swarm, job), "zoe")
    assert rounds
    assert min(rounds) in (joined, joined + 1)
    assert received(swarm, job, "zoe") > 0


@simulated
async def test_a_worker_that_leaves_between_rounds_is_paid_and_missed_by_nobody(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=5)
    await wait_computing(swarm, 1, "wanda")
    wanda = swarm.nodes["wanda"]
    assert wanda.node is not None
    wanda.node.ports.availability.pause()
    job = await finish(swarm, job)
    state = log_of(swarm, job)
    assert max(rounds_of(swarm, state, "wanda")) == 1
    assert all(lease.ended is None for leases in state.shards.values() for lease in leases)
    assert received(swarm, job, "wanda") > 0


@simulated
async def test_a_worker_that_hands_its_lease_back_is_not_held_for_slow(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=4)
    await wait_computing(swarm, 1, "wanda")
    wanda = swarm.nodes["wanda"]
    assert wanda.node is not None
    await wanda.node.ports.availability.leave()
    swarm.kill(wanda)
    job = await finish(swarm, job, cast=troubled("wanda"))
    assert log_of(swarm, job).workers[wanda.address].halvings == 0


@simulated
async def test_fast_workers_take_more_shards(swarm: Swarm) -> None:
    rita = await gather(swarm, workers=2, wanda={"executor": CountingExecutor(4000)}, **KEEPERS)
    job = await finish(swarm, await swarm.submit_training(rita, shards=6))
    state = log_of(swarm, job)
    fast, slow = (len(works_by(swarm, state, name)) for name in ("wanda", "will"))
    assert fast + slow == 24
    assert fast >= 2 * slow
    assert received(swarm, job, "wanda") > received(swarm, job, "will") > 0


@simulated
async def test_a_job_goes_on_after_all_its_workers_were_dead(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita)
    await wait_round(swarm, job, 1)
    await wait_computing(swarm, 1, "wanda")
    names = ("wanda", "will", "walt")
    for name in names:
        swarm.kill(swarm.nodes[name])
    await trio.sleep(25)
    assert open_round(swarm, job) < 4
    for name in names:
        await swarm.start(swarm.nodes[name])
    job = await finish(swarm, job, cast=troubled(*names))
    assert len(log_of(swarm, job).rounds.closes) == 4


@simulated
async def test_a_restarted_worker_hands_in_the_same_contribution(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita)
    await wait_round(swarm, job, 1)
    for _ in range(3):
        await swarm.restart(swarm.nodes["wanda"], after_s=0.7)
        await trio.sleep(3)
    job = await finish(swarm, job, cast=troubled("wanda"))
    assert all(not close.message.gated for close in log_of(swarm, job).rounds.closes)


# ---- rounds and their deadlines --------------------------------------------------------------


@simulated
async def test_a_round_closes_at_its_deadline_with_its_share_and_late_work_is_paid(
    swarm: Swarm,
) -> None:
    slow = CountingExecutor(200)
    rita = await gather(swarm, workers=4, wanda={"executor": slow}, **KEEPERS)
    job = await swarm.submit_training(rita, rounds=6, settings={"min_share": 0.75})
    job = await finish(swarm, job)
    state = log_of(swarm, job)
    held = [len(close.message.commitments) for close in state.rounds.closes]
    assert min(held) == 3
    late = works_by(swarm, state, "wanda")
    entered = {name for close in state.rounds.closes for name in close.message.commitments}
    assert late
    assert any(work.hash not in entered for work in late)
    assert received(swarm, job, "wanda") > 0


@simulated
async def test_without_the_configured_share_a_round_waits(swarm: Swarm) -> None:
    slow = CountingExecutor(100)
    rita = await gather(swarm, workers=4, wanda={"executor": slow}, **KEEPERS)
    job = await swarm.submit_training(rita, rounds=2, settings={"min_share": 1})
    job = await finish(swarm, job)
    held = [len(close.message.commitments) for close in log_of(swarm, job).rounds.closes]
    assert held == [4, 4]


# ---- the gate --------------------------------------------------------------------------------


@simulated
async def test_the_gate_keeps_out_what_the_audit_rejects_later(swarm: Swarm) -> None:
    """Flipped, zeroed and made of noise: none of it enters a round, none of it is paid."""
    twists = {"wanda": bad.flipped, "will": bad.zeroed, "walt": bad.noise}
    special: dict[str, Any] = {
        n: {"executor": bad.Poisoning(ToyExecutor(1000), t)} for n, t in twists.items()
    }
    for number in range(5):
        await swarm.add(f"honest{number}", "worker")
    rita = await gather(swarm, **special, **KEEPERS)
    job = await swarm.submit_training(rita, shards=8, rounds=3)
    job = await finish(swarm, job, cast=cheating(*twists))
    state = log_of(swarm, job)
    for name in twists:
        mine = works_by(swarm, state, name)
        assert len(mine) >= 2
        assert gated_by(swarm, state, name) == len(mine), name
        assert {work.outcome for work in mine} == {Status.REJECTED}
        assert received(swarm, job, name) == 0
    assert sum(len(close.message.gated) for close in state.rounds.closes) == sum(
        len(works_by(swarm, state, name)) for name in twists
    )


@simulated
async def test_what_is_honest_and_gated_out_is_paid(swarm: Swarm) -> None:
    """A gate that lets hardly anything through: what it keeps out was computed all the same."""
    rita = await gather(swarm, **KEEPERS)
    tight = {"norm_low": 0.999, "norm_high": 1.001}
    job = await swarm.submit_training(rita, shards=6, rounds=2, settings=tight)
    job = await finish_anyhow(swarm, job)
    state = log_of(swarm, job)
    gated = {
        close.message.commitments[at] for close in state.rounds.closes for at in close.message.gated
    }
    assert gated
    paid = {r.commitment_hash for r in state.book.receipts if r.receipt_kind == "work"}
    assert gated <= paid


async def finish_anyhow(swarm: Swarm, job: SubmittedJob, cast: Cast | None = None) -> SubmittedJob:
    """Wait for the job's end, whatever it is."""
    await swarm.wait_over(swarm.nodes["rita"], job.id, limit_s=700)
    over = swarm.job(swarm.nodes["rita"], job.id)
    assert over is not None
    return await finish(swarm, job, state=over.state.value, cast=cast)


@simulated
async def test_a_round_of_which_nothing_is_accepted_is_repeated_by_others(swarm: Swarm) -> None:
    names = ("wanda", "will", "walt", "wendy")
    once: dict[str, Any] = {
        n: {"executor": bad.Poisoning(ToyExecutor(1000), bad.zeroed, last=0)} for n in names
    }
    rita = await gather(swarm, workers=4, **once, **KEEPERS)
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2), cast=cheating(*names))
    state = log_of(swarm, job)
    first, second, *_ = [close.message for close in state.rounds.closes]
    assert not accepted(first)
    assert first.state_after == first.state_before
    assert (second.round, len(accepted(second))) == (0, 4)
    for number in range(4):
        workers = [lease.assignment.message.worker for lease in state.shards[number]]
        assert len(set(workers)) == 2


@simulated
async def test_a_round_that_is_empty_twice_fails_the_job_by_name_and_pays_what_passed(
    swarm: Swarm,
) -> None:
    """Nothing that an honest worker computes gets through this gate; it is paid all the same."""
    rita = await gather(swarm, workers=4, **KEEPERS)
    job = await swarm.submit_training(rita, rounds=3, settings={"norm_low": 1, "norm_high": 1})
    job = await finish(swarm, job, state="failed")
    state = log_of(swarm, job)
    assert state.end is not None
    assert state.end.message.reason == JobEndReason.FAILED
    assert [close.message.round for close in state.rounds.closes] == [0, 0]
    assert all(len(close.message.gated) == 4 for close in state.rounds.closes)
    assert len([r for r in state.book.receipts if r.receipt_kind == "work"]) == 8
    assert swarm.ledger.escrow(job.id).refunded > 0


@simulated
async def test_with_fewer_than_four_shards_a_round_every_one_is_audited(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit_training(rita, shards=3))
    state = log_of(swarm, job)
    drawn = [
        len(finding.challenge.message.drawn)
        for span in state.subjects.values()
        for finding in span.findings
        if finding.kind is AuditKind.FIRST
    ]
    assert sum(drawn) == 12


# ---- orchestrator and validators restart -----------------------------------------------------


@simulated
async def test_an_orchestrator_that_restarts_lets_nothing_committed_be_computed_again(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, workers=2)
    job = await swarm.submit_training(rita, shards=6, rounds=3)
    await wait_round(swarm, job, 1)
    await wait_until(lambda: {p[0] for p in executor_of(swarm, "wanda").begun} >= {0, 1})
    await trio.sleep(SHARD_S + 0.5)
    await swarm.restart(swarm.nodes["oscar"], after_s=2.5)
    job = await finish(swarm, job)
    begun = [p for n in ("wanda", "will") for p in executor_of(swarm, n).begun]
    assert sorted(begun) == [(r, s) for r in range(3) for s in range(6)]


@simulated
async def test_an_orchestrator_killed_again_and_again_still_trains(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita)
    await wait_round(swarm, job, 1)
    for _ in range(5):
        await swarm.restart(swarm.nodes["oscar"], after_s=1.7)
        await trio.sleep(4.3)
    job = await finish(swarm, job)
    assert len([c for c in log_of(swarm, job).rounds.closes]) == 4


@simulated
async def test_an_orchestrator_that_restarts_before_the_first_round_learns_every_class(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=2)
    await trio.sleep(1.3)
    await swarm.restart(swarm.nodes["oscar"], after_s=5.9)
    job = await finish(swarm, job)
    assert len(log_of(swarm, job).rounds.canaries) == 6


@simulated
async def test_validators_that_restart_in_turn_hold_no_round_up(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita)
    for name in ("victor", "vera", "vince"):
        await trio.sleep(5)
        await swarm.restart(swarm.nodes[name], after_s=3)
    job = await finish(swarm, job)
    assert all(span.status is Status.ACCEPTED for span in log_of(swarm, job).subjects.values())


@simulated
async def test_a_committee_of_one_trains_and_decides_alone(swarm: Swarm) -> None:
    cheater = bad.Poisoning(ToyExecutor(1000), bad.flipped)
    rita = await gather(swarm, validators=1, workers=4, wanda={"executor": cheater})
    job = await swarm.submit_training(rita, rounds=3)
    job = await finish(swarm, job, cast=cheating("wanda"))
    state = log_of(swarm, job)
    assert {work.outcome for work in works_by(swarm, state, "wanda")} == {Status.REJECTED}
    assert received(swarm, job, "will") > received(swarm, job, "wanda") == 0


# ---- cancelling; two jobs --------------------------------------------------------------------


@simulated
async def test_a_training_job_cancelled_in_mid_round_pays_what_passed(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=8)
    await wait_round(swarm, job, 2)
    await wait_computing(swarm, 2, "wanda")
    assert rita.node is not None
    await wait_until(lambda: following(swarm, job))
    await rita.node.researcher.cancel(job.id)
    job = await finish(swarm, job, state="cancelled")
    state = log_of(swarm, job)
    assert state.end is not None
    assert state.end.message.reason == JobEndReason.STOPPED
    works = list(state.works.values())
    assert len(works) >= 8
    assert {work.outcome for work in works} == {Status.ACCEPTED}
    paid = {r.commitment_hash for r in state.book.receipts if r.receipt_kind == "work"}
    assert paid == {work.hash for work in works}
    sums = swarm.ledger.escrow(job.id)
    assert sums.refunded > 0
    assert not any(executor_of(swarm, name).running for name in ("wanda", "will", "walt"))


@simulated
async def test_a_training_job_and_an_inference_job_share_all_workers(swarm: Swarm) -> None:
    rita = await gather(swarm, speed=600)
    training = await swarm.submit_training(rita, rounds=3)
    inference = await swarm.submit(rita, rows=32)
    training = await finish(swarm, training)
    check_whole_output(swarm, await finish(swarm, inference))
    for name in ("wanda", "will", "walt"):
        assert executor_of(swarm, name).begun
        assert executor_of(swarm, name).inputs
        assert received(swarm, training, name) > 0
        assert received(swarm, inference, name) > 0


# ---- numeric classes -------------------------------------------------------------------------


@simulated
async def test_an_invented_numeric_class_gets_no_work(swarm: Swarm) -> None:
    special = {"executor": bad.Inexact(CountingExecutor())}
    rita = await gather(swarm, workers=4, wanda=special, **KEEPERS)
    job = await finish(swarm, await swarm.submit_training(rita), cast=cheating("wanda"))
    state = log_of(swarm, job)
    wanda = swarm.nodes["wanda"].address
    assert wanda in state.rounds.canaries
    assert wanda not in state.workers
    assert received(swarm, job, "wanda") == 0


@simulated
async def test_a_worker_of_a_class_that_one_member_of_seven_shares_gets_no_work(
    swarm: Swarm,
) -> None:
    """Two members have to share it: an auditor and another that confirms what it finds."""
    other = {"executor": bad.Inexact(ToyExecutor(1_000_000))}
    for name in ("vicky", "vlad"):
        await swarm.add(name, "validator", **FAST)
    special: dict[str, Any] = {**KEEPERS, "vera": other}
    rita = await gather(
        swarm, validators=5, workers=4, wanda={"executor": bad.Inexact(CountingExecutor())},
        viola=FAST, vito=FAST, **special,
    )  # fmt: skip
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    state = log_of(swarm, job)
    assert len(state.genesis.committee) == 7
    canaries = state.rounds.canaries
    wanda, vera = (swarm.nodes[name].address for name in ("wanda", "vera"))
    assert canaries[wanda] == canaries[vera] != canaries[swarm.nodes["victor"].address]
    assert wanda not in state.workers
    assert not any(f.auditor == vera for span in state.subjects.values() for f in span.findings)


# ---- hostile orchestrators, second audits ----------------------------------------------------


async def fail_uncertified(swarm: Swarm, job: SubmittedJob) -> JobState:
    """See a job fail whose orchestrator gets no close certified; nothing of it is paid."""
    job = await finish(swarm, job, state="failed", cast=cheating("oscar"))
    state = log_of(swarm, job)
    assert not state.rounds.closes
    return state


@simulated
async def test_a_close_with_another_state_is_never_certified(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.ClosingWrongly(net, node.identity)  # noqa: E731
    rita = await gather(swarm, oscar={"wrap": wrap, **FAST})
    job = await swarm.submit_training(rita, work_s=50, settle_s=40)
    await fail_uncertified(swarm, job)


@simulated
async def test_a_close_that_leaves_a_rivals_contribution_out_is_never_certified(
    swarm: Swarm,
) -> None:
    wrap = lambda node, net: bad.ClosingWithout(net, node.identity)  # noqa: E731
    rita = await gather(swarm, oscar={"wrap": wrap, **FAST})
    job = await swarm.submit_training(rita, work_s=50, settle_s=40)
    await fail_uncertified(swarm, job)


@simulated
async def test_an_orchestrator_that_withholds_the_log_makes_no_worker_silent(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, validators=1, oscar={"wrap": lambda _, net: bad.Withholding(net)})
    job = await finish_anyhow(swarm, await swarm.submit_training(rita), cheating("oscar"))
    assert not any(worker.rejected for worker in log_of(swarm, job).workers.values())


@simulated
async def test_what_passed_is_audited_a_second_time_under_a_second_beacon(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await swarm.submit_training(rita, rounds=2, second_audit_share=1_000_000)
    state = log_of(swarm, await finish(swarm, job))
    for span in state.subjects.values():
        first, second = span.findings
        assert (first.kind, second.kind) == (AuditKind.FIRST, AuditKind.SECOND)
        assert first.auditor != second.auditor
        assert second.challenge.message.beacon_height > first.height
        assert first.challenge.message.nonce != second.challenge.message.nonce
        assert first.reveal is not None
        assert second.reveal is not None
