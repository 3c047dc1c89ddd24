"""Refuse what turns foreign bytes into code, pickle and its loaders: unsafe_loads.py [ROOT].

Programs are declarative graphs and tensors are safetensors, so nothing of ours has to unpickle.
Linters know `pickle.loads`; they do not know the loaders that unpickle behind another name.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT, python_files

MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
NAMES = {
    "torch.export.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "torch.load",
    "torch.package.PackageImporter",
    "torch.serialization.load",
    "torch.utils.model_zoo.load_url",
}
CURE = "unpickles: read tensors with safetensors, programs with the loader of meshd.node.workloads"


def is_banned(name: str) -> bool:
    """Whether a dotted name is a loader that unpickles, or lies in a module of them."""
    return name in NAMES or name.partition(".")[0] in MODULES


def imported_names(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What an import statement binds: local name and the dotted name that it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            whole = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or whole, whole
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    """The full name that `a.b.c` stands for, or None if its root was not imported."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        root = dotted(node.value, bound)
        return f"{root}.{node.attr}" if root else None
    return None


def unpickling_receive(node: ast.AST) -> bool:
    """Whether a call is `x.recv()`: a multiprocessing pipe unpickles there, a socket has a size."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "recv"
        and not node.args
        and not node.keywords
    )


def complaints_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line number and complaint for each unsafe load in a module."""
    bound = {local: whole for node in ast.walk(tree) for local, whole in imported_names(node)}
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {whole for _, whole in imported_names(node)}
        elif isinstance(node, ast.Attribute):
            names = {dotted(node, bound) or ""}
        for name in sorted(filter(is_banned, names)):
            yield getattr(node, "lineno", 0), f"{name} {CURE}"
        if unpickling_receive(node):
            yield getattr(node, "lineno", 0), "a pipe's recv() unpickles: use recv_bytes()"


def main() -> int:
    """Print the complaints; 1 if there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    found = [
        f"{path.relative_to(root).as_posix()}:{line}: {complaint}"
        for path in python_files(root)
        for line, complaint in sorted(complaints_of(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    print("\n".join(found) or "nothing unpickles")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
