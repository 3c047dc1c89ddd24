"""What must hold after every run, whoever cheated and whatever broke."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sim.swarm import SimNode, Swarm, reference_rows

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.ledger.settlement import Statement
from meshd.ledger.works import Work, works_of
from meshd.node.compute.executor import TrainRequest
from meshd.node.compute.toy_training import train_toy
from meshd.node.compute.training import admit_training
from meshd.node.log.view import LogView
from meshd.node.settling import closed_state, statement_at
from meshd.node.submitted import SubmittedJob
from meshd.node.workloads.datasets import parse_manifest
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.plain import close_plain
from meshd.node.workloads.training.plan import TrainPlan
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.state import result_file
from meshd.p2p.codec import digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import AuditResult, JobTerms, Receipt


@dataclass(frozen=True)
class Cast:
    """Who is honest, and whose machine and network worked all the time."""

    dishonest: frozenset[str] = frozenset()
    troubled: frozenset[str] = frozenset()
    """Crashed, cut off or without a chain for a while: they may rightly be found silent."""
    liars_decide: bool = False
    """So many lying auditors that the committee's word is theirs."""

    def honest(self, swarm: Swarm) -> list[SimNode]:
        """Return the honest nodes."""
        return [node for node in swarm.nodes.values() if node.name not in self.dishonest]


async def check_all(
    swarm: Swarm, researcher: SimNode, job_id: bytes, cast: Cast
) -> JobState | None:
    """Check every invariant of one job that is over; return what its log says, if it has one."""
    job = swarm.job(researcher, job_id)
    assert job is not None
    check_swarm(swarm, cast)
    check_escrow(swarm, job)
    view = await longest_view(swarm, job, cast)
    if view is None:
        assert job.state.value in ("failed", "cancelled"), job.state
        return None
    state = view.state if view.state.book.closed else await closed_state(view)
    statement = statement_at(view, state, state.book.epoch)
    check_money(swarm, job, statement)
    check_receipts(state, statement.receipts)
    check_caught(view, state, statement.receipts)
    check_settlements(swarm, job, cast)
    check_verdicts(swarm, state, cast)
    check_output(swarm, researcher, job, state, cast)
    return state


def check_swarm(swarm: Swarm, cast: Cast) -> None:
    """No handler failed, no honest node said two things where one may be said, books balance."""
    assert swarm.network.handler_errors == []
    dishonest = {swarm.nodes[name].address for name in cast.dishonest}
    lies = [said for said in swarm.wiretap.contradictions if said[0] not in dishonest]
    assert not lies, [(swarm.by_address(who).name, kind, about) for who, kind, about in lies]
    assert swarm.ledger.imbalances() == []


def check_escrow(swarm: Swarm, job: SubmittedJob) -> None:
    """The job is over, and all of its deposit is burnt, paid or refunded."""
    assert job.state.value in ("settled", "cancelled", "failed"), job.state
    sums = swarm.ledger.escrow(job.id)
    assert sums.deposited == job.terms.message.cap
    assert sums.held == 0, (job.state, job.detail, sums)


async def longest_view(swarm: Swarm, job: SubmittedJob, cast: Cast) -> LogView | None:
    """Return the honest view that reaches furthest; all of them must be prefixes of it."""
    views = [job.view] if job.view is not None else []
    for node in cast.honest(swarm):
        view = node.node.jobs.known_view(job.id) if node.node is not None else None
        if view is not None:
            views.append(view)
    if not views:
        return None
    longest = max(views, key=lambda view: len(view.log.final))
    heads = [batch.head.digest for batch in longest.log.final]
    for view in views:
        own = [batch.head.digest for batch in view.log.final]
        assert own == heads[: len(own)], "two final logs contradict each other"
    return longest if heads else None


def check_money(swarm: Swarm, job: SubmittedJob, statement: Statement) -> None:
    """What the chain paid is what the log owes, account by account; or nothing was anchored."""
    pot = swarm.ledger.state().pots[job.id]
    claimed = {
        account: amount
        for (paid_job, account), amount in swarm.ledger.state().claimed.items()
        if paid_job == job.id
    }
    total = sum(claimed.values())
    assert total == pot.paid == pot.settled_total, "promised and not paid"
    owed = {Address(leaf.account): leaf.earned for leaf in statement.leaves if leaf.earned}
    if pot.is_final:
        assert claimed == owed
    for account, amount in claimed.items():
        assert amount <= owed.get(account, 0), f"{account.hex()} got more than the log owes"


def check_receipts(state: JobState, receipts: Sequence[Receipt]) -> None:
    """Nothing unaudited is paid, nothing twice; audits and services stay within their shares."""
    paid: dict[int, set[int]] = {}
    for receipt in receipts:
        assert receipt.amount >= 0
        if receipt.receipt_kind == "work":
            # A round of which the gate accepts nothing is computed, and paid, once more.
            before = paid.setdefault(receipt.shard, set())
            assert receipt.attempt not in before, f"shard {receipt.shard} is paid twice"
            before.add(receipt.attempt)
            once = [at for at in before if not state.shards[receipt.shard][at].released]
            assert len(once) <= 1, f"shard {receipt.shard} is paid twice"
            work = state.works[receipt.commitment_hash]
            audited = work.span or work
            assert audited.status is Status.ACCEPTED
            assert any(finding.result is AuditResult.ACCEPTED for finding in audited.findings)
        if receipt.receipt_kind == "audit":
            assert receipt.signer in state.genesis.committee
    for finding in (f for subject in state.subjects.values() for f in subject.findings):
        assert finding.auditor in state.genesis.committee
    work_pay = sum(r.amount + r.charged for r in receipts if r.receipt_kind == "work")
    audit_pay = sum(r.amount for r in receipts if r.receipt_kind == "audit")
    charged = sum(r.charged for r in receipts)
    budget = state.terms.cap * state.terms.audit_budget // 10**6
    assert audit_pay - charged <= budget
    services = sum(r.amount for r in receipts if r.receipt_kind in ("orchestrate", "aggregate"))
    shares = state.terms.orchestrator_share + state.terms.aggregator_share
    assert services <= work_pay * shares // 10**6


def check_caught(view: LogView, state: JobState, receipts: Sequence[Receipt]) -> None:
    """A worker that was caught is paid for nothing that was not settled before."""
    caught: dict[Address, int] = {}
    for subject in state.subjects.values():
        if subject.status is Status.REJECTED:
            height = subject.findings[-1].height
            caught[subject.worker] = min(height, caught.get(subject.worker, height))
    for receipt in receipts:
        if receipt.receipt_kind == "work" and receipt.signer in caught:
            cut = view.log.batches[receipt.log_seq - 1]
            assert cut.height <= caught[Address(receipt.signer)], "a caught worker is paid"


def check_settlements(swarm: Swarm, job: SubmittedJob, cast: Cast) -> None:
    """Every honest member signed the same settlement of the same epoch."""
    dishonest = {swarm.nodes[name].address for name in cast.dishonest}
    for (job_id, epoch), signed in swarm.wiretap.settlements.items():
        if job_id == job.id:
            roots = {root for member, root in signed.items() if member not in dishonest}
            assert len(roots) <= 1, f"members disagree on the settlement of epoch {epoch}"


def check_verdicts(swarm: Swarm, state: JobState, cast: Cast) -> None:
    """No honest worker is found wrong, and no reachable one silent."""
    if cast.liars_decide:
        return
    for subject in state.subjects.values():
        name = swarm.by_address(subject.worker).name
        if subject.status is not Status.REJECTED or name in cast.dishonest:
            continue
        assert subject.reason == "silent", f"honest {name} was found {subject.reason}"
        assert name in cast.troubled, f"honest, reachable {name} was found silent"


def check_output(
    swarm: Swarm, researcher: SimNode, job: SubmittedJob, state: JobState, cast: Cast
) -> None:
    """A settled job's output is right wherever an honest worker computed or an honest auditor
    looked: elsewhere a cheater may have been lucky.
    """
    terms = job.terms.message
    if state.rounds.training:
        states = check_rounds(swarm, researcher, state, cast)
        if job.state.value == "settled":
            check_trained(researcher, job, states)
        return
    if job.state.value != "settled":
        return
    assert job.output is not None
    rows = unpack(researcher.blobs.read(job.output)).rows()
    right = reference_rows(terms.rows)
    assert len(rows) == len(right)
    for shard in range(terms.shards):
        work = state.shard_done(shard)
        assert work is not None
        first = shard * terms.rows_per_shard
        for index in _certain_rows(swarm, work, terms, cast):
            assert rows[first + index] == right[first + index], f"shard {shard} row {index}"


def _certain_rows(swarm: Swarm, work: Work, terms: JobTerms, cast: Cast) -> Collection[int]:
    """Return the rows of a shard that cannot be wrong."""
    if swarm.by_address(work.worker).name not in cast.dishonest:
        return range(work.commitment.message.n)
    return {
        row
        for finding in work.findings
        if finding.result is AuditResult.ACCEPTED
        and swarm.by_address(finding.auditor).name not in cast.dishonest
        for row in finding.challenge.message.drawn
    }


def check_trained(researcher: SimNode, job: SubmittedJob, states: dict[bytes, bytes]) -> None:
    """A settled training job's output is the last round's state."""
    terms = job.terms.message
    assert len(states) == terms.rounds + 1
    assert job.output is not None
    program = parse_program(researcher.blobs.read(terms.program))
    last = result_file(list(states.values())[-1], program)
    assert researcher.blobs.read(job.output) == last


def check_rounds(
    swarm: Swarm, researcher: SimNode, state: JobState, cast: Cast
) -> dict[bytes, bytes]:
    """Every certified state follows from what it names, and what passed an honest audit is what
    its shard comes to. Return the states by their digests, recomputed from the first.
    """
    terms, rounds = state.terms, state.rounds
    settings = TrainSettings.parse(terms.hyperparameters)
    program = parse_program(researcher.blobs.read(terms.program))
    before = researcher.blobs.read(terms.initial_state)
    states = {terms.initial_state: before}
    for entry in rounds.closes:
        close = entry.message
        works = [state.works[name] for name in close.commitments]
        held = [_contribution(swarm, work) for work in works]
        after, gated = close_plain(
            before, held, close.weights, program, settings, round_=close.round
        )
        assert (digest(after), gated) == (close.state_after, close.gated)
        before = states[close.state_after] = after
    for work in _certain_works(swarm, state, cast):
        round_ = work.assignment.message.round
        right = _train_again(researcher, terms, work, states[rounds.state_of(round_)])
        assert right == _contribution(swarm, work), f"{work.place} of round {round_} is wrong"
    return states


def _contribution(swarm: Swarm, work: Work) -> bytes:
    """Return what was committed to, from whoever has it."""
    name = work.commitment.message.output_root
    return next(node.blobs.read(name) for node in swarm.nodes.values() if name in node.blobs)


def _certain_works(swarm: Swarm, state: JobState, cast: Cast) -> list[Work]:
    """Return the works of a training job that cannot be wrong."""
    certain = []
    for work in state.works.values():
        if swarm.by_address(work.worker).name not in cast.dishonest:
            certain.append(work)
    for span in state.subjects.values():
        for finding in span.findings:
            honest = swarm.by_address(finding.auditor).name not in cast.dishonest
            if honest and finding.result is AuditResult.ACCEPTED:
                certain += [works_of(span)[at] for at in finding.challenge.message.drawn]
    return certain


def _train_again(researcher: SimNode, terms: JobTerms, work: Work, before: bytes) -> bytes:
    blobs, message = researcher.blobs, work.assignment.message
    manifest = parse_manifest(blobs.read(terms.data))
    plan = TrainPlan(terms, parse_program(blobs.read(terms.program)), manifest)
    rows = plan.rows(message.round, message.shard)
    chunks = {name: blobs.read(name) for name, _ in plan.chunks(rows)}
    request = TrainRequest(
        job_id=message.job_id,
        slot=0,
        program=blobs.read(terms.program),
        state=before,
        inputs=plan.inputs(chunks, rows),
        settings=terms.hyperparameters,
        seed=terms.seed,
        round=message.round,
        shard=message.shard,
    )
    return train_toy(admit_training(request), request).contribution
