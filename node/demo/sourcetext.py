"""Windows of the standard library's source text: what the demo's language model learns from.

Files are held out whole, so nothing of a held-out file is trained on.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd.node.demo.errors import SourceTextError
from meshd.node.demo.sentences import source_files

CONTEXT: Final = 128
"""Bytes that the model predicts in a window."""
WINDOW: Final = CONTEXT + 1
"""Bytes of a row: each but the first is predicted from those before it."""
_MOST_TRAINING: Final = 64
_MOST_HELD_OUT: Final = 16
"""Rows that one file gives at most, so that a few large ones do not make up the text."""


@dataclass(frozen=True)
class SourceText:
    """Rows of 129 bytes each."""

    training: bytes
    held_out: bytes


def collect_source_text(
    training: int, held_out: int, seed: int = 0, stdlib: Path | None = None
) -> SourceText:
    """Return so many rows for training and others, of other files, to be held out.

    The same library, numbers and seed give the same rows in the same order. *stdlib* is the
    folder to read instead of the running Python's. Raises SourceTextError if it is too small.
    """
    folder = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    files = source_files(folder)
    random.Random(seed).shuffle(files)
    kept, rest = _take(files, held_out, _MOST_HELD_OUT, folder)
    learned, _ = _take(rest, training, _MOST_TRAINING, folder)
    return SourceText(training=learned, held_out=kept)


def _take(
    files: Sequence[Path], rows: int, most: int, folder: Path
) -> tuple[bytes, Sequence[Path]]:
    """Return *rows* rows, *most* of a file, and the files that none of them is from."""
    found = bytearray()
    for at, path in enumerate(files):
        text = path.read_bytes()
        found += text[: min(len(text) // WINDOW, most) * WINDOW]
        if len(found) >= rows * WINDOW:
            return bytes(found[: rows * WINDOW]), files[at + 1 :]
    raise SourceTextError(
        f"{len(found) // WINDOW} rows of {WINDOW} bytes found in {len(files)} source files under "
        f"{folder}, {rows} are needed: install Python with the sources of its standard library"
    )
