"""What the demo is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

JOBS: Final = ("infer", "train")
"""Kinds of job that the demo can run."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of `meshd demo`."""

    jobs: tuple[str, ...]
    workers: int
    validators: int
    keep: bool
    """Leave the data directories and logs in place at the end."""
    seed: int
    json_file: Path | None
    out: Path
