"""docs/tutorial.md as a reader has it: each command as it stands, in the terminal it is for."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import psutil
import pytest

from tests.e2e.local_swarm import clean_environment

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
PATIENCE_S = 300.0
"""How long one block of commands may take on a busy machine."""
DONE = "--- done: "
SECTION = re.compile(r"^## (.+?)$(.*?)(?=^## |\Z)", re.M | re.S)
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Some commands, and the terminal in which they are to be typed."""

    terminal: int
    commands: str


def blocks(page: str) -> Iterator[Block]:
    """Yield every block of commands in the order of the page."""
    for title, text in SECTION.findall(page):
        named = re.match(r"Terminal (\d)", title)
        terminals = [int(named.group(1))] if named else [1, 2, 3, 4]
        for commands in BLOCK.findall(text):
            yield from (Block(terminal, commands) for terminal in terminals)


@dataclass
class Terminal:
    """A shell that is typed into, and what it says."""

    folder: Path
    shell: subprocess.Popen[str] = field(init=False)
    said: str = ""

    def __post_init__(self) -> None:
        self.shell = subprocess.Popen(
            ["bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            cwd=self.folder,
            env=clean_environment(),
            start_new_session=True,
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.shell.stdout is not None
        for line in self.shell.stdout:
            self._lines.put(line)

    def type(self, commands: str) -> str:
        """Run *commands*, each of which has to succeed, and return what they say."""
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"set -e\n{commands}\nset +e\necho '{DONE}'\n")
        self.shell.stdin.flush()
        until, said = time.monotonic() + PATIENCE_S, ""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(1.0, until - time.monotonic())))
            except Empty:
                problem = "ended" if self.shell.poll() is not None else ""
                problem = problem or ("took too long" if time.monotonic() > until else "")
                assert not problem, f"the terminal {problem} in\n{commands}\nafter\n{said}"
                continue
            if line.startswith(DONE):
                self.said += said
                return said
            said += line

    def close(self) -> None:
        """End the shell and everything that was started in it."""
        shell = psutil.Process(self.shell.pid) if self.shell.poll() is None else None
        started = shell.children(recursive=True) if shell is not None else []
        self.shell.kill()
        for process in started:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(started, timeout=30)
        self.shell.wait()
        for pipe in (self.shell.stdin, self.shell.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[dict[int, Terminal]]:
    """Four terminals in a folder that looks like the clone."""
    for name in (".venv", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    opened = {number: Terminal(tmp_path) for number in (1, 2, 3, 4)}
    try:
        yield opened
    finally:
        for terminal in reversed(opened.values()):
            terminal.close()


def test_the_tutorial_says_which_terminal_its_commands_are_for() -> None:
    found = list(blocks(PAGE))
    assert {block.terminal for block in found} == {1, 2, 3, 4}
    assert sum(block.commands.count("meshd ") for block in found) > 20


@pytest.mark.long
def test_the_tutorials_commands_do_what_it_says(terminals: dict[int, Terminal]) -> None:
    for block in blocks(PAGE):
        terminals[block.terminal].type(block.commands)
    mine = terminals[4].said
    locally, swarm = re.findall(r"^(\d+) are right$", mine, re.M)
    assert locally == swarm
    assert "297 of 297 rows" in mine
    trained = re.search(r"^(\d+) of 297 test images are right$", mine, re.M)
    assert trained is not None
    assert int(trained.group(1)) > 240  # an untrained classifier is right about 30 times
    assert not re.search(r"^mcc +0 ", terminals[3].said, re.M)
