"""A swarm on real sockets: finding one another, gossip, reconnecting, shutting down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from meshd.p2p.blobs import BlobStore
from meshd.p2p.identity import Identity
from meshd.p2p.libp2p import ListenError, NetworkSettings, open_network
from meshd.p2p.network import Departure, NetworkError

TOPIC = "/meshd/net-test/test/1"

PROCESS = """
import sys, trio
from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Identity
from meshd.p2p.libp2p import NetworkSettings, open_network

async def main(number, bootstrap):
    identity = Identity(number.to_bytes(32, "big"))
    async with open_network(
        identity, Domain("net-test", 31337), BlobStore(),
        listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=bootstrap,
        settings=NetworkSettings(lan=True),
    ) as network:
        while not network.peers():
            await trio.sleep(0.02)
        print("connected", flush=True)
        await trio.sleep_forever()

try:
    trio.run(main, int(sys.argv[1]), sys.argv[2:])
except* KeyboardInterrupt:
    print("interrupted", flush=True)
"""


PYTHON = (sys.executable, "-W", "error")


def start_process(number: int, *bootstrap: str) -> subprocess.Popen[str]:
    """Start a node as a process of its own; it says so when it is connected."""
    return subprocess.Popen(
        # py-libp2p leaves the socket of a dial cancelled half-made to the garbage collector.
        [*PYTHON, "-W", "ignore::ResourceWarning", "-c", PROCESS, str(number), *bootstrap],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_eight_nodes_find_one_another_by_one_bootstrap_peer_and_gossip_reaches_all(kit):
    first = await kit.start(1)
    async with trio.open_nursery() as nursery:
        for number in range(2, 9):
            nursery.start_soon(kit.start, number, [first.multiaddr])
    await kit.eventually(
        lambda: all(len(node.network.capabilities()) == 8 for node in kit.nodes), within_s=60
    )
    heard: dict[int, set[int]] = {}

    async def listen(place: int, node, task_status=trio.TASK_STATUS_IGNORED) -> None:
        async with node.network.subscribe(TOPIC) as inbox:
            task_status.started()
            async for signed in inbox:
                heard.setdefault(signed.message.shard, set()).add(place)

    async with trio.open_nursery() as nursery:
        for place, node in enumerate(kit.nodes):
            await nursery.start(listen, place, node)
        with trio.fail_after(60):
            # Gossip may lose a message while the topic's mesh forms: say it again until heard.
            while missing := [n for n in range(8) if len(heard.get(n, ())) < 8]:
                for number in missing:
                    node = kit.nodes[number]
                    await node.network.publish(TOPIC, kit.word(node.identity, number))
                with trio.move_on_after(2):
                    await kit.eventually(
                        lambda missing=missing: all(len(heard.get(n, ())) == 8 for n in missing)
                    )
        nursery.cancel_scope.cancel()


async def test_a_burst_of_messages_arrives_whole(kit):
    alice = await kit.start(1)
    bob = await kit.start(2, [alice.multiaddr])
    await kit.eventually(lambda: bob.network.peers() and alice.network.peers())
    async with bob.network.subscribe(TOPIC) as inbox, alice.network.subscribe(TOPIC):
        with trio.fail_after(30):
            while True:
                await alice.network.publish(TOPIC, kit.word(alice.identity, 9999))
                with trio.move_on_after(0.2):
                    await inbox.receive()
                    break
        for number in range(200):
            await alice.network.publish(TOPIC, kit.word(alice.identity, number))
        seen = set()
        with trio.fail_after(30):
            while len(seen - {9999}) < 200:
                seen.add((await inbox.receive()).message.shard)


async def test_a_frozen_peer_is_noticed_by_its_missed_pings(kit):
    settings = NetworkSettings(lan=True, ping_interval_s=0.3)
    alice = await kit.start(1, settings=settings)
    async with alice.network.departures() as gone:
        process = start_process(2, alice.multiaddr)
        try:
            await kit.eventually(lambda: alice.network.peers(), within_s=30)
            (peer,) = alice.network.peers()
            await kit.eventually(lambda: alice.network.peers()[0].latency_s)
            process.send_signal(signal.SIGSTOP)
            start = trio.current_time()
            with trio.fail_after(30):
                assert await gone.receive() == Departure(peer.address)
            assert trio.current_time() - start < 5
            assert alice.network.peers() == ()
        finally:
            process.kill()
            process.communicate()


async def test_a_killed_peer_is_noticed_at_once(kit):
    alice = await kit.start(1)
    async with alice.network.departures() as gone:
        process = start_process(2, alice.multiaddr)
        try:
            await kit.eventually(lambda: alice.network.peers(), within_s=30)
            process.kill()
            with trio.fail_after(3):
                await gone.receive()
        finally:
            process.kill()
            process.communicate()


async def test_an_interrupted_process_ends_cleanly(kit):
    alice = await kit.start(1)
    process = start_process(2, alice.multiaddr)
    try:
        await kit.eventually(lambda: alice.network.peers(), within_s=30)
        assert await trio.to_thread.run_sync(process.stdout.readline) == "connected\n"
        process.send_signal(signal.SIGINT)
        out, err = await trio.to_thread.run_sync(lambda: process.communicate(timeout=10))
    finally:
        process.kill()
    assert (out, err, process.returncode) == ("interrupted\n", "", 0)
    await kit.eventually(lambda: not alice.network.peers())


async def test_a_restarted_bootstrap_peer_is_dialled_again(kit):
    alice = await kit.start(1)
    bob = await kit.start(2, [alice.multiaddr])
    await kit.eventually(lambda: bob.network.peers())
    where = alice.multiaddr.split("/p2p/")[0]
    await alice.stop()
    await kit.eventually(lambda: not bob.network.peers())
    await kit.start(1, listen=where)
    await kit.eventually(lambda: bob.network.peers())


async def test_anchors_are_dialled_without_a_bootstrap_peer(kit, tmp_path):
    settings = NetworkSettings(lan=True, anchors=tmp_path / "anchors", anchor_after_s=0.0)
    alice = await kit.start(1)
    bob = await kit.start(2, [alice.multiaddr], settings=settings)
    await kit.eventually(lambda: bob.network.peers())
    await bob.stop()
    bob = await kit.start(2, settings=settings)
    await kit.eventually(lambda: bob.network.peers())


async def test_a_damaged_anchors_file_is_nobody(kit, tmp_path):
    (tmp_path / "anchors").write_text('["/ip4/127.0.0.1", 7')
    await kit.start(1, settings=NetworkSettings(anchors=tmp_path / "anchors"))


async def test_a_node_is_reached_by_its_record_though_nobody_dialled_it(kit):
    loners = NetworkSettings(lan=True, target_peers=1)
    hub = await kit.start(1, settings=NetworkSettings(lan=True, target_peers=0))
    bob = await kit.start(2, [hub.multiaddr], settings=loners)
    carol = await kit.start(3, [hub.multiaddr], settings=loners)
    await kit.eventually(lambda: len(bob.network.capabilities()) == 3)
    assert {peer.address for peer in bob.network.peers()} == {hub.address}
    await kit.assert_serves(carol, bob)
    assert {peer.address for peer in bob.network.peers()} == {hub.address, carol.address}


async def test_a_node_whose_record_is_not_known_is_found_in_the_dht(kit):
    loners = NetworkSettings(lan=True, target_peers=1)
    hub = await kit.start(1, settings=NetworkSettings(lan=True, target_peers=0))
    bob = await kit.start(2, [hub.multiaddr], settings=loners)
    carol = await kit.start(3, [hub.multiaddr], settings=loners)
    key = f"/meshd-net-test/{carol.address.hex()}".encode()
    stored = hub.network._discovery._directory._dht.value_store
    await kit.eventually(lambda: stored.get(key))
    await kit.eventually(lambda: len(bob.network.capabilities()) == 3)
    del bob.network._book._records[carol.address]
    await kit.assert_serves(carol, bob)
    assert len(bob.network.capabilities()) == 3


async def test_a_blob_is_finished_from_another_holder_when_one_stops(kit):
    alice = await kit.start(1)
    holders = [await kit.start(number, [alice.multiaddr]) for number in (2, 3)]
    await kit.eventually(lambda: len(alice.network.peers()) == 2)
    data = os.urandom(48_000_000)
    (name,) = {holder.blobs.put(data) for holder in holders}

    def sent(node) -> int:
        return node.network.stats().get("blob bytes sent", 0)

    async def stop_the_one_that_sends() -> None:
        await kit.eventually(lambda: any(sent(holder) > 4_000_000 for holder in holders))
        await max(holders, key=sent).stop()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_the_one_that_sends)
        await alice.network.fetch(
            name, max_bytes=len(data), holders=[holder.address for holder in holders]
        )
    assert alice.blobs.read(name) == data
    assert min(sent(holder) for holder in holders) > 4_000_000
    assert alice.network.stats()["blob bytes received"] == len(data)


async def test_a_port_in_use_is_a_clear_error(kit):
    alice = await kit.start(1)
    where = alice.multiaddr.split("/p2p/")[0]
    with pytest.raises(ListenError, match=f"cannot listen at {where}.*choose another port"):
        async with open_network(
            Identity(bytes(31) + b"\2"), kit.domain, BlobStore(), listen=[where]
        ):
            pass


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:4001", "/ip4/127.0.0.1/udp/4001", "/ip4/203.0.113.1/tcp/0", ""]
)
async def test_an_address_that_cannot_be_listened_at_is_named(kit, listen):
    with pytest.raises(ListenError, match="cannot listen at"):
        async with open_network(
            Identity(bytes(31) + b"\2"), kit.domain, BlobStore(), listen=[listen]
        ):
            pass


async def test_a_malformed_bootstrap_peer_is_named(kit):
    with pytest.raises(NetworkError, match=r"bootstrap peer: multiaddr '/ip4/127\.0\.0\.1/tcp/1'"):
        async with open_network(
            Identity(bytes(31) + b"\2"),
            kit.domain,
            BlobStore(),
            listen=["/ip4/127.0.0.1/tcp/0"],
            bootstrap=["/ip4/127.0.0.1/tcp/1"],
        ):
            pass


async def test_what_the_body_raises_comes_out_bare_and_nothing_is_left_running(kit):
    alice = await kit.start(1)
    tasks = trio.lowlevel.current_statistics().tasks_living

    async def run_and_fail() -> None:
        async with open_network(
            Identity(bytes(31) + b"\2"),
            kit.domain,
            BlobStore(),
            listen=["/ip4/127.0.0.1/tcp/0"],
            bootstrap=[alice.multiaddr],
            settings=NetworkSettings(lan=True),
        ) as network:
            await kit.eventually(lambda: network.peers())
            raise KeyError("own")

    for _ in range(5):
        with pytest.raises(KeyError, match="own"):
            await run_and_fail()
        await kit.eventually(lambda: not alice.network.peers())
    await kit.eventually(  # alice's own tasks come and go: fewer than one is left a round
        lambda: trio.lowlevel.current_statistics().tasks_living < tasks + 5
    )


async def test_connections_that_come_and_go_leave_no_slot_taken(kit):
    alice = await kit.start(1, settings=NetworkSettings(lan=True, max_connections=8))
    for number in range(2, 14):  # more than the seven inbound slots
        bob = await kit.start(number, [alice.multiaddr], advertise=False)
        await kit.eventually(lambda bob=bob: bob.network.peers() and alice.network.peers())
        await bob.stop()
        await kit.eventually(lambda: not alice.network.peers())


async def test_networks_with_other_names_do_not_mix(kit):
    alice = await kit.start(1)
    kit.domain = type(kit.domain)("another", 31337)
    bob = await kit.start(2, [alice.multiaddr])
    await kit.eventually(lambda: bob.network.stats().get("exchanges failed"))
    assert [known.signer for known in bob.network.capabilities()] == [bob.identity.address]
