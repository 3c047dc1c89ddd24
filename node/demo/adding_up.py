"""From the demo's outcome to its report: everything counted from what the daemons and chain say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import cast

from meshd.config.amounts import parse_mcc
from meshd.node.control.api import AuditInfo, JobDetail, WorkerShare
from meshd.node.demo.course import Outcome
from meshd.node.demo.processes import port_of
from meshd.node.demo.report import (
    Account,
    Anchor,
    AuditKind,
    AuditResult,
    Audits,
    Cheater,
    Escrow,
    Finding,
    Job,
    Killed,
    Mark,
    Process,
    ReceiptKind,
    Receipts,
    Report,
    Researcher,
    Shards,
    Worker,
)
from meshd.node.demo.stage import JobOutcome
from meshd.node.demo.tables import count_of

MIB = 1 << 20


def add_up(outcome: Outcome, *, seconds: float, pss_bytes: int) -> Report:
    """Return the report of a run that came to its end."""
    jobs = tuple(_job(outcome, job) for job in outcome.jobs)
    details = [job.detail for job in outcome.jobs]
    earned = _earned(outcome.jobs)
    cheater = outcome.cheater
    work = [_work_units(job) for job in outcome.jobs]
    researcher = outcome.swarm.of_role("researcher")[0]
    return Report(
        jobs=jobs,
        cheater=Cheater(
            cheater.address,
            sum(job.rejected_of_cheater for job in jobs),
            outcome.after[cheater.address] - outcome.before[cheater.address],
        ),
        killed=Killed(
            outcome.victim.status["peer_id"], sum(job.reissued_of_killed for job in jobs)
        ),
        receipts=tuple(_receipts(outcome.jobs)),
        anchors=tuple(
            Anchor(a["epoch"], a["root"], a["tx"]) for detail in details for a in detail["anchors"]
        ),
        accounts=tuple(
            Account(
                p.name,
                p.address,
                outcome.before[p.address],
                outcome.after[p.address],
                earned[p.address.lower()],
            )
            for p in outcome.swarm.participants.values()
            if p is not researcher
        ),
        researcher=Researcher(
            researcher.address,
            outcome.before[researcher.address],
            outcome.after[researcher.address],
        ),
        escrow=_escrow(details),
        audit_overhead=_share([job.audit_overhead for job in jobs], work),
        audit_overhead_steady=_share([job.audit_overhead_steady for job in jobs], work),
        heads=sum(detail["certified_seq"] for detail in details),
        committee=min((len(detail["committee"]) for detail in details), default=0),
        quorum=min((detail["quorum"] for detail in details), default=0),
        processes=tuple(_processes(outcome)),
        outputs=tuple(output for job in outcome.jobs for output in job.outputs),
        seconds=seconds,
        pss_mb=pss_bytes / MIB,
    )


def _work_units(job: JobOutcome) -> int:
    return sum(receipt["units"] for receipt in job.receipts if receipt["kind"] == "work")


def _share(shares: list[float], weights: list[int]) -> float:
    """Return the mean of *shares*, each counting by its weight."""
    total = sum(weights)
    return sum(s * w for s, w in zip(shares, weights, strict=True)) / total if total else 0.0


def _escrow(details: list[JobDetail]) -> Escrow:
    def total(name: str) -> int:
        amounts = (cast(dict[str, str], detail["escrow"])[name] for detail in details)
        return sum(map(parse_mcc, amounts))

    return Escrow(total("deposited"), total("burnt"), total("paid"), total("refunded"))


def _job(outcome: Outcome, job: JobOutcome) -> Job:
    detail = job.detail
    names = {p.address: p.name for p in outcome.swarm.participants.values()}
    shares = {share["account"]: share for share in detail["workers"]}
    killed = shares.get(outcome.victim.address)
    work = _work_units(job)
    audited = sum(audit["units"] for audit in detail["audits"])
    return Job(
        id=detail["id"],
        kind=detail["kind"],
        state=detail["state"],
        shards=Shards(**detail["shards"]),
        seconds=detail["seconds"],
        check=job.check,
        why=detail["note"],
        rounds=detail["rounds"]["total"] if detail["rounds"] is not None else 0,
        workers=tuple(_workers(outcome, job, shares)),
        audits=tuple(_audits(detail["audits"], names)),
        findings=tuple(_findings(job, outcome.cheater.address, names)),
        reissued_of_killed=killed["lost"] if killed is not None else 0,
        audit_overhead=audited / work if work else 0.0,
        audit_overhead_steady=job.overhead_steady,
    )


def _workers(outcome: Outcome, job: JobOutcome, shares: dict[str, WorkerShare]) -> Iterable[Worker]:
    for participant in outcome.swarm.of_role("worker"):
        mark: Mark = ""
        if participant.name == outcome.cheater.name:
            mark = "cheater"
        elif participant.name == outcome.victim.name and job.was_killed:
            mark = "killed"
        share = shares.get(participant.address)
        counts = (share["accepted"], share["rejected"], share["voided"]) if share else (0, 0, 0)
        lost = share["lost"] if share else 0
        if (
            job.detail["kind"] == "infer"
        ):  # where what is found wrong is computed anew, hence lost as well
            lost -= counts[1] + counts[2]
        yield Worker(participant.name, participant.address, *counts, max(lost, 0), mark)


def _audits(audits: list[AuditInfo], names: dict[str, str]) -> Iterable[Audits]:
    units: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for audit in audits:
        units[names[audit["auditor"]], audit["kind"], audit["result"]].append(audit["units"])
    for (auditor, kind, result), each in sorted(units.items()):
        yield Audits(
            auditor, cast(AuditKind, kind), cast(AuditResult, result), len(each), sum(each)
        )


def _findings(job: JobOutcome, worker: str, names: dict[str, str]) -> Iterable[Finding]:
    """Yield what two auditors found of a worker, audit by audit."""
    audits, shares = job.detail["audits"], job.detail["workers"]
    rejected = sum(share["rejected"] for share in shares if share["account"] == worker)
    for subject in _subjects(audit for audit in audits if audit["worker"] == worker):
        found = [audit for audit in subject if audit["result"] != "accepted"]
        if len(found) < 2:
            continue
        first, confirmed = found[0], found[-1]
        what = f"{count_of(first['rows'], 'row')} of shard {first['shard']}"
        if job.detail["kind"] == "train":
            what = f"{first['rows'] // job.rows_per_shard} of its {rejected} shards"
        yield Finding(what, names[first["auditor"]], names[confirmed["auditor"]])


def _subjects(audits: Iterable[AuditInfo]) -> Iterator[list[AuditInfo]]:
    """Yield the audits of one and the same thing: each begins with a first one."""
    subject: list[AuditInfo] = []
    for audit in audits:
        if audit["kind"] == "first" and subject:
            yield subject
            subject = []
        subject.append(audit)
    if subject:
        yield subject


def _receipts(jobs: list[JobOutcome]) -> Iterable[Receipts]:
    amounts: dict[str, list[int]] = defaultdict(list)
    for job in jobs:
        for receipt in job.receipts:
            amounts[receipt["kind"]].append(parse_mcc(receipt["amount"]))
    for kind, each in amounts.items():
        yield Receipts(cast(ReceiptKind, kind), len(each), sum(each))


def _earned(jobs: list[JobOutcome]) -> Counter[str]:
    earned: Counter[str] = Counter()
    for job in jobs:
        for receipt in job.receipts:
            earned[receipt["account"].lower()] += parse_mcc(receipt["amount"])
    return earned


def _processes(outcome: Outcome) -> Iterable[Process]:
    swarm = outcome.swarm
    assert swarm.chain is not None
    yield Process("chain", swarm.chain.pid, int(swarm.rpc.rsplit(":", 1)[1]))
    for participant in swarm.participants.values():
        port = port_of(participant.status["listen"][0])
        yield Process(participant.role, participant.child.pid, port)
