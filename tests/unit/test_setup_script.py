"""scripts/setup, with a python3.11 that only notes down what it is asked to do."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SETUP_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup"
TOOLS = ("bash", "cat", "chmod", "cp", "dirname", "env", "mkdir", "mv", "rm", "sha256sum", "tail")
PYTHON = """#!/usr/bin/env bash
case "$*" in
    "--version") echo "Python 3.11.0" ;;
    "-m venv --clear "*)
        rm -rf "$4"
        mkdir -p "$4/bin" "$4/lib/python3.11/site-packages/pip.dist-info"
        echo "command = python3.11 $*" >"$4/pyvenv.cfg"
        echo pip >"$4/lib/python3.11/site-packages/pip.dist-info/RECORD"
        cp "$0" "$4/bin/python"
        echo venv >>"$NOTES" ;;
    "-m pip install "*)
        echo "pip ${@: -1}" >>"$NOTES"
        [[ ! -e $NOTES.fails ]] || { echo "no matching distribution"; exit 1; } ;;
esac
"""


class Checkout:
    """A repository with nothing in it but what scripts/setup reads."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a clone"
        self.programs = root / "bin"
        self.notes = root / "notes"
        (self.root / "scripts").mkdir(parents=True)
        self.programs.mkdir()
        shutil.copy(SETUP_SCRIPT, self.root / "scripts" / "setup")
        (self.root / "setup.cfg").write_text("[metadata]\n")
        (self.root / "constraints.txt").write_text("trio==1\n")
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.programs / tool).symlink_to(found)
        (self.programs / "python3.11").write_text(PYTHON)
        (self.programs / "python3.11").chmod(0o755)

    def set_up(self, extra: str = "test", status: int = 0) -> tuple[list[str], str]:
        """What was done (calls of the interpreter) and what was said."""
        self.notes.write_text("")
        done = subprocess.run(
            [self.root / "scripts" / "setup", extra],
            cwd="/",
            env={"PATH": str(self.programs), "NOTES": str(self.notes), "HOME": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return self.notes.read_text().replace(str(self.root), "").splitlines(), done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_run_makes_a_venv_and_installs_and_says_why(checkout: Checkout) -> None:
    calls, said = checkout.set_up()
    assert calls == ["venv", "pip [test]"]
    assert "there is none yet" in said
    assert "installing meshd[test]" in said


def test_a_second_run_does_and_says_nothing(checkout: Checkout) -> None:
    checkout.set_up()
    assert checkout.set_up() == ([], "")


def test_a_venv_for_tests_is_enough_for_the_demo(checkout: Checkout) -> None:
    checkout.set_up("test")
    assert checkout.set_up("demo") == ([], "")


def test_a_venv_for_the_demo_is_completed_for_tests(checkout: Checkout) -> None:
    checkout.set_up("demo")
    calls, said = checkout.set_up("test")
    assert calls == ["pip [test]"]
    assert "without the extra 'test'" in said


@pytest.mark.parametrize("name", ["setup.cfg", "constraints.txt", ".venv/pyvenv.cfg"])
def test_a_changed_input_installs_again_into_the_same_venv(checkout: Checkout, name: str) -> None:
    checkout.set_up("test")
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    calls, said = checkout.set_up("demo")
    assert calls == ["pip [test]"]
    assert "changed" in said


def test_a_failed_installation_shows_the_reason_and_is_completed_next_time(
    checkout: Checkout,
) -> None:
    fails = checkout.notes.with_name("notes.fails")
    fails.touch()
    _, said = checkout.set_up(status=1)
    assert "no matching distribution" in said
    fails.unlink()
    calls, said = checkout.set_up()
    assert calls == ["pip [test]"]
    assert "did not finish" in said


def _cut_off_venv(venv: Path) -> None:
    (venv / "pyvenv.cfg").unlink()


def _cut_off_package(venv: Path) -> None:
    (venv / "lib/python3.11/site-packages/torch.dist-info").mkdir()


def _interpreter_gone(venv: Path) -> None:
    (venv / "bin/python").unlink()


@pytest.mark.parametrize("damage", [_cut_off_venv, _cut_off_package, _interpreter_gone])
def test_a_venv_that_was_cut_off_half_way_is_made_anew(
    checkout: Checkout, damage: Callable[[Path], None]
) -> None:
    checkout.set_up()
    (checkout.root / ".venv/test.stamp").unlink()
    damage(checkout.root / ".venv")
    assert checkout.set_up()[0] == ["venv", "pip [test]"]


def test_a_venv_that_moved_with_its_folder_is_made_anew(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    assert checkout.set_up()[0] == ["venv", "pip [test]"]


def test_a_missing_interpreter_is_named_with_the_cure(checkout: Checkout) -> None:
    (checkout.programs / "python3.11").unlink()
    _, said = checkout.set_up(status=1)
    assert "python3.11 is not on the PATH" in said
    assert not (checkout.root / ".venv").exists()


def test_an_unknown_extra_is_a_usage_error(checkout: Checkout) -> None:
    assert "unknown extra 'tset'" in checkout.set_up("tset", status=2)[1]
