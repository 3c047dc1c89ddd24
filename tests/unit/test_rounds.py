"""What a training job's log means: numeric classes, rounds and their closes, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from sim.logkit import JOB, LAG, Story, person, terms_of
from sim.trainlog import CLASS, OTHER, WORKERS, TrainStory, input_hash

from meshd.ledger.audits import Status
from meshd.ledger.rounds import Rounds, fewest
from meshd.p2p.codec import digest
from meshd.p2p.messages import ZERO, Canary, JobEndReason, LeaseEndReason

SOMETHING = b"\x07" * 32
NOT_OPEN = "assignment is of a later term, or of a round that is not open"


# ---- numeric classes -------------------------------------------------------------------------


def test_a_party_shows_its_class_once() -> None:
    story = TrainStory(classes={"wanda": None})
    assert story.show("wanda") is None
    assert story.show("wanda", OTHER) == "this party's class is known"
    assert story.state.rounds.canaries[person("wanda").address] == CLASS


def test_everybody_of_a_class_shows_the_same_digest() -> None:
    story = TrainStory()
    shown = story.state.rounds.canaries
    assert set(shown) == {person(name).address for name in (*WORKERS, "v0", "v1", "v2")}
    assert set(shown.values()) == {CLASS}


def test_nobody_shows_the_class_of_another() -> None:
    story = TrainStory(classes={"wanda": None})
    message = Canary(job_id=JOB, party=person("wanda").address, digest=OTHER)
    assert story.say("will", message) == "canary of another party"
    assert story.show("wanda") is None


def test_a_canary_without_a_digest_shows_nothing() -> None:
    story = TrainStory(classes={"wanda": None})
    assert story.show("wanda", ZERO) == "canary without a digest"
    assert "not shown" in (story.say("oscar", story.assignment(0, "wanda")) or "")


def test_inference_knows_no_classes() -> None:
    story = Story()
    message = Canary(job_id=JOB, party=person("wanda").address, digest=CLASS)
    assert story.say("wanda", message) == "canary has no effect in this kind of job"
    why = story.say("oscar", story.assignment(0, "wanda", numeric_class=CLASS))
    assert why == "inference knows no numeric classes"


def test_a_worker_gets_shards_in_the_class_that_it_has_shown_only() -> None:
    story = TrainStory(classes={"wanda": None, "v2": OTHER})
    why = "worker has not shown this numeric class"
    assert story.say("oscar", story.assignment(0, "wanda")) == why
    assert story.say("oscar", story.assignment(0, "wanda", numeric_class=ZERO)) == why
    assert story.say("oscar", story.assignment(0, "will", numeric_class=OTHER)) == why
    assert story.show("wanda") is None
    assert story.say("oscar", story.assignment(0, "wanda")) is None


@pytest.mark.parametrize(("members", "needed"), [(3, 1), (6, 1), (7, 2)])
def test_a_class_needs_members_that_can_audit_in_it(members: int, needed: int) -> None:
    others: dict[str, bytes | None] = {f"v{i}": OTHER for i in range(members)}
    for shown in range(needed):
        story = TrainStory(members=members, classes=others)
        why = story.say("oscar", story.assignment(0, "wanda"))
        assert why == f"{shown} members share the worker's numeric class, {needed} are needed"
        others[f"v{shown}"] = CLASS
    story = TrainStory(members=members, classes=others)
    assert story.say("oscar", story.assignment(0, "wanda")) is None


def test_a_member_that_works_is_not_the_one_that_shares_its_class() -> None:
    story = TrainStory(classes={"v1": OTHER, "v2": OTHER})
    why = story.say("oscar", story.assignment(0, "v0"))
    assert why == "0 members share the worker's numeric class, 1 are needed"


def test_auditors_are_drawn_from_the_workers_class_only() -> None:
    story = TrainStory(members=4, classes={"v1": OTHER, "v3": None})
    for _ in range(2):
        story.round("wanda", "will", "wilma", "wolf")
    spans = story.opened()
    assert len(spans) == 4
    for span in spans:
        assert span.track is not None
        assert set(span.track.order) == {person("v0").address, person("v2").address}


def test_a_member_that_shows_its_class_later_audits_what_is_drawn_from_then_on() -> None:
    story = TrainStory(classes={"v2": None})
    story.round()
    story.round()
    assert story.show("v2") is None
    for span in story.opened():
        assert span.track is not None
        assert person("v2").address in span.track.order


def test_a_commitment_is_of_its_assignments_class() -> None:
    story = TrainStory(classes={"v2": OTHER})
    lease = story.lease(0, "wanda")
    why = story.say("wanda", story.commitment(lease, numeric_class=OTHER))
    assert why == "commitment is of another numeric class than its assignment"
    story.commit(lease, "wanda")


# ---- assignments -----------------------------------------------------------------------------


def test_only_shards_of_the_open_round_are_assigned() -> None:
    story = TrainStory(rounds=3)
    state = story.state.rounds.state
    later = story.assignment(0, "wanda", round=1, input_hash=input_hash(1, 0, state))
    assert story.say("oscar", later) == NOT_OPEN
    story.round()
    earlier = story.assignment(0, "wanda", round=0, attempt=1, input_hash=input_hash(0, 0, state))
    assert story.say("oscar", earlier) == NOT_OPEN
    assert story.say("oscar", story.assignment(0, "wanda")) is None


def test_a_shard_is_computed_from_the_open_rounds_state() -> None:
    story = TrainStory()
    before = story.state.rounds.state
    story.round()
    old = story.assignment(0, "wanda", input_hash=input_hash(1, 0, before))
    assert story.say("oscar", old) == "units or input are not those of the shard"
    assert story.say("oscar", story.assignment(0, "wanda")) is None


def test_nothing_is_assigned_after_the_last_round() -> None:
    story = TrainStory()
    story.round()
    story.round()
    assert story.state.rounds.done
    assert story.state.free_shards() == []
    assert story.say("oscar", story.assignment(0, "wanda")) == "no round is open"


def test_every_delivered_shard_allows_one_lease_more() -> None:
    story = TrainStory()
    story.committed(0, "wanda")
    story.lease(1, "wanda")
    story.lease(2, "wanda")
    assert "in flight" in (story.say("oscar", story.assignment(3, "wanda")) or "")


def test_a_worker_stops_at_its_unsettled_limit_until_a_span_of_it_is_settled() -> None:
    story = TrainStory(max_unsettled=2, span_shards=2, rounds=3)
    story.deliver(["wanda"], [0, 1])
    assert "unsettled" in (story.say("oscar", story.assignment(2, "wanda")) or "")
    story.pass_all()
    assert "unsettled" in (story.say("oscar", story.assignment(2, "wanda")) or "")
    assert story.cut() is None
    assert story.say("oscar", story.assignment(2, "wanda")) is None


# ---- what closes a round ---------------------------------------------------------------------


def test_a_close_opens_the_next_round_with_the_state_it_names() -> None:
    story = TrainStory()
    works = story.round()
    rounds = story.state.rounds
    assert (rounds.open, rounds.state) == (1, digest(b"state 1"))
    assert rounds.states() == [story.terms.initial_state, digest(b"state 1")]
    assert rounds.state_of(1) == rounds.state
    assert [work.number for work in works] == [0, 1, 2, 3]
    assert [work.number for work in story.round()] == [4, 5, 6, 7]
    assert rounds.done


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"round": 1}, "close is not of round 0 and its state"),
        ({"state_before": SOMETHING}, "close is not of round 0 and its state"),
        ({"state_before": ZERO}, "close is not of round 0 and its state"),
        ({"commitments": ()}, "close holds other commitments than the round"),
        ({"weights": (8, 8, 8)}, "weights are not the rows of the contributions"),
        ({"weights": (8, 8, 8, 7)}, "weights are not the rows of the contributions"),
        ({"weights": (8, 8, 8, 8, 8)}, "weights are not the rows of the contributions"),
        ({"gated": (4,)}, "gated contributions are not ascending places in the close"),
        ({"gated": (2, 1)}, "gated contributions are not ascending places in the close"),
        ({"gated": (1, 1)}, "gated contributions are not ascending places in the close"),
        ({"gated": (2**32 - 1,)}, "gated contributions are not ascending places in the close"),
        ({"gated": (0, 1, 2, 3), "state_after": SOMETHING}, "nothing was accepted, and the state"),
        ({"state_after": ZERO}, "close names no state"),
        ({"job_id": SOMETHING}, "entry is of another job"),
    ],
)
def test_a_close_says_what_the_log_says(change: dict[str, Any], why: str) -> None:
    story = TrainStory()
    story.deliver(WORKERS)
    wrong = story.close().model_copy(update=change)
    assert (story.say("oscar", wrong) or "").startswith(why)
    assert story.state.rounds.open == 0
    story.close_round(1, 3)
    assert story.state.rounds.open == 1


def test_a_close_holds_all_that_was_committed_and_nothing_else_in_the_order_of_shards() -> None:
    story = TrainStory()
    works = story.deliver(WORKERS, [2, 0, 1])
    names = {work.assignment.message.shard: work.hash for work in works}
    why = "close holds other commitments than the round"
    for wrong in ([2, 0, 1], [0, 1], [0, 1, 1, 2], [0, 0, 1, 2]):
        close = story.close(commitments=tuple(names[shard] for shard in wrong))
        assert story.say("oscar", close) == why
    unknown = story.close(commitments=(*(names[shard] for shard in (0, 1, 2)), SOMETHING))
    assert story.say("oscar", unknown) == why
    right = story.close()
    assert right.commitments == (names[0], names[1], names[2])
    assert story.say("oscar", right) is None


def test_only_the_orchestrator_closes_a_round() -> None:
    story = TrainStory()
    story.deliver(WORKERS)
    assert story.say("wanda", story.close()) == "entry is the orchestrator's to sign"


def test_a_round_of_inference_is_never_closed() -> None:
    story = Story()
    story.committed(0)
    training = TrainStory()
    training.deliver(WORKERS)
    assert story.say("oscar", training.close()) == "no round is open"
    assert not story.state.rounds.may_close(list(story.state.works.values()) * 4)


def test_a_round_is_closed_once() -> None:
    story = TrainStory(rounds=1)
    story.deliver(WORKERS)
    close = story.close()
    assert story.say("oscar", close) is None
    assert story.say("oscar", close) == "logged already"
    again = close.model_copy(update={"loss": "2.0"})
    assert story.say("oscar", again) == "no round is open"


def test_a_close_needs_the_share_of_shards_that_the_job_asks_for() -> None:
    story = TrainStory(hyperparameters=("min_share=0.6",))  # three of four
    story.deliver(WORKERS, [0, 2])
    assert not story.state.rounds.may_close(story.state.round_works())
    assert story.say("oscar", story.close()) == "the round has 2 commitments, 3 are needed"
    story.deliver(WORKERS, [3])
    assert story.state.rounds.may_close(story.state.round_works())
    story.close_round()


def test_an_empty_round_is_never_closed() -> None:
    story = TrainStory(hyperparameters=("min_share=0.000001",))
    assert story.say("oscar", story.close()) == "the round has 0 commitments, 1 are needed"


@pytest.mark.parametrize(
    ("share", "shards", "least"),
    [
        ("0.5", 4, 2),
        ("0.5", 5, 3),
        ("0.6", 4, 3),
        ("0.1", 30, 3),
        ("0.7", 10, 7),
        ("1", 7, 7),
        ("0.0001", 7, 1),
        ("0", 7, 1),
        ("-1", 7, 1),
        ("2", 7, 7),
        ("1E-999999", 7, 1),
        ("9E+999999", 7, 7),
        ("1E+99999999999999999999", 7, 7),
        ("Infinity", 7, 7),
        ("-Infinity", 7, 7),
        ("NaN", 7, 7),
        ("sNaN", 7, 7),
        ("half", 7, 7),
        ("", 7, 7),
    ],
)
def test_the_least_a_round_closes_with_is_rounded_up(share: str, shards: int, least: int) -> None:
    terms = terms_of(shards=shards, hyperparameters=("other", f"min_share={share}"))
    assert fewest(terms) == least


def test_without_a_share_a_round_closes_with_all_its_shards() -> None:
    assert fewest(terms_of(shards=9)) == 9


# ---- the gate --------------------------------------------------------------------------------


def test_what_the_gate_keeps_out_is_no_reason_to_compute_it_again() -> None:
    story = TrainStory()
    works = story.deliver(WORKERS)
    story.close_round(1, 3)
    assert story.state.rounds.open == 1
    assert all(work.status is Status.PENDING for work in works)
    assert len(story.state.free_shards()) == 4, "those of the next round"


def test_a_round_of_which_nothing_is_accepted_keeps_its_state_and_is_repeated() -> None:
    story = TrainStory()
    works = story.deliver(WORKERS)
    story.gate_all()
    rounds = story.state.rounds
    assert (rounds.open, rounds.tries, rounds.failed) == (0, 1, False)
    assert rounds.state == story.terms.initial_state
    assert story.state.free_shards() == [0, 1, 2, 3]
    assert story.state.round_works() == []
    assert story.say("oscar", story.assignment(0, "will", attempt=0)) is not None
    again = story.deliver(WORKERS)
    assert [work.number for work in again] == [work.number for work in works]
    assert [work.place[1] for work in again] == [1, 1, 1, 1]
    story.close_round()
    assert (rounds.open, rounds.tries) == (1, 0)
    assert len(rounds.closes) == 2
    assert rounds.states() == [story.terms.initial_state, digest(b"state 1")]


def test_what_a_repeated_round_had_is_audited_with_its_workers_span() -> None:
    story = TrainStory(rounds=1)
    works = story.deliver(WORKERS)
    story.gate_all()
    works += story.deliver(WORKERS)
    story.close_round()
    assert {work for span in story.spans for work in span.works} == set(works)


def test_a_shard_that_came_in_after_an_empty_gate_counts_for_the_repetition() -> None:
    story = TrainStory()
    story.deliver(["wanda", "will"], [0, 1])
    lease = story.lease(2, "wilma")
    story.gate_all()
    assert story.state.free_shards() == [0, 1, 3]
    late = story.commit(lease, "wilma")
    assert story.state.round_works() == [late]
    assert story.state.free_shards() == [0, 1, 3]


def test_a_round_of_which_nothing_is_accepted_twice_fails_the_job() -> None:
    story = TrainStory()
    for _ in range(2):
        story.deliver(WORKERS)
        story.gate_all()
    rounds = story.state.rounds
    assert rounds.failed
    assert not rounds.done
    assert story.state.free_shards() == []
    assert story.say("oscar", story.assignment(0, "wanda")) == "no round is open"
    assert story.say("oscar", story.close()) == "no round is open"
    story.pass_all()
    assert story.end() == "a round failed: the gate accepted nothing of it"
    assert story.end(JobEndReason.FAILED) is None


def test_each_round_may_be_repeated_once() -> None:
    story = TrainStory()
    for _ in range(2):
        story.deliver(WORKERS)
        story.gate_all()
        story.round()
    assert story.state.rounds.done


# ---- late, dead and rejected workers ---------------------------------------------------------


def test_a_late_commitment_inside_its_lease_is_taken_and_audited() -> None:
    story = TrainStory(rounds=1)
    lease = story.lease(3, "wolf")
    story.deliver(["wanda", "will"], [0, 1])
    story.close_round()
    late = story.commit(lease, "wolf")
    assert late.number == 3
    assert late.span in story.spans, "no round follows that could close its span"
    story.pass_all()
    assert late.outcome is Status.ACCEPTED


def test_a_commitment_that_is_late_for_its_round_is_not_in_the_next_one() -> None:
    story = TrainStory()
    lease = story.lease(3, "wolf")
    story.deliver(["wanda", "will"], [0, 1])
    story.close_round()
    late = story.commit(lease, "wolf")
    works = story.deliver(["wanda", "will"])
    assert late not in story.state.round_works()
    assert story.state.round_works() == works


def test_a_commitment_after_its_lease_counts_in_no_round() -> None:
    story = TrainStory()
    lease = story.lease(3, "wolf")
    story.at(story.state.leases[lease].until + 1)
    assert story.say("wolf", story.commitment(lease)) == "the lease lapsed"
    lease = story.lease(2, "will")
    assert story.end_lease(lease) is None
    assert story.say("will", story.commitment(lease)) == "lease was not accepted, or is over"
    assert story.state.round_works() == []


def test_a_dead_workers_shard_is_assigned_again() -> None:
    story = TrainStory()
    lease = story.lease(0, "wanda")
    assert story.say("oscar", story.assignment(0, "will")) == "shard 0 is another lease's"
    assert story.end_lease(lease, LeaseEndReason.DISCONNECTED) is None
    assert story.state.free_shards() == [0, 1, 2, 3]
    again = story.committed(0, "will")
    assert again.place == (0, 1)
    assert story.state.round_works() == [again]


def caught_in(story: TrainStory, worker: str = "wolf") -> None:
    """Let the span that *worker* closes by leaving be found wrong."""
    story.end_lease(story.lease(story.state.free_shards()[0], worker))
    (span,) = (span for span in story.opened() if span.worker == person(worker).address)
    story.reject(span)
    assert span.status is Status.REJECTED


def test_a_rejected_workers_commitment_leaves_the_open_round_and_its_shard_is_free() -> None:
    story = TrainStory()
    story.deliver(["wolf"], [0])
    good = story.deliver(["wanda"], [1])
    caught_in(story)
    assert story.state.round_works() == good
    assert story.state.free_shards() == [0, 2, 3]
    assert story.say("oscar", story.assignment(0, "wolf")) == "worker was rejected in this job"
    assert story.committed(0, "will").place == (0, 1)


def test_a_rejected_workers_commitment_that_no_span_holds_leaves_the_open_round_too() -> None:
    story = TrainStory(rounds=3, span_shards=2)
    story.deliver(["wolf"], [0, 1])
    (span,) = story.opened()
    later = story.committed(2, "wolf")
    assert later.span is None
    story.reject(span)
    assert later.status is Status.VOID
    assert story.state.round_works() == []
    assert story.state.free_shards() == [0, 1, 2, 3]
    story.round("wanda", "will")
    story.round("wanda", "will")
    story.round("wanda", "will")
    story.pass_all()
    assert later.span is None
    assert story.state.audited
    assert story.end() is None


def test_closed_rounds_stay_though_a_worker_is_caught_later() -> None:
    story = TrainStory(rounds=3)
    story.round()
    state = story.state.rounds.state
    caught_in(story)
    assert (story.state.rounds.open, story.state.rounds.state) == (1, state)
    assert story.state.free_shards() == [0, 1, 2, 3]
    story.round("wanda", "will", "wilma")
    assert story.state.rounds.open == 2


def test_the_open_lease_of_a_rejected_worker_ends() -> None:
    story = TrainStory(span_shards=1)
    story.committed(0, "wolf")
    lease = story.lease(1, "wolf")
    (span,) = story.opened()
    story.reject(span)
    assert story.state.leases[lease].ended is LeaseEndReason.REJECTED
    assert story.say("wolf", story.commitment(lease)) is not None
    assert story.state.free_shards() == [0, 1, 2, 3]


# ---- the end ---------------------------------------------------------------------------------


def test_a_training_job_is_complete_when_its_rounds_are_closed_and_its_spans_audited() -> None:
    story = TrainStory()
    story.round()
    assert story.end() == "not every shard is accepted and audited"
    story.round()
    assert story.state.complete
    assert story.end() == "not every shard is accepted and audited"
    for span in story.opened():
        assert story.end() == "not every shard is accepted and audited"
        story.audit(span)
    assert story.end() == "not every shard is accepted and audited", "a second audit may come"
    story.at(story.state.height + LAG)
    assert story.end() is None


def test_a_training_job_is_complete_though_a_span_of_it_was_rejected() -> None:
    story = TrainStory()
    story.round()
    story.round()
    first, *others = story.opened()
    for span in others:
        story.audit(span)
    story.reject(first)
    story.at(story.state.height + LAG)
    assert story.end() is None


def test_a_lease_that_is_open_at_the_end_delays_nobody() -> None:
    story = TrainStory(rounds=1)
    story.lease(3, "wolf")
    story.deliver(["wanda", "will"], [0, 1])
    story.close_round()
    story.pass_all()
    assert story.end() is None


# ---- terms -----------------------------------------------------------------------------------


def test_a_close_that_is_entered_again_in_a_later_term_means_the_same() -> None:
    story = TrainStory()
    story.deliver(WORKERS)
    close = story.sign("oscar", story.close())
    story.at(9, term=1)
    assert story.state.apply(story.term_start(1, 8)) is None
    assert story.state.apply(close) is None
    assert (story.state.rounds.open, story.state.rounds.state) == (1, digest(b"state 1"))


def test_a_job_of_inference_has_one_round_that_stays_open() -> None:
    rounds = Rounds(terms_of(), ())
    assert (rounds.open, rounds.state, rounds.over) == (0, ZERO, False)
