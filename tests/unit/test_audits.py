"""How one commitment is audited: each rule, and what happens to who breaks it."""

from __future__ import annotations

import pytest
from sim.logkit import UNITS, Story, person

from meshd.ledger.audits import Status
from meshd.p2p.messages import AuditKind, AuditResult

ACCEPTED, MISMATCH = AuditResult.ACCEPTED, AuditResult.MISMATCH
SILENT, MALFORMED = AuditResult.SILENT, AuditResult.MALFORMED


def test_an_audit_that_finds_equal_rows_accepts_the_work() -> None:
    story = Story()
    work = story.work(0)
    story.audit(work)
    assert work.status is Status.ACCEPTED


def test_no_audit_is_open_before_the_beacon() -> None:
    story = Story()
    work = story.committed(0)
    story.at(work.beacon_height - 1)
    assert work.track is None
    story.at(work.beacon_height)
    assert work.track is not None
    assert work.track.kind is AuditKind.FIRST


def test_the_worker_never_audits_itself() -> None:
    story = Story()
    for shard in range(4):
        work = story.committed(shard, "v0") if not shard else None
        if work is not None:
            story.at(work.beacon_height)
            assert work.track is not None
            assert person("v0").address not in work.track.order


def test_a_work_that_nobody_may_audit_is_void() -> None:
    story = Story(members=1)
    work = story.work(0, "v0")
    assert work.status is Status.VOID


# ---- challenges ------------------------------------------------------------------------------


def test_only_the_drawn_auditor_challenges() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    other = work.track.order[1]
    why = story.say(other, story.challenge(work))
    assert why == "challenger is not the auditor whose turn it is"


@pytest.mark.parametrize(
    "change",
    [
        {"drawn": (0, 1, 2, 3)},
        {"nonce": b"\x02" * 32, "drawn": (0, 1, 2, 4)},
        {"audit_kind": int(AuditKind.SECOND)},
        {"beacon_height": 5},
        {"draw_index": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_challenge_that_does_not_follow_from_the_beacon_has_no_effect(
    change: dict[str, object],
) -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    assert story.say(work.track.auditor, story.challenge(work, **change)) is not None
    assert work.track.challenge is None


def test_an_auditor_challenges_once() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    assert story.say(work.track.auditor, story.challenge(work)) is None
    again = story.challenge(work, nonce=b"\x07" * 32)
    assert story.say(work.track.auditor, again) == "challenged already"


def test_an_auditor_that_does_not_challenge_is_replaced_by_the_next() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    first, second = work.track.order[:2]
    late = story.challenge(work)
    story.at(work.beacon_height + story.terms.challenge_blocks + 1)
    assert story.say(first, late) == "challenger is not the auditor whose turn it is"
    assert work.track.auditor == second
    assert story.say(second, story.challenge(work)) is None


def test_a_challenge_in_the_last_block_is_in_time() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    first = work.track.auditor
    story.at(work.beacon_height + story.terms.challenge_blocks)
    assert story.say(first, story.challenge(work)) is None


def test_an_auditor_that_does_not_attest_in_time_is_replaced_and_its_word_does_not_count() -> None:
    story = Story()
    work = story.work(0)
    first, verdict = story.judge(work)
    late = story.attestation(work, verdict)
    story.at(work.beacon_height + 100)
    assert story.say(first, late) is not None
    assert work.status is Status.PENDING
    assert work.track is not None
    assert work.track.auditor != first


# ---- verdicts and attestations ---------------------------------------------------------------


def test_an_attestation_needs_a_verdict_first() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    auditor = work.track.auditor
    challenge = story.sign(auditor, story.challenge(work))
    assert story.state.apply(challenge) is None
    unlogged = story.sign(auditor, story.verdict(work, challenge))
    why = story.say(auditor, story.attestation(work, unlogged))
    assert why == "attestation without a verdict of this slot"


@pytest.mark.parametrize("change", [{"shard": 3}, {"attempt": 9}, {"draw_index": 4}])
def test_a_verdict_is_bound_to_its_shard_attempt_and_slot(change: dict[str, int]) -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    auditor = work.track.auditor
    challenge = story.sign(auditor, story.challenge(work))
    assert story.state.apply(challenge) is None
    why = story.say(auditor, story.verdict(work, challenge, **change))
    assert why == "verdict is bound to another shard"


def test_a_verdict_is_its_auditors_own_and_the_only_one() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    auditor, other = work.track.order[:2]
    challenge = story.sign(auditor, story.challenge(work))
    assert story.state.apply(challenge) is None
    assert story.say(other, story.verdict(work, challenge)) is not None
    assert story.say(auditor, story.verdict(work, challenge)) is None
    assert story.say(auditor, story.verdict(work, challenge, salted=b"\x05" * 32)) is not None


def test_accepting_means_holding_the_output() -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    why = story.say(auditor, story.attestation(work, verdict, holds_output=False))
    assert why == "accepted without holding the output"
    assert work.status is Status.PENDING


def test_another_member_cannot_attest_in_an_auditors_place() -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    other = next(member for member in story.genesis.committee if member != auditor)
    assert story.say(other, story.attestation(work, verdict)) is not None
    assert story.say(other, story.attestation(work, verdict, validator=other)) is not None
    assert work.status is Status.PENDING


@pytest.mark.parametrize("change", [{"audit_kind": 2}, {"draw_index": 1}, {"result": 9}])
def test_an_attestation_names_its_audit_and_a_known_result(change: dict[str, int]) -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    wrong = story.attestation(work, verdict).model_copy(update=change)
    assert story.say(auditor, wrong) is not None
    assert work.status is Status.PENDING


def test_an_attestation_claims_no_more_units_than_its_draw() -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    claim = story.attestation(work, verdict, units_reexecuted=UNITS)
    assert "claims more than" in (story.say(auditor, claim) or "")


# ---- rejection -------------------------------------------------------------------------------


def test_two_auditors_who_agree_reject_a_work() -> None:
    story = Story()
    work = story.work(0)
    story.reject(work)
    assert work.status is Status.REJECTED
    assert work.reason == "mismatch"
    assert len({finding.auditor for finding in work.findings}) == 2


def test_the_confirming_auditor_takes_the_first_ones_rows() -> None:
    story = Story()
    work = story.work(0)
    story.audit(work, MISMATCH)
    first = work.findings[0]
    assert work.track is not None
    assert work.track.kind is AuditKind.CONFIRM
    assert work.track.drawn == first.challenge.message.drawn
    assert first.auditor not in work.track.order
    own = story.challenge(work, drawn=(0, 1, 2, 5))
    assert story.say(work.track.auditor, own) == "rows drawn do not follow from beacon and nonce"


@pytest.mark.parametrize("accusation", [MISMATCH, MALFORMED, SILENT])
def test_a_false_accusation_is_overruled_and_not_in_the_majority(accusation: AuditResult) -> None:
    story = Story()
    work = story.work(0)
    story.audit(work, accusation)
    assert work.status is Status.PENDING
    story.audit(work)
    assert work.status is Status.ACCEPTED
    assert [finding.in_majority for finding in work.findings] == [False, True]


def test_two_different_findings_reject_nothing() -> None:
    story = Story(members=4)
    work = story.work(0)
    story.audit(work, MISMATCH)
    story.audit(work, MISMATCH)  # agrees with nobody
    assert work.status is Status.PENDING
    assert work.track is not None
    assert work.track.kind is AuditKind.CONFIRM


def test_auditors_who_never_agree_make_a_work_void_and_are_not_in_the_majority() -> None:
    story = Story()
    work = story.work(0)
    for _ in range(3):
        story.audit(work, MISMATCH)
    assert work.status is Status.VOID
    assert not any(finding.in_majority for finding in work.findings)


def test_a_third_auditor_decides_between_two_who_differ() -> None:
    story = Story()
    work = story.work(0)
    story.audit(work, MISMATCH)
    story.audit(work, MISMATCH)
    story.audit(work, MISMATCH, agrees_with=work.findings[0].attestation.digest)
    assert work.status is Status.REJECTED
    assert [finding.in_majority for finding in work.findings] == [True, False, True]


def test_two_who_were_opened_malformed_rows_reject() -> None:
    story = Story()
    work = story.work(0)
    story.audit(work, MALFORMED)
    story.audit(work, MALFORMED, agrees_with=work.findings[0].attestation.digest)
    assert work.status is Status.REJECTED
    assert work.reason == "malformed"


def test_silence_before_its_time_has_no_effect() -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    story.at(story.state.height + story.terms.silence - 1)
    claim = story.attestation(work, verdict, SILENT)
    assert story.say(auditor, claim) == "the worker still has time to open"


def test_a_worker_that_two_found_silent_is_rejected() -> None:
    story = Story()
    work = story.work(0)
    story.audit(work, SILENT)
    assert work.status is Status.PENDING
    story.audit(work, SILENT)
    assert work.status is Status.REJECTED
    assert work.reason == "silent"


def test_one_silence_and_one_accusation_are_not_two_of_a_kind() -> None:
    story = Story()
    work = story.work(0)
    story.audit(work, SILENT)
    story.audit(work, MISMATCH)
    assert work.status is Status.PENDING
    story.audit(work)
    assert work.status is Status.ACCEPTED
    assert [finding.in_majority for finding in work.findings] == [False, False, True]


def test_one_silence_and_one_accusation_reject_nobody_even_if_no_third_is_left() -> None:
    story = Story(members=2)
    work = story.work(0)
    story.audit(work, MISMATCH)
    story.audit(work, SILENT)
    assert work.status is Status.VOID
    assert not story.state.workers[work.worker].rejected


def test_in_a_committee_of_one_its_word_decides() -> None:
    story = Story(members=1)
    work = story.work(0)
    story.audit(work, MISMATCH)
    assert work.status is Status.REJECTED


# ---- second audits ---------------------------------------------------------------------------


def test_an_accepted_work_is_settled_only_when_its_second_audit_is_decided() -> None:
    story = Story(second_audit_share=0)
    work = story.work(0)
    story.audit(work)
    assert not work.settled
    story.at(work.accepted_height + story.terms.lag - 1)
    assert not work.settled
    story.at(work.accepted_height + story.terms.lag)
    assert work.settled


def test_a_second_audit_has_another_auditor_and_can_reject_what_was_accepted() -> None:
    story = Story(second_audit_share=1_000_000)
    work = story.work(0)
    first = story.audit(work)
    story.at(work.accepted_height + story.terms.lag)
    assert work.track is not None
    assert work.track.kind is AuditKind.SECOND
    assert first not in work.track.order
    story.reject(work)
    assert work.status is Status.REJECTED


def test_what_a_lost_head_held_is_audited_again_under_its_beacon() -> None:
    story = Story(second_audit_share=0)
    work = story.committed(0)
    work.lost_beacons = (work.beacon_height - 1,)
    story.at(work.beacon_height)
    story.audit(work)
    story.at(work.accepted_height + story.terms.lag)
    assert work.track is not None
    assert work.track.kind is AuditKind.SECOND
    assert work.track.beacon_height == work.beacon_height - 1


# ---- reveals ---------------------------------------------------------------------------------


def test_a_verdict_is_not_revealed_while_somebody_could_copy_it() -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    assert story.say(auditor, story.attestation(work, verdict)) is None
    why = story.say(auditor, story.reveal(verdict))
    assert why == "too early: a later auditor could copy it"
    story.at(work.accepted_height + story.terms.lag)
    assert story.say(auditor, story.reveal(verdict)) is None


def test_the_first_verdict_is_revealed_once_the_second_is_committed() -> None:
    story = Story()
    work = story.work(0)
    first, verdict = story.judge(work)
    assert story.say(first, story.attestation(work, verdict, MISMATCH)) is None
    assert story.say(first, story.reveal(verdict)) is not None
    story.judge(work)
    assert story.say(first, story.reveal(verdict)) is None


def test_everything_may_be_revealed_when_the_job_has_ended() -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    assert story.say(auditor, story.attestation(work, verdict)) is None
    assert story.stop() is None
    assert story.end(2) is None
    assert story.say(auditor, story.reveal(verdict)) is None


@pytest.mark.parametrize("change", [{"salt": b"\x02" * 32}, {"digest": b"\x02" * 32}])
def test_a_reveal_must_open_its_verdict(change: dict[str, bytes]) -> None:
    story = Story()
    work = story.work(0)
    auditor, verdict = story.judge(work)
    assert story.say(auditor, story.attestation(work, verdict)) is None
    story.at(work.accepted_height + story.terms.lag)
    assert story.say(auditor, story.reveal(verdict, **change)) == "does not open the verdict"
    other = next(member for member in story.genesis.committee if member != auditor)
    assert story.say(other, story.reveal(verdict)) == "revealed already, or by another"
    assert story.say(auditor, story.reveal(verdict)) is None
    assert story.say(auditor, story.reveal(verdict, **change)) is not None
