"""The EVM adapter beside what every Chain adapter keeps to: bad RPCs, restarts, set-up."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio.abc import Clock
from trio.testing import MockClock

from meshd.contracts import artifact
from meshd.ledger import evm as evm_module
from meshd.ledger.chain import (
    CallFailed,
    ChainUnavailable,
    JobOpened,
    OpenJob,
    Register,
    Stake,
    Transfer,
)
from meshd.ledger.chain_calls import ESCROW, MCC, REGISTRY
from meshd.ledger.contract_abi import error_name
from meshd.ledger.deploy import deploy, fund
from meshd.ledger.evm import MAX_ANSWER, REQUEST_S, EvmRpc
from meshd.p2p.identity import Address, Identity
from tests.chain.conftest import word
from tests.chain.evm_world import BANK, CHAIN_ID, ETHER, URL, EvmWorld
from tests.chain.evm_world import MCC as ONE_MCC

ALICE = Identity(b"\x0a" * 32)
BOB = Identity(b"\x0b" * 32)


@pytest.fixture
def clock() -> Clock:
    """Virtual time; a test has to ask for it by itself."""
    return MockClock(autojump_threshold=0)


@pytest.fixture
async def world(clock: Clock, nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[EvmWorld]:
    world = EvmWorld(tmp_path / "chain.sqlite3", nursery)
    await world.start()
    yield world
    world.close()


def terms(salt: int, now: int, cap: int = 10 * ONE_MCC) -> OpenJob:
    return OpenJob(
        spec_hash=bytes([salt]) * 32,
        salt=word(salt),
        cap=cap,
        epoch_limit=cap,
        window=3,
        work_deadline=now + 10_000,
        settle_deadline=now + 20_000,
    )


# ---- sending -----------------------------------------------------------------------------


async def test_a_call_lands_once_though_the_node_dies_right_after_sending(
    world: EvmWorld, clock: Clock
) -> None:
    await world.fund(ALICE, 5 * ONE_MCC)
    for number in range(4):
        dying = world.adapter(ALICE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dying.run)
            await dying.send(f"rent {number}", Transfer(BOB.address, ONE_MCC))
            await trio.sleep(0.3 * number)  # dies at another point each time
            nursery.cancel_scope.cancel()
    alice = world.chain(ALICE)
    for number in range(4):
        await alice.send(f"rent {number}", Transfer(BOB.address, ONE_MCC))
    for number in range(4):
        assert (await alice.wait(f"rent {number}")).error is None
    assert await alice.balance(BOB.address) == 4 * ONE_MCC


async def test_deposits_in_flight_together_do_not_use_each_others_allowance(
    world: EvmWorld,
    clock: Clock,
) -> None:
    await world.fund(ALICE, 100 * ONE_MCC)
    alice = world.chain(ALICE)
    now = (await alice.head()).timestamp
    await alice.send("register", Register(1, ALICE.address))
    await alice.send("stake", Stake(20 * ONE_MCC))
    for number in range(3):
        await alice.send(f"job {number}", terms(number, now, (number + 1) * 10 * ONE_MCC))
    keys = ["register", "stake", *(f"job {number}" for number in range(3))]
    assert {(await alice.wait(key)).error for key in keys} == {None}
    assert await alice.balance(ALICE.address) == 20 * ONE_MCC
    opened = [e for e in await alice.events(0, 10**6) if isinstance(e, JobOpened)]
    assert [event.cap // ONE_MCC for event in opened] == [10, 20, 30]


async def test_a_call_that_fits_no_contract_is_refused_before_it_is_kept(
    world: EvmWorld, clock: Clock
) -> None:
    alice = world.chain(ALICE)
    for call in (Transfer(BOB.address, -1), Transfer(BOB.address, 2**256)):
        with pytest.raises(CallFailed, match=r"MCC\.transfer"):
            await alice.send("rent", call)
    with pytest.raises(CallFailed, match=r"JobEscrow\.open"):
        await alice.send("job", terms(1, 0, cap=2**96))


async def test_a_node_without_coin_for_gas_waits_until_it_has_some(
    world: EvmWorld, clock: Clock
) -> None:
    alice = world.chain(ALICE)
    await alice.send("register", Register(1, ALICE.address))
    with trio.move_on_after(20):
        await alice.wait("register")
        pytest.fail("nobody paid for this")
    await world.fund(ALICE, ONE_MCC)
    assert (await alice.wait("register")).error is None


async def test_an_outage_delays_and_loses_nothing(world: EvmWorld, clock: Clock) -> None:
    await world.fund(ALICE, 5 * ONE_MCC)
    alice = world.chain(ALICE)
    await alice.head()
    await alice.send("one", Transfer(BOB.address, ONE_MCC))
    world.transport.is_cut = True
    await alice.send("two", Transfer(BOB.address, ONE_MCC))
    with pytest.raises(ChainUnavailable, match="cannot be reached"):
        await alice.block(1)
    await trio.sleep(10)
    world.transport.is_cut = False
    assert (await alice.wait("one")).error is None
    assert (await alice.wait("two")).error is None
    assert await alice.balance(BOB.address) == 2 * ONE_MCC


async def test_waiting_for_a_height_goes_through_an_outage(
    world: EvmWorld, clock: Clock, nursery: trio.Nursery
) -> None:
    alice = world.adapter(ALICE)
    height = (await alice.head()).height + 5
    world.transport.is_cut = True
    reached = []

    async def wait() -> None:
        reached.append(await alice.wait_height(height))

    nursery.start_soon(wait)
    await trio.sleep(20)
    assert reached == []
    world.transport.is_cut = False
    await trio.sleep(2)
    assert [block.height for block in reached] == [height]


async def test_all_who_wait_for_a_block_share_one_poll_and_nobody_is_late(
    world: EvmWorld, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = world.adapter(ALICE)
    head = await alice.head()
    started = trio.current_time()
    asked, arrivals = [], []
    block = EvmRpc.block

    async def counted(rpc: EvmRpc, height: int | None = None) -> Any:
        asked.append(height)
        return await block(rpc, height)

    async def wait(height: int) -> None:
        await alice.wait_height(height)
        arrivals.append(trio.current_time() - started)

    monkeypatch.setattr(EvmRpc, "block", counted)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(wait, head.height + 3)
        await trio.sleep(0.6)
        before = trio.current_time()
        await alice.wait_height(head.height)
        assert trio.current_time() == before
    assert asked.count(None) <= 3 * 2 + 2  # two polls a second
    assert max(arrivals) <= 3.5


# ---- reading -----------------------------------------------------------------------------


async def test_events_are_asked_for_in_ranges_that_nodes_accept(
    world: EvmWorld, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evm_module, "MAX_LOG_BLOCKS", 2)
    await world.fund(ALICE, 100 * ONE_MCC)
    alice = world.chain(ALICE)
    now = (await alice.head()).timestamp
    for number in range(3):
        await alice.send(f"{number}", terms(number, now))
        await alice.wait(f"{number}")
    opened = await alice.events(0, 10**9)
    assert [event.spec_hash[0] for event in opened if isinstance(event, JobOpened)] == [0, 1, 2]
    job = await alice.job(alice.job_id(ALICE.address, bytes([2]) * 32, word(2)))
    assert job is not None
    assert (job.spec_hash, job.deposited) == (bytes([2]) * 32, 10 * ONE_MCC)


def test_every_error_of_the_contracts_is_known_by_name() -> None:
    for contract in (MCC, REGISTRY, ESCROW):
        for selector, name in contract.errors.items():
            assert error_name([ESCROW, REGISTRY, MCC], selector + word(1)) == name
    assert "JobEscrowWindowOpen" in ESCROW.errors.values()
    assert "ERC20InsufficientBalance" in MCC.errors.values()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("", "reverted without a reason"),
        ("08c379a0" + word(32).hex() + word(3).hex() + b"why".hex().ljust(64, "0"), "why"),
        ("4e487b71" + word(0x11).hex(), "Panic(0x11)"),
        ("08c379a0ff", "reverted with 08c379a0ff"),
        ("deadbeef", "reverted with deadbeef"),
    ],
)
def test_other_reverts_are_told_as_well_as_they_can_be(data: str, text: str) -> None:
    assert error_name([ESCROW], bytes.fromhex(data)) == text


# ---- wrong chains and bad nodes -----------------------------------------------------------


async def test_another_chain_id_is_one_clear_error(world: EvmWorld, clock: Clock) -> None:
    assert world.deployment is not None
    world.deployment = world.deployment.model_copy(update={"chain_id": 5})
    with pytest.raises(ChainUnavailable, match=f"has the id {CHAIN_ID}, not 5: correct chain.rpc"):
        await world.adapter(ALICE).run()


async def test_a_missing_contract_is_one_clear_error(world: EvmWorld, clock: Clock) -> None:
    assert world.deployment is not None
    for name in ("escrow", "registry", "mcc"):
        elsewhere = world.deployment.model_copy(update={name: b"\x05" * 20})
        world.deployment, kept = elsewhere, world.deployment
        with pytest.raises(ChainUnavailable, match="has no contract at 0x0505"):
            await world.adapter(ALICE).run()
        world.deployment = kept


async def test_the_adapter_says_when_it_is_ready(
    world: EvmWorld, clock: Clock, nursery: trio.Nursery
) -> None:
    await nursery.start(world.adapter(ALICE).run)


Handler = Callable[[httpx.Request], httpx.Response]


def rpc(handler: Any) -> EvmRpc:
    return EvmRpc(URL, httpx.MockTransport(handler))


def reply(content: bytes, status: int = 200) -> Handler:
    return lambda request: httpx.Response(status, content=content)


def answer(**fields: Any) -> Handler:
    return reply(json.dumps({"jsonrpc": "2.0", "id": 1, **fields}).encode())


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (reply(b"", 429), "status 429"),
        (reply(b"{}", 500), "status 500"),
        (reply(b"<html>"), "what is no JSON"),
        (reply(b"\xff\xfe"), "what is no JSON"),
        (reply(b"[]"), "what is no JSON-RPC"),
        (reply(b"{}"), "what is no JSON-RPC"),
        (reply(b" " * (MAX_ANSWER + 1)), "over 33554432 bytes"),
        (answer(error={"code": -32000, "message": "busy"}), "busy"),
        (answer(result="0xnonsense"), "http://devchain"),
        (answer(result=None), "http://devchain"),
        (answer(result=[1]), "http://devchain"),
    ],
)
async def test_whatever_is_no_answer_means_that_the_chain_is_unavailable(
    handler: Handler, text: str
) -> None:
    node = rpc(handler)
    for question in (node.height, node.chain_id, partial(node.nonce, ALICE.address), node.fees):
        with pytest.raises(ChainUnavailable, match=text):
            await question()
    await node.aclose()


async def test_an_rpc_that_hangs_is_given_up(autojump_clock: MockClock) -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    node = rpc(hang)
    started = trio.current_time()
    with pytest.raises(ChainUnavailable, match="gave no answer in 10 s"):
        await node.height()
    assert trio.current_time() - started == REQUEST_S
    await node.aclose()


async def test_an_rpc_that_nobody_serves_is_one_clear_error() -> None:
    node = EvmRpc("http://127.0.0.1:1")
    with pytest.raises(ChainUnavailable, match=r"http://127.0.0.1:1 cannot be reached .*chain.rpc"):
        await node.height()
    await node.aclose()


async def test_a_contract_that_answers_something_else_is_named(
    world: EvmWorld, clock: Clock
) -> None:
    assert world.deployment is not None
    node = EvmRpc(URL, world.transport)
    with pytest.raises(ChainUnavailable, match=r"NodeRegistry.nodeOf .* correct chain.deployment"):
        await node.read(REGISTRY, BOB.address, "nodeOf", ALICE.address)
    await node.aclose()


# ---- set-up ------------------------------------------------------------------------------


async def test_a_deployment_puts_three_contracts_that_know_each_other(
    world: EvmWorld, clock: Clock
) -> None:
    assert world.deployment is not None
    node = EvmRpc(URL, world.transport)
    where = world.deployment
    token, registry, escrow = (Address(each) for each in (where.mcc, where.registry, where.escrow))
    assert bytes.fromhex((await node.read(ESCROW, escrow, "token"))[2:]) == token
    assert bytes.fromhex((await node.read(ESCROW, escrow, "registry"))[2:]) == registry
    assert await node.read(REGISTRY, registry, "epochBlocks") == world.epoch_length
    assert await node.read(REGISTRY, registry, "minimumStake") == world.minimum_stake
    assert await node.read(MCC, token, "balanceOf", BANK.address) == 10**9 * ONE_MCC
    assert where.chain_id == CHAIN_ID
    await node.aclose()


async def test_funding_gives_coin_and_mcc_to_everybody(world: EvmWorld, clock: Clock) -> None:
    assert world.deployment is not None
    accounts = [Address(bytes([number]) * 20) for number in range(1, 13)]
    await fund(
        URL,
        BANK,
        accounts,
        coin=ETHER,
        mcc=7 * ONE_MCC,
        token=Address(world.deployment.mcc),
        transport=world.transport,
    )
    chain = world.adapter(ALICE)
    for account in accounts:
        assert await chain.gas_balance(account) == ETHER
        assert await chain.balance(account) == 7 * ONE_MCC


async def test_who_has_no_coin_cannot_set_anything_up(world: EvmWorld, clock: Clock) -> None:
    with pytest.raises(CallFailed, match="has no coin for gas"):
        await deploy(
            URL,
            ALICE,
            epoch_blocks=5,
            unbonding_s=1,
            minimum_stake=1,
            transport=world.transport,
        )


async def test_a_set_up_that_the_contracts_refuse_says_why(world: EvmWorld, clock: Clock) -> None:
    with pytest.raises(CallFailed, match="NodeRegistryInvalidParameter"):
        await deploy(
            URL,
            BANK,
            epoch_blocks=0,
            unbonding_s=1,
            minimum_stake=1,
            transport=world.transport,
        )
    assert world.deployment is not None
    with pytest.raises(CallFailed, match="ERC20InvalidReceiver"):
        await fund(
            URL,
            BANK,
            [Address(bytes(20))],
            coin=0,
            mcc=1,
            token=Address(world.deployment.mcc),
            transport=world.transport,
        )


def test_the_artifacts_are_those_that_the_adapter_uses() -> None:
    for contract, name in ((MCC, "MCC"), (REGISTRY, "NodeRegistry"), (ESCROW, "JobEscrow")):
        assert contract.artifact == artifact(name)  # type: ignore[arg-type]
