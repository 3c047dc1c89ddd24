"""Money: what a log owes to whom, and what no log can make it owe."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sim.logkit import LAG, UNITS, Story, kinds, person

from meshd.ledger import merkle
from meshd.ledger.settlement import NOBODY_EARNED, Book, amount_of
from meshd.p2p.identity import Address
from meshd.p2p.messages import AuditResult, JobEndReason


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
