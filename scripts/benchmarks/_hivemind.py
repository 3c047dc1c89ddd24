"""Hivemind 1.1.12 beside a swarm of meshd: peers that train, one of which is killed.

It lives in an environment of its own, `.bench-venv-hivemind`, which the first run makes; git
ignores it and it can be deleted at any time. torch is installed first, in the version of
constraints.txt, and Hivemind without its dependencies' opinion on that.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _rounds import Tail
from _table import say

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".bench-venv-hivemind"
PEER = Path(__file__).with_name("_hivemind_peer.py")
HIVEMIND = "hivemind==1.1.12"
NEEDED = (
    *("PyYAML", "numpy", "scipy", "prefetch_generator", "msgpack", "sortedcontainers", "uvloop"),
    *("grpcio-tools", "protobuf", "configargparse", "py-multihash", "cryptography", "pydantic"),
    *("packaging", "varint", "base58", "netaddr", "idna", "py-cid"),
)
"""What it imports besides torch."""
MOMENTS = ("computing", "averaging")
WHOLE = {"process": False, "machine": True}
"""What is killed: the main process, or everything, as by a power cut."""
QUIET_EPOCHS = 3
"""Epochs with every peer before one dies; the first one does not count for the times."""
START_S = 120.0
LOOK_S = 0.02


class HivemindMissing(Exception):
    """It cannot be installed, or does not start, here; the text says why."""


def prepare() -> Path:
    """Return the interpreter of the environment; raises HivemindMissing."""
    python, stamp = VENV / "bin" / "python", VENV / "installed"
    if stamp.exists() and stamp.read_text() == HIVEMIND:
        return python
    say(f"installing {HIVEMIND} and torch into {VENV}, once")
    pip = [str(python), "-m", "pip", "install", "-q", "--no-input", "--progress-bar", "off"]
    pinned = ["-c", str(ROOT / "constraints.txt")]
    torch = next(line for line in _lines(ROOT / "constraints.txt") if line.startswith("torch=="))
    commands = [
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, *pinned, torch],
        [*pip, "--no-deps", HIVEMIND],
        [*pip, *pinned, *NEEDED],
        [str(python), "-c", "import hivemind"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HivemindMissing((done.stderr or done.stdout).strip()[-500:])
    (VENV / ".gitignore").write_text("*\n")
    stamp.write_text(HIVEMIND)
    return python


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@dataclass
class Peer:
    """A peer's processes, which are one process group, and what it printed."""

    process: subprocess.Popen[bytes]
    output: Path
    tail: Tail = field(default_factory=Tail)
    _read: int = 0

    def events(self) -> list[dict[str, Any]]:
        """Return what it noted, in order."""
        with self.output.open() as file:
            file.seek(self._read)
            self.tail.feed(file.read())
            self._read = file.tell()
        return self.tail.events

    def is_ready(self) -> bool:
        """Return whether it is; raises HivemindMissing if it ended instead."""
        if not self.events() and self.process.poll() is not None:
            said = self.output.with_suffix(".log").read_text(errors="replace")
            code = self.process.returncode
            raise HivemindMissing(f"a peer ended with exit code {code}: {said.strip()[-300:]}")
        return bool(self.events())

    def kill(self, *, whole: bool = True) -> None:
        """Kill it; the processes that it started too, unless *whole* is false."""
        if not whole:
            self.process.kill()
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure(
    folder: Path,
    *,
    peers: int,
    compute_s: float,
    tuned: bool,
    moment: str,
    whole: bool,
    limit_s: float,
) -> dict[str, float | None]:
    """Train, kill a peer at a *moment* of an epoch, wait for the next averaging of the others.

    Its main process is killed, as meshd's daemon is, or with *whole* every process of it.
    Returns `death_completed_s`, None if it did not come within *limit_s* seconds, and
    `overhead_s`, an epoch's time beyond *compute_s* with every peer there.
    Raises HivemindMissing.
    """
    begin = folder / "begin"
    flags = ["--begin", str(begin), "--peers", str(peers), "--compute-s", str(compute_s)]
    flags += [*(["--tuned"] if tuned else []), *(["--whole"] if whole else [])]
    with _peers(
        folder, flags, peers, dies=QUIET_EPOCHS + 1 if moment == "averaging" else 0
    ) as all_:
        begin.touch()
        victim, *others = reversed(all_)
        if moment == "computing":
            _wait(lambda: len(_times(others[0].events(), "epoch")) >= QUIET_EPOCHS, START_S * 2)
            time.sleep(compute_s / 2)
            died = time.monotonic()
            victim.kill(whole=whole)
        else:
            _wait(lambda: _times(victim.events(), "died"), START_S * 2)
            died = _times(victim.events(), "died")[0]
        ended = [[at for at in _times(other.events(), "epoch") if at < died] for other in others]
        _wait(lambda: completed([o.events() for o in others], died) is not None, limit_s, late=True)
        found = completed([other.events() for other in others], died)
    steps = [b - a for times in ended for a, b in itertools.pairwise(times)]
    return {
        "overhead_s": statistics.median(steps) - compute_s if steps else None,
        "death_completed_s": found,
    }


def completed(events: Sequence[Sequence[Mapping[str, Any]]], died: float) -> float | None:
    """Return when all survivors had averaged again, in seconds after *died*; None: not yet."""
    first: list[float] = []
    for each in events:
        times = [event["at"] for event in each if event["kind"] == "averaged"]
        after = [at for at in times if at > died]
        if not after:
            return None
        first.append(after[0] - died)
    return max(first)


def _times(events: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    return [event["at"] for event in events if event["kind"] == kind]


@contextmanager
def _peers(folder: Path, flags: list[str], count: int, dies: int) -> Iterator[list[Peer]]:
    """Yield peers that are ready, the last of which may die by itself; none is left behind."""
    python, peers = prepare(), list[Peer]()
    try:
        for number in range(count):
            own = ["--dies-averaging", str(dies)] if number == count - 1 and dies else []
            if peers:
                own += ["--initial", peers[0].events()[0]["address"]]
            peers.append(_start([str(python), str(PEER), *flags, *own], folder, number))
            if number in (0, count - 1):
                _wait(lambda: all(peer.is_ready() for peer in peers), START_S)
        yield peers
    finally:
        for peer in peers:
            peer.kill()


def _start(command: list[str], folder: Path, number: int) -> Peer:
    output = folder / f"peer-{number}.events"
    quiet = {"OMP_NUM_THREADS": "1", "HIVEMIND_LOGLEVEL": "ERROR"}
    with output.open("wb") as out, output.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=out, stderr=log, start_new_session=True, env=os.environ | quiet
        )
    return Peer(process, output)


def _wait(holds: Any, limit_s: float, *, late: bool = False) -> None:
    """Wait until *holds*; after *limit_s* raise HivemindMissing, or go on if it may be late."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > limit_s:
            if late:
                return
            raise HivemindMissing(f"its peers did not get on within {limit_s:g} s")
        time.sleep(LOOK_S)
