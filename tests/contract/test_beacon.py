"""What every Beacon keeps: one value a height, the same for everybody, unknown before its time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from meshd.ledger.beacon import Beacon, BlockHashBeacon, SeededBeacon
from meshd.ledger.memory_chain import MemoryChain, MemoryLedger
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Identity

DOMAIN = Domain("test", 31337)
ALICE, BOB = Identity(b"\x01" * 32), Identity(b"\x02" * 32)

Pair = tuple[Beacon, Beacon]
"""The beacons of two nodes of one network."""


def _block_hashes(seed: int) -> Pair:
    ledger = MemoryLedger(DOMAIN, seed=seed)
    return tuple(BlockHashBeacon(MemoryChain(ledger, who)) for who in (ALICE, BOB))  # type: ignore[return-value]


def _seeded(seed: int) -> Pair:
    value = seed.to_bytes(32, "big")
    return SeededBeacon(value), SeededBeacon(value)


@pytest.fixture(params=[_block_hashes, _seeded], ids=["block hash", "seeded"])
def make(request: pytest.FixtureRequest) -> Callable[[int], Pair]:
    maker: Callable[[int], Pair] = request.param
    return maker


async def test_two_nodes_see_the_same_value_whenever_they_ask(
    make: Callable[[int], Pair], autojump_clock: trio.testing.MockClock
) -> None:
    alice, bob = make(1)
    early = await alice.at(3)
    await trio.sleep(100)
    assert await bob.at(3) == early == await alice.at(3)
    assert len(early) == 32


async def test_every_height_has_a_value_of_its_own(
    make: Callable[[int], Pair], autojump_clock: trio.testing.MockClock
) -> None:
    alice, _ = make(1)
    values = [await alice.at(height) for height in range(1, 20)]
    assert len(set(values)) == len(values)


async def test_another_network_has_other_values(
    make: Callable[[int], Pair], autojump_clock: trio.testing.MockClock
) -> None:
    values = []
    for seed in (1, 2):
        alice, _ = make(seed)
        values.append(await alice.at(2))
    assert values[0] != values[1]


async def test_a_block_hash_is_waited_for_until_its_block_exists(
    autojump_clock: trio.testing.MockClock,
) -> None:
    alice, _ = _block_hashes(1)
    assert await alice.at(1)
    began = trio.current_time()
    with trio.move_on_after(5) as scope:
        await alice.at(20)
    assert scope.cancelled_caught
    await alice.at(20)
    assert trio.current_time() - began == pytest.approx(19, abs=1)
