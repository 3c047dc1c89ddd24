"""What a run of the demo came to: it holds, or every way in which it does not is named."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from meshd.config.amounts import ONE_MCC, parse_mcc
from meshd.node.demo.promises import problems
from meshd.node.demo.report import (
    Account,
    Anchor,
    Audits,
    Cheater,
    Check,
    Escrow,
    Finding,
    Job,
    Killed,
    Losses,
    Output,
    Process,
    Receipts,
    Report,
    Researcher,
    Shards,
    Worker,
    to_json,
)

JOB = "0x" + "3f" * 32
TRAINING = "0x" + "4e" * 32
WORKERS = ["0x" + f"{at}a" * 20 for at in range(1, 5)]
ALICE, BOB, CAROL, MALLORY = WORKERS
ORCHESTRATOR = "0x" + "0b" * 20
VALIDATORS = ["0x" + f"{at}c" * 20 for at in range(1, 4)]
RESEARCHER = "0x" + "0d" * 20

UNITS = 180_219_536_193
SHARD = UNITS * 2 * 10**6
"""What 128 rows of MiniLM-L6 earn at 0.002 MCC for 10^9 units."""
AUDIT = SHARD // 16 * 5 // 4
"""What an audit of 8 of them earns."""


def account(name: str, address: str, before: int, earned: int) -> Account:
    return Account(name, address, before, before + earned, earned)


EMBEDDING = Job(
    JOB,
    "infer",
    "settled",
    Shards(16, 16, 1, 3),
    121.25,
    Check(2048, 3.1e-7),
    workers=(
        Worker("worker-1", ALICE, 8, 0, 0, 0),
        Worker("worker-2", BOB, 7, 0, 0, 0),
        Worker("worker-3", CAROL, 1, 0, 0, 1, "killed"),
        Worker("worker-4", MALLORY, 0, 1, 1, 0, "cheater"),
    ),
    audits=(
        Audits("validator-1", "first", "accepted", 6, 6 * UNITS // 16),
        Audits("validator-1", "first", "mismatch", 1, UNITS // 16),
        Audits("validator-2", "first", "accepted", 6, 6 * UNITS // 16),
        Audits("validator-2", "confirm", "mismatch", 1, UNITS // 16),
        Audits("validator-3", "first", "accepted", 5, 5 * UNITS // 16),
        Audits("validator-3", "second", "accepted", 1, UNITS // 16),
    ),
    findings=(Finding("8 rows of shard 3", "validator-1", "validator-2"),),
    reissued_of_killed=1,
    audit_overhead=20 / 16 / 16,
    audit_overhead_steady=0.017,
)
LOSSES = Losses((5.5, 4.0, 2.9, 2.7, 2.6, 2.5, 2.4, 2.4, 2.3), 2.45)
LANGUAGE = Job(
    TRAINING,
    "train",
    "settled",
    Shards(32, 32, 9, 1),
    90.5,
    LOSSES,
    rounds=8,
    workers=(
        Worker("worker-1", ALICE, 11, 0),
        Worker("worker-2", BOB, 12, 0),
        Worker("worker-3", CAROL, 0, 2, 0, 1, "killed"),
        Worker("worker-4", MALLORY, 0, 7, mark="cheater"),
    ),
    audits=(
        Audits("validator-1", "first", "accepted", 1, 3 * UNITS),
        Audits("validator-1", "first", "mismatch", 1, 2 * UNITS),
        Audits("validator-2", "first", "accepted", 1, 3 * UNITS),
        Audits("validator-3", "confirm", "mismatch", 1, 2 * UNITS),
    ),
    findings=(Finding("2 of its 7 shards", "validator-1", "validator-3"),),
    reissued_of_killed=1,
    audit_overhead=0.43,
    audit_overhead_steady=0.034,
)


def whole_report() -> Report:
    """A run that holds: two jobs, in each one cheater caught and one worker killed."""
    accepted = [8 + 11, 7 + 12, 1, 0]
    probation = [-3 * AUDIT, -3 * AUDIT, -AUDIT, 0]
    work = [n * SHARD + charged for n, charged in zip(accepted, probation, strict=True)]
    audits = [7 * AUDIT, 7 * AUDIT, 6 * AUDIT]
    orchestrate, aggregate = 16 * SHARD // 50, 16 * SHARD // 50
    paid = sum(work) + sum(audits) + orchestrate + aggregate
    deposited = 20 * ONE_MCC
    burnt = deposited // 100
    names = ["worker-1", "worker-2", "worker-3", "worker-4"]
    start = 1000 * ONE_MCC
    return Report(
        jobs=(EMBEDDING, LANGUAGE),
        cheater=Cheater(MALLORY, 8, 0),
        killed=Killed("16Uiu2HAmQkmVy6QkGRmfEYpPEjdWQnMf9qYVwGZjYg9Xb1Xq6a9K", 2),
        receipts=(
            Receipts("work", 39, sum(work)),
            Receipts("audit", 20, sum(audits)),
            Receipts("orchestrate", 1, orchestrate),
            Receipts("aggregate", 1, aggregate),
        ),
        anchors=(
            Anchor(1, "0x" + "7e" * 32, "0x" + "5d" * 32),
            Anchor(1, "0x" + "6c" * 32, "0x" + "4b" * 32),
        ),
        accounts=(
            account("orchestrator", ORCHESTRATOR, start - 200 * ONE_MCC, orchestrate + aggregate),
            *(account(*each) for each in zip(names, WORKERS, [start] * 4, work, strict=True)),
            *(
                account(f"validator-{at}", address, start - 200 * ONE_MCC, earned)
                for at, (address, earned) in enumerate(zip(VALIDATORS, audits, strict=True), 1)
            ),
        ),
        researcher=Researcher(RESEARCHER, start, start - burnt - paid),
        escrow=Escrow(deposited, burnt, paid, deposited - burnt - paid),
        audit_overhead=0.2,
        audit_overhead_steady=0.02,
        heads=61,
        committee=3,
        quorum=2,
        processes=tuple(
            Process(role, 4000 + at, 30_000 + at)
            for at, role in enumerate(
                ["chain", "orchestrator", *["worker"] * 4, *["validator"] * 3, "researcher"]
            )
        ),
        outputs=(Output("demo-out/embeddings.rows", 3_145_780, "2,048 embeddings"),),
        seconds=158.4,
        pss_mb=2891.5,
    )


REPORT = whole_report()


def with_job(report: Report, **changes: Any) -> Report:
    return replace(report, jobs=(replace(report.jobs[0], **changes), *report.jobs[1:]))


def with_training(report: Report, **changes: Any) -> Report:
    return replace(report, jobs=(report.jobs[0], replace(report.jobs[1], **changes)))


def with_worker(job: Job, at: int, **changes: Any) -> tuple[Worker, ...]:
    return tuple(
        replace(worker, **changes) if number == at else worker
        for number, worker in enumerate(job.workers)
    )


def with_account(report: Report, name: str, **changes: Any) -> Report:
    accounts = [replace(a, **changes) if a.name == name else a for a in report.accounts]
    return replace(report, accounts=tuple(accounts))


def test_a_run_that_holds_has_no_problem() -> None:
    assert problems(REPORT) == []


Change = Callable[[Report], Report]

BROKEN: dict[str, tuple[Change, str]] = {
    "no job": (lambda r: replace(r, jobs=()), "no job ran"),
    "failed": (lambda r: with_job(r, state="failed", why="no worker"), "failed, not settled: no w"),
    "shard missing": (
        lambda r: with_job(r, shards=replace(r.jobs[0].shards, accepted=15)),
        "15 of 16 shards were accepted",
    ),
    "no shards": (lambda r: with_job(r, shards=Shards(0, 0, 1, 1)), "0 of 0 shards"),
    "not compared": (lambda r: with_job(r, check=None), "was not compared with plain torch"),
    "no rows": (lambda r: with_job(r, check=Check(0, 0.0)), "was not compared"),
    "other output": (lambda r: with_job(r, check=Check(2048, 2e-5)), "by 2e-05, more than 1e-05"),
    "not a number": (lambda r: with_job(r, check=Check(2048, math.nan)), "by nan, more than"),
    "whose shard": (
        lambda r: with_job(r, workers=with_worker(EMBEDDING, 1, accepted=0)),
        "16 shards were accepted, but the workers' add up to 9",
    ),
    "not caught": (
        lambda r: with_job(r, workers=with_worker(EMBEDDING, 3, rejected=0)),
        "(infer): the cheater was not caught",
    ),
    "not caught in training": (
        lambda r: with_training(r, workers=with_worker(LANGUAGE, 3, accepted=7, rejected=0)),
        "(train): the cheater was not caught",
    ),
    "round missing": (
        lambda r: with_training(r, check=replace(LOSSES, loss=(5.5, 4.0))),
        "its losses on held-out text are not known for all rounds",
    ),
    "no losses": (lambda r: with_training(r, check=None), "are not known for all rounds"),
    "worse than alone": (
        lambda r: with_training(r, check=Losses(LOSSES.loss, 2.2)),
        "the swarm came to 2.3000 nats per byte, one worker alone to 2.2000",
    ),
    "loss not a number": (
        lambda r: with_training(r, check=Losses((*LOSSES.loss[:-1], math.nan), 2.45)),
        "the swarm came to nan nats per byte",
    ),
    "shard of no round": (
        lambda r: with_training(r, shards=replace(LANGUAGE.shards, accepted=31)),
        "31 of 32 shards were accepted",
    ),
    "whose round": (
        lambda r: with_training(r, workers=with_worker(LANGUAGE, 1, accepted=3)),
        "32 shards entered their round, but the workers' add up to 23",
    ),
    "unaudited span": (
        lambda r: with_training(r, audits=LANGUAGE.audits[1:]),
        "2 workers were paid, and 1 audits passed",
    ),
    "cheater told of twice": (
        lambda r: replace(r, cheater=replace(r.cheater, rejected=16)),
        "16 rejections are told of all jobs, 8 of each",
    ),
    "cheater paid": (lambda r: replace(r, cheater=replace(r.cheater, received=1)), "received 0.0"),
    "not re-issued": (
        lambda r: with_job(r, reissued_of_killed=0),
        "(infer): no shard of the killed worker was re-issued",
    ),
    "not re-issued in training": (
        lambda r: with_training(r, reissued_of_killed=0),
        "(train): no shard of the killed worker was re-issued",
    ),
    "honest rejected": (
        lambda r: with_job(r, workers=with_worker(EMBEDDING, 0, rejected=2)),
        "worker-1 is honest, and 2 of its shards were rejected",
    ),
    "unaudited": (
        lambda r: with_job(r, audits=EMBEDDING.audits[:3]),
        "16 shards were accepted, but only 12 audits passed",
    ),
    "free audits": (lambda r: replace(r, audit_overhead=0.0), "audit_overhead is 0"),
    "endless audits": (
        lambda r: replace(r, audit_overhead_steady=math.inf),
        "audit_overhead_steady is inf",
    ),
    "no heads": (lambda r: replace(r, heads=0), "no head of a job log was certified"),
    "paid twice": (
        lambda r: replace(r, receipts=(replace(r.receipts[0], count=40), *r.receipts[1:])),
        "39 shards passed, but 40 receipts are of work",
    ),
    "receipts wrong": (
        lambda r: replace(
            r, receipts=(replace(r.receipts[0], amount=r.receipts[0].amount + 1), *r.receipts[1:])
        ),
        "the receipts add up to",
    ),
    "no anchor": (
        lambda r: replace(r, anchors=r.anchors[:1]),
        "1 settlement anchored for 2 jobs",
    ),
    "no transaction": (
        lambda r: replace(r, anchors=(replace(r.anchors[0], tx=""), r.anchors[1])),
        "the anchor of epoch 1 has no transaction",
    ),
    "no deposit": (
        lambda r: replace(r, escrow=replace(r.escrow, deposited=0)),
        "nothing was deposited",
    ),
    "escrow short": (
        lambda r: replace(r, escrow=replace(r.escrow, refunded=r.escrow.refunded - 1)),
        "the escrow is not exact: 20 MCC deposited, 19.999999999999999999 burnt, paid and refunded",
    ),
    "escrow over": (
        lambda r: replace(r, escrow=replace(r.escrow, burnt=r.escrow.burnt + 1)),
        "the escrow is not exact",
    ),
    "unpaid": (
        lambda r: with_account(r, "worker-1", after=1000 * ONE_MCC),
        f"worker-1 {ALICE} received 0 MCC, its receipts add up to 6.",
    ),
    "overpaid": (
        lambda r: with_account(r, "validator-2", after=801 * ONE_MCC),
        f"validator-2 {VALIDATORS[1]} received 1 MCC",
    ),
    "paid elsewhere": (
        lambda r: with_account(r, "validator-2", after=800 * ONE_MCC, earned=0),
        "MCC, the accounts received",
    ),
    "twice": (
        lambda r: with_account(r, "worker-4", address=CAROL),
        f"the account {CAROL} is listed twice",
    ),
    "worker missing": (
        lambda r: replace(r, accounts=tuple(a for a in r.accounts if a.name != "worker-4")),
        f"the account {MALLORY} of a worker is missing",
    ),
    "researcher": (
        lambda r: replace(r, researcher=replace(r.researcher, after=r.researcher.after - 1)),
        "the jobs cost the researcher",
    ),
    "no processes": (lambda r: replace(r, processes=()), "no process is listed"),
    "shared process": (
        lambda r: replace(
            r, processes=(*r.processes[:2], replace(r.processes[2], pid=4001), *r.processes[3:])
        ),
        "orchestrator and worker have the same pid 4001",
    ),
    "shared port": (
        lambda r: replace(r, processes=(replace(r.processes[0], port=30_009), *r.processes[1:])),
        "chain and researcher have the same port 30009",
    ),
    "left behind": (
        lambda r: replace(r, left_behind=("process 4711",)),
        "left behind: process 4711",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_hold_is_named(name: str) -> None:
    change, said = BROKEN[name]
    found = problems(change(REPORT))
    assert any(said in problem for problem in found), found


def test_a_killed_worker_may_have_been_found_silent() -> None:
    workers = with_worker(EMBEDDING, 2, rejected=1)
    assert problems(with_job(REPORT, workers=workers)) == []


def test_every_problem_is_named_not_the_first_only() -> None:
    broken = with_job(REPORT, state="failed", check=None)
    assert len(problems(replace(broken, anchors=(), left_behind=("a", "b")))) == 5


def test_a_training_job_by_itself_holds_too() -> None:
    alone = replace(REPORT, jobs=(LANGUAGE,), cheater=replace(REPORT.cheater, rejected=7))
    found = problems(replace(alone, killed=replace(alone.killed, reissued=1)))
    assert found == ["23 shards passed, but 39 receipts are of work"]


def test_the_json_has_exactly_the_promised_keys() -> None:
    found = json.loads(json.dumps(to_json(REPORT)))
    assert list(found) == [
        "jobs",
        "cheater",
        "killed",
        "receipts",
        "anchors",
        "payments",
        "escrow",
        "audit_overhead",
        "audit_overhead_steady",
        "processes",
        "seconds",
        "pss_mb",
    ]
    assert found["jobs"] == [
        {
            "id": JOB,
            "kind": "infer",
            "state": "settled",
            "shards": {"total": 16, "accepted": 16, "rejected": 1, "reissued": 3},
            "seconds": 121.25,
            "check": {"rows": 2048, "max_abs_diff": 3.1e-7},
        },
        {
            "id": TRAINING,
            "kind": "train",
            "state": "settled",
            "shards": {"total": 32, "accepted": 32, "rejected": 9, "reissued": 1},
            "seconds": 90.5,
            "check": {"loss": [5.5, 4.0, 2.9, 2.7, 2.6, 2.5, 2.4, 2.4, 2.3], "loss_alone": 2.45},
        },
    ]
    assert found["cheater"] == {"address": MALLORY, "rejected": 8, "received": "0"}
    assert found["killed"] == {"peer": REPORT.killed.peer, "reissued": 2}
    assert found["receipts"] == 61
    assert found["anchors"][0] == {"epoch": 1, "root": "0x" + "7e" * 32, "tx": "0x" + "5d" * 32}
    assert found["processes"][0] == {"role": "chain", "pid": 4000, "port": 30_000}


def test_amounts_in_json_are_exact_decimal_text_and_add_up() -> None:
    found: Any = to_json(REPORT)
    escrow = {name: parse_mcc(amount) for name, amount in found["escrow"].items()}
    assert escrow["deposited"] == escrow["burnt"] + escrow["paid"] + escrow["refunded"]
    assert len(found["payments"]) == 8
    assert found["payments"][MALLORY] == {"earned": "0", "received": "0"}
    assert RESEARCHER not in found["payments"]
    received = [parse_mcc(payment["received"]) for payment in found["payments"].values()]
    assert sum(received) == escrow["paid"]


def test_an_output_that_was_not_compared_is_null_in_json() -> None:
    found: Any = to_json(with_job(REPORT, check=None))
    assert found["jobs"][0]["check"] is None


def test_a_committee_below_seven_is_small() -> None:
    assert REPORT.small_committee
    assert not replace(REPORT, committee=7, quorum=5).small_committee
