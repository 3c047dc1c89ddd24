"""What the demo shows: everything there is to see, on a terminal and in a file."""

import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Literal

import pytest
from rich.console import Console

from meshd.config.amounts import ONE_MCC
from meshd.node.control.api import JobDetail, JobState
from meshd.node.demo.page import print_page
from meshd.node.demo.progress import Progress
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
)
from meshd.node.demo.tables import bar, count_of, fixed_mcc, places_of, short_hex

ALICE, MALLORY, VERA = "0x" + "a1" * 20, "0x" + "bad0" * 10, "0x" + "c3" * 20
TX = "0x" + "5d" * 32
MILLI = ONE_MCC // 1000

EMBEDDING = Job(
    "0x" + "3f" * 32,
    "infer",
    "settled",
    Shards(2, 2, 1, 2),
    61.5,
    Check(256, 3.1e-7),
    workers=(
        Worker("worker-1", ALICE, 2, 0),
        Worker("worker-2", MALLORY, 0, 1, mark="cheater"),
        Worker("worker-3", "0x" + "d4" * 20, 0, 0, lost=1, mark="killed"),
    ),
    audits=(
        Audits("validator-1", "first", "accepted", 2, 22_500_000_000),
        Audits("validator-1", "confirm", "mismatch", 1, 11_250_000_000),
    ),
    findings=(Finding("8 rows of shard 7", "validator-2", "validator-1"),),
    reissued_of_killed=1,
    audit_overhead=0.0938,
    audit_overhead_steady=0.0172,
)
LANGUAGE = Job(
    "0x" + "4e" * 32,
    "train",
    "settled",
    Shards(8, 8, 3, 1),
    40.0,
    Losses((5.541, 2.7, 2.344), 2.435),
    rounds=2,
    workers=(
        Worker("worker-1", ALICE, 5, 0),
        Worker("worker-2", MALLORY, 0, 2, mark="cheater"),
        Worker("worker-3", "0x" + "d4" * 20, 0, 1, lost=1, mark="killed"),
    ),
    audits=(Audits("validator-1", "first", "accepted", 1, 5_000_000_000),),
    findings=(Finding("1 of its 2 shards", "validator-1", "validator-2"),),
    reissued_of_killed=1,
    audit_overhead=0.25,
    audit_overhead_steady=0.0344,
)
REPORT = Report(
    jobs=(EMBEDDING,),
    cheater=Cheater(MALLORY, 1, 0),
    killed=Killed("16Uiu2HAmKilled", 1),
    receipts=(Receipts("work", 2, 700 * MILLI), Receipts("audit", 3, 45 * MILLI)),
    anchors=(Anchor(1, "0x" + "7e" * 32, TX),),
    accounts=(
        Account("worker-1", ALICE, 1000 * ONE_MCC, 1000 * ONE_MCC + 700 * MILLI, 700 * MILLI),
        Account("worker-2", MALLORY, ONE_MCC, ONE_MCC, 0),
        Account("worker-3", "0x" + "d4" * 20, 0, 0, 0),
        Account("validator-1", VERA, 800 * ONE_MCC, 800 * ONE_MCC + 45 * MILLI, 45 * MILLI),
    ),
    researcher=Researcher("0x" + "0d" * 20, 1000 * ONE_MCC, 1000 * ONE_MCC - 755 * MILLI),
    escrow=Escrow(ONE_MCC, 10 * MILLI, 745 * MILLI, 245 * MILLI),
    audit_overhead=0.0938,
    audit_overhead_steady=0.0172,
    heads=31,
    committee=3,
    quorum=2,
    processes=(Process("chain", 4711, 30_000), Process("worker", 4712, 30_001)),
    outputs=(Output("demo-out/embeddings.rows", 393_300, "256 embeddings"),),
    seconds=158.4,
    pss_mb=2891.5,
)


def shown(report: Report, *, terminal: bool = False, width: int = 80) -> str:
    """Return the page as text."""
    file = StringIO()
    color: Literal["truecolor"] | None = "truecolor" if terminal else None
    console = Console(
        file=file, force_terminal=terminal, width=width, color_system=color, legacy_windows=False
    )
    print_page(report, console)
    return file.getvalue()


def test_in_a_file_the_page_is_ascii_of_at_most_a_hundred_columns() -> None:
    page = shown(REPORT)
    assert page.isascii()
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) == 100
    assert not any(line.endswith(" ") for line in page.splitlines())


@pytest.mark.parametrize(
    "line",
    [
        r"infer 0x(3f){32}  settled",
        r"2 of 2 shards accepted, 1 rejected, 2 re-issued, in 61\.5 s",
        r"largest difference from plain torch in 256 rows: 3\.1e-07 \(allowed: 1e-05\)",
        r"worker-1  0xa1a1\.\.a1a1  #+ +2 +0 +0$",
        r"worker-2  0xbad0\.\.bad0 +0 +1 +0  cheats$",
        r"worker-3  0xd4d4\.\.d4d4 +0 +0 +1  killed$",
        rf"cheater {MALLORY}: 1 shard rejected, received 0 MCC",
        r"cheater validator-2 computed 8 rows of shard 7 again and got others, confirmed by",
        r"killed  16Uiu2HAmKilled: 1 shard re-issued",
        r"auditor +first  confirm  accepted  mismatch  10\^9 units",
        r"validator-1 +2 +1 +2 +1 +33\.8",
        r"infer: 9\.4% now, .*; 1\.7% in the steady state",
        r"work +2  0\.700",
        r"audit +3  0\.045",
        r"all +5  0\.745",
        r"31 log heads certified, each by at least 2 of the 3 committee members",
        r"small committee: you trust its quorum",
        rf"1  0x7e7e\.\.7e7e  {TX}",
        r"worker-1 +0xa1a1\.\.a1a1  1,000\.000  1,000\.700 +0\.700 +0\.700  =",
        r"worker-2 +0xbad0\.\.bad0 +1\.000 +1\.000 +0\.000 +0\.000  =",
        r"researcher +0x0d0d\.\.0d0d  1,000\.000 +999\.245 +-0\.755",
        r"^    1\.000  deposited",
        r"^  = 0\.010  burnt",
        r"^  \+ 0\.745  paid",
        r"^  \+ 0\.245  refunded",
        r"exact to the last unit",
        r"time    158 s",
        r"memory  2,892 MB",
        r"chain \(pid 4711, port 30000\), worker \(pid 4712, port 30001\)",
        r"demo-out/embeddings\.rows  393,300 bytes: 256 embeddings",
    ],
)
def test_the_page_shows(line: str) -> None:
    assert re.search(line, shown(REPORT), re.MULTILINE), shown(REPORT)


@pytest.mark.parametrize(
    "line",
    [
        r"train 0x(4e){32}  settled",
        r"8 of 8 shards entered one of 2 rounds, 3 rejected, 1 re-issued, in 40\.0 s",
        r"loss on held-out text, in nats per byte:",
        r"    0  5\.541  #{60}$",
        r"    2  2\.344  #{26}$",
        r"alone  2\.435  #{27}$",
        r"after 2 rounds 2\.344; one worker alone after as many steps of its own 2\.435",
        r"Shards by worker: train",
        r"worker-1  0xa1a1\.\.a1a1  #+ +5 +0 +0$",
        r"worker-3  0xd4d4\.\.d4d4 +0 +1 +1  killed$",
        r"cheater validator-1 computed 1 of its 2 shards again and got others, confirmed by",
        r"train: 25\.0% now, .*; 3\.4% in the steady state",
        r"all: 9\.4% now",
    ],
)
def test_the_page_shows_of_a_training_job(line: str) -> None:
    page = shown(replace(REPORT, jobs=(EMBEDDING, LANGUAGE)))
    assert re.search(line, page, re.MULTILINE), page
    assert max(map(len, page.splitlines())) == 100


def test_the_last_line_says_that_everything_holds() -> None:
    assert shown(REPORT).splitlines()[-1] == "Everything holds."


def test_the_last_lines_name_everything_that_does_not_hold() -> None:
    broken = replace(REPORT, anchors=(), left_behind=("process 4711",))
    assert shown(broken).splitlines()[-3:] == [
        "- 0 settlements anchored for 1 job",
        "- left behind: process 4711",
        "2 things do not hold.",
    ]
    one = replace(REPORT, heads=0)
    assert shown(one).splitlines()[-1] == "One thing does not hold."


def test_an_account_that_was_not_paid_is_marked() -> None:
    first = replace(REPORT.accounts[0], after=REPORT.accounts[0].before)
    page = shown(replace(REPORT, accounts=(first, *REPORT.accounts[1:])))
    assert re.search(r"worker-1 .* 0\.000 +0\.700  differs$", page, re.MULTILINE)


def test_an_escrow_that_does_not_add_up_is_marked() -> None:
    page = shown(replace(REPORT, escrow=replace(REPORT.escrow, paid=0)))
    assert "NOT EXACT" in page
    assert "exact to the last unit" not in page


def test_a_job_that_failed_says_why() -> None:
    failed = replace(EMBEDDING, state="failed", check=None, why="no worker matches")
    page = shown(replace(REPORT, jobs=(failed,)))
    assert re.search(r"infer 0x(3f){32}  failed", page)
    assert "  no worker matches" in page
    assert "largest difference" not in page


def test_a_large_committee_is_not_called_small() -> None:
    assert "small committee" not in shown(replace(REPORT, committee=7, quorum=5))


def test_differences_stay_exact_where_balances_are_cut() -> None:
    """18 decimals fill the line: balances are cut, what was earned never is."""
    odd = 700 * MILLI + 1
    first = replace(REPORT.accounts[0], after=1000 * ONE_MCC + odd, earned=odd)
    page = shown(replace(REPORT, accounts=(first, *REPORT.accounts[1:])))
    assert max(map(len, page.splitlines())) == 100
    assert "0.700000000000000001  0.700000000000000001  =" in page
    assert "before and after are cut to 4 decimals" in page


def test_balances_stay_exact_while_they_fit_without_addresses() -> None:
    fine = 10**4  # 14 decimals, what prices of inference come to
    first = replace(
        REPORT.accounts[0], after=1000 * ONE_MCC + 700 * MILLI + fine, earned=700 * MILLI + fine
    )
    page = shown(replace(REPORT, accounts=(first, *REPORT.accounts[1:])))
    assert "1,000.70000000000001" in page
    assert "are cut" not in page


def test_a_terminal_gets_colours_and_lines() -> None:
    page = shown(REPORT, terminal=True, width=120)
    assert "─" in page
    assert "█" in page
    assert "\x1b[" in page
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", page).splitlines())) == 100


def test_a_narrow_terminal_folds_and_loses_nothing() -> None:
    page = re.sub(r"\x1b\[[0-9;]*m", "", shown(REPORT, terminal=True, width=60))
    assert max(map(len, page.splitlines())) <= 60
    assert "…" not in page


def test_brackets_are_shown_as_they_are() -> None:
    odd = replace(REPORT.jobs[0], why="shard [bold]3[/bold] is gone")
    assert "shard [bold]3[/bold] is gone" in shown(replace(REPORT, jobs=(odd,)))


# ---- while it runs -----------------------------------------------------------------------


def detail(state: JobState, accepted: int, rejected: int = 0, seq: int = 1) -> JobDetail:
    return {
        "id": "0x" + "3f" * 32,
        "kind": "infer",
        "state": state,
        "researcher": ALICE,
        "shards": {"total": 16, "accepted": accepted, "rejected": rejected, "reissued": 0},
        "cap": "1",
        "deadline": 0,
        "seconds": 0.0,
        "note": "",
        "program": "",
        "data": "",
        "rows": 2048,
        "price": "0.001",
        "orchestrator": ALICE,
        "committee": [],
        "quorum": 2,
        "term": 0,
        "certified_seq": seq,
        "workers": [],
        "audits": [],
        "escrow": {"deposited": "0", "burnt": "0", "paid": "0", "refunded": "0"},
        "anchors": [],
        "output": "",
        "rounds": None,
    }


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def progress_into(file: StringIO, clock: Callable[[], float], *, terminal: bool) -> Progress:
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    return Progress(console, clock)


def test_without_a_terminal_there_is_one_line_for_every_change() -> None:
    file, clock = StringIO(), Clock()
    with progress_into(file, clock, terminal=False) as progress:
        progress.phase("chain: starting it")
        clock.now += 12.3
        progress.phase("job: embedding")
        for accepted, seq in ((0, 1), (0, 2), (3, 3), (3, 4)):
            clock.now += 1
            progress.job(detail("running", accepted, seq=seq))
        progress.job(detail("running", 3, rejected=1, seq=5))
        progress.job(detail("settling", 3, rejected=1, seq=5))
    said = file.getvalue().replace("0 re-issued, 0 audits", "..")
    assert said.splitlines() == [
        "   0.0 s  chain: starting it",
        "  12.3 s  job: embedding",
        "  13.3 s  infer running: 0 of 16 shards accepted, 0 rejected, .., 1 log head",
        "  15.3 s  infer running: 3 of 16 shards accepted, 0 rejected, .., 3 log heads",
        "  16.3 s  infer running: 3 of 16 shards accepted, 1 rejected, .., 5 log heads",
        "  16.3 s  infer settling: 3 of 16 shards accepted, 1 rejected, .., 5 log heads",
    ]


def test_on_a_terminal_phases_stay_with_their_time_and_the_job_is_kept_up_to_date() -> None:
    file, clock = StringIO(), Clock()
    with progress_into(file, clock, terminal=True) as progress:
        progress.phase("chain: starting it")
        clock.now += 12.3
        progress.phase("job: embedding")
        running = detail("running", 8, seq=9)
        running["workers"] = [
            {
                "account": ALICE,
                "accepted": 8,
                "rejected": 0,
                "voided": 0,
                "leases": 1,
                "lost": 0,
                "finding": "",
            }
        ]
        progress.job(running)
        clock.now += 60
    text = file.getvalue()
    assert "chain: starting it (12.3 s)" in text
    assert "job: embedding (60.0 s)" in text
    assert re.search(
        r"infer running  (█{12})\s+8 of 16 shards accepted, 0 rejected, 0 re-issued", text
    )
    assert "0 audits, 9 log heads" in text
    assert "worker 0xa1a1..a1a1  " + "█" * 12 in text


def test_jobs_that_run_side_by_side_are_told_apart() -> None:
    file, clock = StringIO(), Clock()
    training = detail("running", 4)
    training |= {"id": "0x" + "4e" * 32, "kind": "train"}
    training["rounds"] = {"done": 1, "total": 8, "losses": [4.0], "state": "0x00"}
    with progress_into(file, clock, terminal=False) as progress:
        for _ in range(3):
            progress.job(detail("settling", 16))
            progress.job(training)
        progress.note("round 1: held-out loss 4.098")
    assert [line[10:].partition(" shards")[0] for line in file.getvalue().splitlines()] == [
        "infer settling: 16 of 16",
        "train running, round 1 of 8 closed: 4 of 16",
        "round 1: held-out loss 4.098",
    ]


def test_a_job_that_has_ended_is_no_longer_kept_up_to_date() -> None:
    file, clock = StringIO(), Clock()
    with progress_into(file, clock, terminal=True) as progress:
        progress.job(detail("settled", 16))
        progress.phase("adding up")
    assert "16 of 16 shards" not in file.getvalue()


def test_the_display_ends_with_the_error_that_ends_the_demo() -> None:
    file = StringIO()
    progress = progress_into(file, Clock(), terminal=True)
    with pytest.raises(ZeroDivisionError), progress:
        raise ZeroDivisionError
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back


# ---- numbers -----------------------------------------------------------------------------


def test_amounts_are_aligned_and_cut_never_rounded() -> None:
    assert fixed_mcc(ONE_MCC * 1234 + 56 * MILLI, 3) == "1,234.056"
    assert fixed_mcc(-MILLI, 3) == "-0.001"
    assert fixed_mcc(ONE_MCC - 1, 4) == "0.9999"
    assert fixed_mcc(ONE_MCC, 0) == "1"
    assert places_of([ONE_MCC, MILLI, 0]) == 3
    assert places_of([]) == 0


def test_bars_never_exceed_their_length_and_never_hide_a_part() -> None:
    assert bar(0, 16, 32, plain=True) == ""
    assert bar(16, 16, 32, plain=True) == "#" * 32
    assert bar(99, 16, 32, plain=True) == "#" * 32
    assert bar(1, 1000, 12, plain=False) == "█"
    assert bar(0, 0, 12, plain=True) == ""


def test_nouns_follow_their_number_and_hashes_are_cut() -> None:
    assert count_of(1, "shard") == "1 shard"
    assert count_of(2048, "row") == "2,048 rows"
    assert short_hex(TX) == "0x5d5d..5d5d"
    assert short_hex("0x3f") == "0x3f"
