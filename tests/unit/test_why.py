"""Why a job is not further: the reason of each pending shard and of each node."""

from __future__ import annotations

from typing import Any

import pytest
from sim.logkit import LAG, LeaseEndReason, Story, person, terms_of

from meshd.ledger.jobstate import JobState
from meshd.node.why import Candidate, ShardReason, job_text, node_reasons, shard_reasons
from meshd.p2p.identity import NOBODY
from meshd.p2p.messages import Capability


def shard_of(story: Story, shard: int, height: int | None = None) -> ShardReason | None:
    """Return the reason of one shard, None if it is through."""
    reasons = shard_reasons(story.state, height or story.state.height)
    return next((reason for reason in reasons if reason.shard == shard), None)


def offer(name: str, *, connected: bool = True, **over: Any) -> Candidate:
    """Return a node that offers enough; *over* replaces parts of its capability."""
    values: dict[str, Any] = {
        "roles": ("worker",),
        "addresses": (),
        "device": "cpu",
        "memory_bytes": 1 << 30,
        "units_per_second": 1,
        "ask": 0,
        "issued": 1,
    }
    return Candidate(person(name).address, Capability(**(values | over)), connected)


def state_of(story: Story, candidate: Candidate, *offers: str) -> tuple[str, str]:
    """Return what is said of one node."""
    given = [person(name).address for name in offers] if offers else None
    (reason,) = [
        reason
        for reason in node_reasons(story.state, story.terms, [candidate], given)
        if reason.address == candidate.address
    ]
    return reason.state, reason.text


# ---- shards ----------------------------------------------------------------------------------


def test_a_shard_that_nobody_has_is_free() -> None:
    reason = shard_of(Story(), 2)
    assert reason is not None
    assert (reason.state, reason.worker, reason.attempt) == ("free", None, 0)
    assert reason.text == "no worker has it"


def test_a_free_shard_says_what_became_of_its_last_attempt() -> None:
    story = Story()
    story.end_lease(story.lease(0, "wanda"), LeaseEndReason.NO_PROGRESS)
    reason = shard_of(story, 0)
    assert reason is not None
    assert reason.text == "no worker has it; attempt 0 ended: no progress"
    assert reason.attempt == 1


def test_a_lease_that_its_worker_has_not_taken_up_says_so() -> None:
    story = Story()
    assert story.say("oscar", story.assignment(1, "will")) is None
    reason = shard_of(story, 1)
    assert reason is not None
    assert (reason.state, reason.worker) == ("handed-out", person("will").address)


def test_a_shard_that_is_computed_says_until_when_and_whether_that_is_over() -> None:
    story = Story()
    story.lease(1, "will")
    reason = shard_of(story, 1)
    assert reason is not None
    assert (reason.state, reason.attempt) == ("computing", 0)
    assert reason.text.endswith("the lease ends at block 61")
    late = shard_of(story, 1, height=70)
    assert late is not None
    assert late.text.endswith("block 61, 9 blocks ago")


def test_a_committed_shard_waits_for_the_block_that_draws_its_auditor() -> None:
    story = Story()
    work = story.committed(0)
    reason = shard_of(story, 0)
    assert reason is not None
    assert reason.state == "audit"
    assert f"drawn by block {work.beacon_height} (the chain is at 1)" in reason.text


def test_an_open_audit_names_its_auditor_and_what_it_is_at() -> None:
    story = Story()
    work = story.work(0)
    assert work.track is not None
    due = work.track.due(story.terms)
    begun = shard_of(story, 0)
    replaced = shard_of(story, 0, height=due + 1)
    story.judge(work)
    judged = shard_of(story, 0)
    assert begun is not None
    assert f"0x{work.track.auditor.hex()}, which has not begun: until block {due}" in begun.text
    assert replaced is not None
    assert "(the 1 before it were silent)" in replaced.text
    assert judged is not None
    assert "waits for the worker to open its rows" in judged.text


def test_a_shard_that_is_accepted_needs_no_reason() -> None:
    story = Story()
    story.audit(story.work(0))
    assert shard_of(story, 0) is None
    assert [reason.shard for reason in shard_reasons(story.state, 9)] == [1, 2, 3]


def test_a_shard_of_a_rejected_worker_is_free_and_says_why() -> None:
    story = Story()
    story.audit(story.work(0))
    work = story.work(1)
    story.lease(2, "wanda")
    story.reject(work)
    reason = shard_of(story, 1)
    assert reason is not None
    assert reason.text == "no worker has it; attempt 0 was rejected (mismatch)"
    other = shard_of(story, 2)
    assert other is not None
    assert other.text == "no worker has it; attempt 0 ended: rejected"
    void = shard_of(story, 0)
    assert void is not None
    assert void.text == "no worker has it; attempt 0 was void (its worker was rejected)"


def test_a_stopped_job_gives_its_shards_to_nobody() -> None:
    story = Story()
    assert story.stop() is None
    reason = shard_of(story, 3)
    assert reason is not None
    assert "being stopped" in reason.text


# ---- nodes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "over", "state", "text"),
    [
        ({}, {"roles": ("validator",)}, "no-worker", "its roles: validator"),
        ({}, {"roles": ()}, "no-worker", "its roles: none"),
        ({}, {"ask": 2 * 10**9}, "price", "it asks 0.000000002 MCC per 10^9 units, the job pays"),
        ({"memory_bytes": 2 << 30}, {}, "memory", "a shard takes 2147483648"),
        ({"device": "cuda"}, {}, "device", "it has a cpu, the job needs a cuda"),
        ({"workers": (person("will").address,)}, {}, "not-named", "other workers only"),
    ],
)
def test_a_node_that_does_not_match_says_in_what(
    terms: dict[str, Any], over: dict[str, Any], state: str, text: str
) -> None:
    found, said = state_of(Story(**terms), offer("wanda", **over))
    assert found == state
    assert text in said


def test_a_node_that_said_nothing_and_one_that_is_known_from_the_log_differ() -> None:
    story = Story()
    silent = Candidate(person("wanda").address, None, connected=True)
    assert state_of(story, silent)[0] == "silent"
    story.lease(0, "wanda")
    assert state_of(story, silent) == ("allowance", state_of(story, silent)[1])
    (known,) = node_reasons(story.state, story.terms, [])
    assert known.address == person("wanda").address


def test_a_worker_at_its_allowance_waits_for_its_audits() -> None:
    story = Story()
    story.committed(0)
    state, text = state_of(story, offer("wanda"))
    assert state == "allowance"
    assert text.startswith("it computes 0 and 1 wait for their audit; it may have 1 at once")


def test_leases_that_lapsed_are_told_as_the_reason_of_a_small_allowance() -> None:
    story = Story()
    story.audit(story.work(0))
    story.end_lease(story.lease(1, "wanda"))
    story.lease(1, "wanda")
    assert "halved 1 times" in state_of(story, offer("wanda"))[1]


def test_a_worker_with_room_says_what_it_computes() -> None:
    story = Story()
    story.audit(story.work(0))
    story.lease(1, "wanda")
    assert state_of(story, offer("wanda")) == ("computing", "it computes shard 1")


def test_a_rejected_worker_and_one_with_too_much_unpaid_get_nothing() -> None:
    story = Story(max_unsettled=1, retention=0)
    story.audit(story.work(0))
    assert state_of(story, offer("wanda"))[0] == "unsettled"
    story = Story()
    story.reject(story.work(0))
    state, text = state_of(story, offer("wanda"))
    assert (state, "(mismatch)" in text) == ("rejected", True)


def test_the_only_auditor_cannot_work() -> None:
    story = Story(members=1)
    assert state_of(story, offer("v0"))[0] == "auditor"


def test_a_worker_that_matches_and_has_nothing_says_what_is_missing() -> None:
    story = Story()
    state, text = state_of(story, offer("wanda"))
    assert (state, "the orchestrator gave it nothing" in text) == ("no-offer", True)
    assert "see whether its daemon runs, is paused" in text
    assert "not connected" in state_of(story, offer("wanda", connected=False))[1]
    assert state_of(story, offer("wanda"), "will")[1].startswith("it matches, but has not offered")
    assert state_of(story, offer("wanda"), "wanda")[0] == "next"


def test_a_worker_that_matches_waits_when_no_shard_is_free() -> None:
    story = Story(shards=1, rows=8)
    story.lease(0, "will")
    assert state_of(story, offer("wanda"))[0] == "idle"


def test_before_the_log_begins_nodes_match_or_do_not() -> None:
    candidates = [offer("wanda"), offer("will", ask=10**18)]
    first, second = node_reasons(None, terms_of(), candidates)
    assert (first.state, second.state) == ("matches", "price")


# ---- the job ---------------------------------------------------------------------------------


def whole(state: JobState | None, terms: Any = None, orchestrator: str = "oscar") -> str:
    return job_text(terms or terms_of(), state, person(orchestrator).address)


def test_a_job_says_what_holds_up_the_whole_of_it() -> None:
    assert "no orchestrator" in job_text(terms_of(orchestrator=NOBODY), None, NOBODY)
    assert "its log has not begun" in whole(None)
    story = Story(shards=1, rows=8)
    assert "its log has not begun" in whole(story.state)
    work = story.work(0)
    assert whole(story.state) == ""
    story.audit(work)
    assert whole(story.state) == "every shard is in; audits are still open"
    story.at(story.state.height + LAG)
    assert whole(story.state) == "every shard is in and audited; its end is being logged"
    assert story.end() is None
    assert whole(story.state) == "its shards are done; it is being settled"
