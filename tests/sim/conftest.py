"""The simulation's options, its import path, and its figures at the end of a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest
import structlog
import trio

SEEDS = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--sim-seed", type=int, help="play this one seed")
    group.addoption("--sim-log", action="store_true", help="print what the nodes log")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        only = metafunc.config.getoption("--sim-seed", None)
        seeds = range(SEEDS) if only is None else [only]
        metafunc.parametrize("seed", seeds)


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let nodes log nothing, or with --sim-log everything, at virtual times."""
    wanted = request.config.getoption("--sim-log", False)

    def stamp(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        return {"at": round(trio.current_time(), 2), **event}

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if wanted else logging.CRITICAL
        ),
        processors=[stamp, structlog.dev.ConsoleRenderer(colors=False)],
    )
    yield
    structlog.reset_defaults()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what all seeds add up to, those that other processes ran included."""
    figures: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        properties = dict(report.user_properties) if report.when == "call" else {}
        figures.update(properties.get("simulation", {}))
    if not figures["seeds"]:
        return
    faults = {name: n for name, n in sorted(figures.items()) if name.startswith("fault: ")}
    states = {name: n for name, n in sorted(figures.items()) if name.startswith("state: ")}
    terminalreporter.section("simulation")
    terminalreporter.write_line(
        f"{figures['seeds']} seeds, {figures['virtual ms'] / 3.6e6:.1f} virtual hours in "
        f"{figures['ms'] / 1e3:.0f} seconds, {sum(faults.values())} faults injected"
    )
    for counts in (states, faults):
        line = ", ".join(f"{name.split(': ')[1]} {n}" for name, n in counts.items())
        terminalreporter.write_line(line)
