"""Amounts and quantities: exact both ways, and nothing that could be meant otherwise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.config.amounts import ONE_MCC, cost, format_mcc, parse_mcc
from meshd.config.errors import QuantityError
from meshd.config.quantities import (
    format_account,
    format_duration,
    format_share,
    format_size,
    is_loopback,
    parse_account,
    parse_duration,
    parse_multiaddr,
    parse_share,
    parse_size,
)

PEER = "16Uiu2HAm9QQ2QVGgYw3uqVeuFjJmkWK2Ld9m4pWn4wZ7k2TzCzqA"


@given(st.integers(min_value=0, max_value=2**256 - 1))
def test_every_amount_survives_writing_and_reading(amount: int) -> None:
    assert parse_mcc(format_mcc(amount)) == amount


def test_amounts_read_as_people_write_them() -> None:
    assert parse_mcc("1.5") == 15 * ONE_MCC // 10
    assert parse_mcc("0.000000000000000001") == 1
    assert parse_mcc("007") == 7 * ONE_MCC
    assert parse_mcc("1.5000000000000000000000") == parse_mcc("1.5")
    assert format_mcc(-ONE_MCC // 2) == "-0.5"
    assert format_mcc(0) == "0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1.",
        ".5",
        "-1",
        "+1",
        "1e3",
        "1,5",
        " 1",
        "1 ",
        "1_000",
        "0x10",
        "٣",
        "nan",
        "1.2.3",
    ],
)
def test_an_amount_that_is_not_plain_digits_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(QuantityError, match="write digits like"):
        parse_mcc(text)


def test_an_amount_finer_than_the_smallest_unit_is_refused_not_rounded() -> None:
    with pytest.raises(QuantityError, match="more than 18 decimals"):
        parse_mcc("0.0000000000000000001")


def test_an_amount_beyond_256_bits_is_refused() -> None:
    with pytest.raises(QuantityError, match="256 bits"):
        parse_mcc("9" * 60)


def test_a_cost_is_rounded_up_once() -> None:
    assert cost(10**9, 7) == 7
    assert cost(1, 1) == 1
    assert cost(10**9 + 1, 7) == 8
    assert cost(0, 7) == 0


@given(st.integers(min_value=0, max_value=10**9))
def test_every_duration_survives_writing_and_reading(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(min_value=0, max_value=1_000_000))
def test_every_share_survives_writing_and_reading(share: int) -> None:
    assert parse_share(format_share(share)) == share


@given(st.integers(min_value=0, max_value=2**49))
def test_every_size_survives_writing_and_reading(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.binary(min_size=20, max_size=20))
def test_every_account_survives_writing_and_reading(account: bytes) -> None:
    assert parse_account(format_account(account)) == account


def test_accounts_carry_the_checksum_of_eip_55() -> None:
    text = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # an example of EIP-55
    assert format_account(parse_account(text)) == text
    assert parse_account(text.lower()) == parse_account(text)
    with pytest.raises(QuantityError, match="mistyped"):
        parse_account(text.replace("5aA", "5AA"))


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_size, "2GB"),
        (parse_size, "-1"),
        (parse_size, "1.5GiB"),
        (parse_duration, ""),
        (parse_duration, "2"),
        (parse_duration, "1m1h"),
        (parse_duration, "-1h"),
        (parse_share, "1.5"),
        (parse_share, "2"),
        (parse_share, "10%"),
        (parse_share, "0.1234567"),
        (parse_account, "5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"),
        (parse_account, "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAe"),
    ],
)
def test_malformed_quantities_are_refused(parse, text) -> None:
    with pytest.raises(QuantityError):
        parse(text)


@pytest.mark.parametrize(
    "text", ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/4001", "/dns4/node.example.org/tcp/443"]
)
def test_tcp_multiaddrs_are_understood(text: str) -> None:
    assert parse_multiaddr(text, needs_peer=False) == text
    assert parse_multiaddr(f"{text}/p2p/{PEER}", needs_peer=True)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:4001",
        "/ip4/127.0.0.1/udp/4001",
        "/ip4/256.0.0.1/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/x",
        "/dns/-bad-/tcp/1",
        f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}",
        "",
    ],
)
def test_other_multiaddrs_are_refused(text: str) -> None:
    with pytest.raises(QuantityError):
        parse_multiaddr(text, needs_peer=False)


def test_a_bootstrap_peer_needs_its_peer_id() -> None:
    with pytest.raises(QuantityError, match="/p2p/PEER"):
        parse_multiaddr("/ip4/127.0.0.1/tcp/1", needs_peer=True)
    with pytest.raises(QuantityError, match="not a PeerId"):
        parse_multiaddr("/ip4/127.0.0.1/tcp/1/p2p/0OIl", needs_peer=True)


def test_only_loopback_addresses_count_as_this_machine() -> None:
    assert is_loopback("/ip4/127.0.0.2/tcp/1")
    assert is_loopback("/ip6/::1/tcp/1")
    assert not is_loopback("/ip4/0.0.0.0/tcp/1")
    assert not is_loopback("/dns4/localhost/tcp/1")
