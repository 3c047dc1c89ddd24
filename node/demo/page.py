"""What the demo shows at the end: who did what, what was found, and who was paid what.

On a terminal it has colours and lines; anywhere else it is plain ASCII, a hundred columns wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import product
from operator import attrgetter
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from meshd.config.amounts import format_mcc
from meshd.node.demo.promises import LARGEST_DIFFERENCE, problems
from meshd.node.demo.report import Audits, Check, Job, Losses, Report
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
BAR_S: Final = 360
BAR_MB: Final = 4096
"""What a run may take on two cores, installing aside."""

_INDENT: Final = 2
_CUT: Final = 4
"""Decimals of balances where exact ones do not fit; differences are never cut."""
_BLOCKS: Final = 12
_CURVE: Final = 60
"""Length of the bars of workers, and of losses."""
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
        for job in report.jobs:
            yield from self.section(f"Job: {job.kind}", *_job(job), *self.losses(job))
            yield from self.section(
                f"Shards by worker: {job.kind}", self.workers(job), *_found(job)
            )
        yield from self.section(
            "The cheater and the killed worker", _cheater(report), _killed(report)
        )
        yield from self.section("Audits", self.audits(), *_audit_shares(report))
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

    def losses(self, job: Job) -> Iterator[RenderableType]:
        """Yield the losses on held-out text, round by round and of one worker alone."""
        if not isinstance(job.check, Losses):
            return
        yield Text("loss on held-out text, in nats per byte:")
        highest = max([*job.check.loss, job.check.loss_alone])
        table = self.table("round", "loss", "", numbers=("round", "loss"))
        rows = [(str(at), loss, "green") for at, loss in enumerate(job.check.loss)]
        for name, loss, style in [*rows, ("alone", job.check.loss_alone, "yellow")]:
            length = bar(round(1000 * loss), round(1000 * highest), _CURVE, plain=self.plain)
            add_row(table, name, f"{loss:.3f}", Text(length, style=style))
        yield table
        better = job.check.loss[-1] < job.check.loss_alone
        yield Text.assemble(
            f"after {job.rounds} rounds ",
            (f"{job.check.loss[-1]:.3f}", "bold green" if better else "bold red"),
            f"; one worker alone after as many steps of its own {job.check.loss_alone:.3f}",
        )

    def workers(self, job: Job) -> RenderableType:
        """Return what each worker did, with the cheater and the killed one marked."""
        workers = job.workers
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
        made: list[Audits] = [audits for job in self.report.jobs for audits in job.audits]
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
    entered = "accepted" if not job.rounds else f"entered one of {job.rounds} rounds"
    yield Text(
        f"{shards.accepted} of {shards.total} shards {entered}, {shards.rejected} rejected, "
        f"{shards.reissued} re-issued, in {job.seconds:.1f} s"
    )
    if isinstance(job.check, Check):
        equal = job.check.max_abs_diff <= LARGEST_DIFFERENCE
        yield Text.assemble(
            f"largest difference from plain torch in {job.check.rows:,} rows: ",
            (f"{job.check.max_abs_diff:.2g}", "bold green" if equal else "bold red"),
            f" (allowed: {LARGEST_DIFFERENCE:g})",
        )
    if job.why:
        yield Text(job.why, style="dim" if settled else "red")


def _found(job: Job) -> Iterator[RenderableType]:
    """Yield how the cheater was caught in a job, and what the killed worker's death cost."""
    yield Text("")
    for finding in job.findings[:_MOST_FINDINGS]:
        confirmed = f", confirmed by {finding.confirmed_by}" if finding.confirmed_by else ""
        yield Text.assemble(
            ("cheater ", "bold red"),
            f"{finding.found_by} computed {finding.what} again and got others{confirmed}",
        )
    if (more := len(job.findings) - _MOST_FINDINGS) > 0:
        yield Text(f"  and {more} more")
    yield Text.assemble(
        ("killed  ", "bold yellow"), f"{count_of(job.reissued_of_killed, 'shard')} re-issued"
    )


def _cheater(report: Report) -> RenderableType:
    cheater = report.cheater
    return Text.assemble(
        ("cheater ", "bold red"),
        f"{cheater.address}: {count_of(cheater.rejected, 'shard')} rejected, "
        f"received {format_mcc(cheater.received)} MCC",
    )


def _killed(report: Report) -> RenderableType:
    killed = report.killed
    return Text.assemble(
        ("killed  ", "bold yellow"),
        f"{killed.peer}: {count_of(killed.reissued, 'shard')} re-issued",
    )


def _audit_shares(report: Report) -> Iterator[RenderableType]:
    yield Text("\nshare of the compute:")
    shares = [(job.kind, job.audit_overhead, job.audit_overhead_steady) for job in report.jobs]
    if len(shares) > 1:
        shares.append(("all", report.audit_overhead, report.audit_overhead_steady))
    for kind, now, steady in shares:
        yield Text.assemble(
            f"{kind}: ",
            (f"{now:.1%}", "bold"),
            " now, with every worker in probation; ",
            (f"{steady:.1%}", "bold"),
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
