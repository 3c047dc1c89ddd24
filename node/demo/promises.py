"""Whether a run holds what the demo promises: every way in which it does not, in a line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from meshd.config.amounts import format_mcc
from meshd.node.demo.report import Check, Job, Losses, Process, Report
from meshd.node.demo.tables import count_of

LARGEST_DIFFERENCE: Final = 1e-5
"""How far the job's output may be from plain torch, for any number of any row."""


def problems(report: Report) -> list[str]:
    """Return every way in which the run does not hold what the demo promises; empty: all does."""
    found = [problem for job in report.jobs for problem in _of_job(job)]
    if not report.jobs:
        found.append("no job ran")
    return [
        *found,
        *_of_failing(report),
        *_of_audits(report),
        *_of_receipts(report),
        *_of_money(report),
        *_of_processes(report.processes),
        *(f"left behind: {what}" for what in report.left_behind),
    ]


def name_of(job: Job) -> str:
    """Return how a job is called in a sentence."""
    return f"job {job.id[:10]} ({job.kind})"


def _of_job(job: Job) -> Iterator[str]:
    name, shards = name_of(job), job.shards
    because = f": {job.why}" if job.why else ""
    if job.state != "settled":
        yield f"{name} is {job.state}, not settled{because}"
    if shards.total < 1 or shards.accepted != shards.total:
        yield f"{name}: {shards.accepted} of {shards.total} shards were accepted"
    yield from _of_training(job, because) if job.rounds else _of_inference(job, because)
    for worker in job.workers:
        if worker.rejected and worker.mark == "":
            yield (
                f"{name}: {worker.name} is honest, and {worker.rejected} of its shards "
                "were rejected"
            )
    if job.rejected_of_cheater < 1:
        yield f"{name}: the cheater was not caught: none of its shards was rejected"
    if job.reissued_of_killed < 1:
        yield f"{name}: no shard of the killed worker was re-issued"


def _of_inference(job: Job, because: str) -> Iterator[str]:
    name, check = name_of(job), job.check
    if not isinstance(check, Check) or check.rows < 1:
        yield f"{name}: its output was not compared with plain torch{because}"
    elif not check.max_abs_diff <= LARGEST_DIFFERENCE:
        yield (
            f"{name}: its output differs from plain torch by {check.max_abs_diff:.3g}, "
            f"more than {LARGEST_DIFFERENCE:g}"
        )
    if job.paid_shards != job.shards.accepted:
        yield (
            f"{name}: {job.shards.accepted} shards were accepted, but the workers' add up to "
            f"{job.paid_shards}"
        )
    passed = sum(audits.count for audits in job.audits if audits.result == "accepted")
    if passed < job.shards.accepted:
        yield f"{name}: {job.shards.accepted} shards were accepted, but only {passed} audits passed"


def _of_training(job: Job, because: str) -> Iterator[str]:
    name, losses = name_of(job), job.check
    if not isinstance(losses, Losses) or len(losses.loss) != job.rounds + 1:
        yield f"{name}: its losses on held-out text are not known for all rounds{because}"
    elif not losses.loss[-1] < losses.loss_alone < math.inf:
        yield (
            f"{name}: the swarm came to {losses.loss[-1]:.4f} nats per byte, one worker alone to "
            f"{losses.loss_alone:.4f}: together they should be better"
        )
    entered = sum(worker.accepted + worker.rejected + worker.void for worker in job.workers)
    if entered < job.shards.accepted:
        yield (
            f"{name}: {job.shards.accepted} shards entered their round, but the workers' add up "
            f"to {entered}"
        )
    paid = sum(worker.accepted > 0 for worker in job.workers)
    passed = sum(audits.count for audits in job.audits if audits.result == "accepted")
    if not 0 < paid <= passed:
        yield f"{name}: {paid} workers were paid, and {passed} audits passed"


def _of_failing(report: Report) -> Iterator[str]:
    cheater = report.cheater
    if cheater.received != 0:
        yield f"the cheater {cheater.address} received {format_mcc(cheater.received)} MCC"
    for what, told, counted in (
        ("rejections", cheater.rejected, sum(job.rejected_of_cheater for job in report.jobs)),
        ("re-issues", report.killed.reissued, sum(job.reissued_of_killed for job in report.jobs)),
    ):
        if told != counted:
            yield f"{told} {what} are told of all jobs, {counted} of each"


def _of_audits(report: Report) -> Iterator[str]:
    for name in ("audit_overhead", "audit_overhead_steady"):
        value = getattr(report, name)
        if not 0 < value < math.inf:
            yield f"{name} is {value:g}: a share of the compute is above 0"
    if report.heads < 1:
        yield "no head of a job log was certified"


def _of_receipts(report: Report) -> Iterator[str]:
    paid = sum(job.paid_shards for job in report.jobs)
    works = sum(receipts.count for receipts in report.receipts if receipts.kind == "work")
    if works != paid:
        yield f"{paid} shards passed, but {works} receipts are of work"
    amount = sum(receipts.amount for receipts in report.receipts)
    if amount != report.escrow.paid:
        yield (
            f"the receipts add up to {format_mcc(amount)} MCC, "
            f"the escrow paid {format_mcc(report.escrow.paid)}"
        )
    if len(report.anchors) < len(report.jobs) or not report.anchors:
        settled = count_of(len(report.anchors), "settlement")
        yield f"{settled} anchored for {count_of(len(report.jobs), 'job')}"
    for anchor in report.anchors:
        if not anchor.tx:
            yield f"the anchor of epoch {anchor.epoch} has no transaction"


def _of_money(report: Report) -> Iterator[str]:
    escrow = report.escrow
    spent = escrow.burnt + escrow.paid + escrow.refunded
    if escrow.deposited < 1:
        yield "nothing was deposited into an escrow"
    if escrow.deposited != spent:
        yield (
            f"the escrow is not exact: {format_mcc(escrow.deposited)} MCC deposited, "
            f"{format_mcc(spent)} burnt, paid and refunded"
        )
    for account in report.accounts:
        if account.received != account.earned:
            yield (
                f"{account.name} {account.address} received {format_mcc(account.received)} MCC, "
                f"its receipts add up to {format_mcc(account.earned)}"
            )
    received = sum(account.received for account in report.accounts)
    if received != escrow.paid:
        yield (
            f"the escrow paid {format_mcc(escrow.paid)} MCC, "
            f"the accounts received {format_mcc(received)}"
        )
    listed = Counter(account.address for account in report.accounts)
    for address in (a for a, count in listed.items() if count > 1):
        yield f"the account {address} is listed twice"
    workers = {worker.address: None for job in report.jobs for worker in job.workers}
    for address in dict.fromkeys([report.cheater.address, *workers]):
        if address not in listed:
            yield f"the account {address} of a worker is missing among the payments"
    cost = report.researcher.before - report.researcher.after
    if cost != escrow.deposited - escrow.refunded:
        yield (
            f"the jobs cost the researcher {format_mcc(cost)} MCC, not the "
            f"{format_mcc(escrow.deposited - escrow.refunded)} that were not refunded"
        )


def _of_processes(processes: Sequence[Process]) -> Iterator[str]:
    if not processes:
        yield "no process is listed"
    for name in ("pid", "port"):
        counts = Counter(getattr(process, name) for process in processes)
        for value in (value for value, count in counts.items() if count > 1):
            roles = " and ".join(p.role for p in processes if getattr(p, name) == value)
            yield f"{roles} have the same {name} {value}: every participant has its own"
