"""The embedded chain's blocks: what enters them, what survives, and what time they tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from eth.abc import SignedTransactionAPI
from eth_hash.auto import keccak

from meshd.ledger.devchain import store as store_module
from meshd.ledger.devchain.chain import CHAIN_ID, Devchain, Genesis
from meshd.ledger.devchain.errors import ChainFileError
from meshd.ledger.devchain.execution import BlockBuilder
from meshd.ledger.devchain.pool import MIN_MAX_FEE, waiting_from_raw
from meshd.ledger.devchain.store import GAS_LIMIT, Store
from tests.chain.conftest import GWEI, START, Clock, Rpc, Sender

NOBODY_IN_PARTICULAR = bytes([0x11]) * 20
Open = Callable[[], Devchain]


async def test_a_block_holds_many_transactions_of_several_senders(
    chain: Devchain, alice: Sender, bob: Sender
) -> None:
    hashes = [chain.submit(sender.sign()) for _ in range(30) for sender in (alice, bob)]
    header = await chain.produce_block()
    mined = chain.store.mined_in(1)
    assert {transaction.hash for transaction in mined} == set(hashes)
    assert [transaction.position for transaction in mined] == list(range(60))
    assert header.gas_used == 60 * 21_000 == mined[-1].cumulative_gas_used
    assert len(chain.pool) == 0
    accounts = chain.accounts(header)
    assert accounts.balance(NOBODY_IN_PARTICULAR) == 60
    assert (accounts.nonce(alice.address), accounts.nonce(bob.address)) == (30, 30)


async def test_transactions_sent_out_of_order_are_mined_in_the_order_of_their_nonces(
    chain: Devchain, alice: Sender
) -> None:
    for nonce in (3, 1, 0, 2):
        chain.submit(alice.sign(nonce=nonce))
    await chain.produce_block()
    assert [chain.store.mined(m.hash).position for m in chain.store.mined_in(1)] == [0, 1, 2, 3]
    assert chain.accounts(chain.head).nonce(alice.address) == 4


async def test_a_transaction_after_a_gap_waits_until_the_gap_is_filled(
    chain: Devchain, alice: Sender
) -> None:
    late = chain.submit(alice.sign(nonce=1))
    await chain.produce_block()
    assert chain.pool.get(late) is not None
    chain.submit(alice.sign(nonce=0))
    await chain.produce_block()
    assert chain.store.mined(late) is not None


async def test_what_does_not_fit_into_a_block_comes_into_the_next(
    chain: Devchain, alice: Sender, bob: Sender
) -> None:
    for sender in (alice, bob):
        chain.submit(sender.sign(gas=GAS_LIMIT))
    await chain.produce_block()
    await chain.produce_block()
    assert [len(chain.store.mined_in(number)) for number in (1, 2)] == [1, 1]


async def test_a_block_stops_when_its_time_for_execution_is_over_but_never_empty(
    chain: Devchain, alice: Sender
) -> None:
    for _ in range(3):
        chain.submit(alice.sign())
    for number in (1, 2, 3):
        await chain.produce_block(budget=0)
        assert len(chain.store.mined_in(number)) == 1


async def test_a_transaction_that_cannot_be_applied_is_dropped_and_the_reason_logged(
    open_chain: Open, bob: Sender, carol: Sender
) -> None:
    unpaid = keep_waiting(open_chain(), carol.sign())  # carol has no coin
    chain = open_chain()
    paid = chain.submit(bob.sign())
    with structlog.testing.capture_logs() as logs:
        await chain.produce_block()
    assert [entry["event"] for entry in logs] == ["devchain.transaction_dropped"]
    assert logs[0]["transaction"] == "0x" + unpaid.hex()
    assert "cannot afford" in logs[0]["reason"]
    assert chain.store.mined(paid) is not None
    assert len(open_chain().pool) == 0


async def test_a_waiting_transaction_that_the_rules_refuse_by_now_is_dropped_at_the_start(
    open_chain: Open, alice: Sender
) -> None:
    chain = open_chain()
    foreign = alice.sign(nonce=0, chainId=5)
    kept = chain.submit(alice.sign(nonce=0))
    with chain.store.transaction():
        chain.store.put_pending(keccak(foreign), alice.address, 1, foreign)
    with structlog.testing.capture_logs() as logs:
        chain = open_chain()
    assert [entry["reason"][:16] for entry in logs] == ["invalid chain id"]
    assert (len(chain.pool), chain.pool.get(kept) is not None) == (1, True)
    assert len(chain.store.pending()) == 1


async def test_a_transaction_that_breaks_the_machine_is_dropped_and_the_block_built_anew(
    chain: Devchain, alice: Sender, bob: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [chain.submit(sender.sign()) for sender in (alice, bob)]
    apply = BlockBuilder.apply

    def fragile_apply(builder: BlockBuilder, transaction: SignedTransactionAPI) -> None:
        apply(builder, transaction)
        if transaction.hash == hashes[1]:
            raise RecursionError("too deep")

    monkeypatch.setattr(BlockBuilder, "apply", fragile_apply)
    with structlog.testing.capture_logs() as logs:
        await chain.produce_block()
    assert logs[0]["reason"] == "RecursionError('too deep')"
    assert [mined.hash for mined in chain.store.mined_in(1)] == hashes[:1]
    assert chain.accounts(chain.head).nonce(bob.address) == 0
    assert len(chain.pool) == 0


async def test_a_failing_call_is_mined_with_status_0_and_pays_for_its_gas(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "echo_revert", clock)
    before = chain.accounts(chain.head).balance(alice.address)
    failed = chain.submit(alice.call(contract, b"no"))
    await chain.produce_block()
    mined = chain.store.mined(failed)
    assert mined is not None
    assert mined.status == 0
    assert chain.accounts(chain.head).balance(alice.address) < before


async def test_an_endless_loop_ends_with_its_gas(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "loop", clock)
    looping = chain.submit(alice.call(contract, b"", gas=60_000))
    await chain.produce_block()
    mined = chain.store.mined(looping)
    assert mined is not None
    assert (mined.status, mined.gas_used) == (0, 60_000)


async def test_the_deepest_recursion_that_gas_buys_is_survived(
    chain: Devchain, rpc: Rpc, alice: Sender, clock: Clock
) -> None:
    contract = await rpc.deploy(alice, "recurse", clock)
    deep = chain.submit(alice.call(contract, b"", gas=GAS_LIMIT))
    await chain.produce_block()
    mined = chain.store.mined(deep)
    assert mined is not None
    assert mined.status == 1


# -- time and fees --


async def test_timestamps_are_those_of_the_clock_and_always_increase(
    chain: Devchain, clock: Clock
) -> None:
    times = []
    for now in (START + 0.9, START + 1.2, START + 1.3, START + 50.0):
        clock.now = now
        times.append((await chain.produce_block()).timestamp - START)
    assert times == [1, 2, 3, 50]


async def test_the_chain_says_how_long_to_wait_so_that_no_block_is_over_a_second_ahead(
    chain: Devchain, clock: Clock
) -> None:
    clock.now = START + 0.25
    await chain.produce_block()  # timestamp 1
    assert chain.seconds_too_early() == pytest.approx(0.75)
    clock.now = START + 1.0
    assert chain.seconds_too_early() == 0.0
    header = await chain.produce_block()
    assert header.timestamp - clock.now <= 1.0


async def test_every_block_has_fresh_randomness(chain: Devchain) -> None:
    seen = {(await chain.produce_block()).mix_hash for _ in range(5)}
    assert len(seen) == 5
    assert bytes(32) not in seen


async def test_the_base_fee_follows_demand(chain: Devchain, alice: Sender) -> None:
    fees = [(await chain.produce_block()).base_fee_per_gas for _ in range(3)]
    assert fees == [875_000_000, 765_625_000, 669_921_875]
    # INVALID uses all of its gas
    chain.submit(alice.sign(to=None, value=0, gas=GAS_LIMIT, data=b"\xfe"))
    full = await chain.produce_block()
    assert full.gas_used == GAS_LIMIT
    assert (await chain.produce_block()).base_fee_per_gas == full.base_fee_per_gas * 9 // 8


async def test_the_base_fee_of_an_idle_chain_stays_at_the_least_that_the_pool_asks(
    chain: Devchain, clock: Clock
) -> None:
    for _ in range(200):
        clock.now += 1
        await chain.produce_block()
    assert chain.head.base_fee_per_gas == MIN_MAX_FEE


# -- hashes and history --


async def test_every_block_names_its_parent_and_is_found_by_number_and_hash(
    chain: Devchain, alice: Sender, clock: Clock
) -> None:
    headers = [chain.head]
    for number in range(1, 12):
        clock.now += 1
        if number in (4, 5, 9):
            chain.submit(alice.sign())
        headers.append(await chain.produce_block())
    for parent, header in itertools.pairwise(headers):
        assert header.parent_hash == parent.hash
    for header in headers:
        number = header.block_number
        assert chain.store.header(number) == header
        assert chain.store.block_number(header.hash) == number
    assert chain.header(12) is None
    assert chain.header(-1) is None


async def test_roots_are_those_of_the_block_with_transactions_before(
    chain: Devchain, alice: Sender
) -> None:
    chain.submit(alice.sign())
    full = await chain.produce_block()
    empty = await chain.produce_block()
    assert empty.state_root == full.state_root
    assert empty.transaction_root != full.transaction_root


async def test_a_damaged_block_is_noticed(chain: Devchain) -> None:
    for _ in range(3):
        await chain.produce_block()
    chain.store._connection.execute("update block set mix_hash=? where number=2", (bytes(32),))
    with pytest.raises(ChainFileError, match="block 2 is damaged"):
        chain.header(2)


async def test_old_empty_blocks_are_dropped_and_full_ones_kept(
    chain: Devchain, alice: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "EMPTY_BLOCKS_KEPT", 5)
    for number in range(1, 13):
        if number == 3:
            chain.submit(alice.sign())
        await chain.produce_block()
    kept = [number for number in range(13) if chain.header(number) is not None]
    assert kept == [0, 3, *range(9, 13)]
    assert chain.store.block_hash(7) is None
    assert chain.accounts(chain.header(9)).nonce(alice.address) == 1


async def test_empty_blocks_take_little_room(chain: Devchain, clock: Clock, tmp_path: Path) -> None:
    def size() -> int:
        chain.store._connection.execute("pragma wal_checkpoint(truncate)")
        return sum(file.stat().st_size for file in tmp_path.iterdir())

    before = size()
    for _ in range(400):
        clock.now += 1
        await chain.produce_block()
    assert size() - before <= 400 * 150  # 91 MB a day would be 1,050 each


# -- restart and crash --


async def test_a_restart_keeps_blocks_state_and_waiting_transactions(
    open_chain: Open, alice: Sender, bob: Sender
) -> None:
    chain = open_chain()
    mined = chain.submit(alice.sign())
    head = await chain.produce_block()
    waiting = chain.submit(bob.sign())

    chain = open_chain()
    assert chain.head == head
    assert chain.store.mined(mined) is not None
    assert chain.accounts(chain.head).nonce(alice.address) == 1
    assert chain.pool.get(waiting) is not None
    await chain.produce_block()
    assert chain.store.mined(waiting) is not None


class Crash(Exception):
    """The process dies here."""


@pytest.mark.parametrize("step", ["put_block", "drop_pending"])
async def test_a_crash_within_a_block_leaves_it_absent_and_its_transactions_waiting(
    open_chain: Open, alice: Sender, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    chain = open_chain()
    waiting = chain.submit(alice.sign())
    original = getattr(Store, step)

    def crash_after(store: Store, *args: object) -> None:
        original(store, *args)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Store, step, crash_after)
        with pytest.raises(Crash):
            await chain.produce_block()
    chain = open_chain()
    assert chain.head.block_number == 0
    assert chain.store.mined_in(1) == []
    assert chain.accounts(chain.head).nonce(alice.address) == 0
    assert chain.pool.get(waiting) is not None


async def test_a_replacement_accepted_while_the_block_is_built_does_not_stay_behind(
    open_chain: Open, alice: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = open_chain()
    old = chain.submit(alice.sign(nonce=0))
    new = alice.sign(nonce=0, maxFeePerGas=20 * GWEI, maxPriorityFeePerGas=2 * GWEI)
    apply = BlockBuilder.apply

    def apply_and_replace(builder: BlockBuilder, transaction: SignedTransactionAPI) -> None:
        apply(builder, transaction)
        chain.submit(new)

    monkeypatch.setattr(BlockBuilder, "apply", apply_and_replace)
    await chain.produce_block()
    assert chain.store.mined(old) is not None
    assert len(chain.pool) == 0
    assert len(open_chain().pool) == 0


# -- opening --


def test_another_chain_id_is_refused(open_chain: Open, tmp_path: Path, genesis: Genesis) -> None:
    open_chain().close()
    with pytest.raises(ChainFileError, match="is chain 31373, not 1"):
        Devchain(tmp_path / "chain.sqlite3", Genesis(1, genesis.balances))


def test_other_balances_are_refused(open_chain: Open, tmp_path: Path, alice: Sender) -> None:
    open_chain().close()
    with pytest.raises(ChainFileError, match="other balances"):
        Devchain(tmp_path / "chain.sqlite3", Genesis(CHAIN_ID, {alice.address: 1}))


def test_a_second_process_on_the_same_file_is_refused(chain: Devchain, genesis: Genesis) -> None:
    with pytest.raises(ChainFileError, match="locked"):
        Devchain(chain.store.path, genesis)


def test_a_file_that_is_no_chain_is_refused(tmp_path: Path, genesis: Genesis) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ChainFileError, match="is not a chain"):
        Devchain(file, genesis)
    assert file.read_bytes() == b"not a database at all" * 100


def test_a_missing_folder_is_refused(tmp_path: Path, genesis: Genesis) -> None:
    with pytest.raises(ChainFileError, match="make its folder first"):
        Devchain(tmp_path / "none" / "chain.sqlite3", genesis)


def keep_waiting(chain: Devchain, raw: bytes) -> bytes:
    """Put a transaction on disk as waiting, past the rules of the pool; return its hash."""
    waiting = waiting_from_raw(raw, CHAIN_ID)
    with chain.store.transaction():
        chain.store.put_pending(waiting.hash, waiting.sender, waiting.nonce, raw)
    return waiting.hash
