"""The outbox: whatever crashes, lags or costs more, each intent lands exactly once."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
import trio
import trio.testing
from eth_account import Account
from eth_account.typed_transactions import TypedTransaction
from eth_hash.auto import keccak
from hexbytes import HexBytes

from meshd.ledger.chain import ChainError, ChainUnavailable, Outcome
from meshd.ledger.intents import InlineDatabase, Transaction
from meshd.ledger.outbox import (
    GWEI,
    MAX_GAS,
    MAX_IN_FLIGHT,
    TAKEN_BLOCKS,
    Fees,
    Mined,
    Outbox,
)
from meshd.node.store import Store
from meshd.p2p.identity import Address, Identity

T = TypeVar("T")

ALICE = Identity(b"\x0a" * 32)
BOB = Identity(b"\x0b" * 32)
GENESIS = b"\x6e" * 32
TARGET = Address(b"\x7a" * 20)


def pay(number: int = 0) -> list[Transaction]:
    """An intent of one transaction that says *number*."""
    return [Transaction(TARGET, bytes([number]), 50_000)]


class Crash(Exception):
    """The process dies here."""


class FakeChain:
    """A chain as the outbox sees it; blocks come when the test says so."""

    def __init__(self) -> None:
        self.blocks: list[list[bytes]] = [[]]
        self.raws: dict[bytes, bytes] = {}
        """Every transaction that ever came, by hash."""
        self.pool: dict[int, bytes] = {}
        """Waiting, by nonce."""
        self.broadcasts: list[bytes] = []
        self.base_fee = GWEI
        self.refusal: str | None = None
        self.estimate: int | None = 40_000
        self.is_down = False
        self.hidden: set[bytes] = set()
        """Mined transactions whose receipts the RPC does not have."""
        self.failing: set[bytes] = set()
        """Data of transactions that fail when they are mined."""

    # -- what the test does --

    def fields(self, tx: bytes) -> dict[str, Any]:
        return TypedTransaction.from_bytes(HexBytes(self.raws[tx])).as_dict()

    def mine(self) -> None:
        block = []
        for nonce in range(self.used, self.used + len(self.pool)):
            tx = self.pool.get(nonce)
            if tx is None or self.fields(tx)["maxFeePerGas"] < self.base_fee:
                break
            block.append(self.pool.pop(nonce))
        self.blocks.append(block)

    def reorganise(self, depth: int) -> None:
        """Replace the last blocks by as many empty ones, and forget what was in them."""
        self.blocks[-depth:] = [[] for _ in range(depth)]

    def take_nonce(self) -> None:
        """Mine a foreign transaction of the same account."""
        self.pool.clear()
        self.blocks.append([b"foreign" + bytes([len(self.blocks)])])

    @property
    def used(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def landed(self) -> list[int]:
        """What the mined transactions say, in order."""
        mined = [tx for block in self.blocks for tx in block if tx in self.raws]
        return [self.fields(tx)["data"][0] for tx in mined]

    # -- what the outbox asks --

    async def _answer(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise ChainUnavailable("down")

    async def height(self) -> int:
        await self._answer()
        return len(self.blocks) - 1

    async def nonce(self, sender: Address, height: int | None = None) -> int:
        await self._answer()
        upto = len(self.blocks) if height is None else height + 1
        return sum(map(len, self.blocks[:upto]))

    async def fees(self) -> Fees:
        await self._answer()
        return Fees(self.base_fee, GWEI)

    async def gas(self, sender: Address, transaction: Transaction) -> int | None:
        await self._answer()
        return self.estimate

    async def broadcast(self, raw: bytes) -> str | None:
        await self._answer()
        self.broadcasts.append(raw)
        if self.refusal is not None:
            return self.refusal
        tx = keccak(raw)
        self.raws[tx] = raw
        fields = self.fields(tx)
        if fields["nonce"] < self.used:
            return "nonce too low: next nonce 9, tx nonce 3"
        old = self.pool.get(fields["nonce"])
        if old == tx:
            return "already known"
        if old is not None and any(
            fields[fee] * 100 < self.fields(old)[fee] * 110
            for fee in ("maxFeePerGas", "maxPriorityFeePerGas")
        ):
            return "replacement transaction underpriced"
        self.pool[fields["nonce"]] = tx
        return None

    async def mined(self, tx: bytes) -> Mined | None:
        await self._answer()
        for height, block in enumerate(self.blocks):
            if tx in block and tx not in self.hidden:
                return Mined(height, self.fields(tx)["data"] not in self.failing)
        return None

    async def why_failed(self, sender: Address, transaction: Transaction, height: int) -> str:
        await self._answer()
        return f"NotAllowed at {height}"


class Disk:
    """A node's database that the process can die at."""

    def __init__(self) -> None:
        self.store = Store(None)
        self.crash_before: int | None = None
        self.crash_after: int | None = None
        self._writes = 0

    async def write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        self._writes += 1
        if self._writes == self.crash_before:
            raise Crash
        result = await self.store.write(step)
        if self._writes == self.crash_after:
            raise Crash
        return result

    async def read(self, step: Callable[[sqlite3.Connection], T]) -> T:
        return await self.store.read(step)

    def revive(self) -> None:
        """The process is started again."""
        self._writes, self.crash_before, self.crash_after = 0, None, None

    async def states(self) -> list[str]:
        return [row[0] for row in await self.store.rows("select state from intent order by id")]

    async def attempts(self) -> list[tuple[int, int, int]]:
        rows = await self.store.rows("select nonce, max_fee, tip from attempt order by rowid")
        return [(nonce, int(max_fee), int(tip)) for nonce, max_fee, tip in rows]


@pytest.fixture
def chain() -> FakeChain:
    return FakeChain()


@pytest.fixture
def disk() -> Disk:
    return Disk()


def outbox(chain: FakeChain, disk: Disk | InlineDatabase, **options: Any) -> Outbox:
    chosen = {"identity": ALICE, "chain_id": 1, "genesis": GENESIS} | options
    return Outbox(disk, chain, **chosen)


async def step(box: Outbox, chain: FakeChain) -> None:
    await box.step(await chain.height())


async def outcome(box: Outbox, key: str) -> Outcome:
    """What became of an intent that is final by now."""
    with trio.fail_after(5):
        return await box.wait(key)


async def live(box: Outbox, chain: FakeChain, blocks: int) -> None:
    """Let the outbox see so many more blocks."""
    await step(box, chain)
    for _ in range(blocks):
        chain.mine()
        await step(box, chain)


# ---- the ordinary course ----------------------------------------------------------------


async def test_an_intent_is_signed_sent_mined_and_final(chain: FakeChain, disk: Disk) -> None:
    box = outbox(chain, disk, confirmations=2)
    await box.put("rent", pay(7))
    assert await disk.states() == ["new"]
    seen = []
    await step(box, chain)
    seen += await disk.states()
    for _ in range(3):
        chain.mine()
        await step(box, chain)
        seen += await disk.states()
    assert seen == ["sent", "mined", "mined", "final"]
    assert chain.landed == [7]
    assert await outcome(box, "rent") == Outcome(chain.blocks[1][0], 1, None)


async def test_bytes_and_nonce_are_on_disk_before_they_go_out(
    chain: FakeChain, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    broadcast = chain.broadcast

    async def check_and_broadcast(raw: bytes) -> str | None:
        assert await disk.store.rows("select nonce, state from intent") == [(0, "signed")]
        assert await disk.store.rows("select raw from attempt") == [(raw,)]
        return await broadcast(raw)

    monkeypatch.setattr(chain, "broadcast", check_and_broadcast)
    box = outbox(chain, disk)
    await box.put("rent", pay())
    await step(box, chain)
    assert len(chain.broadcasts) == 1


async def test_a_transaction_says_what_was_put(chain: FakeChain, disk: Disk) -> None:
    box = outbox(chain, disk)
    await box.put("rent", [Transaction(TARGET, b"\x01\x02", 99_000, value=5)])
    await box.put("new contract", [Transaction(None, b"\x60", 99_000)])
    await live(box, chain, 1)
    first, second = (chain.fields(tx) for tx in chain.blocks[1])
    assert (bytes(first["to"]), bytes(first["data"]), first["value"]) == (TARGET, b"\x01\x02", 5)
    assert (first["chainId"], first["nonce"], second["nonce"]) == (1, 0, 1)
    assert bytes(second["to"]) == b""
    raw = chain.raws[chain.blocks[1][0]]
    assert bytes.fromhex(Account.recover_transaction(raw)[2:]) == ALICE.address


@pytest.mark.parametrize(("estimate", "gas"), [(40_000, 70_000), (None, 50_000), (10**8, MAX_GAS)])
async def test_gas_is_the_estimate_with_a_margin_or_what_it_needs_at_worst(
    chain: FakeChain, disk: Disk, estimate: int | None, gas: int
) -> None:
    chain.estimate = estimate
    box = outbox(chain, disk)
    await box.put("rent", pay())
    await live(box, chain, 1)
    assert chain.fields(chain.blocks[1][0])["gas"] == gas


async def test_a_failed_transaction_is_failed_with_the_contracts_error(
    chain: FakeChain, disk: Disk
) -> None:
    chain.failing = {b"\x03"}
    box = outbox(chain, disk)
    await box.put("rent", pay(3))
    await live(box, chain, 2)
    assert (await outcome(box, "rent")).error == "NotAllowed at 1"
    assert await disk.states() == ["failed"]


async def test_the_transactions_of_one_key_go_out_in_order_and_the_last_one_counts(
    chain: FakeChain, disk: Disk
) -> None:
    chain.failing = {b"\x01"}
    box = outbox(chain, disk)
    await box.put("deposit", [*pay(1), *pay(2)])
    await box.put("other", pay(3))
    await live(box, chain, 2)
    assert chain.landed == [1, 2, 3]
    assert (await outcome(box, "deposit")).error is None


async def test_only_so_many_are_in_flight_and_all_of_them_arrive_in_order(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk)
    count = MAX_IN_FLIGHT + 5
    for number in range(count):
        await box.put(f"{number}", pay(number))
    await step(box, chain)
    assert len(chain.pool) == MAX_IN_FLIGHT
    await live(box, chain, 6)
    assert chain.landed == list(range(count))
    assert set(await disk.states()) == {"final"}


# ---- keys -------------------------------------------------------------------------------


async def test_the_same_key_is_a_no_op_whatever_it_says(chain: FakeChain, disk: Disk) -> None:
    box = outbox(chain, disk)
    await box.put("rent", pay(1))
    await box.put("rent", pay(2))
    await live(box, chain, 2)
    await box.put("rent", pay(3))
    await live(box, chain, 2)
    assert chain.landed == [1]


async def test_another_account_and_another_chain_are_apart(chain: FakeChain, disk: Disk) -> None:
    first = outbox(chain, disk)
    await first.put("rent", pay(1))
    await live(first, chain, 2)
    for options in ({"identity": BOB}, {"genesis": b"\x01" * 32}):
        other_chain = FakeChain()
        other = outbox(other_chain, disk, **options)
        with pytest.raises(ChainError, match="rent"):
            await other.wait("rent")
        await other.put("rent", pay(2))
        await live(other, other_chain, 2)
        assert other_chain.landed == [2]
    assert chain.landed == [1]


async def test_waiting_for_what_was_never_put_is_an_error(chain: FakeChain, disk: Disk) -> None:
    with pytest.raises(ChainError, match=r"'rent'.*call send"):
        await outbox(chain, disk).wait("rent")


# ---- crashes ----------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["crash_before", "crash_after"])
@pytest.mark.parametrize("write", range(1, 7))
async def test_a_crash_at_any_write_leaves_every_intent_to_land_exactly_once(
    chain: FakeChain, disk: Disk, moment: str, write: int
) -> None:
    box = outbox(chain, disk)
    for number in range(3):
        await box.put(f"{number}", pay(number))
    disk.revive()
    setattr(disk, moment, write)
    with pytest.raises(Crash):
        await live(outbox(chain, disk), chain, 5)
    disk.revive()
    await live(outbox(chain, disk), chain, 5)
    assert chain.landed == [0, 1, 2]
    assert set(await disk.states()) == {"final"}


@pytest.mark.parametrize("has_arrived", [False, True])
async def test_a_crash_on_the_wire_sends_the_same_bytes_again(
    chain: FakeChain, disk: Disk, monkeypatch: pytest.MonkeyPatch, has_arrived: bool
) -> None:
    broadcast = chain.broadcast

    async def crash(raw: bytes) -> str | None:
        chain.broadcasts.append(raw)
        if has_arrived:
            await broadcast(raw)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(chain, "broadcast", crash)
        box = outbox(chain, disk)
        await box.put("rent", pay(1))
        with pytest.raises(Crash):
            await step(box, chain)
    await live(outbox(chain, disk), chain, 2)
    assert len(set(chain.broadcasts)) == 1
    assert chain.landed == [1]


async def test_twenty_intents_survive_a_crash_at_each_of_many_points(
    chain: FakeChain, disk: Disk
) -> None:
    for number in range(20):
        disk.revive()
        await outbox(chain, disk).put(f"{number}", pay(number))
        disk.revive()
        disk.crash_after = number % 5 + 1
        with pytest.raises(Crash):
            await live(outbox(chain, disk), chain, 5)
    disk.revive()
    await live(outbox(chain, disk), chain, 5)
    assert Counter(chain.landed) == Counter(range(20))


async def test_after_a_restart_everything_sent_is_sent_once_more(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk)
    await box.put("rent", pay(1))
    await step(box, chain)
    chain.pool.clear()  # the node forgot it too
    restarted = outbox(chain, disk)
    await step(restarted, chain)
    await step(restarted, chain)
    assert len(chain.broadcasts) == 2
    assert len(set(chain.broadcasts)) == 1
    await live(restarted, chain, 2)
    assert chain.landed == [1]


async def test_two_outboxes_on_one_database_do_not_double_anything(
    chain: FakeChain, disk: Disk
) -> None:
    boxes = [outbox(chain, disk) for _ in range(2)]
    for number in range(6):
        await boxes[number % 2].put(f"{number}", pay(number))
        await boxes[1 - number % 2].put(f"{number}", pay(number))
    for _ in range(8):
        async with trio.open_nursery() as nursery:
            for box in boxes:
                nursery.start_soon(step, box, chain)
        chain.mine()
    assert chain.landed == list(range(6))
    assert set(await disk.states()) == {"final"}


async def test_intents_outlive_the_process_in_a_file(chain: FakeChain, tmp_path: Path) -> None:
    store = Store(tmp_path / "meshd.sqlite3")
    await outbox(chain, store).put("rent", pay(1))
    store.close()
    store = Store(tmp_path / "meshd.sqlite3")
    await live(outbox(chain, store), chain, 2)
    store.close()
    assert chain.landed == [1]


# ---- fees -------------------------------------------------------------------------------


async def test_what_is_not_mined_is_raised_by_an_eighth_in_both_fees_with_the_same_nonce(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk, bump_blocks=2)
    await box.put("rent", pay(1))
    await step(box, chain)
    for _ in range(5):
        chain.blocks.append([])  # the miners pass it over
        await step(box, chain)
    attempts = await disk.attempts()
    assert len(attempts) == 3
    assert {nonce for nonce, _, _ in attempts} == {0}
    for (_, fee, tip), (_, raised_fee, raised_tip) in itertools.pairwise(attempts):
        assert raised_fee * 8 >= fee * 9
        assert raised_tip * 8 >= tip * 9
    await live(box, chain, 2)
    assert chain.landed == [1]


async def test_a_base_fee_fifty_times_as_high_is_followed_at_once(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk, bump_blocks=2)
    for number in range(3):
        await box.put(f"{number}", pay(number))
    await step(box, chain)
    chain.base_fee *= 50
    await live(box, chain, 4)
    assert chain.landed == [0, 1, 2]
    assert all(fee <= 101 * GWEI for _, fee, _ in await disk.attempts())


async def test_what_waits_only_for_an_earlier_one_is_not_raised(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk, bump_blocks=1)
    for number in range(2):
        await box.put(f"{number}", pay(number))
    await step(box, chain)
    chain.blocks.append([])
    await step(box, chain)
    assert Counter(nonce for nonce, _, _ in await disk.attempts()) == {0: 2, 1: 1}


async def test_no_fee_goes_over_the_cap(chain: FakeChain, disk: Disk) -> None:
    box = outbox(chain, disk, bump_blocks=1, fee_cap=4 * GWEI)
    await box.put("rent", pay(1))
    await step(box, chain)
    chain.base_fee = 10 * GWEI
    with structlog.testing.capture_logs() as logs:
        await live(box, chain, 8)
    assert "outbox.fees_above_cap" in [entry["event"] for entry in logs]
    assert max(fee for _, fee, _ in await disk.attempts()) <= 4 * GWEI
    assert len(chain.broadcasts) > 3  # the node is reminded of it
    chain.base_fee = GWEI
    await live(box, chain, 2)
    assert chain.landed == [1]


async def test_nothing_is_signed_while_the_base_fee_is_over_the_cap(
    chain: FakeChain, disk: Disk
) -> None:
    chain.base_fee = 10 * GWEI
    box = outbox(chain, disk, fee_cap=10 * GWEI)
    await box.put("rent", pay(1))
    await live(box, chain, 3)
    assert await disk.states() == ["new"]
    chain.base_fee = GWEI
    await live(box, chain, 2)
    assert chain.landed == [1]


async def test_the_first_attempt_counts_even_if_a_later_one_was_sent(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk, bump_blocks=1)
    await box.put("rent", pay(1))
    await step(box, chain)
    (first,) = chain.pool.values()
    chain.blocks.append([])
    await step(box, chain)
    assert chain.pool[0] != first
    chain.pool[0] = first
    await live(box, chain, 2)
    assert (await outcome(box, "rent")).tx == first


# ---- refusals, outages, reorganisations --------------------------------------------------


async def test_a_refusal_is_recorded_logged_once_and_tried_again(
    chain: FakeChain, disk: Disk
) -> None:
    chain.refusal = "insufficient funds for gas * price + value"
    box = outbox(chain, disk)
    await box.put("rent", pay(1))
    with structlog.testing.capture_logs() as logs:
        await live(box, chain, 3)
    assert [entry["reason"] for entry in logs] == [chain.refusal]
    assert await disk.store.rows("select state, error from intent") == [("signed", chain.refusal)]
    chain.refusal = None
    await live(box, chain, 2)
    assert chain.landed == [1]
    assert await disk.store.rows("select error from intent") == [(None,)]


@pytest.mark.parametrize(
    "refusal", ["already known", "Nonce too low: x", "replacement transaction underpriced"]
)
async def test_some_refusals_are_none(chain: FakeChain, disk: Disk, refusal: str) -> None:
    chain.refusal = refusal
    box = outbox(chain, disk)
    await box.put("rent", pay(1))
    await step(box, chain)
    assert await disk.store.rows("select state, error from intent") == [("sent", None)]


async def test_an_outage_is_waited_out(
    chain: FakeChain, disk: Disk, autojump_clock: trio.testing.MockClock
) -> None:
    chain.is_down = True
    async with running(chain, disk) as box:
        await box.put("rent", pay(1))
        await trio.sleep(30)
        chain.is_down = False
        assert (await outcome(box, "rent")).error is None
    assert chain.landed == [1]


async def test_what_a_reorganisation_undoes_is_sent_again(chain: FakeChain, disk: Disk) -> None:
    box = outbox(chain, disk, confirmations=3)
    await box.put("rent", pay(1))
    await live(box, chain, 2)
    assert await disk.states() == ["mined"]
    chain.reorganise(2)
    await step(box, chain)
    assert await disk.states() == ["sent"]
    await live(box, chain, 4)
    assert chain.landed == [1]
    assert (await outcome(box, "rent")).height == 3
    assert len(set(chain.broadcasts)) == 1


async def test_a_nonce_that_somebody_else_used_is_given_up_after_a_long_time(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk)
    await box.put("rent", pay(1))
    await step(box, chain)
    chain.take_nonce()
    await live(box, chain, TAKEN_BLOCKS)
    assert [nonce for nonce, _, _ in await disk.attempts()] == [0]
    await live(box, chain, 4)
    assert [nonce for nonce, _, _ in await disk.attempts()] == [0, 1]
    assert chain.landed == [1]
    assert await disk.states() == ["final"]


async def test_a_receipt_that_comes_late_is_no_reason_to_send_twice(
    chain: FakeChain, disk: Disk
) -> None:
    box = outbox(chain, disk)
    await box.put("rent", pay(1))
    await step(box, chain)
    (tx,) = chain.pool.values()
    chain.hidden.add(tx)
    await live(box, chain, TAKEN_BLOCKS)
    chain.hidden.clear()
    await live(box, chain, TAKEN_BLOCKS)
    assert chain.landed == [1]
    assert len(await disk.attempts()) == 1
    assert await disk.states() == ["final"]


async def test_a_nonce_that_a_lost_database_used_is_not_used_again(chain: FakeChain) -> None:
    lost, found = Disk(), Disk()
    box = outbox(chain, lost)
    await box.put("one", pay(1))
    await live(box, chain, 2)
    box = outbox(chain, found)
    await box.put("two", pay(2))
    await live(box, chain, 2)
    assert chain.landed == [1, 2]


# ---- as a service ------------------------------------------------------------------------


@asynccontextmanager
async def running(
    chain: FakeChain, disk: Disk | InlineDatabase, **options: Any
) -> AsyncIterator[Outbox]:
    """An outbox that runs, on a chain with a block every second."""

    async def make_blocks() -> None:
        while True:
            await trio.sleep(1)
            chain.mine()

    box = outbox(chain, disk, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_blocks)
        nursery.start_soon(box.run)
        yield box
        nursery.cancel_scope.cancel()


async def test_the_service_sends_what_is_put_while_it_runs(
    chain: FakeChain, autojump_clock: trio.testing.MockClock
) -> None:
    database = InlineDatabase()
    async with running(chain, database, confirmations=2) as box:
        await trio.sleep(10)
        await box.put("rent", pay(1))
        started = trio.current_time()
        outcome = await box.wait("rent")
        assert outcome.error is None
        assert trio.current_time() - started < 4
        assert (await box.wait("rent")) == outcome
    database.close()


async def test_an_idle_service_asks_nothing_of_the_chain(
    chain: FakeChain, disk: Disk, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(chain, disk) as box:
        await box.put("rent", pay(1))
        await box.wait("rent")
        await trio.sleep(1)
        chain.is_down = True
        with structlog.testing.capture_logs() as logs:
            await trio.sleep(100)
        assert logs == []


async def test_waiting_works_while_another_process_does_the_sending(
    chain: FakeChain, disk: Disk, autojump_clock: trio.testing.MockClock
) -> None:
    waiting = outbox(chain, disk)
    async with running(chain, disk) as box:
        await box.put("rent", pay(1))
        assert (await waiting.wait("rent")).error is None
