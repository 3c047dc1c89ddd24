"""The job log: what a head, a certificate and a term start must be, and what is final."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sim.logkit import DOMAIN, JOB, Story, genesis_of, person

from meshd.ledger.joblog import (
    Batch,
    Genesis,
    JobLog,
    LogError,
    VoteContent,
    check_certificate,
    entries_root,
    open_vote,
    term_start,
)
from meshd.p2p.codec import Signed, encode
from meshd.p2p.messages import Certificate, LogHead, Message, Offer, TermStart, TermVote

GENESIS = genesis_of(3)


def head_of(
    prev: Signed[LogHead] | None,
    entries: Sequence[Signed[Message]] = (),
    *,
    signer: str = "oscar",
    **over: Any,
) -> Signed[LogHead]:
    """Return the head after *prev* over *entries*; *over* replaces fields."""
    before = prev.message if prev else None
    values: dict[str, Any] = {
        "job_id": JOB,
        "term": before.term if before else 0,
        "seq": before.seq + 1 if before else 1,
        "prev": prev.digest if prev else GENESIS.hash,
        "start": before.start if before else GENESIS.start,
        "entries_root": entries_root(entries),
        "height": before.height + 2 if before else 3,
        "block_hash": b"\x01" * 32,
    }
    return DOMAIN.sign(person(signer), LogHead(**(values | over)))


def certificate_of(head: Signed[LogHead], *members: str, **over: Any) -> Certificate:
    """Return the certificate of *head* by *members*."""
    names = members or ("v0", "v1")
    values: dict[str, Any] = {
        "job_id": JOB,
        "head_hash": head.digest,
        "signers": tuple(person(name).address for name in names),
        "signatures": tuple(person(name).sign(head.digest) for name in names),
    }
    return Certificate(**(values | over))


def batch_of(
    prev: Signed[LogHead] | None,
    entries: Sequence[Signed[Message]] = (),
    **over: Any,
) -> Batch:
    """Return a certified batch after *prev*."""
    head = head_of(prev, entries, **over)
    return Batch(head, tuple(entries), certificate_of(head))


def vote_of(
    member: str,
    term: int,
    high: Batch | None = None,
    signed: Sequence[Signed[LogHead]] = (),
    **over: Any,
) -> Signed[TermVote]:
    """Return a member's vote."""
    attached = tuple(head.raw for head in signed)
    if high is not None and high.certificate is not None:
        attached = (high.head.raw, encode(high.certificate), *attached)
    values: dict[str, Any] = {
        "job_id": JOB,
        "term": term,
        "orchestrator": GENESIS.orchestrator,
        "high": high.head.digest if high else GENESIS.hash,
        "signed": tuple(head.digest for head in signed),
    }
    return DOMAIN.sign(person(member), TermVote(**(values | over)), attached=attached)


def opened(*votes: Signed[TermVote]) -> list[VoteContent]:
    """Return checked votes."""
    return [open_vote(DOMAIN, GENESIS, vote.raw) for vote in votes]


def start_of(term: int, *votes: Signed[TermVote]) -> Signed[TermStart]:
    """Return the orchestrator's start of *term* on *votes*."""
    message, attached, _ = term_start(GENESIS, term, opened(*votes))
    return DOMAIN.sign(person("oscar"), message, attached=attached)


def begun(prev: Batch, start: Signed[TermStart]) -> Batch:
    """Return the first batch of the term that *start* begins."""
    message = start.message
    return batch_of(prev.head, [start], term=message.term, start=start.digest)


@pytest.fixture
def log() -> JobLog:
    """An empty log."""
    return JobLog(DOMAIN, GENESIS)


def test_certified_heads_follow_one_another(log: JobLog) -> None:
    first = batch_of(None)
    second = batch_of(first.head)
    log.add(first)
    log.add(second)
    log.add(first)  # again: nothing happens
    assert [batch.head for batch in log.batches] == [first.head, second.head]
    assert log.tip == second.head


def test_a_head_is_final_once_a_certified_one_of_its_term_follows(log: JobLog) -> None:
    first = batch_of(None)
    log.add(first)
    assert list(log.final) == []
    log.add(batch_of(first.head))
    assert list(log.final) == [first]


@pytest.mark.parametrize(
    "change",
    [
        {"signer": "v0"},
        {"job_id": b"\x01" * 32},
        {"seq": 3},
        {"height": 1},
        {"entries_root": b"\x01" * 32},
        {"term": 1},
        {"start": b"\x01" * 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_head_that_breaks_the_chain_is_refused(log: JobLog, change: dict[str, Any]) -> None:
    first = batch_of(None)
    log.add(first)
    with pytest.raises(LogError):
        log.add(batch_of(first.head, **change))
    assert log.tip == first.head


def test_a_batch_whose_predecessor_is_not_here_is_refused(log: JobLog) -> None:
    first = batch_of(None)
    with pytest.raises(LogError, match="not here"):
        log.add(batch_of(first.head))


def test_a_batch_holds_the_entries_that_its_head_binds(log: JobLog) -> None:
    story = Story()
    entry = story.sign("oscar", story.assignment(0, "wanda"))
    head = head_of(None, [entry])
    with pytest.raises(LogError, match="binds other entries"):
        log.add(Batch(head, (), certificate_of(head)))
    log.add(Batch(head, (entry,), certificate_of(head)))


def test_only_kinds_of_the_log_are_entries(log: JobLog) -> None:
    offer = Offer(job_id=JOB, payee=bytes(20), ask=0, slots=1, numeric_class=bytes(32))
    entry = DOMAIN.sign(person("wanda"), offer)
    with pytest.raises(LogError, match="no entry of a job log"):
        log.add(batch_of(None, [entry]))


# ---- certificates ----------------------------------------------------------------------------


def refused(certificate: Certificate, head: Signed[LogHead], genesis: Genesis = GENESIS) -> str:
    """Return why a certificate is not one."""
    with pytest.raises(LogError) as caught:
        check_certificate(genesis, head.digest, certificate)
    return str(caught.value)


def test_a_quorum_of_members_certifies() -> None:
    head = head_of(None)
    check_certificate(GENESIS, head.digest, certificate_of(head, "v0", "v2"))


def test_less_than_a_quorum_certifies_nothing() -> None:
    head = head_of(None)
    assert "the quorum is 2" in refused(certificate_of(head, "v0"), head)


def test_one_member_counts_once() -> None:
    head = head_of(None)
    assert "twice" in refused(certificate_of(head, "v0", "v0"), head)


def test_nobody_outside_the_committee_counts() -> None:
    head = head_of(None)
    assert "not in the committee" in refused(certificate_of(head, "v0", "wanda"), head)


def test_signatures_are_over_this_head() -> None:
    head, other = head_of(None), head_of(None, height=9)
    forged = certificate_of(other, "v0", "v1", head_hash=head.digest)
    assert "signature" in refused(forged, head)
    assert "another head" in refused(certificate_of(other), head)


def test_every_signer_has_one_signature() -> None:
    head = head_of(None)
    good = certificate_of(head, "v0", "v1")
    short = good.model_copy(update={"signatures": good.signatures[:1]})
    assert "one signature for each" in refused(short, head)


def test_a_batch_without_certificate_is_refused(log: JobLog) -> None:
    with pytest.raises(LogError, match="no certificate"):
        log.add(Batch(head_of(None), ()))


# ---- terms -----------------------------------------------------------------------------------


def test_a_term_begins_on_a_quorum_of_votes_and_extends_the_highest_head(log: JobLog) -> None:
    first = batch_of(None)
    second = batch_of(first.head)
    start = start_of(1, vote_of("v0", 1, first), vote_of("v1", 1, second))
    assert start.message.prev == second.head.digest
    assert start.message.seq == 3
    for batch in (first, second, begun(second, start)):
        log.add(batch)
    assert log.tip is not None
    assert log.tip.message.term == 1


def test_less_than_a_quorum_of_votes_starts_nothing() -> None:
    first = batch_of(None)
    with pytest.raises(LogError, match="2 needed"):
        term_start(GENESIS, 1, opened(vote_of("v0", 1, first)))
    with pytest.raises(LogError, match="2 needed"):
        term_start(GENESIS, 1, opened(vote_of("v0", 1, first), vote_of("v0", 1, None)))
    with pytest.raises(LogError, match="not for term"):
        term_start(GENESIS, 2, opened(vote_of("v0", 1, first), vote_of("v1", 2, first)))


def test_heads_that_voters_signed_above_the_start_are_lost() -> None:
    first = batch_of(None)
    uncertified = head_of(first.head)
    start = start_of(1, vote_of("v0", 1, first, [uncertified]), vote_of("v1", 1, first))
    assert start.message.lost == (uncertified.digest,)


def test_a_certified_head_among_the_votes_is_not_lost() -> None:
    first = batch_of(None)
    second = batch_of(first.head)
    start = start_of(1, vote_of("v0", 1, first, [second.head]), vote_of("v1", 1, second))
    assert start.message.lost == ()


def test_a_start_that_leaves_out_what_votes_list_is_refused(log: JobLog) -> None:
    first = batch_of(None)
    log.add(first)
    uncertified = head_of(first.head)
    honest = start_of(1, vote_of("v0", 1, first, [uncertified]), vote_of("v1", 1, first))
    hiding = DOMAIN.sign(
        person("oscar"),
        honest.message.model_copy(update={"lost": ()}),
        attached=honest.attached,
    )
    with pytest.raises(LogError, match="does not follow from its votes"):
        log.add(begun(first, hiding))
    log.add(begun(first, honest))


def test_only_the_orchestrator_starts_a_term(log: JobLog) -> None:
    first = batch_of(None)
    log.add(first)
    honest = start_of(1, vote_of("v0", 1, first), vote_of("v1", 1, first))
    forged = DOMAIN.sign(person("v0"), honest.message, attached=honest.attached)
    with pytest.raises(LogError, match="does not follow"):
        log.add(begun(first, forged))


def test_a_term_start_is_the_first_entry_and_comes_once(log: JobLog) -> None:
    story = Story()
    first = batch_of(None)
    log.add(first)
    start = start_of(1, vote_of("v0", 1, first), vote_of("v1", 1, first))
    entry = story.sign("oscar", story.assignment(0, "wanda"))
    late = batch_of(first.head, [entry, start], term=1, start=start.digest)
    with pytest.raises(LogError, match="not the first entry"):
        log.add(late)
    opening = begun(first, start)
    log.add(opening)
    with pytest.raises(LogError):
        log.add(batch_of(opening.head, [start]))


def test_a_higher_term_drops_what_was_certified_and_not_final(log: JobLog) -> None:
    first = batch_of(None)
    second = batch_of(first.head)
    third = batch_of(second.head)
    for batch in (first, second, third):
        log.add(batch)
    start = start_of(1, vote_of("v0", 1, second), vote_of("v1", 1, second))
    opening = begun(second, start)
    log.add(opening)
    assert [batch.head for batch in log.batches] == [first.head, second.head, opening.head]
    assert list(log.final) == [first, second]


def test_nothing_drops_a_final_head(log: JobLog) -> None:
    first = batch_of(None)
    second = batch_of(first.head)
    third = batch_of(second.head)
    for batch in (first, second, third):
        log.add(batch)
    start = start_of(1, vote_of("v0", 1, first), vote_of("v1", 1, first))
    with pytest.raises(LogError, match="final"):
        log.add(begun(first, start))
    assert log.tip == third.head


# ---- votes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vote",
    [
        vote_of("wanda", 1),
        vote_of("v0", 1, job_id=b"\x01" * 32),
        vote_of("v0", 1, orchestrator=person("will").address),
        DOMAIN.sign(
            person("v0"),
            TermVote(
                job_id=JOB,
                term=1,
                orchestrator=GENESIS.orchestrator,
                high=b"\x01" * 32,
                signed=(),
            ),
        ),
    ],
    ids=["no member", "another job", "another orchestrator", "nothing attached"],
)
def test_a_vote_is_a_members_for_this_job_and_shows_what_it_names(vote: Signed[TermVote]) -> None:
    with pytest.raises(LogError):
        open_vote(DOMAIN, GENESIS, vote.raw)


def test_a_vote_lists_the_heads_it_attaches() -> None:
    first = batch_of(None)
    listed = vote_of("v0", 1, first, [head_of(first.head)])
    silent = listed.message.model_copy(update={"signed": ()})
    hidden = DOMAIN.sign(person("v0"), silent, attached=listed.attached)
    with pytest.raises(LogError):
        open_vote(DOMAIN, GENESIS, hidden.raw)


def test_a_votes_highest_head_is_certified() -> None:
    head = head_of(None)
    uncertified = Batch(head, (), certificate_of(head, "v0"))
    with pytest.raises(LogError, match="the quorum is 2"):
        open_vote(DOMAIN, GENESIS, vote_of("v0", 1, uncertified).raw)
