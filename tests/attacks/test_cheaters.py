"""Every cheater of the threat model, played through the real protocol with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks.roster import CHEATERS, LONG, LONG_SHARD_S, Cheater, Row, row_of
from attacks.stage import ROUNDS, SHARDS, SPAN, Part, play
from attacks.tiny import Learner

TABLE = Path(__file__).parents[2] / "docs" / "cheaters.md"
SEEDS = range(5)
INTRODUCTION = """\
# Cheaters

Each of these is played through the real protocol: the unchanged roles on a simulated network and
chain, with torch, on a model of {parameters} parameters. One of four workers, one of three
validators (the pair: two of five), or the orchestrator cheats, all the time.

Training: rounds of {shards} shards; spans of {span}, a quarter of each audited. {long} rounds with
shards of {shard_s:g} seconds where a worker cheats, else {rounds} with shards of one second.

*Shards*: how many it delivered before it was rejected, or in all; an audit takes about twelve
seconds, in which it goes on. *Received*: what it was paid, beside the best paid honest worker
(auditors: for how many audits). Medians of {seeds} seeds.

What an auditor that computes nothing is paid for, and what two members of five can do to a worker
where the beacon draws both in turn, stands here as it was measured. Written by

    .venv/bin/pytest tests/attacks --write-table

| cheater | does | shards | received | found by |
| --- | --- | --- | --- | --- |
"""


@pytest.mark.parametrize("cheater", CHEATERS, ids=lambda cheater: cheater.name)
def test_nothing_is_gained_by_cheating(cheater: Cheater) -> None:
    cheater.ending([play(cheater.part)])


def test_the_same_swarm_without_a_cheater_finds_nobody_wrong() -> None:
    for workload in ("train", "infer"):
        result = play(Part(workload=workload))
        assert result.state == "settled"
        assert not result.caught
        assert not result.gated
        assert result.received == result.earned > 0 or workload == "infer"


def test_the_table_names_every_cheater(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-table", False):
        write_table([row_of(cheater, SEEDS) for cheater in CHEATERS])
    named = [line.split("|")[1].strip() for line in TABLE.read_text().splitlines() if "| " in line]
    assert named[2:] == [cheater.name for cheater in CHEATERS]


def write_table(rows: list[Row]) -> None:
    head = INTRODUCTION.format(
        parameters=sum(p.numel() for p in Learner().parameters()),
        rounds=ROUNDS,
        long=LONG,
        shard_s=LONG_SHARD_S,
        shards=SHARDS,
        span=SPAN,
        seeds=len(SEEDS),
    )
    lines = [
        f"| {row.cheater.name} | {row.cheater.does} | {row.shards} | {row.received} | {row.found} |"
        for row in rows
    ]
    TABLE.write_text(head + "\n".join(lines) + "\n")
