"""Refuse modules above 400 lines and functions above 60: sizes.py [ROOT]."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT, python_files

MODULE_LINES = 400
FUNCTION_LINES = 60

# "path" or "path:qualified.name" -> (lines it may have, why it reads better in one piece)
EXCEPTIONS: dict[str, tuple[int, str]] = {
    "p2p/messages.py": (700, "every message of the protocol is in this one file, on purpose"),
}


def function_lengths(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Qualified name and lines, docstring included, of every function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1
            yield from function_lengths(node, f"{name}.")
        else:
            yield from function_lengths(node, prefix)


def measured(root: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and limit of every module and function below `root`."""
    for path in python_files(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        yield name, len(text.splitlines()), MODULE_LINES
        for function, lines in function_lengths(ast.parse(text, filename=str(path))):
            yield f"{name}:{function}", lines, FUNCTION_LINES


def complaints(root: Path) -> Iterator[str]:
    """One line for each thing that is too long, and for each exception nobody needs."""
    unused = set(EXCEPTIONS)
    for name, lines, limit in measured(root):
        if lines <= limit:
            continue
        allowed = EXCEPTIONS[name][0] if name in EXCEPTIONS else limit
        unused.discard(name)
        if lines > allowed:
            yield f"{name} has {lines} lines, {allowed} are allowed: split it"
    for name in sorted(unused):
        yield f"{name} is listed as an exception in scripts/checks/sizes.py and needs none"


def main() -> int:
    """Print the complaints; 1 if there are any."""
    found = list(complaints(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
    print("\n".join(found) or "no module and no function is too long")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
