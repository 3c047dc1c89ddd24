"""The checks of our own sources that scripts/check runs, each on a tree that breaks its rule."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).resolve().parents[2] / "scripts" / "checks"


def check(name: str, tree: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, CHECKS / f"{name}.py", tree],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def write(tree: Path, path: str, text: str) -> None:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text(text)


def function_of(lines: int) -> str:
    return "class A:\n    async def f(self):\n" + "        pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n" * 401, "node/a.py has 401 lines"),
        (function_of(61), "node/a.py:A.f has 61 lines"),
    ],
)
def test_what_is_too_long_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    write(tmp_path, "node/a.py", text)
    status, printed = check("sizes", tmp_path)
    assert status == 1
    assert complaint in printed


def test_what_is_just_short_enough_is_accepted(tmp_path: Path) -> None:
    write(tmp_path, "node/a.py", function_of(60) + "x = 1\n" * 339)
    write(tmp_path, "tests/unit/test_a.py", "x = 1\n" * 1000)
    assert "node/a.py" not in check("sizes", tmp_path)[1]
    assert "tests" not in check("sizes", tmp_path)[1]


def test_an_exception_from_the_sizes_that_nobody_needs_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "p2p/messages.py", "x = 1\n")
    status, printed = check("sizes", tmp_path)
    assert status == 1
    assert "p2p/messages.py is listed as an exception" in printed


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\n",
        "from pickle import loads\n",
        "import joblib as j\n",
        "import torch\ntorch.load('x')\n",
        "import torch as t\nread = t.load\n",
        "from torch import load as read\n",
        "import torch.export\ntorch.export.load('x')\n",
        "from torch import export\nexport.load('x')\n",
        "def f():\n    import torch.jit as jit\n    return jit.load('x')\n",
        "def f(pipe):\n    return pipe.recv()\n",
    ],
)
def test_an_unpickling_load_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    write(tmp_path, "node/a.py", text)
    status, printed = check("unsafe_loads", tmp_path)
    assert status == 1
    assert printed.startswith("node/a.py:")


def test_safe_loads_are_accepted(tmp_path: Path) -> None:
    write(
        tmp_path,
        "node/a.py",
        "import json, torch\nfrom safetensors.torch import load\n"
        "def f(x, socket, pipe):\n"
        "    return json.load(x), load(x), torch.export.export(x), socket.recv(4), x.load()\n",
    )
    assert check("unsafe_loads", tmp_path) == (0, "nothing unpickles\n")
