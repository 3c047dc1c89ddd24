"""Real sentences: the docstrings of Python's standard library, as it lies on this machine.

Files are parsed, never imported. Nothing is fetched and nothing is invented: the demo has text
of people to embed wherever there is a Python.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from meshd.node.demo.errors import SentencesError

FEWEST_WORDS: Final = 5
MOST_WORDS: Final = 60

_NOT_LIBRARY: Final = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
)
"""Folders of other people's packages, of tests, and of what newer Pythons no longer have."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_END: Final = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bcf\.)(?<=[.!?])\s+(?=[A-Z\"'(])")
_SENTENCE: Final = re.compile(r"[A-Z][ -~]*[A-Za-z)\"'][.!?]")
_WORD: Final = re.compile(r"[\"'(]?[A-Za-z][A-Za-z'-]*[\"')]?[,;:.!?]?")
_LITERAL: Final = re.compile(r"\s|>>>|\.\.\.|[-*+=|#:@~]|\d+[.)]")
"""How lines begin that are examples, lists, tables or headings: paragraphs of them are no prose."""


def collect_sentences(minimum: int = 2048, seed: int = 0, stdlib: Path | None = None) -> list[str]:
    """Return *minimum* different sentences of 5 to 60 words from the standard library.

    The same library, number and seed give the same sentences in the same order; another seed
    reads other modules. *stdlib* is the folder to read instead of the running Python's.
    Raises SentencesError if there are fewer.
    """
    folder = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    files = source_files(folder)
    random.Random(seed).shuffle(files)
    found: dict[str, str] = {}
    for path in files:
        for docstring in _docstrings(path):
            for sentence in split_sentences(docstring):
                found.setdefault(sentence.casefold(), sentence)
        if len(found) >= minimum:
            return list(found.values())[:minimum]
    raise SentencesError(
        f"{len(found)} sentences found in the docstrings of {len(files)} files under {folder}, "
        f"{minimum} are needed: install Python with the sources of its standard library"
    )


def split_sentences(docstring: str) -> list[str]:
    """Return the sentences of a docstring's prose: plain words of 5 to 60, each on one line.

    Examples, lists, tables and signatures are left out.
    """
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", docstring):
        lines = paragraph.strip("\n").splitlines()
        if any(_LITERAL.match(line) for line in lines):
            continue
        text = " ".join(" ".join(lines).split())
        found += [sentence for sentence in _END.split(text) if _is_prose(sentence)]
    return found


def _is_prose(sentence: str) -> bool:
    words = sentence.split(" ")
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS or not _SENTENCE.fullmatch(sentence):
        return False
    return sum(_WORD.fullmatch(word) is not None for word in words) >= 0.8 * len(words)


def source_files(folder: Path) -> list[Path]:
    """Return the library's source files, in an order that does not depend on the file system."""
    listed = []
    pending = [folder] if folder.is_dir() else []
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                if path.name not in _NOT_LIBRARY and not path.is_symlink():
                    pending.append(path)
            elif path.suffix == ".py":
                listed.append(path)
    return sorted(listed, key=lambda path: path.relative_to(folder).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file, the outer ones first; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings, which are not ours
            tree = ast.parse(path.read_bytes(), filename=path.name)
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring
