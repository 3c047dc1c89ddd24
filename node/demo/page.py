"""What the demo shows: how it goes while it runs, and at the end who did what and was paid what.

On a terminal it has colours and lines; anywhere else it is plain ASCII, a hundred columns wide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from itertools import product
from operator import attrgetter
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from meshd.config.amounts import format_mcc
from meshd.node.control.api import JobDetail
from meshd.node.demo.report import LARGEST_DIFFERENCE, Job, Report, problems
from meshd.node.demo.tables import (
    GAP,
    add_row,
    bar,
    count_of,
    fixed_mcc,
    new_table,
    places_of,
    short_hex,
    shows_unicode,
)

WIDTH: Final = 100
BAR_S: Final = 240
BAR_MB: Final = 4096
"""What a run may take on two cores, installing aside."""

_INDENT: Final = 2
_CUT: Final = 4
"""Decimals of balances where exact ones do not fit; differences are never cut."""
_BLOCKS: Final = 12
_LINE: Final = 24
"""Length of the bars on the last page, and of those before it."""
_MOST_FINDINGS: Final = 4

_MARKS: Final = {
    "": ("", ""),
    "cheater": ("cheats", "bold red"),
    "killed": ("killed", "bold yellow"),
}
_COUNTS: Final = ("accepted", "rejected", "void", "lost")
"""What is counted of a worker; the last two are shown only where there are any."""
_KINDS: Final = ("first", "second", "confirm")
_RESULTS: Final = ("accepted", "mismatch", "silent", "malformed")


class Progress:
    """How the demo goes: its phases with their time, the job's shards, its workers.

    A context manager: on a terminal the last lines are kept up to date inside it (by rich's own
    thread); elsewhere there is a line for every change.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._plain = not shows_unicode(console)
        self._clock = clock
        self._began = self._since = clock()
        self._phase = ""
        self._job: JobDetail | None = None
        self._said: tuple[object, ...] = ()
        self._live = Live(
            console=console, get_renderable=self._now, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._console.is_terminal:
            self._end_phase()

    def phase(self, text: str) -> None:
        """Say that the demo is at *text* now; what it was at before is done."""
        if self._console.is_terminal:
            self._end_phase()
        else:
            self._say(text)
        self._phase, self._since, self._job = text, self._clock(), None

    def job(self, detail: JobDetail) -> None:
        """Show a job as it is now."""
        shards = detail["shards"]
        now = (detail["id"], detail["state"], *shards.values())
        if now != self._said and not self._console.is_terminal:
            self._say(f"{detail['state']}: {_counts(detail)}, {_seen(detail)}")
        self._job, self._said = detail, now
        if self._live.is_started:
            self._live.refresh()

    def _end_phase(self) -> None:
        if self._phase:
            self._say(f"{self._phase} ({self._clock() - self._since:.1f} s)")
        self._phase = ""

    def _say(self, text: str) -> None:
        line = f"{self._clock() - self._began:6.1f} s  {text}"
        self._console.print(Text(line), soft_wrap=not self._console.is_terminal)

    def _now(self) -> RenderableType:
        """Return the lines that are kept up to date."""
        lines = Text(f"{self._clock() - self._began:6.1f} s  ", style="bold")
        lines.append(self._phase)
        if (job := self._job) is None:
            return lines
        shards = job["shards"]
        done = bar(shards["accepted"], shards["total"], _LINE, plain=self._plain)
        lines.append(f"\n          {job['state']}  ")
        lines.append(f"{done:<{_LINE}}", style="green")
        lines.append(f"  {_counts(job)}\n          {_seen(job)}")
        for worker in job["workers"]:
            lines.append(f"\n          worker {short_hex(worker['account'])}  ")
            own = bar(worker["accepted"], shards["total"], _LINE, plain=self._plain)
            lines.append(f"{own:<{_LINE}}", style="cyan")
            lines.append(f"  {worker['accepted']} accepted, {worker['rejected']} rejected")
        return lines


def _counts(job: JobDetail) -> str:
    shards = job["shards"]
    accepted = f"{shards['accepted']} of {count_of(shards['total'], 'shard')} accepted"
    return f"{accepted}, {shards['rejected']} rejected, {shards['reissued']} re-issued"


def _seen(job: JobDetail) -> str:
    return f"{count_of(len(job['audits']), 'audit')}, {count_of(job['certified_seq'], 'log head')}"


def print_page(report: Report, console: Console) -> None:
    """Print the page, with colours and lines where *console* shows them."""
    page = render(report, plain=not shows_unicode(console))
    if console.is_terminal:
        console.print(page, width=min(WIDTH, console.width))
        return
    paper = Console(file=StringIO(), width=WIDTH, color_system=None)
    with paper.capture() as captured:
        paper.print(page)
    for line in captured.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")


def render(report: Report, *, plain: bool = False) -> RenderableType:
    """Return the page; *plain*: of ASCII characters only."""
    return Group(*_Page(report, plain=plain).parts())


class _Page:
    """The parts of the page, from the top down."""

    def __init__(self, report: Report, *, plain: bool) -> None:
        self.report = report
        self.plain = plain

    def parts(self) -> Iterator[RenderableType]:
        """Yield what stands one below the other."""
        report = self.report
        yield from self.section("Jobs", *(line for job in report.jobs for line in _job(job)))
        yield from self.section("Shards by worker", self.workers(), *_found(report))
        yield from self.section("Audits", self.audits(), _audit_share(report))
        yield from self.section("Receipts", self.receipts())
        yield from self.section("Job log and anchors", *_log(report), self.anchors())
        yield from self.section("Accounts, in MCC", *self.accounts())
        yield from self.section("Escrow, in MCC", _escrow(report))
        yield from self.section("Run", *_run(report))
        yield Text("")
        yield self.rule()
        yield from _verdict(report)

    def section(self, title: str, *parts: RenderableType) -> Iterator[RenderableType]:
        """Yield a heading and what belongs to it."""
        yield Text("")
        yield self.rule(title)
        for part in parts:
            yield Padding(part, (0, 0, 0, _INDENT))

    def rule(self, title: str = "") -> RenderableType:
        """Return a line across the page, with a title at its beginning."""
        heading = Text(title, style="bold cyan")
        return Rule(heading, characters="-" if self.plain else "─", align="left", style="dim")

    def table(self, *columns: str, numbers: Sequence[str] = ()) -> Table:
        """Return an empty table in the page's style."""
        return new_table(*columns, numbers=numbers, plain=self.plain)

    def workers(self) -> RenderableType:
        """Return what each worker did, with the cheater and the killed one marked."""
        workers = self.report.workers
        seen = [name for name in _COUNTS[2:] if any(map(attrgetter(name), workers))]
        counts = (*_COUNTS[:2], *seen)
        table = self.table("worker", "account", "", *counts, "note", numbers=counts)
        most = max((worker.accepted for worker in workers), default=0)
        for worker in workers:
            note, style = _MARKS[worker.mark]
            add_row(
                table,
                worker.name,
                short_hex(worker.address),
                Text(bar(worker.accepted, most, _BLOCKS, plain=self.plain), style="green"),
                *(str(getattr(worker, name)) for name in counts),
                note,
                style=style,
            )
        return table

    def audits(self) -> RenderableType:
        """Return who audited how often, why, and with what result."""
        made = self.report.audits
        kinds = [name for name in _KINDS if any(audits.kind == name for audits in made)]
        results = [name for name in _RESULTS if any(audits.result == name for audits in made)]
        numbers = (*kinds, *results, "10^9 units")
        table = self.table("auditor", *numbers, numbers=numbers)
        for auditor in dict.fromkeys(audits.auditor for audits in made):
            own = [audits for audits in made if audits.auditor == auditor]
            add_row(
                table,
                auditor,
                *(str(sum(a.count for a in own if a.kind == kind)) for kind in kinds),
                *(str(sum(a.count for a in own if a.result == result)) for result in results),
                f"{sum(a.units for a in own) / 1e9:,.1f}",
            )
        return table

    def receipts(self) -> RenderableType:
        """Return the receipts by kind."""
        table = self.table("kind", "receipts", "MCC", numbers=("receipts", "MCC"))
        listed = self.report.receipts
        places = places_of(receipts.amount for receipts in listed)
        for receipts in listed:
            add_row(table, receipts.kind, str(receipts.count), fixed_mcc(receipts.amount, places))
        total = fixed_mcc(sum(receipts.amount for receipts in listed), places)
        add_row(table, "all", str(sum(each.count for each in listed)), total, style="bold")
        return table

    def anchors(self) -> RenderableType:
        """Return the settlements on chain, with their transactions."""
        table = self.table("epoch", "root", "transaction", numbers=("epoch",))
        for anchor in self.report.anchors:
            add_row(table, str(anchor.epoch), short_hex(anchor.root), anchor.tx)
        return table

    def accounts(self) -> Iterator[RenderableType]:
        """Yield every account's balances next to its receipts, as exactly as the width allows."""
        report = self.report
        balances = [amount for each in report.accounts for amount in (each.before, each.after)]
        balances += [report.researcher.before, report.researcher.after]
        exact = places_of([*balances, *(account.earned for account in report.accounts)])
        cut = min(_CUT, exact)
        for places, without in product((exact, cut), (0, 1)):
            rows = [(row[0], *row[1 + without :]) for row in self.account_rows(places, exact)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            if sum(widths) + GAP * (len(widths) - 1) <= WIDTH - _INDENT:
                break
        header, *rest = rows
        table = self.table(*header, numbers=[*header[-5:-1]])
        for row in rest:
            add_row(table, *row, style="bold red" if row[-1] == "differs" else "")
        yield table
        if places < exact:
            yield Text(f"before and after are cut to {places} decimals", style="dim")

    def account_rows(self, places: int, exact: int) -> Iterator[tuple[str, ...]]:
        """Yield the header and the rows of the table of accounts."""
        yield ("account", "address", "before", "after", "difference", "receipts", "")
        for account in self.report.accounts:
            yield (
                account.name,
                short_hex(account.address),
                *(fixed_mcc(balance, places) for balance in (account.before, account.after)),
                *(fixed_mcc(amount, exact) for amount in (account.received, account.earned)),
                "=" if account.received == account.earned else "differs",
            )
        payer = self.report.researcher
        balances = (fixed_mcc(balance, places) for balance in (payer.before, payer.after))
        cost = fixed_mcc(payer.after - payer.before, exact)
        yield ("researcher", short_hex(payer.address), *balances, cost, "", "")


def _job(job: Job) -> Iterator[RenderableType]:
    shards = job.shards
    settled = job.state == "settled"
    yield Text.assemble(
        (f"{job.kind} ", "bold"),
        f"{job.id}  ",
        (job.state, "bold green" if settled else "bold red"),
    )
    yield Text(
        f"{shards.accepted} of {shards.total} shards accepted, {shards.rejected} rejected, "
        f"{shards.reissued} re-issued, in {job.seconds:.1f} s"
    )
    if job.check is not None:
        equal = job.check.max_abs_diff <= LARGEST_DIFFERENCE
        yield Text.assemble(
            f"largest difference from plain torch in {job.check.rows:,} rows: ",
            (f"{job.check.max_abs_diff:.2g}", "bold green" if equal else "bold red"),
            f" (allowed: {LARGEST_DIFFERENCE:g})",
        )
    if job.why:
        yield Text(job.why, style="dim" if settled else "red")


def _found(report: Report) -> Iterator[RenderableType]:
    """Yield what became of the cheater and of the killed worker."""
    cheater, killed = report.cheater, report.killed
    yield Text.assemble(
        ("\ncheater ", "bold red"),
        f"{cheater.address}: {count_of(cheater.rejected, 'shard')} rejected, "
        f"received {format_mcc(cheater.received)} MCC",
    )
    for finding in cheater.findings[:_MOST_FINDINGS]:
        confirmed = f", confirmed by {finding.confirmed_by}" if finding.confirmed_by else ""
        yield Text(
            f"  shard {finding.shard}: {finding.found_by} computed {finding.rows_drawn} rows and "
            f"got others{confirmed}"
        )
    if (more := len(cheater.findings) - _MOST_FINDINGS) > 0:
        yield Text(f"  and {more} more")
    yield Text.assemble(
        ("killed  ", "bold yellow"),
        f"{killed.peer}: {count_of(killed.reissued, 'shard')} re-issued",
    )


def _audit_share(report: Report) -> RenderableType:
    return Text.assemble(
        "\nshare of the compute: ",
        (f"{report.audit_overhead:.1%}", "bold"),
        " now, with every worker in probation; ",
        (f"{report.audit_overhead_steady:.1%}", "bold"),
        " in the steady state",
    )


def _log(report: Report) -> Iterator[RenderableType]:
    yield Text(
        f"{count_of(report.heads, 'log head')} certified, each by at least {report.quorum} of the "
        f"{count_of(report.committee, 'committee member')}"
    )
    if report.small_committee:
        yield Text("small committee: you trust its quorum", style="yellow")
    yield Text("")


def _escrow(report: Report) -> RenderableType:
    escrow = report.escrow
    lines = [
        (escrow.deposited, "deposited", " "),
        (escrow.burnt, "burnt", "="),
        (escrow.paid, "paid", "+"),
        (escrow.refunded, "refunded", "+"),
    ]
    places = places_of(amount for amount, _, _ in lines)
    amounts = [fixed_mcc(amount, places) for amount, _, _ in lines]
    width = max(map(len, amounts))
    text = Text()
    for amount, (_, name, sign) in zip(amounts, lines, strict=True):
        text.append(f"{sign} {amount:>{width}}  {name}\n")
    if escrow.deposited == escrow.burnt + escrow.paid + escrow.refunded:
        return text.append("exact to the last unit", style="bold green")
    return text.append("NOT EXACT", style="bold red")


def _run(report: Report) -> Iterator[RenderableType]:
    yield Text(
        f"time    {report.seconds:.0f} s (on two cores at most {BAR_S})\n"
        f"memory  {report.pss_mb:,.0f} MB of all processes together (at most {BAR_MB:,})"
    )
    yield Text(
        f"{len(report.processes)} processes, each with a key, a folder and a port of its own:"
    )
    each = (f"{p.role} (pid {p.pid}, port {p.port})" for p in report.processes)
    yield Padding(Text(", ".join(each), style="dim"), (0, 0, 0, _INDENT))
    for output in report.outputs:
        yield Text.assemble((output.path, "bold"), f"  {output.size:,} bytes: {output.what}")


def _verdict(report: Report) -> Iterator[RenderableType]:
    if not (found := problems(report)):
        yield Text("Everything holds.", style="bold green")
        return
    for problem in found:
        yield Text(f"- {problem}", style="red")
    things = "One thing does" if len(found) == 1 else f"{len(found)} things do"
    yield Text(f"{things} not hold.", style="bold red")
