"""What the embedded chain takes into its pool, and in which order it tries it."""

from __future__ import annotations

import pytest
import rlp
from eth_account import Account

from meshd.ledger.devchain import pool as pool_module
from meshd.ledger.devchain.chain import CHAIN_ID
from meshd.ledger.devchain.errors import TransactionRefused
from meshd.ledger.devchain.pool import (
    MAX_NONCE_GAP,
    MAX_TRANSACTION_BYTES,
    Pool,
    Waiting,
    waiting_from_raw,
)
from tests.chain.conftest import ETHER, GWEI, Sender

RICH = 10**6 * ETHER
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def read(raw: bytes) -> Waiting:
    return waiting_from_raw(raw, CHAIN_ID)


def put(pool: Pool, raw: bytes, *, nonce: int = 0, balance: int = RICH) -> Waiting:
    waiting = read(raw)
    pool.check(waiting, nonce=nonce, balance=balance)
    pool.put(waiting)
    return waiting


def refusal(pool: Pool, raw: bytes, *, nonce: int = 0, balance: int = RICH) -> str:
    with pytest.raises(TransactionRefused) as refused:
        put(pool, raw, nonce=nonce, balance=balance)
    return str(refused.value)


# -- form --


def test_a_transaction_of_each_supported_type_is_read_with_its_sender(alice: Sender) -> None:
    raws = [
        alice.sign(),
        alice.sign(gasPrice=2 * GWEI),
        bytes(
            alice.account.sign_transaction(
                {
                    "type": 1,
                    "chainId": CHAIN_ID,
                    "nonce": 0,
                    "to": "0x" + "11" * 20,
                    "value": 0,
                    "gas": 30_000,
                    "gasPrice": GWEI,
                    "data": b"",
                    "accessList": [{"address": "0x" + "22" * 20, "storageKeys": []}],
                }
            ).raw_transaction
        ),
    ]
    assert {read(raw).sender for raw in raws} == {alice.address}


@pytest.mark.parametrize(
    "raw", [b"", b"\x02", b"\x02\xc0", b"\xc0", b"\xf8\x00", b"\xff" * 40, bytes(100)]
)
def test_bytes_that_are_no_transaction_are_refused(raw: bytes) -> None:
    with pytest.raises(TransactionRefused):
        read(raw)


def test_every_truncation_of_a_transaction_is_refused(alice: Sender) -> None:
    raw = alice.sign()
    for length in range(len(raw)):
        with pytest.raises(TransactionRefused):
            read(raw[:length])


@pytest.mark.parametrize("kind", [0, 3, 4, 5, 0x7F])
def test_a_transaction_type_without_support_is_refused(alice: Sender, kind: int) -> None:
    with pytest.raises(TransactionRefused, match="transaction type not supported"):
        read(bytes([kind]) + alice.sign()[1:])


@pytest.mark.parametrize("fees", [{}, {"gasPrice": GWEI}])
def test_a_transaction_for_another_chain_is_refused(alice: Sender, fees: dict[str, int]) -> None:
    with pytest.raises(TransactionRefused, match="invalid chain id for signer: have 1 want 31373"):
        read(alice.sign(chainId=1, **fees))


def test_a_transaction_without_replay_protection_is_refused() -> None:
    fields = {"nonce": 0, "to": "0x" + "11" * 20, "value": 0, "gas": 21_000, "gasPrice": GWEI}
    raw = bytes(Account.from_key(bytes([1]) * 32).sign_transaction(fields).raw_transaction)
    with pytest.raises(TransactionRefused, match="EIP-155"):
        read(raw)


def test_a_signature_with_a_high_s_is_refused(alice: Sender) -> None:
    raw = alice.sign()
    fields = rlp.decode(raw[1:])
    parity, s = fields[-3], int.from_bytes(fields[-1], "big")
    fields[-3] = b"" if parity else b"\x01"
    fields[-1] = (ORDER - s).to_bytes(32, "big").lstrip(b"\0")
    with pytest.raises(TransactionRefused, match="invalid transaction v, r, s values"):
        read(b"\x02" + rlp.encode(fields))


@pytest.mark.parametrize("wrong", [b"", b"\x01" * 33, b"\xff" * 32])
def test_a_signature_of_nobody_is_refused(alice: Sender, wrong: bytes) -> None:
    fields = rlp.decode(alice.sign()[1:])
    fields[-2] = wrong
    with pytest.raises(TransactionRefused):
        read(b"\x02" + rlp.encode(fields))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"gas": 30_000_001}, "exceeds block gas limit"),
        ({"gas": 20_999}, "intrinsic gas too low: have 20999, want 21000"),
        ({"gas": 21_000, "data": b"\x01"}, "intrinsic gas too low: have 21000, want 21040"),
        ({"maxPriorityFeePerGas": 11 * GWEI}, "max priority fee per gas higher than max fee"),
        ({"maxFeePerGas": 6, "maxPriorityFeePerGas": 0}, "transaction underpriced"),
        ({"to": None, "gas": 10**7, "data": bytes(49_153)}, "max initcode size exceeded"),
    ],
)
def test_a_transaction_that_can_never_be_valid_is_refused(
    alice: Sender, changed: dict[str, object], text: str
) -> None:
    with pytest.raises(TransactionRefused, match=text):
        read(alice.sign(**changed))


def test_a_transaction_that_is_too_long_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TransactionRefused, match="oversized data"):
        read(bytes(MAX_TRANSACTION_BYTES + 1))


# -- the sender's account --


def test_a_used_nonce_is_too_low(alice: Sender) -> None:
    text = refusal(Pool(), alice.sign(nonce=4), nonce=5)
    assert text == "nonce too low: next nonce 5, tx nonce 4"


def test_a_nonce_may_be_ahead_but_not_without_end(alice: Sender) -> None:
    pool = Pool()
    put(pool, alice.sign(nonce=5 + MAX_NONCE_GAP - 1), nonce=5)
    assert refusal(pool, alice.sign(nonce=5 + MAX_NONCE_GAP), nonce=5).startswith("nonce too high")


def test_the_next_nonce_counts_what_waits_without_a_gap(alice: Sender) -> None:
    pool = Pool()
    for nonce in (7, 8, 10):
        put(pool, alice.sign(nonce=nonce), nonce=7)
    assert pool.next_nonce(alice.address, 7) == 9
    assert pool.next_nonce(alice.address, 6) == 6


def test_the_balance_must_cover_gas_at_the_maximum_fee_and_the_value(alice: Sender) -> None:
    cost = 21_000 * 10 * GWEI + 1
    text = refusal(Pool(), alice.sign(nonce=0), balance=cost - 1)
    assert text.startswith("insufficient funds for gas * price + value")
    put(Pool(), alice.sign(nonce=0), balance=cost)


def test_the_balance_must_cover_everything_that_waits(alice: Sender) -> None:
    pool, cost = Pool(), 21_000 * 10 * GWEI + 1
    put(pool, alice.sign(nonce=0), balance=2 * cost - 1)
    text = refusal(pool, alice.sign(nonce=1), balance=2 * cost - 1)
    assert f"queued cost {cost}" in text
    put(pool, alice.sign(nonce=1), balance=2 * cost)


# -- replacement --


def test_the_same_transaction_again_is_already_known(alice: Sender) -> None:
    pool, raw = Pool(), alice.sign()
    put(pool, raw)
    assert refusal(pool, raw) == "already known"


@pytest.mark.parametrize(("max_fee", "tip"), [(109, 110), (110, 109), (200, 100)])
def test_a_replacement_that_does_not_raise_both_fees_by_a_tenth_is_underpriced(
    alice: Sender, max_fee: int, tip: int
) -> None:
    pool = Pool()
    put(pool, alice.sign(nonce=0, maxFeePerGas=100 * GWEI, maxPriorityFeePerGas=100))
    new = alice.sign(nonce=0, maxFeePerGas=max_fee * GWEI, maxPriorityFeePerGas=tip)
    assert refusal(pool, new) == "replacement transaction underpriced"


def test_a_replacement_takes_the_place_of_the_old_one(alice: Sender) -> None:
    pool = Pool()
    old = put(pool, alice.sign(nonce=0, maxFeePerGas=100 * GWEI, maxPriorityFeePerGas=100))
    new = put(pool, alice.sign(nonce=0, maxFeePerGas=110 * GWEI, maxPriorityFeePerGas=110))
    assert (pool.get(old.hash), pool.get(new.hash), len(pool)) == (None, new, 1)


def test_a_replacement_needs_no_balance_for_what_it_replaces(alice: Sender) -> None:
    pool = Pool()
    put(pool, alice.sign(nonce=0, maxFeePerGas=10 * GWEI))
    new = alice.sign(nonce=0, maxFeePerGas=12 * GWEI, maxPriorityFeePerGas=2 * GWEI)
    put(pool, new, balance=21_000 * 12 * GWEI + 1)


# -- bounds --


def test_a_full_pool_takes_replacements_only(
    alice: Sender, bob: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_WAITING", 1)
    pool = Pool()
    put(pool, alice.sign(nonce=0, maxFeePerGas=100 * GWEI))
    assert refusal(pool, bob.sign()) == "txpool is full"
    put(pool, alice.sign(nonce=0, maxFeePerGas=110 * GWEI, maxPriorityFeePerGas=2 * GWEI))


def test_the_pool_is_bounded_in_bytes_and_gets_them_back(
    alice: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool()
    first = put(pool, alice.sign(nonce=0))
    monkeypatch.setattr(pool_module, "MAX_WAITING_BYTES", len(first.raw) + 10)
    assert refusal(pool, alice.sign(nonce=1)) == "txpool is full"
    pool.drop(first.slot)
    put(pool, alice.sign(nonce=1))


# -- order --


def order(pool: Pool, base_fee: int = GWEI) -> list[tuple[str, int]]:
    candidates = pool.candidates(base_fee)
    found = []
    for waiting in candidates:
        found.append((waiting.sender.hex()[:6], waiting.nonce))
        candidates.advance(waiting)
    return found


def test_the_best_tip_comes_first_but_nonces_keep_their_order(alice: Sender, bob: Sender) -> None:
    pool = Pool()
    a, b = alice.address.hex()[:6], bob.address.hex()[:6]
    put(pool, alice.sign(nonce=1, maxPriorityFeePerGas=9 * GWEI))
    put(pool, alice.sign(nonce=0, maxPriorityFeePerGas=1 * GWEI))
    put(pool, bob.sign(nonce=0, maxPriorityFeePerGas=5 * GWEI))
    assert order(pool) == [(b, 0), (a, 0), (a, 1)]


def test_equal_tips_come_in_turn(alice: Sender, bob: Sender) -> None:
    pool = Pool()
    a, b = alice.address.hex()[:6], bob.address.hex()[:6]
    for nonce in (0, 1):
        put(pool, alice.sign(nonce=nonce))
        put(pool, bob.sign(nonce=nonce))
    assert order(pool) == [(a, 0), (b, 0), (a, 1), (b, 1)]


def test_what_cannot_pay_the_base_fee_waits_and_so_does_what_follows(
    alice: Sender, bob: Sender
) -> None:
    pool = Pool()
    put(pool, alice.sign(nonce=0, maxFeePerGas=2 * GWEI))
    put(pool, alice.sign(nonce=1, maxFeePerGas=9 * GWEI))
    put(pool, bob.sign(nonce=0, maxFeePerGas=9 * GWEI))
    assert order(pool, 3 * GWEI) == [(bob.address.hex()[:6], 0)]


def test_nothing_follows_a_gap(alice: Sender) -> None:
    pool = Pool()
    put(pool, alice.sign(nonce=0))
    put(pool, alice.sign(nonce=2))
    assert order(pool) == [(alice.address.hex()[:6], 0)]
