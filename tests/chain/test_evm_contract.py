from pathlib import Path
import pytest, trio
from collections.abc import AsyncIterator
from trio.testing import MockClock
from tests.contract.test_chain import *
from tests.chain.evm_world import EvmWorld

@pytest.fixture
def clock(): return MockClock(autojump_threshold=0)

@pytest.fixture
async def world(clock, nursery, tmp_path: Path) -> AsyncIterator[EvmWorld]:
    world = EvmWorld(tmp_path/"c", nursery)
    await world.start()
    yield world
    world.close()
