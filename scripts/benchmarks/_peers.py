"""Ray and Dask, the yardsticks, in a virtual environment of their own: `.bench-venv`.

It is made by the first benchmark that needs it, is ignored by git and can be deleted at any time.
What both environments have is installed in the version of constraints.txt; the yardsticks'
own packages are in neither setup.cfg nor constraints.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".bench-venv"
PACKAGES = ("ray==2.60.0", "dask==2026.8.0", "distributed==2026.8.0")
PROFILER = ("py-spy==0.4.3",)
YARDSTICKS = Path(__file__).with_name("_yardsticks.py")


def prepare(packages: Sequence[str] = PACKAGES) -> Path:
    """Return the interpreter of an environment that holds *packages*; says what it installs.

    Raises SystemExit if they cannot be installed.
    """
    python = VENV / "bin" / "python"
    stamp = VENV / "installed"
    wanted = set(packages)
    present = set(stamp.read_text().split()) if stamp.exists() else set()
    if wanted <= present and python.exists():
        return python
    _say(f"installing {' '.join(sorted(wanted - present))} into {VENV}, once")
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(VENV)])
        (VENV / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off", "-q"]
    _run([*pip, "-c", str(ROOT / "constraints.txt"), *sorted(wanted - present)])
    stamp.write_text("\n".join(sorted(present | wanted)) + "\n")
    return python


def yardstick(name: str, *, python: Path | None = None, **options: object) -> dict[str, Any]:
    """Run a yardstick of `_yardsticks.py` in a process of its own and return what it measured.

    Without *python* it runs in the environment of `prepare`. Raises SystemExit if it fails.
    """
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [str(python or prepare()), str(YARDSTICKS), name, *flags]
    printed = _run(command, environment=_environment()).splitlines()
    figures = json.loads(printed[-1])
    assert isinstance(figures, dict)
    return figures


def _environment() -> dict[str, str]:
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | quiet


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        what = " ".join(command[:4])
        raise SystemExit(f"{what} failed:\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    prepare((*PACKAGES, *PROFILER))
