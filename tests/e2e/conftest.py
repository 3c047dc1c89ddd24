"""Processes that the tests of this folder share: they take longer to start than to test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from tests.e2e.local_swarm import LocalSwarm


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """A development chain with meshd's contracts, and nobody on it."""
    swarm = LocalSwarm(tmp_path_factory.mktemp("swarm"))
    try:
        trio.run(swarm.swarm.start_chain)
        yield swarm
    finally:
        swarm.end()


@pytest.fixture(scope="session")
def swarm(chain: LocalSwarm) -> LocalSwarm:
    """The chain with everybody on it, funded, staked and connected."""
    trio.run(chain.populate)
    return chain
