"""How answers are printed: tables on a terminal, plain columns in a pipe, JSON when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from meshd.node.cli.failures import printable


def print_json(answer: Any) -> None:
    """Print *answer* as indented JSON."""
    click.echo(json.dumps(answer, indent=2, ensure_ascii=False))


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Print names and values in two columns; values that are empty are left out."""
    shown = {name: value for name, value in pairs.items() if value not in ("", None, [], ())}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        first, *rest = value if isinstance(value, list) else [value]
        click.echo(f"{name:<{width}}  {printable(str(first))}")
        for line in rest:
            click.echo(f"{'':<{width}}  {printable(str(line))}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Print a table, or the sentence *empty* if it has no rows."""
    if not rows:
        click.echo(empty)
        return
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def seconds_text(seconds: float) -> str:
    """Return *seconds* in the two largest units that say it: ``3 h 12 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
