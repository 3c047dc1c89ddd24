"""Money: what a log owes to whom, and what no log can make it owe."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from sim.logkit import JOB, LAG, UNITS, Story, kinds, person
from sim.trainlog import WORKERS, TrainStory

from meshd.ledger import merkle
from meshd.ledger.settlement import NOBODY_EARNED, Book, amount_of
from meshd.p2p.identity import Address
from meshd.p2p.messages import AuditResult, JobEndReason, LeaseAccept, Receipt


def accept(story: Story, shard: int, worker: str = "wanda", *, reveal: bool = True) -> None:
    """Let a shard be committed, audited, revealed."""
    story.audit(story.work(shard, worker), reveal=reveal)
    story.at(story.state.height + LAG)


def accept_all(story: Story, *, reveal: bool = True) -> None:
    """Let every shard pass."""
    for shard in range(story.terms.shards):
        accept(story, shard, reveal=reveal)


def finish(story: Story) -> None:
    """End the job and cut until everything is settled."""
    assert story.end() is None
    while not story.state.book.closed:
        assert story.cut() is None


# ---- amounts ---------------------------------------------------------------------------------


@given(st.integers(0, 10**15), st.integers(0, 10**30))
def test_an_amount_is_rounded_up_once(units: int, price: int) -> None:
    amount = amount_of(units, price)
    assert 0 <= amount * 10**9 - units * price < 10**9


def test_what_can_be_paid_is_the_cap_less_what_the_escrow_burns_rounded_up() -> None:
    story = Story(cap=101)
    assert story.state.book.pot == 101 - 2
    assert Story(cap=100).state.book.pot == 99


# ---- who is paid what ------------------------------------------------------------------------


def test_work_audits_and_services_are_paid_by_the_terms() -> None:
    story = Story(probation_shards=0)
    accept_all(story)
    finish(story)
    paid = kinds(story)
    assert paid["work"] == 4 * UNITS
    assert paid["audit"] == 4 * (UNITS // 4 * 5 // 4 + 1)  # 2 of 8 rows, times 1.25, rounded up
    assert paid["orchestrate"] == 4 * UNITS * 20_000 // 10**6
    assert paid["aggregate"] == 4 * UNITS * 10_000 // 10**6
    assert story.state.book.total == sum(paid.values())


def test_a_worker_on_probation_pays_its_first_audits() -> None:
    story = Story(probation_shards=4)
    accept_all(story)
    finish(story)
    work = [r for r in story.state.book.receipts if r.receipt_kind == "work"]
    audits = [r for r in story.state.book.receipts if r.receipt_kind == "audit"]
    assert [r.charged for r in work] == [625] * 4  # 4 of 8 rows times 1.25
    assert [r.amount for r in work] == [375] * 4
    assert sum(r.amount for r in audits) == sum(r.charged for r in work)


def test_probation_charges_a_worker_no_more_than_its_work_earns() -> None:
    story = Story(probation_shards=4, probation_rows=8, audit_budget=0)
    accept_all(story)
    finish(story)
    work = [r for r in story.state.book.receipts if r.receipt_kind == "work"]
    assert all(r.amount >= 0 for r in work)
    # An audit of all rows costs 1.25 times the work, and there is no budget for the rest.
    assert kinds(story).get("audit", 0) == 0
    assert sum(r.charged for r in work) == 0


def test_the_rest_of_a_charged_audit_comes_from_the_budget() -> None:
    story = Story(probation_shards=4, probation_rows=8, audit_budget=100_000)
    accept_all(story)
    finish(story)
    assert kinds(story)["audit"] == 4 * 1250
    assert [r.charged for r in story.state.book.receipts if r.receipt_kind == "work"] == [1000] * 4


def test_audits_are_paid_from_the_budget_as_far_as_it_goes() -> None:
    story = Story(probation_shards=0, cap=20_000, audit_budget=50_000)  # 1000 for audits of 313
    accept_all(story)
    finish(story)
    assert kinds(story)["audit"] == 3 * 313


def test_an_audit_that_is_not_revealed_is_not_paid() -> None:
    story = Story(probation_shards=0)
    accept_all(story, reveal=False)
    finish(story)
    assert "audit" not in kinds(story)
    assert kinds(story)["work"] == 4 * UNITS


def test_an_overruled_auditor_is_not_paid() -> None:
    story = Story(probation_shards=0)
    work = story.work(0)
    liar, lie = story.judge(work)
    entry = story.attestation(work, lie, AuditResult.MISMATCH)
    assert story.say(liar, entry) is None
    story.audit(work, reveal=True)
    assert story.say(liar, story.reveal(lie)) is None
    for shard in (1, 2, 3):
        accept(story, shard)
    finish(story)
    false = work.findings[0]
    assert false.reveal is not None
    paid = {r.output_hash for r in story.state.book.receipts if r.receipt_kind == "audit"}
    assert false.attestation.digest not in paid
    assert work.findings[1].attestation.digest in paid


def test_both_auditors_of_a_rejected_work_are_paid_and_its_worker_is_not() -> None:
    story = Story(probation_shards=0)
    bad = story.work(0)
    first, verdict = story.judge(bad)
    mismatch = story.attestation(bad, verdict, AuditResult.MISMATCH)
    assert story.say(first, mismatch) is None
    second, other = story.judge(bad)
    assert story.say(first, story.reveal(verdict)) is None
    agrees = bad.findings[0].attestation.digest
    confirm = story.attestation(bad, other, AuditResult.MISMATCH, agrees_with=agrees)
    assert story.say(second, confirm) is None
    assert story.say(second, story.reveal(other)) is None
    for shard in range(4):
        accept(story, shard, "will")
    finish(story)
    receipts = story.state.book.receipts
    assert not [r for r in receipts if r.signer == person("wanda").address]
    of_bad = [r for r in receipts if r.commitment_hash == bad.hash]
    assert sorted(r.signer for r in of_bad) == sorted([first, second])
    assert {r.receipt_kind for r in of_bad} == {"audit"}


def test_a_shard_is_paid_once_whatever_its_attempts() -> None:
    story = Story()
    story.reject(story.work(0))
    for shard in range(4):
        accept(story, shard, "will")
    finish(story)
    shards = [r.shard for r in story.state.book.receipts if r.receipt_kind == "work"]
    assert sorted(shards) == [0, 1, 2, 3]


def test_an_audit_is_paid_once_over_all_cuts() -> None:
    story = Story(probation_shards=0)
    bad = story.work(0)
    first, verdict = story.judge(bad)
    assert story.say(first, story.attestation(bad, verdict, AuditResult.SILENT)) is not None
    story.at(story.state.height + story.terms.silence)
    assert story.say(first, story.attestation(bad, verdict, AuditResult.SILENT)) is None
    story.audit(bad, AuditResult.SILENT)
    assert story.say(first, story.reveal(verdict)) is None
    for _ in range(3):
        assert story.cut() is None
    assert kinds(story) == {"audit": 313}


# ---- when ------------------------------------------------------------------------------------


def test_nothing_pending_or_unaudited_is_payable() -> None:
    story = Story(retention=0)
    story.committed(0)
    assert story.cut() is None
    story.at(20)
    assert story.cut() is None
    assert story.state.book.receipts == []


def test_what_may_be_audited_again_waits() -> None:
    story = Story(retention=0, second_audit_share=0)
    work = story.work(0)
    story.audit(work)
    assert story.cut() is None
    assert story.state.book.receipts == []
    story.at(work.accepted_height + LAG)
    assert story.cut() is None
    assert kinds(story)["work"] > 0


def test_a_work_is_payable_after_so_many_later_ones_of_its_worker() -> None:
    story = Story(retention=2)
    for shard, payable in ((0, 0), (1, 0), (2, 1), (3, 2)):
        accept(story, shard)
        works = list(story.state.works.values())
        assert len(story.state.book.payable(works, ended=False)) == payable
    assert len(story.state.book.payable(works, ended=True)) == 4


def test_others_works_do_not_count_as_later_ones() -> None:
    story = Story(retention=1)
    accept(story, 0, "wanda")
    accept(story, 1, "will")
    works = list(story.state.works.values())
    assert story.state.book.payable(works, ended=False) == []


def test_a_contested_work_is_not_paid_at_the_end() -> None:
    story = Story(second_audit_share=1_000_000)
    work = story.work(0)
    story.audit(work)
    story.at(work.accepted_height + LAG)
    story.audit(work, AuditResult.MISMATCH)
    assert story.end(JobEndReason.DEADLINE) is None
    assert story.cut() is None
    assert "work" not in kinds(story)


# ---- limits ----------------------------------------------------------------------------------


def test_a_cut_raises_the_total_by_no_more_than_the_epoch_limit() -> None:
    story = Story(probation_shards=0, epoch_limit=2800)
    accept_all(story)
    finish(story)
    book = story.state.book
    before = 0
    for count in book.epochs:
        total = sum(r.amount for r in book.receipts[:count])
        assert total - before <= 2800
        before = total
    assert book.epoch == 2
    assert kinds(story)["work"] == 4 * UNITS


def test_nothing_is_promised_beyond_the_pot() -> None:
    story = Story(probation_shards=0, cap=2500)
    accept_all(story)
    finish(story)
    assert story.state.book.total <= 2475
    assert kinds(story)["work"] == 2 * UNITS


# ---- statements ------------------------------------------------------------------------------


def test_a_statement_sums_up_every_account_and_proves_its_leaf() -> None:
    story = Story(probation_shards=0, epoch_limit=2800)
    accept_all(story)
    finish(story)
    book = story.state.book
    first = book.statement(epoch=1, log_head=b"\x01" * 32, committee_term=0)
    last = book.statement(epoch=2, log_head=b"\x02" * 32, committee_term=0)
    assert last.settlement.prev_root == first.settlement.root
    assert not first.settlement.is_final
    assert last.settlement.is_final
    for statement in (first, last):
        assert statement.settlement.total == sum(leaf.earned for leaf in statement.leaves)
        for leaf in statement.leaves:
            value = merkle.ClaimValue(
                leaf.job_id, Address(leaf.account), leaf.earned, leaf.receipts_root
            )
            assert merkle.verify(statement.settlement.root, value.leaf(), leaf.proof)


def test_earnings_only_grow_from_cut_to_cut() -> None:
    story = Story(probation_shards=0, epoch_limit=2800)
    accept_all(story)
    finish(story)
    book = story.state.book
    earlier: dict[bytes, int] = {}
    for epoch in range(1, book.epoch + 1):
        now = book.statement(epoch=epoch, log_head=b"\x01" * 32, committee_term=0).leaves
        earned = {leaf.account: leaf.earned for leaf in now}
        assert all(earned[account] >= amount for account, amount in earlier.items())
        earlier = earned


def test_a_job_that_owes_nothing_has_a_settlement_that_can_be_anchored() -> None:
    story = Story()
    assert story.end(JobEndReason.DEADLINE) is None
    assert story.cut() is None
    statement = story.state.book.statement(epoch=1, log_head=b"\x01" * 32, committee_term=0)
    assert statement.settlement.root == NOBODY_EARNED != merkle.NOTHING
    assert statement.settlement.is_final
    assert statement.settlement.total == 0


@given(st.lists(st.sampled_from(["wanda", "will"]), min_size=4, max_size=4), st.integers(0, 3))
def test_the_books_add_up_whoever_worked_and_whenever_it_was_cut(
    workers: list[str], cut_after: int
) -> None:
    story = Story(retention=1)
    for shard, worker in enumerate(workers):
        accept(story, shard, worker)
        if shard == cut_after:
            assert story.cut() is None
    finish(story)
    book: Book = story.state.book
    assert sorted(r.shard for r in book.receipts if r.receipt_kind == "work") == [0, 1, 2, 3]
    assert book.total == sum(r.amount for r in book.receipts) <= book.pot
    charged = sum(r.charged for r in book.receipts)
    assert kinds(story)["audit"] - charged <= story.terms.cap * story.terms.audit_budget // 10**6


# ---- training --------------------------------------------------------------------------------


def of_kind(story: Story, kind: str, worker: str | None = None) -> list[Receipt]:
    """Return the receipts of a kind, of one signer if *worker* is named."""
    signer = person(worker).address if worker else None
    return [
        receipt
        for receipt in story.state.book.receipts
        if receipt.receipt_kind == kind and signer in (None, receipt.signer)
    ]


def trained(*workers: str, rounds: int = 2, **terms: Any) -> TrainStory:
    """Return a job whose rounds *workers* computed, every span passed and revealed."""
    story = TrainStory(rounds=rounds, **terms)
    for _ in range(rounds):
        story.round(*workers)
    story.pass_all()
    return story


def test_a_span_that_passed_is_paid_shard_by_shard_under_their_numbers_in_the_job() -> None:
    story = trained("wanda", "will", rounds=3)
    finish(story)
    assert [r.shard for r in of_kind(story, "work", "wanda")] == [0, 2, 4, 6, 8, 10]
    assert [r.shard for r in of_kind(story, "work", "will")] == [1, 3, 5, 7, 9, 11]
    for receipt in of_kind(story, "work"):
        work = story.state.works[receipt.commitment_hash]
        assert receipt.amount + receipt.charged == UNITS
        assert (receipt.account, receipt.attempt) == (work.payee, work.place[1])
        assert receipt.output_hash == work.commitment.message.output_root
    assert len(of_kind(story, "audit")) == 2
    for receipt, span in zip(of_kind(story, "audit"), story.spans, strict=True):
        assert (receipt.commitment_hash, receipt.shard) == (span.hash, span.works[0].number)
        assert receipt.amount == 2 * UNITS * 5 // 4  # a quarter of six, rounded up


def test_a_span_waits_for_no_later_ones() -> None:
    story = TrainStory(rounds=3, span_shards=4)
    story.round("wanda")
    assert story.cut() is None
    assert of_kind(story, "work") == []
    story.pass_all()
    assert story.cut() is None
    assert len(of_kind(story, "work")) == 4


def test_a_span_that_may_be_audited_again_waits() -> None:
    story = TrainStory(rounds=3, span_shards=4)
    story.round("wanda")
    (span,) = story.opened()
    story.audit(span)
    assert story.cut() is None
    assert of_kind(story, "work") == []
    story.at(span.accepted_height + LAG)
    assert story.cut() is None
    assert len(of_kind(story, "work")) == 4


def test_the_audits_of_a_first_span_are_charged_to_its_works_in_turn() -> None:
    story = trained("wanda", rounds=8)
    finish(story)
    work = of_kind(story, "work")
    assert len(work) == 32
    fee = 8 * UNITS * 5 // 4
    assert [r.charged for r in work] == [UNITS] * 10 + [0] * 22
    assert [r.amount for r in of_kind(story, "audit")] == [fee]
    assert kinds(story)["work"] == 32 * UNITS - fee


def test_later_spans_are_audited_at_the_jobs_cost() -> None:
    story = TrainStory(rounds=2, span_shards=4, probation_span_shards=1)
    story.round("wanda")
    story.pass_all()
    story.round("wanda")
    story.pass_all()
    finish(story)
    assert [r.charged for r in of_kind(story, "work")] == [1000, 250, 0, 0, 0, 0, 0, 0]
    assert [r.amount for r in of_kind(story, "audit")] == [1250, 1250]


def test_a_first_span_pays_no_more_than_it_earns() -> None:
    story = trained("wanda", rounds=1, shards=2)  # both are audited: 2500 for 2000
    finish(story)
    assert [r.charged for r in of_kind(story, "work")] == [1000, 1000]
    assert [r.amount for r in of_kind(story, "work")] == [0, 0]
    assert [r.amount for r in of_kind(story, "audit")] == [2500]
    poor = trained("wanda", rounds=1, shards=2, audit_budget=0)
    finish(poor)
    assert [r.amount for r in of_kind(poor, "work")] == [1000, 1000]
    assert of_kind(poor, "audit") == []


def test_a_cut_takes_a_span_whole_or_not_at_all() -> None:
    limit = 4 * UNITS + 4 * UNITS * 3 // 100 + 2 * UNITS  # one span with its shares, not two
    story = trained("wanda", "will", rounds=2, epoch_limit=limit)
    assert story.end() is None
    assert story.cut() is None
    assert len(of_kind(story, "work")) == 4
    assert {r.signer for r in of_kind(story, "work")} == {person("wanda").address}
    assert story.cut() is None
    assert len(of_kind(story, "work")) == 8
    assert story.state.book.closed
    book = story.state.book
    assert all(book.total_at(epoch) <= epoch * limit for epoch in (1, 2))


def test_a_span_beyond_the_epoch_limit_is_never_entered() -> None:
    story = trained("wanda", rounds=1, epoch_limit=4 * UNITS)
    assert story.end() is None
    assert story.cut() is None
    assert story.state.book.closed
    assert of_kind(story, "work") == []


def test_a_price_that_no_receipt_can_name_enters_nothing() -> None:
    terms = {"price": 2**255, "cap": 2**256 - 1, "epoch_limit": 2**256 - 1}
    story = Story(**terms, orchestrator_share=0, aggregator_share=0)
    entry = story.sign("oscar", story.assignment(0, "wanda", units=2**64 - 1))
    assert story.state.apply(entry) is None
    accept = LeaseAccept(job_id=JOB, assignment_hash=entry.digest, payee=person("wanda").address)
    assert story.say("wanda", accept) is None
    assert story.say("wanda", story.commitment(entry.digest)) is None
    (work,) = story.state.works.values()
    story.at(work.beacon_height)
    story.audit(work, reveal=True)
    assert story.end(JobEndReason.DEADLINE) is None
    assert story.cut() is None
    assert story.state.book.receipts == []
    assert story.state.book.closed


def test_a_rejected_span_pays_its_auditors_and_not_its_worker() -> None:
    story = TrainStory(rounds=2)
    story.round("wolf", "wanda")
    story.round("wolf", "wanda")
    bad, good = story.opened()
    story.reject(bad)
    story.audit(good)
    story.at(story.state.height + LAG)
    story.reveal_all()
    finish(story)
    assert of_kind(story, "work", "wolf") == []
    assert len(of_kind(story, "work", "wanda")) == 4
    paid = [r for r in of_kind(story, "audit") if r.commitment_hash == bad.hash]
    assert {r.signer for r in paid} == {finding.auditor for finding in bad.findings}
    assert [r.amount for r in paid] == [1250, 1250]


def test_a_caught_worker_loses_what_passed_and_keeps_what_was_entered() -> None:
    story = TrainStory(rounds=3, span_shards=4)
    story.round("wolf")
    story.pass_all()
    assert story.cut() is None
    story.round("wolf")
    story.pass_all()
    story.round("wolf")
    story.reject(story.opened()[0])
    story.at(story.state.height + LAG)
    finish(story)
    assert [r.shard for r in of_kind(story, "work", "wolf")] == [0, 1, 2, 3]


def test_what_was_gated_out_or_late_for_its_round_is_paid() -> None:
    story = TrainStory(rounds=1)
    lease = story.lease(3, "wolf")
    gated, kept = story.deliver(["wanda", "will"], [0, 1])
    story.close_round(0)
    late = story.commit(lease, "wolf")
    story.pass_all()
    finish(story)
    paid = {r.commitment_hash for r in of_kind(story, "work")}
    assert paid == {gated.hash, kept.hash, late.hash}


def test_a_repeated_round_pays_each_commitment_once() -> None:
    story = TrainStory(rounds=1)
    first = story.deliver(WORKERS)
    story.gate_all()
    again = story.deliver(WORKERS)
    story.close_round()
    story.pass_all()
    assert story.cut() is None
    finish(story)
    paid = of_kind(story, "work")
    assert sorted(r.commitment_hash for r in paid) == sorted(w.hash for w in [*first, *again])
    assert sorted((r.shard, r.attempt) for r in paid) == [
        (shard, attempt) for shard in range(4) for attempt in (0, 1)
    ]


def test_a_failed_job_pays_what_passed() -> None:
    story = TrainStory()
    for _ in range(2):
        story.deliver(["wanda"], [0, 1])
        story.gate_all()
    story.pass_all()
    assert story.end(JobEndReason.FAILED) is None
    assert story.cut() is None
    assert len(of_kind(story, "work", "wanda")) == 4


def test_a_span_that_nobody_audited_before_the_end_is_not_paid() -> None:
    story = TrainStory(rounds=1)
    story.round("wanda", "will")
    story.audit(story.opened()[0])
    assert story.end(JobEndReason.DEADLINE) is None
    assert story.cut() is None
    assert len(of_kind(story, "work", "wanda")) == 2
    assert of_kind(story, "work", "will") == []


def test_a_training_log_without_end_is_closed_with_what_passed() -> None:
    story = TrainStory(rounds=3, span_shards=2)
    story.round("wanda", "will")
    story.audit(story.opened()[0])
    story.deliver(["wanda"], [0])
    story.state.close_without_end()
    assert len(of_kind(story, "work")) == 2
    assert story.state.book.closed
