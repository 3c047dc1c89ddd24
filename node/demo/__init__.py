"""The local swarm that `scripts/demo` starts, with its cheater: `main` runs it and tells all."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from meshd.node.demo.errors import DemoError

if TYPE_CHECKING:
    from rich.console import Console

    from meshd.node.demo.options import DemoOptions
    from meshd.node.demo.report import Report

INTERRUPTED = 130
"""Exit code after ctrl-C."""


def main(options: DemoOptions) -> int:
    """Run the demo; return 0 if everything holds, 1 if not, 130 after ctrl-C.

    Leaves no process behind, and no file but the outputs that it names.
    """
    from rich.console import Console

    from meshd.node.demo.page import print_page
    from meshd.node.demo.promises import problems
    from meshd.node.demo.report import to_json

    console = Console(width=None if sys.stdout.isatty() else 100)
    folder = Path(tempfile.mkdtemp(prefix="meshd-demo-"))
    began = time.monotonic()
    try:
        report = trio.run(_run, options, folder, console, began)
    except BaseExceptionGroup as group:
        error = _first(group)
        if isinstance(error, KeyboardInterrupt):
            report = None
        elif isinstance(error, DemoError):
            console.print(f"meshd: {error}", style="red", markup=False, highlight=False)
            return 1
        else:
            raise
    except KeyboardInterrupt:
        report = None
    except DemoError as error:
        console.print(f"meshd: {error}", style="red", markup=False, highlight=False)
        return 1
    finally:
        if options.keep:
            console.print(f"kept: {folder}", highlight=False)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if report is None:
        console.print("meshd: interrupted; every process has ended")
        return INTERRUPTED
    if folder.exists() and not options.keep:
        report = replace(report, left_behind=(*report.left_behind, str(folder)))
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(to_json(report), indent=2) + "\n")
    print_page(report, console)
    return 1 if problems(report) else 0


async def _run(options: DemoOptions, folder: Path, console: Console, began: float) -> Report | None:
    """Return the report; None if the demo was told to stop."""
    from meshd.node.demo.adding_up import add_up
    from meshd.node.demo.course import Outcome, run_course
    from meshd.node.demo.processes import open_processes
    from meshd.node.demo.progress import Progress

    outcome: Outcome | None = None
    with (
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        Progress(console) as progress,
    ):
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for _ in signals:
                    progress.phase("stopping: ending every process")
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            async with open_processes(folder) as processes:
                outcome = await run_course(options, folder, processes, progress)
                progress.phase("shutting down")
            nursery.cancel_scope.cancel()
    if outcome is None:
        return None
    report = add_up(outcome, seconds=time.monotonic() - began, pss_bytes=processes.peak_pss_bytes)
    return replace(report, left_behind=tuple(processes.left_behind()))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error in nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
