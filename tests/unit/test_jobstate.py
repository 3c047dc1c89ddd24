"""What a job's log means: leases, allowances, rejections and the end, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from sim.logkit import JOB, LAG, Story, person, terms_of

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.ledger.terms import terms_problem
from meshd.p2p.identity import NOBODY
from meshd.p2p.messages import (
    ZERO,
    Challenge,
    JobEndReason,
    LeaseAccept,
    LeaseEndReason,
    TermStart,
)

# ---- assignments -----------------------------------------------------------------------------


def test_a_shard_is_given_to_one_worker_at_a_time() -> None:
    story = Story()
    story.lease(0, "wanda")
    why = story.say("oscar", story.assignment(0, "will"))
    assert why == "shard 0 is another lease's"


def test_a_shard_is_given_again_as_the_next_attempt_when_its_lease_is_over() -> None:
    story = Story()
    lease = story.lease(0, "wanda")
    assert story.end_lease(lease) is None
    assert story.say("oscar", story.assignment(0, "will", attempt=0)) is not None
    assert story.say("oscar", story.assignment(0, "will", attempt=2)) is not None
    assert story.say("oscar", story.assignment(0, "will", attempt=1)) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shard": 4}, "the job has no shard 4"),
        ({"term": 1}, "assignment is of a later term, or of a round that is not open"),
        ({"round": 1}, "assignment is of a later term, or of a round that is not open"),
        ({"lease_until": 1}, "lease ends before its beginning or after the terms' limit"),
        ({"lease_until": 62}, "lease ends before its beginning or after the terms' limit"),
        ({"job_id": b"\x01" * 32}, "entry is of another job"),
    ],
)
def test_an_assignment_keeps_to_the_terms(change: dict[str, Any], why: str) -> None:
    story = Story()
    assert story.say("oscar", story.assignment(0, "wanda").model_copy(update=change)) == why


def test_only_the_orchestrator_assigns() -> None:
    story = Story()
    why = story.say("wanda", story.assignment(0, "wanda"))
    assert why == "entry is the orchestrator's to sign"


def test_only_workers_that_the_terms_name_get_shards() -> None:
    story = Story(workers=(person("will").address,))
    assert "not among" in (story.say("oscar", story.assignment(0, "wanda")) or "")
    assert story.say("oscar", story.assignment(0, "will")) is None


class Plan:
    """Shards as program and data make them."""

    def units(self, shard: int) -> int:
        return 1000

    def input_hash(self, round_: int, shard: int, state: bytes) -> bytes:
        return bytes([shard]) * 32


@pytest.mark.parametrize("change", [{"units": 1001}, {"input_hash": b"\x09" * 32}])
def test_units_and_input_are_those_of_the_shard(change: dict[str, Any]) -> None:
    story = Story()
    story.state = JobState(story.state.domain, story.genesis, story.terms, Plan())
    story.at(1)
    right = story.assignment(2, "wanda", input_hash=b"\x02" * 32)
    wrong = right.model_copy(update=change)
    assert story.say("oscar", wrong) == "units or input are not those of the shard"
    assert story.say("oscar", right) is None


# ---- allowances ------------------------------------------------------------------------------


def test_a_new_worker_has_one_lease_in_flight() -> None:
    story = Story()
    story.lease(0, "wanda")
    why = story.say("oscar", story.assignment(1, "wanda"))
    assert why == "worker has 1 leases in flight and may have no more"


def test_every_accepted_shard_allows_one_lease_more() -> None:
    story = Story()
    story.audit(story.work(0))
    story.lease(1, "wanda")
    story.lease(2, "wanda")
    assert "in flight" in (story.say("oscar", story.assignment(3, "wanda")) or "")


def test_a_lapse_halves_the_allowance_and_handing_back_does_not() -> None:
    story = Story()
    for shard in range(2):
        story.audit(story.work(shard))
    worker = story.state.workers[person("wanda").address]
    assert worker.allowance == 3
    story.end_lease(story.lease(2, "wanda"), LeaseEndReason.HANDED_BACK)
    assert worker.allowance == 3
    story.end_lease(story.lease(2, "wanda"), LeaseEndReason.LAPSED)
    assert worker.allowance == 1
    story.end_lease(story.lease(2, "wanda"), LeaseEndReason.LAPSED)
    assert worker.allowance == 1, "there is always one"


def test_a_worker_stops_at_its_unsettled_limit() -> None:
    story = Story(max_unsettled=2, retention=0)
    story.audit(story.work(0))
    story.audit(story.work(1))
    assert "unsettled" in (story.say("oscar", story.assignment(2, "wanda")) or "")
    story.at(story.state.height + LAG)
    assert story.cut() is None
    assert story.say("oscar", story.assignment(2, "wanda")) is None


# ---- leases ----------------------------------------------------------------------------------


def test_a_lease_is_accepted_once_by_its_worker_with_a_payee() -> None:
    story = Story()
    entry = story.sign("oscar", story.assignment(0, "wanda"))
    assert story.state.apply(entry) is None

    def accept(name: str, payee: bytes = person("wanda").address) -> str | None:
        message = LeaseAccept(job_id=JOB, assignment_hash=entry.digest, payee=payee)
        return story.say(name, message)

    assert accept("will") == "no lease of this worker"
    assert accept("wanda", NOBODY) == "no payee"
    assert accept("wanda") is None
    assert accept("wanda", person("will").address) is not None, "the payee is fixed"


def test_a_lease_ends_once_and_only_while_it_is_open() -> None:
    story = Story()
    lease = story.lease(0, "wanda")
    assert story.end_lease(lease) is None
    story.at(2)
    assert story.end_lease(lease, LeaseEndReason.FAILED) == "no such lease is open"
    assert story.end_lease(ZERO) == "no such lease is open"


def test_a_term_change_adds_the_blocks_between_to_open_leases() -> None:
    story = Story()
    lease = story.lease(0, "wanda")
    until = story.state.leases[lease].until
    story.at(13, term=1)
    assert story.state.leases[lease].until == until + 12
    story.at(20, term=1)
    assert story.state.leases[lease].until == until + 12


# ---- commitments -----------------------------------------------------------------------------


def test_a_commitment_needs_an_accepted_lease_of_its_signer() -> None:
    story = Story()
    entry = story.sign("oscar", story.assignment(0, "wanda"))
    assert story.state.apply(entry) is None
    early = story.say("wanda", story.commitment(entry.digest))
    assert early == "lease was not accepted, or is over"
    lease = story.lease(1, "will")
    assert story.say("wanda", story.commitment(lease)) == "no lease of this worker"
    assert story.say("wanda", story.commitment(ZERO)) == "no lease of this worker"


def test_a_commitment_after_the_lease_is_over_does_not_count() -> None:
    story = Story()
    lease = story.lease(0, "wanda")
    until = story.state.leases[lease].until
    story.at(until + 1)
    assert story.say("wanda", story.commitment(lease)) == "the lease lapsed"
    story = Story()
    lease = story.lease(0, "wanda")
    story.end_lease(lease)
    assert story.say("wanda", story.commitment(lease)) is not None


def test_a_lease_takes_one_commitment() -> None:
    story = Story()
    lease = story.lease(0, "wanda")
    assert story.say("wanda", story.commitment(lease)) is None
    other = story.commitment(lease, output_root=b"\x05" * 32)
    assert story.say("wanda", other) == "lease was not accepted, or is over"


@pytest.mark.parametrize("change", [{"n": 7}, {"hash_alg": 2}])
def test_a_commitment_is_to_all_rows_by_a_known_hash(change: dict[str, int]) -> None:
    story = Story()
    lease = story.lease(0, "wanda")
    assert story.say("wanda", story.commitment(lease, **change)) is not None


def test_the_first_works_of_a_worker_are_on_probation() -> None:
    story = Story(probation_shards=1)
    first = story.work(0)
    story.audit(first)
    second = story.work(1)
    assert (first.probation, first.sample) == (True, 4)
    assert (second.probation, second.sample) == (False, 2)


# ---- rejection -------------------------------------------------------------------------------


def test_a_rejected_worker_loses_what_is_unsettled_and_gets_no_shard_again() -> None:
    story = Story()
    good = story.work(0)
    story.audit(good)
    story.lease(2, "wanda")
    bad = story.work(1)
    story.reject(bad)
    worker = story.state.workers[person("wanda").address]
    assert worker.rejected
    assert good.status is Status.VOID
    assert not any(lease.open for lease in worker.leases)
    assert story.say("oscar", story.assignment(3, "wanda")) == "worker was rejected in this job"
    for shard in (0, 1, 2):
        assert story.say("oscar", story.assignment(shard, "will")) is None
        story.state.workers[person("will").address].accepted += 1


def test_what_has_entered_a_settlement_stays_though_its_worker_is_caught_later() -> None:
    story = Story(retention=0)
    good = story.work(0)
    story.audit(good)
    story.at(story.state.height + LAG)
    assert story.cut() is None
    story.reject(story.work(1))
    assert good.status is Status.ACCEPTED
    assert good.epoch == 1


# ---- the end ---------------------------------------------------------------------------------


def done(story: Story) -> None:
    """Let every shard be accepted and every audit be through."""
    for shard in range(story.terms.shards):
        story.audit(story.work(shard))
    story.at(story.state.height + LAG)


def test_a_job_is_complete_when_every_shard_is_accepted_and_audited() -> None:
    story = Story()
    for shard in range(3):
        story.audit(story.work(shard))
    assert story.end() == "not every shard is accepted and audited"
    story.audit(story.work(3))
    assert story.end() == "not every shard is accepted and audited", "a second audit may come"
    story.at(story.state.height + LAG)
    assert story.end() is None


def test_only_the_researcher_stops_a_job_and_only_then_it_ends_as_stopped() -> None:
    story = Story()
    assert story.end(JobEndReason.STOPPED) == "the researcher has not stopped the job"
    assert story.stop("oscar") == "only the researcher may stop the job"
    assert story.stop() is None
    assert story.end(JobEndReason.STOPPED) is None


def test_a_job_ends_for_a_known_reason_and_once() -> None:
    story = Story()
    assert story.end(9) == "unknown reason 9"
    assert story.say("wanda", story.assignment(0, "wanda")) is not None
    assert story.end(JobEndReason.DEADLINE) is None
    assert story.end(JobEndReason.FAILED) == "the job has ended"
    assert story.say("oscar", story.assignment(0, "wanda")) == "the job has ended"


def test_cuts_are_numbered_name_a_payee_and_stop_when_all_is_settled() -> None:
    story = Story()
    assert story.cut(epoch=2) == "cut has epoch 2, not 1"
    assert story.cut(payee=NOBODY) == "cut names no payee"
    done(story)
    assert story.end() is None
    assert story.cut() is None
    assert story.state.book.closed
    assert story.cut() == "everything is settled"


def test_an_entry_counts_once() -> None:
    story = Story()
    entry = story.sign("oscar", story.assignment(0, "wanda"))
    assert story.state.apply(entry) is None
    assert story.state.apply(entry) == "logged already"


def test_entries_about_the_unknown_have_no_effect() -> None:
    story = Story()
    challenge = Challenge(
        job_id=JOB,
        commitments=ZERO,
        audit_kind=1,
        draw_index=0,
        beacon_height=1,
        nonce=ZERO,
        drawn=(),
        payee=person("v0").address,
    )
    assert story.say("v0", challenge) == "challenge of an unknown commitment"


def test_a_log_without_end_is_closed_with_what_passed() -> None:
    story = Story()
    story.audit(story.work(0))
    story.work(1)
    story.state.close_without_end()
    paid = [r.shard for r in story.state.book.receipts if r.receipt_kind == "work"]
    assert paid == [0]
    assert story.state.book.closed


def test_a_term_may_begin_after_the_end() -> None:
    story = Story()
    assert story.end(JobEndReason.DEADLINE) is None
    story.at(9, term=1)
    start = TermStart(
        job_id=JOB,
        term=1,
        orchestrator=story.genesis.orchestrator,
        committee=story.genesis.committee,
        prev=ZERO,
        seq=2,
        lost=(),
        votes_root=ZERO,
    )
    assert story.say("v0", start) == "entry is the orchestrator's to sign"
    assert story.say("oscar", start.model_copy(update={"term": 2})) is not None
    assert story.say("oscar", start) is None
    assert story.cut() is None


# ---- terms -----------------------------------------------------------------------------------


def test_the_terms_of_these_stories_can_be_kept_to() -> None:
    assert terms_problem(terms_of()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"challenge_blocks": 0},
        {"audit_blocks": 0},
        {"silence": 0},
        {"lease_blocks": 10**9},
        {"lag": 2},
        {"shards": 0},
        {"rows_per_shard": 0},
        {"audit_rows": 0},
        {"window": 0},
        {"orchestrator_share": 1_000_001},
        {"second_audit_share": 1_000_001},
        {"max_unsettled": 8},
        {"settle_deadline": 2_000_000_000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_terms_that_would_hold_everybody_up_are_named(change: dict[str, int]) -> None:
    problem = terms_problem(terms_of(**change))
    assert problem is not None
    assert next(iter(change)).split("_")[0] in problem
