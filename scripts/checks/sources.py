"""The Python files that the checks read: everything of ours that is shipped or run, tests aside."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("config", "contracts", "ledger", "node", "p2p", "scripts")
FOREIGN = ("node_modules", "__pycache__")


def python_files(root: Path) -> Iterator[Path]:
    """Each Python file below the folders of `root` that hold our code, in a fixed order."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if not any(part in FOREIGN for part in path.relative_to(root).parts):
                yield path
