"""Build the wheel, install it into a clean environment, and run it from somewhere else."""

import configparser
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from sources import ROOT

DESCRIPTION = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; raises SystemExit with all of it if the command fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        line = " ".join(str(word) for word in command)
        raise SystemExit(f"{done.stdout}\n`{line}` failed with exit status {done.returncode}")
    return done.stdout


def build(setup: configparser.ConfigParser, scratch: Path) -> Path:
    """The wheel, built from a copy of the packages so that no older build/ slips into it."""
    source = scratch / "source"
    source.mkdir()
    for name in DESCRIPTION:
        shutil.copy(ROOT / name, source)
    for line in setup["options"]["package_dir"].split("\n"):
        if line:
            folder = line.partition("=")[2].strip()
            ignored = shutil.ignore_patterns("__pycache__", "node_modules")
            shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", scratch / "dist", cwd=source)
    (wheel,) = (scratch / "dist").glob("*.whl")
    return wheel


def check_contents(wheel: Path, setup: configparser.ConfigParser) -> None:
    """Raise SystemExit if the wheel would put any name but meshd into site-packages."""
    info = f"meshd-{setup['metadata']['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    if tops != {"meshd", info}:
        raise SystemExit(f"{wheel.name} holds {sorted(tops)}; only meshd and {info} belong there")


def check_run(wheel: Path, setup: configparser.ConfigParser, scratch: Path) -> None:
    """Install the wheel without extras, import every package, and ask `meshd` for its version."""
    programs = scratch / "env" / "bin"
    run(sys.executable, "-m", "venv", scratch / "env", cwd=scratch)
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check", "--no-input")
    constraints = ROOT / "constraints.txt"
    run(*pip, "install", "-q", "--no-compile", "-c", constraints, wheel, cwd=scratch)
    run(*pip, "check", cwd=scratch)
    packages = ", ".join(setup["options"]["packages"].split())
    run(programs / "python", "-I", "-c", f"import {packages}", cwd=scratch)
    printed = run(programs / "meshd", "--version", cwd=scratch)
    if setup["metadata"]["version"] not in printed:
        raise SystemExit(f"`meshd --version` printed {printed!r}, not the version of setup.cfg")


def main() -> None:
    """Run the whole check in a temporary folder, which is removed again."""
    begun = time.monotonic()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    with tempfile.TemporaryDirectory(prefix="meshd-wheel-") as folder:
        wheel = build(setup, Path(folder))
        check_contents(wheel, setup)
        check_run(wheel, setup, Path(folder))
    print(f"the wheel runs in a clean environment ({time.monotonic() - begun:.0f} s)")


if __name__ == "__main__":
    main()
