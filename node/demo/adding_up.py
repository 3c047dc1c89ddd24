"""From the demo's outcome to its report: everything counted from what the daemons and chain say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from meshd.config.amounts import parse_mcc
from meshd.node.control.api import AuditInfo, JobDetail
from meshd.node.demo.course import AUDIT_ROWS, ROWS_PER_SHARD, Outcome
from meshd.node.demo.processes import port_of
from meshd.node.demo.report import (
    Account,
    Anchor,
    AuditKind,
    AuditResult,
    Audits,
    Cheater,
    Check,
    Escrow,
    Finding,
    Job,
    Killed,
    Mark,
    Output,
    Process,
    ReceiptKind,
    Receipts,
    Report,
    Researcher,
    Shards,
    Worker,
)

MIB = 1 << 20
SECOND_AUDITS = 0.1
"""The share of accepted shards that is audited twice."""


def add_up(outcome: Outcome, *, seconds: float, pss_bytes: int) -> Report:
    """Return the report of a run that came to its end."""
    detail = cast(JobDetail, outcome.detail)
    names = {p.address: p.name for p in outcome.swarm.participants.values()}
    shares = {share["account"]: share for share in detail["workers"]}
    earned = _earned(outcome)
    escrow = detail["escrow"]
    cheater, victim = outcome.cheater, outcome.victim
    work_units = sum(r["units"] for r in outcome.receipts if r["kind"] == "work")
    audit_units = sum(audit["units"] for audit in detail["audits"])
    researcher = outcome.swarm.of_role("researcher")[0]
    return Report(
        jobs=(_job(outcome, detail),),
        workers=tuple(_workers(outcome, detail)),
        audits=tuple(_audits(detail["audits"], names)),
        cheater=Cheater(
            cheater.address,
            shares[cheater.address]["rejected"] if cheater.address in shares else 0,
            outcome.after[cheater.address] - outcome.before[cheater.address],
            tuple(_findings(detail["audits"], cheater.address, names)),
        ),
        killed=Killed(
            victim.status["peer_id"],
            shares[victim.address]["lost"] if victim.address in shares else 0,
        ),
        receipts=tuple(_receipts(outcome)),
        anchors=tuple(Anchor(a["epoch"], a["root"], a["tx"]) for a in detail["anchors"]),
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
        escrow=Escrow(
            parse_mcc(escrow["deposited"]),
            parse_mcc(escrow["burnt"]),
            parse_mcc(escrow["paid"]),
            parse_mcc(escrow["refunded"]),
        ),
        audit_overhead=audit_units / work_units if work_units else 0.0,
        audit_overhead_steady=AUDIT_ROWS / ROWS_PER_SHARD * (1 + SECOND_AUDITS),
        heads=detail["certified_seq"],
        committee=len(detail["committee"]),
        quorum=detail["quorum"],
        processes=tuple(_processes(outcome)),
        outputs=tuple(_outputs(outcome)),
        seconds=seconds,
        pss_mb=pss_bytes / MIB,
    )


def _job(outcome: Outcome, detail: JobDetail) -> Job:
    compared = outcome.rows > 0
    return Job(
        id=detail["id"],
        kind=detail["kind"],
        state=detail["state"],
        shards=Shards(**detail["shards"]),
        seconds=detail["seconds"],
        check=Check(outcome.rows, outcome.max_abs_diff) if compared else None,
        why=detail["note"],
    )


def _workers(outcome: Outcome, detail: JobDetail) -> Iterable[Worker]:
    shares = {share["account"]: share for share in detail["workers"]}
    for participant in outcome.swarm.of_role("worker"):
        mark: Mark = ""
        if participant is outcome.cheater:
            mark = "cheater"
        elif participant is outcome.victim and outcome.was_killed:
            mark = "killed"
        share = shares.get(participant.address)
        counts = (share["accepted"], share["rejected"], share["voided"]) if share else (0, 0, 0)
        lost = share["lost"] - share["rejected"] - share["voided"] if share else 0
        yield Worker(participant.name, participant.address, *counts, max(lost, 0), mark)


def _audits(audits: list[AuditInfo], names: dict[str, str]) -> Iterable[Audits]:
    units: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for audit in audits:
        units[names[audit["auditor"]], audit["kind"], audit["result"]].append(audit["units"])
    for (auditor, kind, result), each in sorted(units.items()):
        yield Audits(
            auditor, cast(AuditKind, kind), cast(AuditResult, result), len(each), sum(each)
        )


def _findings(audits: list[AuditInfo], worker: str, names: dict[str, str]) -> Iterable[Finding]:
    by_shard: dict[tuple[int, int], list[AuditInfo]] = defaultdict(list)
    for audit in audits:
        if audit["worker"] == worker and audit["result"] != "accepted":
            by_shard[audit["shard"], audit["attempt"]].append(audit)
    for (shard, _), found in by_shard.items():
        if len(found) > 1:
            first, confirmed = found[0], found[-1]
            yield Finding(
                shard, first["rows"], names[first["auditor"]], names[confirmed["auditor"]]
            )


def _receipts(outcome: Outcome) -> Iterable[Receipts]:
    amounts: dict[str, list[int]] = defaultdict(list)
    for receipt in outcome.receipts:
        amounts[receipt["kind"]].append(parse_mcc(receipt["amount"]))
    for kind, each in amounts.items():
        yield Receipts(cast(ReceiptKind, kind), len(each), sum(each))


def _earned(outcome: Outcome) -> Counter[str]:
    earned: Counter[str] = Counter()
    for receipt in outcome.receipts:
        earned[receipt["account"].lower()] += parse_mcc(receipt["amount"])
    return earned


def _processes(outcome: Outcome) -> Iterable[Process]:
    swarm = outcome.swarm
    assert swarm.chain is not None
    yield Process("chain", swarm.chain.pid, int(swarm.rpc.rsplit(":", 1)[1]))
    for participant in swarm.participants.values():
        port = port_of(participant.status["listen"][0])
        yield Process(participant.role, participant.child.pid, port)


def _outputs(outcome: Outcome) -> Iterable[Output]:
    described = {
        outcome.output: "the embeddings, packed rows in the order of the sentences",
        outcome.sentences: "the sentences, one a line",
    }
    for path, what in described.items():
        if path != Path() and path.exists():
            yield Output(str(path), path.stat().st_size, what)
