"""How the demo goes while it runs: phases, jobs, and what happens in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from meshd.node.control.api import ENDED, JobDetail
from meshd.node.demo.tables import bar, count_of, short_hex, shows_unicode

_LINE: Final = 24
"""Length of the bars."""


class Progress:
    """How the demo goes: its phases with their time, the job's shards, its workers.

    A context manager: on a terminal the last lines are kept up to date inside it (by rich's own
    thread); elsewhere there is a line for every change.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._plain = not shows_unicode(console)
        self._clock = clock
        self._began = self._since = clock()
        self._phase = ""
        self._jobs: dict[str, JobDetail] = {}
        """Those that have not ended, by id."""
        self._said: dict[str, tuple[object, ...]] = {}
        self._live = Live(
            console=console, get_renderable=self._now, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._console.is_terminal:
            self._end_phase()

    def phase(self, text: str) -> None:
        """Say that the demo is at *text* now; what it was at before is done."""
        if self._console.is_terminal:
            self._end_phase()
        else:
            self._say(text)
        self._phase, self._since = text, self._clock()

    def note(self, text: str) -> None:
        """Say that something happened."""
        self._say(text)

    def job(self, detail: JobDetail) -> None:
        """Show a job as it is now."""
        shards = detail["shards"]
        name, rounds = detail["id"], detail["rounds"]
        now = (detail["state"], rounds and rounds["done"], *shards.values())
        if now != self._said.get(name) and not self._console.is_terminal:
            self._say(f"{_called(detail)}: {_counts(detail)}, {_seen(detail)}")
        self._jobs[name], self._said[name] = detail, now
        if detail["state"] in ENDED:
            del self._jobs[name]
        if self._live.is_started:
            self._live.refresh()

    def _end_phase(self) -> None:
        if self._phase:
            self._say(f"{self._phase} ({self._clock() - self._since:.1f} s)")
        self._phase = ""

    def _say(self, text: str) -> None:
        line = f"{self._clock() - self._began:6.1f} s  {text}"
        self._console.print(Text(line), soft_wrap=not self._console.is_terminal)

    def _now(self) -> RenderableType:
        """Return the lines that are kept up to date."""
        lines = Text(f"{self._clock() - self._began:6.1f} s  ", style="bold")
        lines.append(self._phase)
        for job in self._jobs.values():
            self._add_job(lines, job)
        return lines

    def _add_job(self, lines: Text, job: JobDetail) -> None:
        shards = job["shards"]
        done = bar(shards["accepted"], shards["total"], _LINE, plain=self._plain)
        lines.append(f"\n          {_called(job)}  ")
        lines.append(f"{done:<{_LINE}}", style="green")
        lines.append(f"  {_counts(job)}\n          {_seen(job)}")
        for worker in job["workers"]:
            lines.append(f"\n          worker {short_hex(worker['account'])}  ")
            own = bar(worker["accepted"], shards["total"], _LINE, plain=self._plain)
            lines.append(f"{own:<{_LINE}}", style="cyan")
            lines.append(f"  {worker['accepted']} accepted, {worker['rejected']} rejected")


def _called(job: JobDetail) -> str:
    """Return a job's kind and state, and how far its rounds are."""
    rounds = job["rounds"]
    far = f", round {rounds['done']} of {rounds['total']} closed" if rounds is not None else ""
    return f"{job['kind']} {job['state']}{far}"


def _counts(job: JobDetail) -> str:
    shards = job["shards"]
    accepted = f"{shards['accepted']} of {count_of(shards['total'], 'shard')} accepted"
    return f"{accepted}, {shards['rejected']} rejected, {shards['reissued']} re-issued"


def _seen(job: JobDetail) -> str:
    return f"{count_of(len(job['audits']), 'audit')}, {count_of(job['certified_seq'], 'log head')}"
