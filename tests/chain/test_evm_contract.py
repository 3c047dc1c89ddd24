"""What every Chain adapter keeps to, kept to by the EVM adapter on the embedded chain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.abc import Clock
from trio.testing import MockClock

from tests.chain.evm_world import EvmWorld
from tests.contract.test_chain import *  # noqa: F403  (its tests, with the fixtures below)


@pytest.fixture
def clock() -> Clock:
    return MockClock(autojump_threshold=0)


@pytest.fixture
async def world(clock: Clock, nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[EvmWorld]:
    world = EvmWorld(tmp_path / "chain.sqlite3", nursery)
    await world.start()
    yield world
    world.close()
