"""Tables for people: lines on a terminal, ASCII elsewhere, amounts aligned at their points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshd.config.amounts import DECIMALS, ONE_MCC, format_mcc

GAP: Final = 2
"""Blanks between two columns."""

_ASCII_HEAD: Final = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def shows_unicode(console: Console) -> bool:
    """Whether lines and blocks can be drawn there; else ASCII it is."""
    return console.is_terminal and console.encoding.lower().startswith("utf")


def new_table(*columns: str, numbers: Sequence[str] = (), plain: bool) -> Table:
    """Return an empty table; the columns named in *numbers* are flush right."""
    table = Table(
        box=_ASCII_HEAD if plain else box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        header_style="bold",
    )
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row of texts, in which brackets are brackets."""
    table.add_row(*(Text(c) if isinstance(c, str) else c for c in cells), style=style)


def bar(part: int, whole: int, length: int, *, plain: bool) -> str:
    """Return a bar for *part*, which is *length* long for the *whole*."""
    filled = -(-min(part, whole) * length // whole) if whole > 0 else 0
    return ("#" if plain else "█") * filled


def count_of(count: int, noun: str) -> str:
    """Return a number with its noun: 1 shard, 2 shards."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def short_hex(value: str) -> str:
    """Return the two ends of an address or hash."""
    return value if len(value) <= 12 else f"{value[:6]}..{value[-4:]}"


def places_of(amounts: Iterable[int]) -> int:
    """Return how many decimals the amounts need so that all of them are exact."""
    return max((len(format_mcc(amount).partition(".")[2]) for amount in amounts), default=0)


def fixed_mcc(amount: int, places: int) -> str:
    """Return an amount (smallest unit) with *places* decimals; further ones are cut off."""
    whole, fraction = divmod(abs(amount), ONE_MCC)
    sign = "-" if amount < 0 else ""
    return f"{sign}{whole:,}" + (f".{fraction:0{DECIMALS}d}"[: places + 1] if places else "")
