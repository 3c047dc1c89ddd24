"""Cheating workers, lying auditors and hostile orchestrators, one story each."""

from __future__ import annotations

from sim import adversaries as bad
from sim.cast import check_whole_output, finish, gather, log_of, received
from sim.invariants import Cast
from sim.swarm import Swarm, simulated

from meshd.ledger.audits import Status
from meshd.node.compute.toy import ToyExecutor
from meshd.p2p.messages import AuditKind, AuditResult


def cast_of(*dishonest: str) -> Cast:
    return Cast(dishonest=frozenset(dishonest))


@simulated
async def test_a_worker_that_invents_rows_is_rejected_by_two_and_receives_nothing(
    swarm: Swarm,
) -> None:
    cheater = bad.Inventing(ToyExecutor(1000), 0.5)
    rita = await gather(swarm, wanda={"executor": cheater})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("wanda"))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    rejected = [w for w in state.works.values() if w.status is Status.REJECTED]
    assert rejected
    for work in rejected:
        assert work.worker == swarm.nodes["wanda"].address
        assert len({f.auditor for f in work.findings}) >= 2
        confirm = work.findings[-1]
        assert confirm.kind is AuditKind.CONFIRM
        assert confirm.attestation.message.agrees_with == work.findings[-2].attestation.digest
        again = state.shard_done(work.assignment.message.shard)
        assert again is not None
        assert again.worker != work.worker
    assert received(swarm, job, "wanda") == 0
    audited = {r.output_hash for r in state.book.receipts if r.receipt_kind == "audit"}
    assert all(f.attestation.digest in audited for work in rejected for f in work.findings)


@simulated
async def test_an_output_holds_nothing_of_a_worker_that_was_caught_late(swarm: Swarm) -> None:
    """Every accepted shard is audited again: what passed the first time may fail the second."""
    late = 0
    for round_ in range(12):
        name = f"cheater{round_}"
        if not round_:
            rita = await gather(swarm, workers=2)
        cheater = bad.Inventing(ToyExecutor(1000), 0.25, seed=round_)
        await swarm.add(name, "worker", executor=cheater)
        job = await swarm.submit(rita, rows=24, second_audit_share=1_000_000, probation_rows=2)
        names = tuple(f"cheater{i}" for i in range(round_ + 1))
        job = await finish(swarm, job, cast=cast_of(*names))
        state = log_of(swarm, job)
        late += any(
            work.status in (Status.REJECTED, Status.VOID) and work.accepted_height
            for work in state.works.values()
        )
        if late:
            break
    assert late, "no draw let a first audit pass and a second one find: take other seeds"


@simulated
async def test_a_worker_that_repeats_one_answer_is_rejected(swarm: Swarm) -> None:
    rita = await gather(swarm, wanda={"executor": bad.Caching(ToyExecutor(1000))})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("wanda"))
    check_whole_output(swarm, job)
    assert log_of(swarm, job).workers[swarm.nodes["wanda"].address].rejected


@simulated
async def test_a_worker_that_opens_malformed_rows_is_rejected(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.OpeningMalformed(net, node.identity)  # noqa: E731
    rita = await gather(swarm, wanda={"wrap": wrap})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("wanda"))
    check_whole_output(swarm, job)
    assert log_of(swarm, job).workers[swarm.nodes["wanda"].address].rejected
    assert received(swarm, job, "wanda") == 0


@simulated
async def test_a_worker_that_opens_nothing_is_found_silent_twice(swarm: Swarm) -> None:
    rita = await gather(swarm, wanda={"wrap": lambda _, net: bad.NeverOpening(net)})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("wanda"))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    silent = [w for w in state.works.values() if w.status is Status.REJECTED]
    assert silent
    for work in silent:
        assert [f.result for f in work.findings] == [AuditResult.SILENT] * 2
        assert len(state.shards[work.assignment.message.shard]) == 2
    assert received(swarm, job, "wanda") == 0


@simulated
async def test_a_worker_that_hoards_leases_holds_nothing_up(swarm: Swarm) -> None:
    rita = await gather(swarm, wanda={"executor": bad.Hoarding(ToyExecutor(1000))})
    job = await swarm.submit(rita, lease_blocks=20)
    job = await finish(swarm, job, cast=cast_of("wanda"))
    check_whole_output(swarm, job)
    assert all(len(leases) <= 2 for leases in log_of(swarm, job).shards.values())
    assert received(swarm, job, "wanda") == 0


# ---- auditors --------------------------------------------------------------------------------


@simulated
async def test_an_auditor_that_never_challenges_is_replaced_and_unpaid(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.never_challenging(net, node.identity)  # noqa: E731
    rita = await gather(swarm, vera={"wrap": wrap})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("vera"))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    slots = [f.challenge.message.draw_index for w in state.works.values() for f in w.findings]
    assert max(slots) >= 1
    assert received(swarm, job, "vera") == 0


@simulated
async def test_an_auditor_that_never_attests_is_replaced_and_unpaid(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.never_attesting(net, node.identity)  # noqa: E731
    rita = await gather(swarm, vera={"wrap": wrap})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("vera"))
    check_whole_output(swarm, job)
    assert received(swarm, job, "vera") == 0


@simulated
async def test_an_auditor_that_judges_without_a_verdict_does_not_count(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.attesting_unjudged(net, node.identity)  # noqa: E731
    rita = await gather(swarm, vera={"wrap": wrap})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("vera"))
    check_whole_output(swarm, job)
    assert received(swarm, job, "vera") == 0


@simulated
async def test_a_false_accuser_is_outvoted_and_unpaid(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.FalseAccuser(net, node.identity)  # noqa: E731
    rita = await gather(swarm, vera={"wrap": wrap})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("vera"))
    check_whole_output(swarm, job)
    state = log_of(swarm, job)
    vera = swarm.nodes["vera"].address
    accused = [f for w in state.works.values() for f in w.findings if f.auditor == vera]
    assert accused
    assert not any(finding.in_majority for finding in accused)
    assert not any(worker.rejected for worker in state.workers.values())
    assert received(swarm, job, "vera") == 0


# ---- orchestrators ---------------------------------------------------------------------------


@simulated
async def test_an_orchestrator_that_drops_one_workers_entries_cannot_keep_it_from_nothing_else(
    swarm: Swarm,
) -> None:
    from sim.swarm import identity_of

    victim = identity_of("wanda").address
    rita = await gather(swarm, oscar={"wrap": lambda _, net: bad.Dropping(net, victim)})
    job = await finish(swarm, await swarm.submit(rita), cast=cast_of("oscar"))
    check_whole_output(swarm, job)


@simulated
async def test_an_orchestrator_that_equivocates_gets_no_two_heads_certified(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.Equivocating(net, node.identity, 0.3, 1)  # noqa: E731
    rita = await gather(swarm, oscar={"wrap": wrap})
    job = await swarm.submit(rita, work_s=150)
    await swarm.wait_over(rita, job.id, limit_s=700)
    over = swarm.job(rita, job.id)
    assert over is not None
    await finish(swarm, job, state=over.state.value, cast=cast_of("oscar"))
    assert any(kind == "log-head" for _, kind, _ in swarm.wiretap.contradictions)


@simulated
async def test_an_orchestrator_that_pays_itself_gets_no_head_certified(swarm: Swarm) -> None:
    wrap = lambda node, net: bad.Overpaying(net, node.identity, 1.0, 1)  # noqa: E731
    rita = await gather(swarm, oscar={"wrap": wrap})
    job = await swarm.submit(rita, work_s=80, settle_s=60)
    job = await finish(swarm, job, state="failed", cast=cast_of("oscar"))
    assert log_of(swarm, job).book.epoch == 0
    assert swarm.ledger.escrow(job.id).paid == 0
