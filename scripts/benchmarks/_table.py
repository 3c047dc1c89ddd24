"""Tables on the terminal, and figures in a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--small", action="store_true", help="a quick look: less of everything")
    return parser


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their heads; numbers to three digits, the first column to the left."""
    cells = [list(head), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        first, *rest = row
        numbers = (f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True))
        print("  ".join([f"{first:<{widths[0]}}", *numbers]))


def shown(cell: object) -> str:
    """Return a cell's text: three digits of a float, what is not there as a dash."""
    if cell is None or cell != cell:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return str(cell)


def say(text: str) -> None:
    """Tell, apart from the figures, what is being done."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures where asked, with the load of the machine beside them."""
    if path is not None:
        machine = {"cores": os.cpu_count(), "load": [round(load, 2) for load in os.getloadavg()]}
        path.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")
