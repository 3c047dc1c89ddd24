"""A node that is paused, or leaves: what it takes on, and what it does first."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from meshd.node.availability import REST_S, Availability


def test_a_node_takes_work_unless_it_is_paused_or_leaves() -> None:
    availability = Availability()
    assert availability.open
    availability.pause()
    assert not availability.open
    availability.resume()
    assert availability.open


async def test_whoever_waits_hears_of_a_pause_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    availability = Availability()
    heard: list[float] = []

    async def wait() -> None:
        await availability.changed(100)
        heard.append(trio.current_time())

    began = trio.current_time()
    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    availability.pause()
    await trio.testing.wait_all_tasks_blocked()
    assert heard == [began]
    await availability.changed(5)
    assert trio.current_time() == began + 5


async def test_leaving_takes_every_step_side_by_side(autojump_clock: MockClock) -> None:
    availability = Availability()
    done: list[bool] = []

    async def step() -> None:
        await trio.sleep(2)
        done.append(availability.open)

    began = trio.current_time()
    with availability.before_leaving(step), availability.before_leaving(step):
        assert await availability.leave(3)
    assert done == [False, False]
    assert trio.current_time() == began + 2


async def test_leaving_waits_no_longer_than_it_may(autojump_clock: MockClock) -> None:
    availability = Availability()
    began = trio.current_time()
    with availability.before_leaving(trio.sleep_forever):
        assert not await availability.leave(3)
    assert trio.current_time() == began + 3


async def test_a_step_that_is_over_is_not_taken(autojump_clock: MockClock) -> None:
    availability = Availability()
    with availability.before_leaving(trio.sleep_forever):
        pass
    assert await availability.leave(3)
    assert not availability.open


async def test_a_node_that_could_not_keep_something_takes_nothing_for_a_while(
    autojump_clock: MockClock,
) -> None:
    availability, room = Availability(), [False]
    began = trio.current_time()

    async def step() -> str:
        await trio.lowlevel.checkpoint()
        if not room[0]:
            room[0] = True
            raise OSError(28, "No space left on device")
        return "kept"

    assert availability.taking
    async with trio.open_nursery() as nursery:
        nursery.start_soon(availability.until_kept, step)
        await trio.sleep(REST_S / 2)
        assert availability.open
        assert (availability.taking, availability.resting) == (False, True)
        assert "No space left" in availability.trouble
    assert trio.current_time() - began == REST_S
    assert availability.taking


async def test_a_change_between_two_waits_is_not_missed(autojump_clock: MockClock) -> None:
    availability = Availability()
    seen, began = availability.changes, trio.current_time()
    availability.pause()
    availability.resume()
    await availability.changed(100, seen)
    assert trio.current_time() == began
    await availability.changed(100, availability.changes)
    assert trio.current_time() == began + 100
