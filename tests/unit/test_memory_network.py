"""The swarm in memory: its faults are injected as asked, counted, and repeat with the seed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, Signed
from meshd.p2p.identity import Address, Identity
from meshd.p2p.memory import MemoryNetwork, MemorySwarm
from meshd.p2p.messages import Capability, Message, OutputAck
from meshd.p2p.network import (
    BlobUnavailable,
    Departure,
    RequestTimeout,
    Unreachable,
)

DOMAIN = Domain("test", 31337)
ALICE, BOB, CAROL = (Identity(bytes([n]) * 32) for n in (1, 2, 3))
START = 1_800_000_000


def wall() -> float:
    return START + trio.current_time()


def word(identity: Identity, number: int = 0) -> Signed[Message]:
    """A small message, numbered by its shard."""
    return DOMAIN.sign(
        identity,
        OutputAck(job_id=bytes(32), shard=number, output_root=bytes(32)),
        expires=START + 100_000,
    )


def capability(identity: Identity, *, issued: int = START, life_s: int = 600) -> Signed[Capability]:
    return DOMAIN.sign(
        identity,
        Capability(
            roles=("worker",),
            addresses=(),
            device="cpu",
            memory_bytes=1,
            units_per_second=1,
            ask=1,
            issued=issued,
        ),
        expires=issued + life_s,
    )


@asynccontextmanager
async def open_swarm(
    seed: int = 0, *, loss: float = 0.0, duplicate: float = 0.0
) -> AsyncIterator[tuple[MemorySwarm, MemoryNetwork, MemoryNetwork, MemoryNetwork]]:
    """A swarm of alice, bob and carol."""
    async with trio.open_nursery() as nursery:
        swarm = MemorySwarm(DOMAIN, nursery, seed=seed, wall=wall, loss=loss, duplicate=duplicate)
        alice, bob, carol = (swarm.join(who, BlobStore()) for who in (ALICE, BOB, CAROL))
        yield swarm, alice, bob, carol
        nursery.cancel_scope.cancel()


async def echo(request: Signed[Message]) -> Signed[Message]:
    return request


async def trace(seed: int) -> list[tuple[float, int]]:
    """When bob hears which of alice's messages in a swarm with loss and duplication."""
    heard = []
    async with (
        open_swarm(seed, loss=0.3, duplicate=0.3) as (_, alice, bob, _),
        bob.subscribe("t") as inbox,
    ):
        start = trio.current_time()
        for number in range(30):
            await alice.publish("t", word(ALICE, number))
            await trio.sleep(0.01)
        with trio.move_on_after(1):
            async for signed in inbox:
                assert isinstance(signed.message, OutputAck)
                heard.append((trio.current_time() - start, signed.message.shard))
    return heard


def run_trace(seed: int) -> list[tuple[float, int]]:
    return trio.run(trace, seed, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    assert run_trace(7) == run_trace(7)
    assert run_trace(7) != run_trace(8)


def test_loss_and_duplication_happen_about_as_often_as_asked() -> None:
    numbers = [number for _, number in run_trace(1)]
    assert 12 <= len(set(numbers)) < 30
    assert len(numbers) > len(set(numbers))


async def test_faults_are_counted(autojump_clock: trio.testing.MockClock) -> None:
    async with open_swarm(loss=1.0) as (swarm, alice, bob, _), bob.serve(OutputAck, echo):
        await alice.publish("t", word(ALICE))
        with pytest.raises(RequestTimeout, match="did not answer"):
            await alice.request(BOB.address, word(ALICE), deadline_s=3)
        assert swarm.faults["gossip lost"] == 2
        assert swarm.faults["request lost"] == 1


async def test_gossip_does_not_cross_a_partition_and_does_after_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_swarm() as (swarm, alice, bob, carol), bob.subscribe("t") as inbox:
        swarm.partition([[ALICE.address, CAROL.address]])
        await alice.publish("t", word(ALICE, 1))
        async with carol.subscribe("t") as same_side:
            with trio.fail_after(1):
                await same_side.receive()
        swarm.heal()
        await alice.publish("t", word(ALICE, 2))
        heard = await inbox.receive()
        assert isinstance(heard.message, OutputAck)
        assert heard.message.shard == 2
        assert swarm.faults["gossip cut"] == 1


async def test_a_partition_is_noticed_after_two_missed_pings_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with (
        open_swarm() as (swarm, alice, bob, _),
        bob.serve(OutputAck, echo),
        alice.departures() as gone,
    ):
        start = trio.current_time()
        swarm.partition([[BOB.address]])
        with pytest.raises(RequestTimeout):
            await alice.request(BOB.address, word(ALICE), deadline_s=3)
        assert {peer.address for peer in alice.peers()} == {BOB.address, CAROL.address}
        assert await gone.receive() == Departure(BOB.address)
        assert trio.current_time() - start == pytest.approx(10)
        assert {peer.address for peer in alice.peers()} == {CAROL.address}
        with pytest.raises(Unreachable):
            await alice.request(BOB.address, word(ALICE))
        swarm.heal()
        assert await alice.request(BOB.address, word(ALICE)) is not None
        assert {peer.address for peer in alice.peers()} == {BOB.address, CAROL.address}


async def test_a_partition_shorter_than_two_pings_is_no_departure(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_swarm() as (swarm, alice, _, _), alice.departures() as gone:
        swarm.partition([[BOB.address]])
        await trio.sleep(9)
        swarm.heal()
        await trio.sleep(9)
        with pytest.raises(trio.WouldBlock):
            gone.receive_nowait()


async def test_a_crash_ends_requests_in_flight_and_is_noticed_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def crash_in_handler(request: Signed[Message]) -> None:
        swarm.crash(BOB.address)
        await trio.sleep_forever()

    async with open_swarm() as (swarm, alice, bob, _), bob.serve(OutputAck, crash_in_handler):
        async with alice.departures() as gone:
            start = trio.current_time()
            with pytest.raises(Unreachable, match="closed the connection"):
                await alice.request(BOB.address, word(ALICE))
            assert await gone.receive() == Departure(BOB.address)
            assert trio.current_time() - start < 1
        with pytest.raises(Unreachable, match="nobody listens"):
            await alice.request(BOB.address, word(ALICE))
        with pytest.raises(Unreachable, match="this node was crashed"):
            await bob.request(ALICE.address, word(BOB))


async def test_a_crashed_node_rejoins_and_learns_what_the_others_know(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_swarm() as (swarm, alice, _, carol):
        await alice.advertise(capability(ALICE))
        swarm.crash(BOB.address)
        bob = swarm.rejoin(BOB, BlobStore())
        await trio.sleep(0.1)
        assert [record.signer for record in bob.capabilities()] == [ALICE.address]
        assert [record.signer for record in carol.capabilities()] == [ALICE.address]
        assert swarm.faults["rejoin"] == 1


async def test_capabilities_expire(autojump_clock: trio.testing.MockClock) -> None:
    async with open_swarm() as (_, alice, bob, _):
        await alice.advertise(capability(ALICE, life_s=20))
        await trio.sleep(1)
        assert bob.capabilities()
        await trio.sleep(30)
        assert not bob.capabilities()


async def test_a_handler_outlives_an_asker_that_gave_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    done = trio.Event()

    async def slow(request: Signed[Message]) -> None:
        await trio.sleep(5)
        done.set()

    async with open_swarm() as (_, alice, bob, _), bob.serve(OutputAck, slow):
        with pytest.raises(RequestTimeout):
            await alice.request(BOB.address, word(ALICE), deadline_s=1)
        await done.wait()


async def test_a_blob_is_had_from_the_holder_that_is_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        swarm = MemorySwarm(DOMAIN, nursery, seed=0, wall=wall)
        stores = [BlobStore() for _ in range(3)]
        alice, _, _ = (
            swarm.join(who, store) for who, store in zip((ALICE, BOB, CAROL), stores, strict=True)
        )
        name = stores[1].put(b"rows")
        stores[2].put(b"rows")
        swarm.partition([[BOB.address]])
        holders: list[Address] = [BOB.address, CAROL.address]
        await alice.fetch(name, max_bytes=10, holders=holders)
        assert stores[0].read(name) == b"rows"
        stores[0].remove(name)
        swarm.crash(CAROL.address)
        with pytest.raises(BlobUnavailable, match="nobody listens"):
            await alice.fetch(name, max_bytes=10, holders=holders)
        nursery.cancel_scope.cancel()


async def test_nobody_joins_twice() -> None:
    async with open_swarm() as (swarm, _, _, _):
        with pytest.raises(ValueError, match="crash it first"):
            swarm.join(BOB, BlobStore())
