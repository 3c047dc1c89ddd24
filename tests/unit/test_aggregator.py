"""The aggregator hands out an output only for the very results it was asked for."""

from __future__ import annotations

from typing import cast

import pytest
import trio

from meshd.node.jobs import Jobs
from meshd.node.ports import Ports
from meshd.node.roles.aggregator import Aggregator

JOB = b"\x01" * 32


@pytest.fixture
def aggregator() -> Aggregator:
    """One that keeps no job: results are put in by hand."""
    return Aggregator(cast(Ports, None), cast(Jobs, None))


async def test_an_output_is_given_once_it_is_combined(
    aggregator: Aggregator, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    async def finish_later() -> None:
        await trio.sleep(5)
        aggregator.finished(JOB, (b"a", b"b"), b"output")

    nursery.start_soon(finish_later)
    assert await aggregator.output(JOB, (b"a", b"b")) == b"output"
    assert trio.current_time() == 5


async def test_an_output_made_of_results_that_were_rejected_since_is_not_given(
    aggregator: Aggregator, autojump_clock: trio.testing.MockClock
) -> None:
    aggregator.finished(JOB, (b"cheat", b"b"), b"stale")
    with trio.move_on_after(60) as waited:
        await aggregator.output(JOB, (b"a", b"b"))
    assert waited.cancelled_caught
    aggregator.finished(JOB, (b"a", b"b"), b"right")
    assert await aggregator.output(JOB, (b"a", b"b")) == b"right"
