"""How training's works are audited: spans, what closes them, what is drawn, who decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sim.logkit import LAG, UNITS, Story, beacon, person
from sim.trainlog import OTHER, WORKERS, TrainStory

from meshd.ledger.audits import Status
from meshd.ledger.draws import drawn_rows
from meshd.ledger.works import Span, lost_beacons, sample_size
from meshd.p2p.codec import digest
from meshd.p2p.messages import AuditKind, AuditResult, JobEndReason, LeaseEndReason

ACCEPTED, MISMATCH, SILENT = AuditResult.ACCEPTED, AuditResult.MISMATCH, AuditResult.SILENT


def sizes(story: TrainStory) -> dict[str, list[int]]:
    """Return how many works the closed spans of every worker have."""
    names = {person(name).address: name for name in WORKERS}
    found: dict[str, list[int]] = {}
    for span in story.spans:
        found.setdefault(names[span.worker], []).append(len(span.works))
    return found


def leave(story: TrainStory, worker: str) -> Span | None:
    """Let *worker* take a shard and hand it back; return the span that this closes."""
    before = len(story.spans)
    lease = story.lease(story.state.free_shards()[0], worker)
    assert story.end_lease(lease, LeaseEndReason.HANDED_BACK) is None
    return story.spans[-1] if len(story.spans) > before else None


# ---- what closes a span ----------------------------------------------------------------------


def test_no_work_of_training_is_audited_by_itself() -> None:
    story = TrainStory()
    work = story.committed(0, "wanda")
    story.at(work.height + 100)
    assert story.state.subjects == {}
    assert work.track is None
    assert not story.state.audited


def test_a_span_closes_with_its_last_shard() -> None:
    story = TrainStory(span_shards=3)
    story.deliver(["wanda"], [0, 1])
    assert story.spans == []
    story.deliver(["will"], [2])
    assert story.spans == []
    last = story.deliver(["wanda"], [3])[0]
    assert sizes(story) == {"wanda": [3]}
    span = story.spans[0]
    assert span.works[-1] is last
    assert (span.height, span.position) == (last.height, last.position)


def test_a_span_reaches_over_rounds_and_the_next_begins_empty() -> None:
    story = TrainStory(span_shards=3, rounds=3)
    for _ in range(2):
        story.round("wanda")
    assert sizes(story) == {"wanda": [3, 3]}
    assert [[work.number for work in span.works] for span in story.spans] == [[0, 1, 2], [3, 4, 5]]


def test_a_span_closes_when_its_worker_leaves() -> None:
    story = TrainStory()
    story.deliver(["wanda"], [0, 1])
    story.deliver(["will"], [2])
    span = leave(story, "wanda")
    assert span is not None
    assert sizes(story) == {"wanda": [2]}
    assert leave(story, "wanda") is None, "it has nothing in a span"


@pytest.mark.parametrize("reason", list(LeaseEndReason))
def test_a_lease_that_ends_closes_the_span_whatever_the_reason(reason: LeaseEndReason) -> None:
    story = TrainStory()
    story.deliver(["wanda"], [0])
    assert story.end_lease(story.lease(1, "wanda"), reason) is None
    assert sizes(story) == {"wanda": [1]}


def test_a_span_stays_open_while_its_worker_has_another_lease() -> None:
    story = TrainStory()
    story.deliver(["wanda"], [0])
    first, second = story.lease(1, "wanda"), story.lease(2, "wanda")
    assert story.end_lease(first) is None
    assert story.spans == []
    story.commit(second, "wanda")
    assert story.spans == []
    leave(story, "wanda")
    assert sizes(story) == {"wanda": [2]}


def test_every_span_closes_with_the_last_round() -> None:
    story = TrainStory(rounds=2)
    story.round("wanda", "will")
    assert story.spans == []
    story.round("wanda", "wilma")
    assert sizes(story) == {"wanda": [4], "will": [2], "wilma": [2]}
    assert {span.height for span in story.spans} == {story.state.height}


def test_every_span_closes_when_the_researcher_stops_the_job() -> None:
    story = TrainStory()
    story.deliver(["wanda", "will"], [0, 1, 2])
    assert story.stop("oscar") is not None
    assert story.spans == []
    assert story.stop() is None
    assert sizes(story) == {"wanda": [2], "will": [1]}


def test_a_commitment_after_the_stop_is_a_span_of_its_own() -> None:
    story = TrainStory()
    story.deliver(["wanda"], [0])
    lease = story.lease(1, "wanda")
    assert story.stop() is None
    story.commit(lease, "wanda")
    assert sizes(story) == {"wanda": [1, 1]}
    story.pass_all()
    assert story.state.audited
    assert story.end(JobEndReason.STOPPED) is None


def test_every_span_closes_when_the_job_fails_and_so_do_later_ones() -> None:
    story = TrainStory()
    for _ in range(2):
        lease = story.lease(3, "wolf")
        story.deliver(["wanda", "will"], [0, 1])
        story.gate_all()
        if story.state.rounds.tries == 1:
            assert story.spans == []
            story.end_lease(lease)
    assert sizes(story) == {"wanda": [2], "will": [2]}
    late = story.commit(lease, "wolf")
    assert late.span is story.spans[-1]
    story.pass_all()
    assert story.state.audited
    assert late.outcome is Status.ACCEPTED


# ---- what is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "first", "later"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 1), (5, 2, 1), (8, 2, 1), (9, 3, 1), (31, 8, 1), (32, 8, 1)],
)
def test_a_workers_first_span_is_looked_at_closer(shards: int, first: int, later: int) -> None:
    terms = TrainStory().terms
    assert sample_size(terms, shards, first=True) == first
    assert sample_size(terms, shards, first=False) == later


def test_a_first_span_is_audited_no_less_than_a_later_one() -> None:
    terms = TrainStory(audit_shards=4).terms
    assert sample_size(terms, 8, first=True) == 4
    assert sample_size(terms, 3, first=True) == 3
    assert sample_size(terms, 8, first=False) == 4
    assert sample_size(terms, 3, first=False) == 3


@pytest.mark.parametrize("first", [True, False])
def test_with_few_shards_a_round_every_shard_is_audited(first: bool) -> None:
    for few in (1, 2, 3):
        assert sample_size(TrainStory(shards=few).terms, 32, first=first) == 32
    assert sample_size(TrainStory(shards=4).terms, 32, first=first) < 32


def test_the_first_span_of_every_worker_is_on_probation() -> None:
    story = TrainStory(rounds=20)
    for _ in range(20):
        story.round("wanda", "wanda", "will", "will")
    assert sizes(story) == {"wanda": [32, 8], "will": [32, 8]}
    firsts, others = story.spans[:2], story.spans[2:]
    assert [(span.probation, span.sample) for span in firsts] == [(True, 8)] * 2
    assert [(span.probation, span.sample) for span in others] == [(False, 1)] * 2


def test_short_spans_do_not_end_probation_before_as_many_works_as_a_full_one_has() -> None:
    story = TrainStory(rounds=4, span_shards=4, probation_span_shards=2)
    story.deliver(["wanda"], [0])
    leave(story, "wanda")
    story.deliver(["wanda", "wanda"], [1, 2])
    leave(story, "wanda")
    story.deliver(["wanda"], [3])
    story.close_round()
    story.round("wanda")
    assert sizes(story) == {"wanda": [1, 2, 4]}
    assert [(span.probation, span.sample) for span in story.spans] == [
        (True, 1),
        (True, 1),
        (True, 2),
    ]


def test_a_worker_that_leaves_pays_for_the_audit_of_what_it_leaves_behind() -> None:
    story = TrainStory(rounds=4, span_shards=4, probation_span_shards=2)
    story.round("wanda")
    story.deliver(["wanda"], [0])
    leave(story, "wanda")
    assert sizes(story) == {"wanda": [4, 1]}
    last = story.spans[1]
    assert (last.probation, last.sample) == (True, 1)


def test_a_rejected_span_without_works_does_not_count_as_the_first() -> None:
    story = TrainStory()
    assert leave(story, "wanda") is None
    story.deliver(["wanda"], [0])
    span = leave(story, "wanda")
    assert span is not None
    assert span.probation


def test_the_beacon_is_that_of_the_head_in_which_a_span_closes() -> None:
    story = TrainStory(span_shards=2)
    story.committed(0, "wanda")
    story.at(9)
    story.committed(1, "wanda")
    (span,) = story.spans
    assert span.beacon_height == 9 + LAG
    story.at(9 + LAG - 1)
    assert span.track is None
    assert story.state.needed_beacons(9 + LAG) == {9 + LAG}
    story.at(9 + LAG)
    assert span.track is not None
    assert span.track.kind is AuditKind.FIRST


# ---- one audit -------------------------------------------------------------------------------


def closed_span(shards: int = 8, **terms: Any) -> tuple[TrainStory, Span]:
    """Return a story in which wanda's first span of so many shards has an audit open."""
    story = TrainStory(**{"span_shards": shards, "rounds": shards, **terms})
    for _ in range(-(-shards // 4)):
        story.round("wanda")
    span = story.opened()[0]
    assert len(span.works) == shards
    return story, span


def test_a_challenge_draws_shards_of_the_span() -> None:
    story, span = closed_span()
    assert span.track is not None
    challenge = story.challenge(span)
    nonce = challenge.nonce
    assert challenge.commitments == span.hash
    assert challenge.drawn == drawn_rows(span.hash, beacon(span.beacon_height), nonce, 8, 8)
    assert story.say(span.track.auditor, challenge) is None


@pytest.mark.parametrize("drawn", [(), (0,), (1, 0), (0, 8), tuple(range(9)), (2**32 - 1,)])
def test_a_challenge_with_another_draw_has_no_effect(drawn: tuple[int, ...]) -> None:
    story, span = closed_span(32, rounds=32)
    assert span.track is not None
    right = story.challenge(span)
    assert len(right.drawn) == 8
    wrong = right.model_copy(update={"drawn": drawn})
    why = story.say(span.track.auditor, wrong)
    assert why == "rows drawn do not follow from beacon and nonce"
    assert story.say(span.track.auditor, right) is None


def test_a_work_in_a_span_is_not_challenged_by_itself() -> None:
    story, span = closed_span()
    assert span.track is not None
    wrong = story.challenge(span, commitments=span.works[0].hash)
    assert story.say(span.track.auditor, wrong) == "challenge of an unknown commitment"


def test_a_verdict_on_a_span_is_bound_to_its_first_shard() -> None:
    story, span = closed_span()
    assert span.track is not None
    auditor = span.track.auditor
    challenge = story.sign(auditor, story.challenge(span))
    assert story.state.apply(challenge) is None
    wrong = story.verdict(span, challenge, shard=1)
    assert story.say(auditor, wrong) == "verdict is bound to another shard"
    assert story.say(auditor, story.verdict(span, challenge)) is None


def test_an_auditor_claims_no_more_than_the_units_of_its_draw() -> None:
    story, span = closed_span(32, rounds=32)
    auditor, verdict = story.judge(span)
    most = 8 * UNITS
    assert span.units_of(span.drawn_now()) == most
    greedy = story.attestation(span, verdict, units_reexecuted=most + 1)
    why = f"attestation claims more than the {most} units of its draw"
    assert story.say(auditor, greedy) == why
    assert story.say(auditor, story.attestation(span, verdict)) is None


def test_what_passes_its_audit_is_accepted_whole() -> None:
    story, span = closed_span()
    story.audit(span)
    assert span.status is Status.ACCEPTED
    assert {work.outcome for work in span.works} == {Status.ACCEPTED}
    assert {work.status for work in span.works} == {Status.PENDING}, "the span's word counts"


def test_no_auditor_takes_its_own_span() -> None:
    story = TrainStory(span_shards=1)
    story.committed(0, "v0")
    (span,) = story.opened()
    assert span.track is not None
    assert set(span.track.order) == {person("v1").address, person("v2").address}


def test_an_auditor_that_does_not_challenge_a_span_is_replaced() -> None:
    story, span = closed_span()
    assert span.track is not None
    first, second = span.track.order[:2]
    late = story.challenge(span)
    story.at(span.beacon_height + story.terms.challenge_blocks + 1)
    assert story.say(first, late) == "challenger is not the auditor whose turn it is"
    assert span.track.auditor == second
    story.audit(span)
    assert span.status is Status.ACCEPTED


# ---- objections ------------------------------------------------------------------------------


def test_one_auditor_alone_rejects_no_span() -> None:
    story, span = closed_span()
    story.audit(span, MISMATCH)
    assert span.status is Status.PENDING
    assert span.track is not None
    assert span.track.kind is AuditKind.CONFIRM


def test_the_confirming_auditor_takes_the_first_ones_draw() -> None:
    story, span = closed_span(32, rounds=32)
    story.audit(span, MISMATCH)
    drawn = span.findings[0].challenge.message.drawn
    assert span.track is not None
    own = drawn_rows(span.hash, beacon(span.beacon_height), b"\x02" * 32, 32, 8)
    assert own != drawn
    wrong = story.challenge(span, nonce=b"\x02" * 32, drawn=own)
    assert story.say(span.track.auditor, wrong) == "rows drawn do not follow from beacon and nonce"
    assert story.say(span.track.auditor, story.challenge(span, nonce=b"\x02" * 32)) is None
    assert span.drawn_now() == drawn


def test_two_auditors_with_equal_digests_reject_a_span_and_all_that_is_unsettled() -> None:
    story = TrainStory(rounds=6, span_shards=4, max_unsettled=96)
    story.round("wolf")
    story.pass_all()
    assert story.cut() is None
    story.round("wolf")
    settled, passed = story.spans
    story.pass_all()
    story.round("wolf")
    bad = story.opened()[0]
    lease = story.lease(1, "wolf")
    later = story.committed(0, "wolf")
    story.reject(bad)
    assert [span.status for span in (settled, passed, bad)] == [
        Status.ACCEPTED,
        Status.VOID,
        Status.REJECTED,
    ]
    assert later.outcome is Status.VOID
    assert story.state.leases[lease].ended is LeaseEndReason.REJECTED
    assert story.state.free_shards() == [0, 1, 2, 3]
    assert bad.settled
    assert passed.hash not in story.state.audits.open


def test_a_second_auditor_that_finds_nothing_overrules_the_first() -> None:
    story, span = closed_span()
    story.audit(span, MISMATCH)
    story.audit(span)
    assert span.status is Status.ACCEPTED
    assert [finding.in_majority for finding in span.findings] == [False, True]


def test_three_different_results_are_decided_by_the_next_two_or_by_nobody() -> None:
    story = TrainStory(members=5, span_shards=1)
    story.committed(0, "wolf")
    (span,) = story.opened()
    for _ in range(3):
        story.audit(span, MISMATCH)
        assert span.status is Status.PENDING
    first = span.findings[0].attestation.digest
    story.audit(span, MISMATCH, agrees_with=first)
    assert span.status is Status.REJECTED
    assert [f.in_majority for f in span.findings] == [True, False, False, True]


def test_a_span_that_its_auditors_cannot_agree_on_is_void_and_its_worker_goes_on() -> None:
    story = TrainStory(span_shards=1)
    story.committed(0, "wolf")
    (span,) = story.opened()
    for _ in range(3):
        story.audit(span, MISMATCH)
    assert span.status is Status.VOID
    assert not story.state.workers[person("wolf").address].rejected
    assert 0 in story.state.free_shards()


def test_silence_to_two_auditors_rejects_a_span() -> None:
    story, span = closed_span()
    story.audit(span, SILENT)
    assert span.status is Status.PENDING
    story.audit(span, SILENT)
    assert (span.status, span.reason) == (Status.REJECTED, "silent")


def test_the_only_other_member_of_a_class_decides_alone() -> None:
    story = TrainStory(classes={"v1": OTHER, "v2": OTHER}, span_shards=1)
    story.committed(0, "wolf")
    (span,) = story.opened()
    story.audit(span, MISMATCH)
    assert span.status is Status.REJECTED


def test_an_accepted_span_may_be_drawn_again_and_rejected() -> None:
    story, span = closed_span(second_audit_share=1_000_000, members=4)
    first = story.audit(span)
    story.at(span.accepted_height + LAG)
    assert span.track is not None
    assert span.track.kind is AuditKind.SECOND
    assert first not in span.track.order
    story.reject(span)
    assert span.status is Status.REJECTED
    assert story.state.workers[span.worker].rejected


# ---- the openings ----------------------------------------------------------------------------


def test_a_first_auditor_reveals_only_after_the_second_has_judged() -> None:
    story, span = closed_span()
    first, verdict = story.judge(span)
    assert story.say(first, story.attestation(span, verdict, MISMATCH)) is None
    assert story.say(first, story.reveal(verdict)) == "too early: a later auditor could copy it"
    story.judge(span)
    assert story.say(first, story.reveal(verdict)) is None


# ---- terms -----------------------------------------------------------------------------------


def test_beacons_of_lost_heads_are_those_of_later_terms_than_the_assignment() -> None:
    terms = TrainStory().terms
    lost = [(2, 30), (1, 20), (1, 20), (1, 10)]
    assert lost_beacons(terms, lost, 0) == (10 + LAG, 20 + LAG, 30 + LAG)
    assert lost_beacons(terms, lost, 1) == (30 + LAG,)
    assert lost_beacons(terms, lost, 2) == ()


def last_round(story: TrainStory) -> None:
    """Deliver the last round but for its close."""
    story.round("wanda", "will")
    story.deliver(["wanda", "will"])


def test_spans_that_a_lost_head_may_have_closed_are_audited_under_its_beacon_too() -> None:
    story = TrainStory(members=4)
    last_round(story)
    story.at(9)
    close = story.sign("oscar", story.close())
    # The head of height 9 that held the close is lost; the next term enters it again.
    story.at(20, term=1)
    assert story.state.apply(story.term_start(1, 9)) is None
    assert story.state.apply(close) is None
    assert sizes(story) == {"wanda": [4], "will": [4]}
    for span in story.spans:
        assert (span.beacon_height, span.lost_beacons) == (20 + LAG, (9 + LAG,))
    for span in story.opened():
        first = story.audit(span)
        story.at(span.accepted_height + LAG)
        assert span.track is not None
        assert (span.track.kind, span.track.beacon_height) == (AuditKind.SECOND, 9 + LAG)
        assert first not in span.track.order


def test_spans_of_a_later_term_are_not_those_of_a_lost_head() -> None:
    story = TrainStory(span_shards=2)
    story.at(20, term=1)
    assert story.state.apply(story.term_start(1, 9)) is None
    story.deliver(["wanda"], [0, 1])
    assert story.spans[0].lost_beacons == ()


def test_a_span_with_one_work_of_the_former_term_may_have_been_closed_in_it() -> None:
    story = TrainStory(span_shards=2)
    story.committed(0, "wanda")
    story.at(20, term=1)
    assert story.state.apply(story.term_start(1, 9)) is None
    story.committed(1, "wanda")
    assert story.spans[0].lost_beacons == (9 + LAG,)


def test_a_lost_head_beyond_the_new_terms_first_has_no_beacon_to_wait_for() -> None:
    story = TrainStory(span_shards=1)
    lease = story.lease(0, "wanda")
    story.at(20, term=1)
    assert story.state.apply(story.term_start(1, 9, 21, 2**63)) is None
    story.commit(lease, "wanda")
    (span,) = story.spans
    assert span.lost_beacons == (9 + LAG,)
    assert story.state.needed_beacons(20 + LAG) == {9 + LAG, 20 + LAG}


def test_a_term_start_whose_votes_are_none_has_no_effect() -> None:
    story = TrainStory()
    story.at(20, term=1)
    start = story.term_start(1, 9).message
    assert story.state.apply(story.sign("oscar", start, (b"no vote",))) is not None


def told(*, lost: bool) -> TrainStory:
    """Tell a job in which the head that holds its last close is, or is not, lost."""
    story = TrainStory(members=4)
    last_round(story)
    story.at(9)
    close = story.sign("oscar", story.close())
    if lost:
        story.at(9, term=1)
        assert story.state.apply(story.term_start(1, 9)) is None
    assert story.state.apply(close) is None
    return story


def test_rounds_and_spans_that_are_entered_again_are_the_same() -> None:
    kept, again = told(lost=False), told(lost=True)
    assert kept.state.rounds.states() == again.state.rounds.states()
    assert [span.hash for span in kept.spans] == [span.hash for span in again.spans]
    for one, other in zip(kept.spans, again.spans, strict=True):
        assert (one.beacon_height, one.sample, one.probation, one.worker) == (
            other.beacon_height,
            other.sample,
            other.probation,
            other.worker,
        )
        assert [work.hash for work in one.works] == [work.hash for work in other.works]
    for story in (kept, again):
        story.pass_all()
        for span in story.opened():  # what a lost head may have closed, a second time
            story.audit(span)
        story.at(story.state.height + LAG)
        assert story.end() is None


@pytest.mark.parametrize(
    "first", [lambda s: s.stop(), lambda s: s.close_round()], ids=["stop", "last round"]
)
def test_a_work_is_in_one_span_whatever_happens_afterwards(
    first: Callable[[TrainStory], object],
) -> None:
    story = TrainStory(rounds=1)
    lease = story.lease(3, "wolf")
    story.deliver(["wanda", "will"], [0, 1])
    first(story)
    spans = story.spans
    assert len(spans) == 2
    story.at(3)
    story.stop()
    story.say("oscar", story.close())
    assert story.end_lease(lease) is None
    assert story.spans == spans


def test_a_spans_name_binds_its_works_and_their_order() -> None:
    story, span = closed_span(4)
    names = [work.hash for work in span.works]
    assert span.hash == digest(b"meshd.span.v1\0" + b"".join(names))
    assert span.hash != digest(b"meshd.span.v1\0" + b"".join(reversed(names)))
    assert len({work.hash for work in story.state.works.values()}) == len(story.state.works)


def test_inference_has_no_spans() -> None:
    story = Story()
    work = story.work(0)
    assert work.span is None
    assert story.state.subjects == {work.hash: work}
    story.stop()
    assert story.state.subjects == {work.hash: work}
