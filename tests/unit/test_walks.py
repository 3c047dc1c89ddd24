"""Random job logs, sensible and senseless entries mixed: what no log may ever bring about."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.logkit import JOB, Story, person
from sim.trainlog import CLASS, OTHER, WORKERS, TrainStory

from meshd.ledger.audits import Finding, Status, Subject
from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import Lease
from meshd.ledger.rounds import accepted
from meshd.ledger.works import Span, Work
from meshd.p2p.codec import ATTACHING, Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    JOB_LOG_KINDS,
    MESSAGES,
    ZERO,
    AuditResult,
    Cut,
    Encoded,
    JobEnd,
    JobEndReason,
    LeaseAccept,
    LeaseEnd,
    LeaseEndReason,
    Message,
    Stop,
)

MEMBERS = 4
NUMBERS = (*range(10), 2**32 - 1, 2**63, 2**64 - 1, 2**256 - 1)
SMALL = {
    "span_shards": 3,
    "probation_span_shards": 1,
    "max_unsettled": 6,
    "retention": 1,
    "second_audit_share": 400_000,
    "rounds": 3,
}
"""Terms with which a short log comes to everything."""
Step = Callable[[], None]


class Walk:
    """One random log. It keeps what it entered, to be told again."""

    def __init__(self, seed: int, workload: str, terms: dict[str, Any]) -> None:
        self.chance = random.Random(seed)
        self.workload, self.terms = workload, terms
        self.story = story_of(workload, terms)
        self.told: list[tuple[int, int, list[Signed[Message]]]] = [(0, 1, [])]
        """(term, height, entries) of each batch."""
        self.refused: set[int] = set()
        """Places, in the whole log, of the entries without effect."""
        self.why: Counter[str] = Counter()
        self.steps: list[tuple[int, Step]] = [
            (6, self.go_on),
            (1, self.begin_term),
            (10, self.assign),
            (14, self.accept),
            (14, self.commit),
            (2, self.end_lease),
            (25, self.audit),
            (12, self.close),
            (6, self.reveal),
            (2, self.cut),
            (3, self.mutate),
            (3, self.scramble),
            (1, self.end),
        ]

    @property
    def state(self) -> JobState:
        """What the log means so far."""
        return self.story.state

    def enter(self, who: str | bytes, message: Message, attached: tuple[bytes, ...] = ()) -> None:
        """Enter something, whoever signs it."""
        name = who if isinstance(who, str) else Address(who)
        self.log(self.story.sign(name, message, attached))

    def log(self, entry: Signed[Message]) -> None:
        """Apply an entry and note what it does."""
        count = sum(len(entries) for _, _, entries in self.told)
        self.told[-1][2].append(entry)
        why = self.state.apply(entry)
        if why is not None:
            self.refused.add(count)
        self.why[f"{entry.message.kind}: {why}"] += 1
        assert (entry.digest in self.state) or why is not None

    def walk(self, steps: int) -> None:
        """Go so many steps."""
        weights = [weight for weight, _ in self.steps]
        for count in range(steps):
            (step,) = self.chance.choices(self.steps, weights)
            step[1]()
            if count % 20 == 0:
                check(self.state)
        check(self.state)

    # ---- steps ---------------------------------------------------------------------------

    def go_on(self, most: int = 8, term: int | None = None) -> None:
        height = self.state.height + self.chance.randrange(1, most)
        term = self.state.term if term is None else term
        self.story.at(height, term=term)
        self.told.append((term, height, []))

    def begin_term(self) -> None:
        term = self.state.term + 1
        lost = [max(0, self.state.height + self.chance.randrange(-3, 9)) for _ in range(2)]
        start = self.story.term_start(term, *lost)
        self.go_on(term=term)
        self.log(start)

    def assign(self) -> None:
        free = self.state.free_shards() or [0]
        worker = self.chance.choice([*WORKERS, "v0"])
        self.enter("oscar", self.story.assignment(self.chance.choice(free), worker))

    def pick(self, wanted: Callable[[Lease], bool]) -> Lease | None:
        leases = [lease for lease in self.state.leases.values() if wanted(lease)]
        return self.chance.choice(leases) if leases else None

    def accept(self) -> None:
        lease = self.pick(lambda lease: lease.open and lease.accept is None)
        if lease is not None:
            worker = lease.assignment.message.worker
            name = lease.assignment.digest
            self.enter(worker, LeaseAccept(job_id=JOB, assignment_hash=name, payee=worker))

    def commit(self) -> None:
        lease = self.pick(lambda lease: lease.open and lease.accept is not None)
        if lease is not None:
            message = self.story.commitment(lease.assignment.digest)
            self.enter(lease.assignment.message.worker, message)

    def end_lease(self) -> None:
        lease = self.pick(lambda lease: lease.open)
        if lease is not None:
            reason = self.chance.choice(list(LeaseEndReason))
            name = lease.assignment.digest
            end = LeaseEnd(job_id=JOB, assignment_hash=name, reason=reason, height=0)
            self.enter("oscar", end)

    def audit(self) -> None:
        """Take the next step of an audit that is open."""
        subjects = [s for s in self.state.subjects.values() if s.track is not None]
        if not subjects:
            self.go_on()
            return
        subject = self.chance.choice(subjects)
        track = subject.track
        assert track is not None
        track.advance(self.state.height, self.story.terms)
        if track.challenge is None:
            self.enter(track.auditor, self.story.challenge(subject))
        elif track.verdict is None:
            self.enter(track.auditor, self.story.verdict(subject, track.challenge))
        else:
            self.attest(subject)

    def attest(self, subject: Subject) -> None:
        track = subject.track
        assert track is not None
        assert track.verdict is not None
        bad = 0.3 if subject.worker == person("wolf").address else 0.03
        result = AuditResult.ACCEPTED
        if self.chance.random() < bad or subject.contested is not None:
            result = self.chance.choice([AuditResult.MISMATCH] * 3 + list(AuditResult))
        earlier = [finding.attestation.digest for finding in subject.findings]
        agrees = self.chance.choice([*earlier, ZERO])
        message = self.story.attestation(subject, track.verdict, result, agrees_with=agrees)
        self.enter(track.auditor, message)

    def findings(self) -> Iterator[tuple[Subject, Finding]]:
        for subject in self.state.subjects.values():
            for finding in subject.findings:
                yield subject, finding

    def reveal(self) -> None:
        due = [f for s, f in self.findings() if f.reveal is None and f.verdict is not None]
        if due:
            finding = self.chance.choice(due)
            assert finding.verdict is not None
            self.enter(finding.auditor, self.story.reveal(finding.verdict))

    def close(self) -> None:
        if not isinstance(self.story, TrainStory):
            return
        works = self.state.round_works()
        if len(works) < 4 and self.chance.random() < 0.8:
            return
        gated = [at for at in range(len(works)) if self.chance.random() < 0.1]
        if self.chance.random() < 0.1:
            gated = list(range(len(works)))
        self.enter("oscar", self.story.close(gated=tuple(gated)))

    def cut(self) -> None:
        epoch, payee = self.state.book.epoch + 1, person("oscar").address
        self.enter("oscar", Cut(job_id=JOB, term=0, epoch=epoch, payee=payee))

    def end(self) -> None:
        if self.chance.random() < 0.1:
            self.enter("rita", Stop(job_id=JOB))
        reason = JobEndReason.COMPLETE
        if self.chance.random() < 0.02:
            reason = self.chance.choice(list(JobEndReason))
        self.enter("oscar", JobEnd(job_id=JOB, term=0, output_root=ZERO, reason=reason))

    # ---- nonsense ------------------------------------------------------------------------

    def hashes(self) -> list[bytes]:
        state, known = self.state, [JOB, ZERO, CLASS, OTHER, self.story.terms.initial_state]
        known += [*state.leases, *state.works, *state.subjects, *state.rounds.states()]
        for _, finding in self.findings():
            known += [finding.challenge.digest, finding.attestation.digest]
        return known

    def value(self, solidity: str) -> Any:
        """Return a value of a type: often one that means something, sometimes an extreme."""
        if solidity.endswith("[]"):
            return tuple(self.value(solidity[:-2]) for _ in range(self.chance.randrange(4)))
        match solidity:
            case "bytes32":
                return self.chance.choice(self.hashes())
            case "address":
                return self.chance.choice([*self.story.people, bytes(20)])
            case "bool":
                return self.chance.random() < 0.5
            case "string":
                return self.chance.choice(["", "train", "infer", "1.0", "NaN"])
            case _:
                bits = int(solidity.removeprefix("uint"))
                around = self.chance.choice([*NUMBERS, self.state.height, self.state.term])
                return around if around < 2**bits else 2**bits - 1

    def signer(self) -> bytes:
        return self.chance.choice([*self.story.people, person("oscar").address])

    def scramble(self) -> None:
        """Enter any message that may stand in a log, with any values."""
        model = MESSAGES[self.chance.choice(sorted(JOB_LOG_KINDS))]
        values = {name: self.value(solidity(model, name)) for name in model.model_fields}
        if "job_id" in values:
            values["job_id"] = JOB
        attached = (b"no vote",) if model.kind in ATTACHING else ()
        self.enter(self.signer(), model(**values), attached)

    def mutate(self) -> None:
        """Enter something that was entered before, with one value changed or by another."""
        _, _, entries = self.chance.choice(self.told)
        if not entries:
            return
        old = self.chance.choice(entries)
        model = type(old.message)
        name = self.chance.choice(list(model.model_fields))
        change = {name: self.value(solidity(model, name))} if self.chance.random() < 0.8 else {}
        signer = old.signer if self.chance.random() < 0.7 else self.signer()
        self.enter(signer, old.message.model_copy(update=change), old.attached)


def solidity(model: type[Message], name: str) -> str:
    """Return a field's type."""
    (encoded,) = (item for item in model.model_fields[name].metadata if isinstance(item, Encoded))
    return encoded.solidity


# ---- what must hold --------------------------------------------------------------------------


def check(state: JobState) -> None:
    """Check everything that holds of every log at any time."""
    check_rounds(state)
    check_works(state)
    check_money(state)


def check_rounds(state: JobState) -> None:
    """Closed rounds form a chain; nothing of a worker that was caught is in the open one."""
    rounds, before, number = state.rounds, state.terms.initial_state, 0
    for close in (entry.message for entry in rounds.closes):
        assert (close.round, close.state_before) == (number, before)
        if accepted(close):
            before, number = close.state_after, number + 1
        else:
            assert close.state_after == close.state_before
        assert len(set(close.commitments)) == len(close.commitments) == len(close.weights) > 0
        numbers = [state.works[name].number for name in close.commitments]
        assert numbers == sorted(set(numbers))
        assert {number // state.terms.shards for number in numbers} == {close.round}
    if rounds.training:
        assert (rounds.open, rounds.state) == (number, before)
        assert number <= state.terms.rounds
    for work in state.round_works():
        assert work.outcome in (Status.PENDING, Status.ACCEPTED)
        assert work.entered or not state.workers[work.worker].rejected


def check_works(state: JobState) -> None:
    """A shard has one holder, a work at most one span, a caught worker no lease."""
    for attempts in state.shards.values():
        assert sum(lease.holds_shard for lease in attempts) <= 1
        assert [lease.assignment.message.attempt for lease in attempts] == [*range(len(attempts))]
    for record in state.workers.values():
        assert not (record.rejected and any(lease.open for lease in record.leases))
        assert 0 <= record.unsettled <= state.terms.max_unsettled
        assert record.in_flight >= 0
    held = Counter(
        work.hash
        for span in state.subjects.values()
        if isinstance(span, Span)
        for work in span.works
    )
    assert set(held.values()) <= {1}
    for span in state.subjects.values():
        if isinstance(span, Span):
            assert 1 <= len(span.works) <= state.terms.span_shards
            assert {work.worker for work in span.works} == {span.worker}
            assert all(work.span is span for work in span.works)
            assert 1 <= span.sample <= span.population


def check_money(state: JobState) -> None:
    """Nothing unaudited is paid and nothing twice; no limit of the terms is passed."""
    book, terms = state.book, state.terms
    assert book.total == sum(receipt.amount for receipt in book.receipts) <= book.pot
    for epoch in range(1, book.epoch + 1):
        before = book.total_at(epoch - 1) if epoch > 1 else 0
        assert 0 <= book.total_at(epoch) - before <= terms.epoch_limit
    work = [receipt for receipt in book.receipts if receipt.receipt_kind == "work"]
    audits = [receipt for receipt in book.receipts if receipt.receipt_kind == "audit"]
    for paid in ([r.commitment_hash for r in work], [r.output_hash for r in audits]):
        assert len(set(paid)) == len(paid)
    for receipt in work:
        check_paid(state, state.works[receipt.commitment_hash])
        assert receipt.amount >= 0
    attested = {f.attestation.digest: f for s in state.subjects.values() for f in s.findings}
    for receipt in audits:
        assert attested[receipt.output_hash].reveal is not None
        assert attested[receipt.output_hash].in_majority
        assert receipt.signer in state.genesis.committee
    charged = sum(receipt.charged for receipt in work)
    budget = terms.cap * terms.audit_budget // 10**6
    assert sum(receipt.amount for receipt in audits) - charged <= budget
    gross = sum(receipt.amount for receipt in work) + charged
    services = book.total - sum(receipt.amount for receipt in [*work, *audits])
    assert services <= gross * (terms.orchestrator_share + terms.aggregator_share) // 10**6


def check_paid(state: JobState, work: Work) -> None:
    """A paid work passed an audit by a member that is not its worker."""
    subject: Subject = work.span or work
    assert (work.span is not None) is state.rounds.training
    assert subject.status is Status.ACCEPTED
    passed = [f for f in subject.findings if f.result is AuditResult.ACCEPTED]
    assert passed
    assert all(f.auditor in state.genesis.committee for f in subject.findings)
    assert work.worker not in {f.auditor for f in subject.findings}
    assert all(f.challenge.message.drawn for f in passed)


def fingerprint(state: JobState) -> object:
    """Return all that a log means, as a value."""
    for subject in state.subjects.values():
        if subject.track is not None:
            subject.track.advance(state.height, state.terms)
    return (
        state.position,
        state.rounds.states(),
        state.rounds.tries,
        state.rounds.canaries,
        [
            (name, lease.until, lease.ended, lease.released, lease.holds_shard, lease.accept)
            for name, lease in state.leases.items()
        ],
        [
            (s.hash, s.status, s.sample, s.epoch, s.lost_beacons, s.findings, s.track, s.reason)
            for s in state.subjects.values()
        ],
        [
            (who, len(r.works), r.accepted, r.halvings, r.rejected)
            for who, r in state.workers.items()
        ],
        (state.book.receipts, state.book.epochs, state.book.finals),
        (state.stop, state.end, list(state.audits.open)),
    )


# ---- walks -----------------------------------------------------------------------------------


def story_of(workload: str, terms: dict[str, Any]) -> Story:
    """Return the beginning of a job."""
    if workload == "train":
        return TrainStory(members=MEMBERS, classes={"v3": OTHER, "wilma": OTHER}, **terms)
    return Story(members=MEMBERS, **terms)


def walked(workload: str, seed: int, steps: int = 250) -> Walk:
    """Return a random log of a workload."""
    chance = random.Random(seed)
    terms = SMALL | {
        "epoch_limit": chance.choice([4_000, 9_000, 10_000_000]),
        "cap": chance.choice([20_000, 10_000_000]),
        "audit_budget": chance.choice([0, 50_000, 1_000_000]),
        "shards": chance.choice([3, 4, 5]),
    }
    if workload == "infer":
        terms |= {"rounds": 1, "rows": 8 * terms["shards"]}
    walk = Walk(seed, workload, terms)
    walk.walk(steps)
    return walk


def again(walk: Walk, *, refused: bool) -> JobState:
    """Tell a walk's log once more, with or without the entries that had no effect."""
    story = story_of(walk.workload, walk.terms)
    count = 0
    for place, (term, height, entries) in enumerate(walk.told):
        if place:
            story.at(height, term=term)
        for entry in entries:
            if refused or count not in walk.refused:
                why = story.state.apply(entry)
                assert (why is not None) is (count in walk.refused)
            count += 1
    return story.state


@pytest.mark.parametrize("workload", ["train", "infer"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_log_breaks_what_is_promised(workload: str, seed: int) -> None:
    walk = walked(workload, seed)
    before = fingerprint(walk.state)
    assert fingerprint(again(walk, refused=True)) == before
    assert fingerprint(again(walk, refused=False)) == before, "an entry without effect had one"
    walk.state.close_without_end()
    check(walk.state)
