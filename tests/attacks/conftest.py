"""The option that writes docs/cheaters.md, and quiet nodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attacks")
    group.addoption("--write-table", action="store_true", help="play more, write docs/cheaters.md")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let nodes log nothing."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
    )
    yield
    structlog.reset_defaults()
