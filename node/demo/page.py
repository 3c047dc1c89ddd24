"""The demo's last page: who did what, what was found, and where the money went.

On a terminal it has colours and lines; anywhere else it is plain ASCII, a hundred columns wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from meshd.config.amounts import DECIMALS, ONE_MCC, format_mcc
from meshd.node.demo.report import LARGEST_DIFFERENCE, Account, Job, Report, Worker, problems

WIDTH: Final = 100
BAR_S: Final = 240
BAR_MB: Final = 4096
"""What a run may take on two cores, installing aside."""

_INDENT: Final = 2
_GAP: Final = 2
_CUT: Final = 6
"""Decimals of balances where exact ones do not fit; differences are never cut."""
_BLOCKS: Final = 12
_MOST_FINDINGS: Final = 4

_ASCII_HEAD: Final = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_MARKS: Final = {
    "": ("", ""),
    "cheater": ("cheats", "bold red"),
    "killed": ("killed", "bold yellow"),
}
_KINDS: Final = ("first", "second", "confirm")
_RESULTS: Final = ("accepted", "mismatch", "silent", "malformed")


def print_page(report: Report, console: Console) -> None:
    """Print the page, with colours and lines where *console* shows them."""
    if console.is_terminal:
        width = min(WIDTH, console.width)
        plain = not console.encoding.lower().startswith("utf")
        console.print(render(report, plain=plain), width=width)
    else:
        Console(file=console.file, width=WIDTH, color_system=None).print(render(report, plain=True))


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
        """Return an empty table; the columns named in *numbers* are flush right."""
        table = Table(
            box=_ASCII_HEAD if self.plain else box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP - 1, 0, 0),
            header_style="bold",
        )
        for name in columns:
            table.add_column(
                name, justify="right" if name in numbers else "left", overflow="fold"
            )
        return table

    def workers(self) -> RenderableType:
        """Return what each worker did, with the cheater and the killed one marked."""
        counts = ("accepted", "rejected", "void", "lost")
        table = self.table("worker", "account", "", *counts, "note", numbers=counts)
        most = max((worker.accepted for worker in self.report.workers), default=0)
        for worker in self.report.workers:
            note, style = _MARKS[worker.mark]
            _add(
                table,
                worker.name,
                _short(worker.address),
                Text(self.blocks(worker.accepted, most), style="green"),
                *(str(getattr(worker, name)) for name in counts),
                note,
                style=style,
            )
        return table

    def blocks(self, count: int, most: int) -> str:
        """Return a bar for *count*, as long as the column for the largest one."""
        length = -(-count * _BLOCKS // most) if most else 0
        return ("#" if self.plain else "█") * length

    def audits(self) -> RenderableType:
        """Return who audited how often, why, and with what result."""
        made = self.report.audits
        results = [name for name in _RESULTS if any(audits.result == name for audits in made)]
        numbers = (*_KINDS, *results, "10^9 units")
        table = self.table("auditor", *numbers, numbers=numbers)
        for auditor in dict.fromkeys(audits.auditor for audits in made):
            own = [audits for audits in made if audits.auditor == auditor]
            _add(
                table,
                auditor,
                *(str(sum(a.count for a in own if a.kind == kind)) for kind in _KINDS),
                *(str(sum(a.count for a in own if a.result == result)) for result in results),
                f"{sum(a.units for a in own) / 1e9:,.1f}",
            )
        return table

    def receipts(self) -> RenderableType:
        """Return the receipts by kind."""
        table = self.table("kind", "receipts", "MCC", numbers=("receipts", "MCC"))
        listed = self.report.receipts
        total = sum(receipts.amount for receipts in listed)
        places = _places([*(receipts.amount for receipts in listed), total])
        for receipts in listed:
            _add(table, receipts.kind, str(receipts.count), _fixed(receipts.amount, places))
        count = sum(receipts.count for receipts in listed)
        _add(table, "all", str(count), _fixed(total, places), style="bold")
        return table

    def anchors(self) -> RenderableType:
        """Return the settlements on chain, with their transactions."""
        table = self.table("epoch", "root", "transaction", numbers=("epoch",))
        for anchor in self.report.anchors:
            _add(table, str(anchor.epoch), _short(anchor.root), anchor.tx)
        return table

    def accounts(self) -> Iterator[RenderableType]:
        """Yield every account's balances next to its receipts, as exactly as the width allows."""
        everybody = [*self.report.accounts, self.report.researcher]
        balances = [amount for each in everybody for amount in (each.before, each.after)]
        changes = [*(each.after - each.before for each in everybody)]
        changes += [account.earned for account in self.report.accounts]
        exact = _places(balances + changes)
        for places, addresses in ((exact, True), (exact, False), (min(_CUT, exact), True)):
            rows = [*self.account_rows(places, exact, addresses=addresses)]
            widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
            if sum(widths) + _GAP * (len(widths) - 1) <= WIDTH - _INDENT:
                break
        header, *rest = rows
        table = self.table(*header, numbers=[*header[-5:-1]])
        for row in rest:
            _add(table, *row, style="bold red" if row[-1] == "differs" else "")
        yield table
        if places < exact:
            yield Text(f"before and after are cut to {places} decimals", style="dim")

    def account_rows(
        self, places: int, exact: int, *, addresses: bool
    ) -> Iterator[tuple[str, ...]]:
        """Yield the header and the rows of the table of accounts."""
        numbers = ("before", "after", "difference", "receipts")
        yield ("account", *(["address"] if addresses else []), *numbers, "")
        for account in self.report.accounts:
            yield (
                account.name,
                *([_short(account.address)] if addresses else []),
                _fixed(account.before, places),
                _fixed(account.after, places),
                _fixed(account.received, exact),
                _fixed(account.earned, exact),
                "=" if account.received == account.earned else "differs",
            )
        payer = self.report.researcher
        yield (
            "researcher",
            *([_short(payer.address)] if addresses else []),
            _fixed(payer.before, places),
            _fixed(payer.after, places),
            _fixed(payer.after - payer.before, exact),
            "",
            "",
        )


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
        yield Text(job.why, style="red")


def _found(report: Report) -> Iterator[RenderableType]:
    """Yield what became of the cheater and of the killed worker."""
    cheater, killed = report.cheater, report.killed
    yield Text("")
    yield Text.assemble(
        ("cheater ", "bold red"),
        f"{cheater.address}: {_count(cheater.rejected, 'shard')} rejected, "
        f"received {format_mcc(cheater.received)} MCC",
    )
    for finding in islice(cheater.findings, _MOST_FINDINGS):
        confirmed = f", confirmed by {finding.confirmed_by}" if finding.confirmed_by else ""
        yield Text(
            f"  shard {finding.shard}: {finding.found_by} computed {finding.rows_drawn} rows and "
            f"got others{confirmed}"
        )
    if (more := len(cheater.findings) - _MOST_FINDINGS) > 0:
        yield Text(f"  and {more} more")
    yield Text.assemble(
        ("killed  ", "bold yellow"),
        f"{killed.peer}: {_count(killed.reissued, 'shard')} re-issued",
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
        f"{_count(report.heads, 'log head')} certified, each by at least {report.quorum} of the "
        f"{_count(report.committee, 'committee member')}"
    )
    if report.small_committee:
        yield Text("small committee: you trust its quorum", style="yellow")
    yield Text("")


def _escrow(report: Report) -> RenderableType:
    escrow = report.escrow
    exact = escrow.deposited == escrow.burnt + escrow.paid + escrow.refunded
    lines = [
        (escrow.deposited, "deposited", " "),
        (escrow.burnt, "burnt", "="),
        (escrow.paid, "paid", "+"),
        (escrow.refunded, "refunded", "+"),
    ]
    places = _places(amount for amount, _, _ in lines)
    amounts = [_fixed(amount, places) for amount, _, _ in lines]
    width = max(map(len, amounts))
    text = Text()
    for amount, (_, name, sign) in zip(amounts, lines, strict=True):
        text.append(f"{sign} {amount:>{width}}  {name}\n")
    if exact:
        return text.append("exact to the last unit", style="bold green")
    return text.append("NOT EXACT", style="bold red")


def _run(report: Report) -> Iterator[RenderableType]:
    yield Text(
        f"time    {report.seconds:.0f} s (on two cores at most {BAR_S})\n"
        f"memory  {report.pss_mb:,.0f} MB of all processes together (at most {BAR_MB:,})"
    )
    yield Text(f"{len(report.processes)} processes, each with a key, a folder and a port of its own:")
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


def _add(table: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row of texts, in which brackets are brackets."""
    table.add_row(*(Text(c) if isinstance(c, str) else c for c in cells), style=style)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _short(value: str) -> str:
    """Return the two ends of an address or hash."""
    return value if len(value) <= 14 else f"{value[:8]}..{value[-4:]}"


def _places(amounts: Iterable[int]) -> int:
    """Return how many decimals the amounts need, all of them exact."""
    return max((len(format_mcc(amount).partition(".")[2]) for amount in amounts), default=0)


def _fixed(amount: int, places: int) -> str:
    """Return an amount with *places* decimals; more are cut off."""
    whole, fraction = divmod(abs(amount), ONE_MCC)
    sign = "-" if amount < 0 else ""
    return f"{sign}{whole:,}" + (f".{fraction:0{DECIMALS}d}"[: places + 1] if places else "")
