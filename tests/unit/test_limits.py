"""Rates, slots and dial filter: pure rules, each with what it refuses."""

from __future__ import annotations

import pytest

from meshd.p2p.identity import Identity
from meshd.p2p.limits import (
    MAX_GOSSIP,
    Buckets,
    Endpoint,
    Slots,
    TokenBucket,
    check_gossip,
    is_public,
)

ALICE = Identity(b"\1" * 32)


def test_a_bucket_admits_its_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=2, burst=3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.take(10.5)
    assert not bucket.take(10.5)
    assert not bucket.take(10.0)  # a clock that goes back gives nothing
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_buckets_are_apart_and_bounded_in_number() -> None:
    buckets = Buckets(rate=1, burst=1, size=2)
    assert buckets.take("a", 0)
    assert buckets.take("b", 0)
    assert not buckets.take("a", 0)
    assert buckets.take("c", 0)  # b is the longest unused
    assert buckets.take("b", 0)
    assert not buckets.take("c", 0)


def test_slots_are_bounded_by_address_network_and_in_total() -> None:
    slots = Slots(total=6, per_address=2, per_network=3)
    assert [slots.take("198.51.100.1") for _ in range(3)] == [True, True, False]
    assert [slots.take("198.51.100.2") for _ in range(2)] == [True, False]
    assert [slots.take(f"203.0.{n}.1") for n in range(4)] == [True, True, True, False]
    slots.release("198.51.100.1")
    assert slots.take("198.51.100.1")
    assert not slots.take("192.0.2.1")


def test_one_ipv6_customer_is_one_address() -> None:
    slots = Slots(total=10, per_address=1, per_network=5)
    assert slots.take("2001:db8:1:1::1")
    assert not slots.take("2001:db8:1:1::2")
    assert slots.take("2001:db8:1:2::1")


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.1.1", False),
        ("172.16.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:192.168.1.1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("localhost", False),
    ],
)
def test_only_public_addresses_are_dialled_on_a_peers_word(host: str, public: bool) -> None:
    assert is_public(host) is public
    kind = "ip6" if ":" in host else "ip4" if host[0].isdigit() else "dns4"
    endpoint = Endpoint.parse(f"/{kind}/{host}/tcp/4001/p2p/{ALICE.peer_id}")
    assert endpoint.dialable(lan=False) is public
    assert endpoint.dialable(lan=True)
    assert endpoint.address == ALICE.address


def test_names_are_not_dialled_on_a_peers_word() -> None:
    endpoint = Endpoint.parse(f"/dns4/example.org/tcp/4001/p2p/{ALICE.peer_id}")
    assert not endpoint.dialable(lan=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/ip4/1.1.1.1/tcp/4001",
        f"/ip4/1.1.1.1/udp/4001/p2p/{ALICE.peer_id}",
        f"/ip4/1.1.1.1/tcp/0/p2p/{ALICE.peer_id}",
        f"/ip4/1.1.1.1/tcp/65536/p2p/{ALICE.peer_id}",
        f"/ip4/1.1.1.1/tcp/x/p2p/{ALICE.peer_id}",
        f"/ip4/1.1.1/tcp/4001/p2p/{ALICE.peer_id}",
        f"/ip4/::1/tcp/4001/p2p/{ALICE.peer_id}",
        f"/unix/1.1.1.1/tcp/4001/p2p/{ALICE.peer_id}",
        "/ip4/1.1.1.1/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        f"/ip4/1.1.1.1/tcp/4001/p2p/{ALICE.peer_id}/p2p-circuit",
    ],
)
def test_a_malformed_multiaddr_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"multiaddr|address"):
        Endpoint.parse(text)


def test_a_frame_too_large_for_gossip_is_refused() -> None:
    check_gossip(bytes(MAX_GOSSIP))
    with pytest.raises(ValueError, match="send a request, or a blob"):
        check_gossip(bytes(MAX_GOSSIP + 1))
