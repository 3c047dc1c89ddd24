"""What a run of the demo came to: it holds, or every way in which it does not is named."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from meshd.config.amounts import ONE_MCC, parse_mcc
from meshd.node.demo.report import (
    Account,
    Anchor,
    Audits,
    Check,
    Cheater,
    Escrow,
    Finding,
    Job,
    Killed,
    Output,
    Process,
    Receipts,
    Report,
    Researcher,
    Shards,
    Worker,
    problems,
    to_json,
)

JOB = "0x" + "3f" * 32
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


def whole_report() -> Report:
    """A run that holds: 16 shards, one cheater caught in its first, one worker killed."""
    accepted = [8, 7, 1, 0]
    probation = [-3 * AUDIT, -3 * AUDIT, -AUDIT, 0]
    work = [n * SHARD + charged for n, charged in zip(accepted, probation, strict=True)]
    audits = [7 * AUDIT, 7 * AUDIT, 6 * AUDIT]
    orchestrate, aggregate = 16 * SHARD // 50, 16 * SHARD // 50
    paid = sum(work) + sum(audits) + orchestrate + aggregate
    deposited = 10 * ONE_MCC
    burnt = deposited // 100
    names = ["worker-1", "worker-2", "worker-3", "worker-4"]
    start = 1000 * ONE_MCC
    return Report(
        jobs=(Job(JOB, "infer", "settled", Shards(16, 16, 1, 3), 121.25, Check(2048, 3.1e-7)),),
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
        cheater=Cheater(MALLORY, 1, 0, (Finding(3, 8, "validator-1", "validator-2"),)),
        killed=Killed("16Uiu2HAmQkmVy6QkGRmfEYpPEjdWQnMf9qYVwGZjYg9Xb1Xq6a9K", 1),
        receipts=(
            Receipts("work", 16, sum(work)),
            Receipts("audit", 20, sum(audits)),
            Receipts("orchestrate", 1, orchestrate),
            Receipts("aggregate", 1, aggregate),
        ),
        anchors=(Anchor(1, "0x" + "7e" * 32, "0x" + "5d" * 32),),
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
        audit_overhead=20 / 16 / 16,
        audit_overhead_steady=0.011,
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
