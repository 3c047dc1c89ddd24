"""What every adapter of the Network port does, in memory and over real sockets."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, Signed, digest
from meshd.p2p.identity import Address, Identity
from meshd.p2p.libp2p import NetworkSettings, open_network
from meshd.p2p.limits import MAX_GOSSIP
from meshd.p2p.memory import MemorySwarm
from meshd.p2p.messages import Capability, Message, Open, OpenedRow, OutputAck, Progress
from meshd.p2p.network import (
    BlobUnavailable,
    Departure,
    Network,
    RequestRefused,
    RequestTimeout,
    Unreachable,
)

DOMAIN = Domain("contract", 31337)
OTHER_DOMAIN = Domain("other", 31337)
TOPIC = "/meshd/contract/test/1"
ALICE, BOB, CAROL, DAVE = (Identity(bytes([n]) * 32) for n in (1, 2, 3, 4))
LIMIT = 1 << 20


@dataclass
class Node:
    """A member of the swarm under test."""

    network: Network
    blobs: BlobStore
    folder: Path
    stop: Callable[[], None]
    address: Address = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.network.address

    def hold_corrupt(self, data: bytes) -> bytes:
        """Hold bytes that are not *data* under its digest, as a hostile holder would."""
        name = digest(data)
        (self.folder / name.hex()).write_bytes(b"?" * len(data))
        return name


@asynccontextmanager
async def _memory_swarm(folder: Path, identities: list[Identity]) -> AsyncIterator[list[Node]]:
    async with trio.open_nursery() as nursery:
        swarm = MemorySwarm(DOMAIN, nursery, seed=1, wall=time.time)
        nodes = []
        for number, identity in enumerate(identities):
            blobs = BlobStore(folder / str(number))
            network = swarm.join(identity, blobs)
            address = identity.address

            def stop(address: Address = address) -> None:
                swarm.crash(address)

            nodes.append(Node(network, blobs, folder / str(number), stop))
        yield nodes
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _libp2p_swarm(folder: Path, identities: list[Identity]) -> AsyncIterator[list[Node]]:
    bootstrap: tuple[str, ...] = ()

    async def run(
        number: int,
        identity: Identity,
        task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        nonlocal bootstrap
        stopped = trio.Event()
        blobs = BlobStore(folder / str(number))
        async with open_network(
            identity,
            DOMAIN,
            blobs,
            listen=["/ip4/127.0.0.1/tcp/0"],
            bootstrap=bootstrap,
            settings=NetworkSettings(lan=True),
        ) as network:
            bootstrap = bootstrap or network.multiaddrs
            await network.advertise(capability(identity, network.multiaddrs))
            task_status.started(Node(network, blobs, folder / str(number), stopped.set))
            await stopped.wait()

    async with trio.open_nursery() as nursery:
        nodes = [
            await nursery.start(run, number, identity) for number, identity in enumerate(identities)
        ]
        for node in nodes:
            await eventually(lambda node=node: len(node.network.peers()) == len(nodes) - 1)
        try:
            yield nodes
        finally:
            for node in nodes:
                node.stop()


async def eventually(condition: Callable[[], object], *, within_s: float = 15) -> None:
    """Wait until *condition* holds."""
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.02)


@pytest.fixture(params=["memory", "libp2p"])
def open_swarm(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., object]:
    """Return a function that opens a swarm of the given identities."""
    kinds = {"memory": _memory_swarm, "libp2p": _libp2p_swarm}
    return lambda *identities: kinds[request.param](tmp_path, list(identities))


def capability(
    identity: Identity,
    addresses: tuple[str, ...] = (),
    *,
    issued: int | None = None,
    life_s: int = 600,
) -> Signed[Capability]:
    issued = int(time.time()) if issued is None else issued
    message = Capability(
        roles=("worker",),
        addresses=addresses,
        device="cpu",
        memory_bytes=1,
        units_per_second=1,
        ask=1,
        issued=issued,
    )
    return DOMAIN.sign(identity, message, expires=issued + life_s)


def word(identity: Identity, number: int = 0, *, life_s: int = 60) -> Signed[Message]:
    """A small message, told apart by its number."""
    message = OutputAck(job_id=bytes(32), shard=number, output_root=bytes(32))
    return DOMAIN.sign(identity, message, expires=int(time.time()) + life_s)


def large(identity: Identity) -> Signed[Message]:
    """A message of about 4 MB."""
    row = OpenedRow(index=0, row=bytes(1 << 18), salt=bytes(32), path=())
    message = Open(
        job_id=bytes(32),
        commitment_hash=bytes(32),
        rows=(row,) * 16,
        salt_seed=bytes(32),
        output=bytes(32),
        digests=(),
    )
    return DOMAIN.sign(identity, message)


def number_of(signed: Signed[Message]) -> int:
    assert isinstance(signed.message, OutputAck)
    return signed.message.shard


async def echo(request: Signed[Message]) -> Signed[Message]:
    return request


# ---- gossip -------------------------------------------------------------------------------


async def test_what_is_published_reaches_every_subscriber_the_publisher_included(
    open_swarm,
) -> None:
    async with (
        open_swarm(ALICE, BOB, CAROL) as (alice, bob, carol),
        alice.network.subscribe(TOPIC) as at_alice,
        bob.network.subscribe(TOPIC) as at_bob,
        carol.network.subscribe(TOPIC) as at_carol,
    ):
        await publish_until_heard(alice, at_bob)
        await publish_until_heard(alice, at_carol)
        sent = word(ALICE, 7)
        await alice.network.publish(TOPIC, sent)
        for inbox in (at_alice, at_bob, at_carol):
            with trio.fail_after(5):
                async for heard in inbox:
                    if number_of(heard) == 7:
                        break
            assert heard == sent
            assert heard.signer == ALICE.address


async def publish_until_heard(node: Node, inbox: trio.MemoryReceiveChannel) -> None:
    """Warm a topic up: a subscription takes a moment to be known to others."""
    with trio.fail_after(10):
        while True:
            await node.network.publish(TOPIC, word(ALICE, 1000))
            with trio.move_on_after(0.3):
                await inbox.receive()
                return


async def test_what_is_published_on_a_topic_stays_on_it(open_swarm) -> None:
    async with (
        open_swarm(ALICE, BOB) as (alice, bob),
        bob.network.subscribe(TOPIC) as here,
        bob.network.subscribe("/other") as there,
    ):
        await publish_until_heard(alice, here)
        with pytest.raises(trio.WouldBlock):
            there.receive_nowait()


async def test_expired_and_foreign_messages_are_not_delivered(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob), bob.network.subscribe(TOPIC) as inbox:
        await publish_until_heard(alice, inbox)
        foreign = OTHER_DOMAIN.sign(
            ALICE, OutputAck(job_id=bytes(32), shard=1, output_root=bytes(32))
        )
        await alice.network.publish(TOPIC, word(ALICE, 2, life_s=-10))
        await alice.network.publish(TOPIC, foreign)
        await alice.network.publish(TOPIC, word(ALICE, 3))
        with trio.fail_after(5):
            while (heard := number_of(await inbox.receive())) == 1000:
                pass
        assert heard == 3
        assert bob.network.stats()["bad frames"] >= 1


async def test_a_full_subscription_drops_the_newest_and_counts(open_swarm) -> None:
    async with open_swarm(ALICE) as (alice,), alice.network.subscribe(TOPIC) as inbox:
        for number in range(260):
            await alice.network.publish(TOPIC, word(ALICE, number))
        assert [number_of(inbox.receive_nowait()) for _ in range(256)] == list(range(256))
        with pytest.raises(trio.WouldBlock):
            inbox.receive_nowait()
        assert alice.network.stats()["dropped"] == 4


async def test_a_closed_subscription_does_not_disturb_the_others(open_swarm) -> None:
    async with open_swarm(ALICE) as (alice,), alice.network.subscribe(TOPIC) as left:
        async with alice.network.subscribe(TOPIC) as closed:
            await closed.aclose()
            await alice.network.publish(TOPIC, word(ALICE, 1))
        await alice.network.publish(TOPIC, word(ALICE, 2))
        assert [number_of(left.receive_nowait()) for _ in range(2)] == [1, 2]


async def test_gossip_that_is_too_large_is_refused_to_its_author(open_swarm) -> None:
    async with open_swarm(ALICE) as (alice,):
        with pytest.raises(ValueError, match=f"too much for gossip .{MAX_GOSSIP}"):
            await alice.network.publish(TOPIC, large(ALICE))


# ---- requests -----------------------------------------------------------------------------


async def test_a_request_is_answered_also_a_large_one_and_by_oneself(open_swarm) -> None:
    async with (
        open_swarm(ALICE, BOB) as (alice, bob),
        bob.network.serve(OutputAck, echo),
        bob.network.serve(Open, echo),
    ):
        for asked in (word(ALICE, 5), large(ALICE)):
            assert await alice.network.request(bob.address, asked) == asked
            assert await bob.network.request(bob.address, asked) == asked


async def test_none_acknowledges(open_swarm) -> None:
    async def acknowledge(request: Signed[Message]) -> None:
        return None

    async with open_swarm(ALICE, BOB) as (alice, bob), bob.network.serve(OutputAck, acknowledge):
        assert await alice.network.request(bob.address, word(ALICE)) is None


async def test_requests_are_answered_side_by_side(open_swarm) -> None:
    arrived = 0
    together = trio.Event()

    async def wait_for_all(request: Signed[Message]) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 10:
            together.set()
        await together.wait()

    async with (
        open_swarm(ALICE, BOB) as (alice, bob),
        bob.network.serve(OutputAck, wait_for_all),
        trio.open_nursery() as nursery,
    ):
        for number in range(10):
            nursery.start_soon(alice.network.request, bob.address, word(ALICE, number))


async def test_a_refusal_carries_its_reason(open_swarm) -> None:
    async def refuse(request: Signed[Message]) -> None:
        raise RequestRefused("the lease has lapsed")

    async with open_swarm(ALICE, BOB) as (alice, bob), bob.network.serve(OutputAck, refuse):
        with pytest.raises(RequestRefused, match="the lease has lapsed"):
            await alice.network.request(bob.address, word(ALICE))
        assert bob.network.stats()["refused"] == 1


async def test_what_nobody_serves_and_what_has_expired_is_refused(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob):
        with pytest.raises(RequestRefused, match="does not answer 'output-ack'"):
            await alice.network.request(bob.address, word(ALICE))
        async with bob.network.serve(OutputAck, echo):
            with pytest.raises(RequestRefused, match="expired"):
                await alice.network.request(bob.address, word(ALICE, life_s=-10))


async def test_a_silent_handler_is_a_timeout(open_swarm) -> None:
    async def sleep(request: Signed[Message]) -> None:
        await trio.sleep_forever()

    async with open_swarm(ALICE, BOB) as (alice, bob), bob.network.serve(OutputAck, sleep):
        with pytest.raises(RequestTimeout, match=r"within 0\.5 s"):
            await alice.network.request(bob.address, word(ALICE), deadline_s=0.5)


async def test_a_failing_handler_is_counted_and_the_next_request_answered(open_swarm) -> None:
    async def fail_once(request: Signed[Message]) -> Signed[Message]:
        if number_of(request) == 0:
            raise KeyError("bug")
        return request

    async with open_swarm(ALICE, BOB) as (alice, bob), bob.network.serve(OutputAck, fail_once):
        for asker in (alice, bob):
            with pytest.raises(Unreachable):
                await asker.network.request(bob.address, word(ALICE, 0))
            assert await asker.network.request(bob.address, word(ALICE, 1)) is not None
        assert bob.network.stats()["handler errors"] == 2


async def test_who_is_not_there_is_unreachable(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, _):
        with pytest.raises(Unreachable, match="no connection to 0x"):
            await alice.network.request(DAVE.address, word(ALICE))


async def test_a_model_has_one_handler_at_a_time(open_swarm) -> None:
    async with open_swarm(ALICE) as (alice,):
        async with alice.network.serve(OutputAck, echo), alice.network.serve(Progress, echo):
            with pytest.raises(ValueError, match="already have a handler"):
                async with alice.network.serve(OutputAck, echo):
                    pass
        async with alice.network.serve(OutputAck, echo):
            pass


# ---- departures ---------------------------------------------------------------------------


async def test_who_stops_departs_and_is_unreachable(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob), alice.network.departures() as gone:
        assert {peer.address for peer in alice.network.peers()} == {bob.address}
        assert {peer.peer_id for peer in alice.network.peers()} == {BOB.peer_id}
        bob.stop()
        with trio.fail_after(10):
            assert await gone.receive() == Departure(bob.address)
        assert alice.network.peers() == ()
        with pytest.raises(Unreachable):
            await alice.network.request(bob.address, word(ALICE))


# ---- blobs --------------------------------------------------------------------------------


async def test_a_blob_is_fetched_from_who_holds_it(open_swarm) -> None:
    async with open_swarm(ALICE, BOB, CAROL) as (alice, bob, carol):
        data = bytes(range(256)) * 12_000
        name = bob.blobs.put(data)
        holders = [alice.address, carol.address, bob.address]
        await alice.network.fetch(name, max_bytes=4 * LIMIT, holders=holders)
        assert alice.blobs.read(name) == data
        bob.stop()
        await alice.network.fetch(name, max_bytes=4 * LIMIT, holders=holders)


async def test_an_empty_blob_is_fetched(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob):
        name = bob.blobs.put(b"")
        await alice.network.fetch(name, max_bytes=0, holders=[bob.address])
        assert name in alice.blobs


async def test_two_tasks_that_fetch_one_blob_fetch_it_once(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob):
        name = bob.blobs.put(bytes(100_000))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(
                    lambda: alice.network.fetch(name, max_bytes=LIMIT, holders=[bob.address])
                )
        assert alice.network.stats()["blob bytes received"] == 100_000


async def test_a_blob_over_the_limit_is_not_taken(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob):
        name = bob.blobs.put(bytes(1001))
        with pytest.raises(BlobUnavailable, match="1001 bytes, over the limit of 1000"):
            await alice.network.fetch(name, max_bytes=1000, holders=[bob.address])
        assert name not in alice.blobs


async def test_a_corrupt_holder_is_passed_over_for_a_good_one(open_swarm) -> None:
    async with open_swarm(ALICE, BOB, CAROL) as (alice, bob, carol):
        data = b"rows" * 10_000
        name = bob.hold_corrupt(data)
        with pytest.raises(BlobUnavailable, match="another digest"):
            await alice.network.fetch(name, max_bytes=LIMIT, holders=[bob.address])
        assert name not in alice.blobs
        carol.blobs.put(data)
        await alice.network.fetch(name, max_bytes=LIMIT, holders=[bob.address, carol.address])
        assert alice.blobs.read(name) == data


async def test_a_private_blob_is_served_to_its_readers_only(open_swarm) -> None:
    async with open_swarm(ALICE, BOB, CAROL) as (alice, bob, carol):
        name = bob.blobs.put(b"rows", readers=[carol.address])
        with pytest.raises(BlobUnavailable, match="does not serve it"):
            await alice.network.fetch(name, max_bytes=LIMIT, holders=[bob.address])
        await carol.network.fetch(name, max_bytes=LIMIT, holders=[bob.address])
        assert carol.blobs.read(name) == b"rows"


async def test_a_blob_that_nobody_holds_is_unavailable(open_swarm) -> None:
    async with open_swarm(ALICE, BOB) as (alice, bob):
        for holders, reason in (
            ([], "nobody is named"),
            ([alice.address], "nobody is named"),
            ([bob.address], "does not serve it"),
            ([DAVE.address], "no connection"),
        ):
            with pytest.raises(BlobUnavailable, match=reason):
                await alice.network.fetch(digest(b"?"), max_bytes=LIMIT, holders=holders)


# ---- capabilities -------------------------------------------------------------------------


async def test_capabilities_become_known_and_the_newest_counts(open_swarm) -> None:
    async with open_swarm(ALICE, BOB, CAROL) as (alice, bob, carol):
        newest = capability(ALICE, issued=int(time.time()) + 10)
        await alice.network.advertise(newest)
        await bob.network.advertise(capability(BOB, issued=int(time.time()) + 20))
        for node in (alice, bob, carol):
            await eventually(
                lambda node=node: (
                    {newest.signer, BOB.address}
                    <= {record.signer for record in node.network.capabilities()}
                    and newest in node.network.capabilities()
                )
            )


async def test_an_unusable_capability_is_refused_to_its_author(open_swarm) -> None:
    async with open_swarm(ALICE) as (alice,):
        endless = DOMAIN.sign(ALICE, capability(ALICE).message)
        for record, reason in (
            (capability(ALICE, life_s=-700), "expired"),
            (endless, "must expire"),
            (capability(ALICE, life_s=10**6), "more than 86400 s"),
            (capability(ALICE, ("x" * 128,) * 64), "4096 are allowed"),
        ):
            with pytest.raises(ValueError, match=reason):
                await alice.network.advertise(record)
