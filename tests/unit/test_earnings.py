"""What an account was paid: the chain's events, read once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from meshd.ledger.chain import Anchored, Block, Chain, ChainEvent, ChainUnavailable, Claimed
from meshd.node import earnings
from meshd.node.earnings import Payment, read_payments
from meshd.node.store import Store
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address

ALICE, BOB = Address(b"\x0a" * 20), Address(b"\x0b" * 20)
JOB, OTHER = b"\x01" * 32, b"\x02" * 32


def claimed(height: int, amount: int, account: Address = ALICE, job: bytes = JOB) -> Claimed:
    """Return a payment; the block has one transaction."""
    return Claimed(height, job, account, amount, height.to_bytes(32, "big"))


@dataclass
class PaidChain:
    """A chain that knows nothing but payments."""

    paid: list[ChainEvent]
    height: int = 100
    escrow: Address = field(default=Address(b"\x0e" * 20))
    asked: list[tuple[int, int]] = field(default_factory=list)
    fails_from: int | None = None

    @property
    def domain(self) -> Domain:
        return Domain("test", 7, self.escrow)

    async def head(self) -> Block:
        return Block(self.height, bytes(32), 0)

    async def events(self, from_height: int, to_height: int) -> Sequence[ChainEvent]:
        if self.fails_from is not None and to_height >= self.fails_from:
            raise ChainUnavailable("the RPC went away")
        self.asked.append((from_height, to_height))
        return [event for event in self.paid if from_height <= event.height <= to_height]


async def read(chain: PaidChain, store: Store, account: Address = ALICE) -> list[tuple[int, int]]:
    """Return (height, amount) of every payment."""
    payments = await read_payments(cast(Chain, chain), store, account)
    return [(payment.height, payment.amount) for payment in payments]


async def test_only_payments_to_the_account_are_returned_in_order() -> None:
    anchored = Anchored(3, JOB, 1, bytes(32), 5, False, bytes(32))
    chain = PaidChain([claimed(2, 10**30), anchored, claimed(5, 7, BOB), claimed(9, 1)])
    assert await read(chain, Store()) == [(2, 10**30), (9, 1)]


async def test_several_payments_in_one_transaction_are_one_for_each_job() -> None:
    chain = PaidChain([claimed(4, 2), claimed(4, 3), claimed(4, 7, job=OTHER)])
    payments = await read_payments(cast(Chain, chain), Store(), ALICE)
    tx = (4).to_bytes(32, "big")
    assert payments == [Payment(JOB, 5, 4, tx), Payment(OTHER, 7, 4, tx)]


async def test_blocks_that_were_read_are_asked_for_once_but_for_the_newest() -> None:
    chain, store = PaidChain([claimed(10, 1)], height=1000), Store()
    assert await read(chain, store) == [(10, 1)]
    chain.height, chain.asked = 1002, []
    chain.paid.append(claimed(1001, 2))
    assert await read(chain, store) == [(10, 1), (1001, 2)]
    assert chain.asked == [(1001 - earnings.AGAIN_BLOCKS, 1002)]


async def test_a_payment_that_a_reorganisation_took_back_is_forgotten() -> None:
    chain, store = PaidChain([claimed(990, 5)], height=1000), Store()
    assert await read(chain, store) == [(990, 5)]
    chain.paid = [claimed(991, 4)]
    assert await read(chain, store) == [(991, 4)]


async def test_an_outage_loses_nothing_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earnings, "RANGE_BLOCKS", 100)
    chain, store = PaidChain([claimed(10, 1), claimed(450, 2)], height=500), Store()
    chain.fails_from = 350
    with pytest.raises(ChainUnavailable):
        await read(chain, store)
    chain.fails_from, chain.asked = None, []
    assert await read(chain, store) == [(10, 1), (450, 2)]
    assert chain.asked[0][0] == 300 - earnings.AGAIN_BLOCKS


async def test_another_chain_or_account_has_books_of_its_own() -> None:
    store = Store()
    chain: Any = PaidChain([claimed(10, 1), claimed(11, 3, BOB)])
    assert await read(chain, store) == [(10, 1)]
    assert await read(chain, store, BOB) == [(11, 3)]
    elsewhere = PaidChain([claimed(20, 9)], escrow=Address(b"\x0f" * 20))
    assert await read(elsewhere, store) == [(20, 9)]
    assert await read(chain, store) == [(10, 1)]


async def test_a_chain_that_was_begun_afresh_is_read_from_its_beginning() -> None:
    store = Store()
    assert await read(PaidChain([claimed(900, 1)], height=1000), store) == [(900, 1)]
    assert await read(PaidChain([claimed(3, 2)], height=5), store) == [(3, 2)]
