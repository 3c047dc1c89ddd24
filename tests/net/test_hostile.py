"""What strangers and hostile peers send: the host survives it, and what it costs is bounded."""

from __future__ import annotations

import os
import random
import socket
import struct
from contextlib import asynccontextmanager
from types import SimpleNamespace

import psutil
import pytest
import trio
import trio.lowlevel
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair as create_ed25519_key_pair
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from meshd.p2p.codec import MAX_FRAME
from meshd.p2p.identity import Identity
from meshd.p2p.libp2p import NetworkSettings
from meshd.p2p.libp2p.directory import _Records
from meshd.p2p.messages import OutputAck

PROTOCOLS = [
    "/meshd/net-test/msg/1",
    "/meshd/net-test/blob/1",
    "/meshd/net-test/ping/1",
    "/meshd/net-test/capabilities/1",
    "/meshsub/1.1.0",
    "/ipfs/kad/1.0.0",
    "/ipfs/id/1.0.0",
    "/ipfs/id/push/1.0.0",
    "/ipfs/ping/1.0.0",
]


@asynccontextmanager
async def hostile_peer(victim, *, keys=create_new_key_pair):
    """An authenticated peer without any of meshd's manners, connected to *victim*."""
    host = new_host(key_pair=keys())
    info = info_from_p2p_addr(Multiaddr(victim.multiaddr))
    async with host.run([]):
        await host.connect(info)

        async def open_stream(protocol: str):
            with trio.fail_after(10):
                return await host.new_stream(info.peer_id, [protocol])

        try:
            yield SimpleNamespace(host=host, open_stream=open_stream, victim=info.peer_id)
        finally:
            with trio.move_on_after(2, shield=True):
                await host.disconnect(info.peer_id)


@pytest.fixture
async def pair(kit):
    """Yield a victim and an honest peer of it."""
    victim = await kit.start(1)
    honest = await kit.start(2, [victim.multiaddr])
    await kit.eventually(lambda: honest.network.peers() and victim.network.peers())
    return victim, honest


def connect(node, source: str = "127.0.0.1") -> socket.socket:
    """Open a bare TCP connection to *node*."""
    port = int(node.multiaddr.split("/")[4])
    return socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))


async def test_garbage_on_sockets_does_not_end_the_host(kit, pair):
    victim, honest = pair
    noise = random.Random(1)
    for size in (0, 1, 12, 100, 5000):
        with connect(victim) as sock:
            sock.sendall(noise.randbytes(size))
            await trio.lowlevel.checkpoint()
    await kit.eventually(lambda: victim.network.stats().get("handshakes failed", 0) >= 4)
    await kit.assert_serves(victim, honest)


async def test_an_unbounded_length_before_authentication_costs_no_memory(kit, pair):
    victim, honest = pair
    process = psutil.Process()
    with connect(victim) as sock:
        before = process.memory_info().rss
        sock.settimeout(0)
        sock.send(b"\xff\xff\xff\x7f")  # a line of 256 MiB is announced
        sent = 0
        with trio.move_on_after(3):
            while True:
                try:
                    sent += sock.send(bytes(65536))
                except BlockingIOError:
                    await trio.sleep(0.01)
                except OSError:
                    break
        assert sent < 20 << 20
        assert process.memory_info().rss - before < 8 << 20
    await kit.assert_serves(victim, honest)


async def test_silent_sockets_of_one_address_leave_room_for_others(kit):
    victim = await kit.start(1, settings=NetworkSettings(lan=True, handshakes_per_address=8))
    silent = [connect(victim, "127.0.0.2") for _ in range(40)]
    try:
        await kit.eventually(lambda: victim.network.stats().get("connections refused", 0) >= 32)
        honest = await kit.start(2, [victim.multiaddr])
        await kit.eventually(lambda: honest.network.peers(), within_s=5)
    finally:
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_garbage_on_a_stream_does_not_end_the_host(kit, pair, protocol):
    victim, honest = pair
    noise = random.Random(2)
    async with hostile_peer(victim) as peer:
        for data in (b"", b"\0", noise.randbytes(7), b"\xff" * 64, noise.randbytes(3000)):
            stream = await peer.open_stream(protocol)
            if data:
                await stream.write(data)
            await stream.close()
            await trio.sleep(0.01)
            await stream.reset()
    await kit.assert_serves(victim, honest)


async def test_an_oversized_frame_is_refused_before_it_is_read(kit, pair):
    victim, honest = pair
    async with hostile_peer(victim) as peer:
        stream = await peer.open_stream("/meshd/net-test/msg/1")
        await stream.write(struct.pack("!I", MAX_FRAME + 1))
        with trio.fail_after(5), pytest.raises(StreamError):
            await stream.read(1)
    assert victim.network.stats()["bad frames"] == 1
    await kit.assert_serves(victim, honest)


async def test_a_peer_that_overruns_the_window_is_cut_off(kit, pair):
    victim, honest = pair
    release = trio.Event()

    async def hold(request):
        await release.wait()

    async with victim.network.serve(OutputAck, hold), hostile_peer(victim) as peer:
        stream = await peer.open_stream("/meshd/net-test/msg/1")
        raw = kit.word(Identity(b"\5" * 32)).raw
        await stream.write(struct.pack("!I", len(raw)) + raw)

        async def flood() -> None:
            while True:
                stream.muxed_stream.send_window = 1 << 40
                await stream.write(bytes(1 << 20))

        with trio.fail_after(20), pytest.raises(StreamError):
            await flood()
        await kit.eventually(lambda: len(victim.network.peers()) == 1)
        release.set()
    await kit.assert_serves(victim, honest)


async def test_more_streams_than_a_peer_may_open_are_reset(kit, pair):
    victim, honest = pair
    release = trio.Event()

    async def hold(request):
        await release.wait()

    raw = kit.word(Identity(b"\5" * 32)).raw
    async with victim.network.serve(OutputAck, hold), hostile_peer(victim) as peer:

        async def ask() -> None:
            try:
                stream = await peer.open_stream("/meshd/net-test/msg/1")
                await stream.write(struct.pack("!I", len(raw)) + raw)
            except Exception:
                return

        async with trio.open_nursery() as nursery:
            for _ in range(90):
                nursery.start_soon(ask)
        await kit.eventually(lambda: victim.network.stats().get("streams refused", 0) > 0)
        release.set()
    await kit.assert_serves(victim, honest)


async def test_a_peer_without_a_chain_address_is_dropped(kit):
    victim = await kit.start(1)
    async with hostile_peer(victim, keys=create_ed25519_key_pair):
        await kit.eventually(lambda: victim.network.stats().get("foreign peers"))
    assert victim.network.peers() == ()


async def test_the_dht_admits_a_record_under_its_signers_address_only(kit, pair):
    victim, honest = pair
    record = kit.capability(honest)
    records = _Records(kit.domain, kit.domain.open)
    records.validate(f"/meshd-net-test/{honest.address.hex()}", record.raw)
    for key, value in (
        (f"/meshd-net-test/{victim.address.hex()}", record.raw),
        (f"/meshd-other/{honest.address.hex()}", record.raw),
        (f"/meshd-net-test/{honest.address.hex()}", record.raw[:-1]),
        (f"/meshd-net-test/{honest.address.hex()}", os.urandom(64)),
    ):
        with pytest.raises(ValueError, match="DHT record"):
            records.validate(key, value)
