"""The memory chain's clock, faults and books: what simulations rest on."""

import random

import pytest
import trio
from trio.testing import MockClock

from meshd.ledger import memory_contracts
from meshd.ledger.chain import (
    AnchorSettlement,
    Call,
    CallFailed,
    CancelJob,
    ChainUnavailable,
    Claim,
    ClaimMany,
    OpenJob,
    RefundJob,
    Register,
    Stake,
    StartJob,
    Transfer,
)
from meshd.ledger.memory_chain import FEE, MemoryChain, MemoryLedger
from meshd.ledger.memory_escrow import draw_committee, job_id, quorum_of
from meshd.ledger.memory_state import ContractState, Setting, Status, registry_account
from meshd.ledger.merkle import ClaimValue, Tree
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import Settlement

MCC = 10**18
DOMAIN = Domain("sim", 1, Address(b"\xee" * 20))
ALICE = Identity(b"\x0a" * 32)
BOB = Identity(b"\x0b" * 32)


async def test_block_h_comes_when_its_time_has_come(autojump_clock: MockClock) -> None:
    ledger = MemoryLedger(DOMAIN, block_time_s=2.0, genesis_time=1000)
    alice = MemoryChain(ledger, ALICE)
    assert (await alice.head()).height == 1
    await trio.sleep(5.9)
    assert (await alice.head()).height == 3
    await alice.wait_height(7)
    assert trio.current_time() == pytest.approx(12.0, abs=1e-3)
    assert (await alice.head()).timestamp == 1014


async def test_a_call_takes_effect_with_the_next_block_and_is_known_one_later(
    autojump_clock: MockClock,
) -> None:
    ledger = MemoryLedger(DOMAIN)
    ledger.fund(ALICE.address, MCC)
    alice = MemoryChain(ledger, ALICE)
    await trio.sleep(0.5)
    await alice.send("pay", Transfer(BOB.address, MCC))
    assert await alice.balance(BOB.address) == 0
    await trio.sleep(0.6)
    assert await alice.balance(BOB.address) == MCC
    outcome = await alice.wait("pay")
    assert outcome.height == 2
    assert (await alice.head()).height == 3


def test_two_ledgers_of_one_seed_have_the_same_blocks_and_of_two_seeds_others() -> None:
    one, same, other = (MemoryLedger(DOMAIN, seed=seed) for seed in (1, 1, -1))
    assert [one.block(h) for h in range(9)] == [same.block(h) for h in range(9)]
    assert one.block(3).hash != other.block(3).hash


async def test_an_outage_fails_reads_and_sends_of_one_node(autojump_clock: MockClock) -> None:
    ledger = MemoryLedger(DOMAIN)
    ledger.fund(ALICE.address, MCC)
    alice, bob = MemoryChain(ledger, ALICE), MemoryChain(ledger, BOB)
    ledger.outage(10.0, ALICE.address)
    for read in (
        alice.head(),
        alice.block(1),
        alice.events(0, 9),
        alice.job(bytes(32)),
        alice.orchestrators(),
        alice.stake_of(BOB.address),
        alice.balance(BOB.address),
        alice.gas_balance(BOB.address),
        alice.claimed(bytes(32), BOB.address),
        alice.send("pay", Transfer(BOB.address, MCC)),
    ):
        with pytest.raises(ChainUnavailable):
            await read
    assert (await bob.head()).height == 1
    await trio.sleep(10)
    await alice.send("pay", Transfer(BOB.address, MCC))
    assert (await alice.wait("pay")).height == 12


async def test_waits_last_through_an_outage_of_all(autojump_clock: MockClock) -> None:
    ledger = MemoryLedger(DOMAIN)
    ledger.fund(ALICE.address, MCC)
    alice = MemoryChain(ledger, ALICE)
    await alice.send("pay", Transfer(BOB.address, MCC))
    ledger.outage(20.0)
    assert (await alice.wait("pay")).height == 2
    assert trio.current_time() == pytest.approx(20.0, abs=1e-3)
    ledger.outage(40.0)
    assert (await alice.wait_height(30)).height == 30
    assert trio.current_time() == pytest.approx(40.0, abs=1e-3)


async def test_a_lagging_node_sees_blocks_state_and_events_late(
    autojump_clock: MockClock,
) -> None:
    ledger = MemoryLedger(DOMAIN)
    ledger.fund(ALICE.address, MCC)
    alice, bob = MemoryChain(ledger, ALICE), MemoryChain(ledger, BOB)
    ledger.lagging(BOB.address, 4)
    await trio.sleep(5)
    call = OpenJob(bytes(32), bytes(32), MCC, MCC, 5, 2 * 10**9, 2 * 10**9 + 20)
    await alice.send("open", call)
    opened = await alice.wait("open")
    assert len(await alice.events(0, 99)) == 1
    assert await alice.balance(ALICE.address) == 0
    assert (await bob.head()).height == (await alice.head()).height - 4
    assert await bob.events(0, 99) == []
    assert await bob.balance(ALICE.address) == MCC
    assert await bob.block(opened.height) is None
    await bob.wait_height(opened.height)
    assert (await alice.head()).height == opened.height + 4
    assert len(await bob.events(0, 99)) == 1
    assert await bob.balance(ALICE.address) == 0


async def test_a_lag_that_grows_while_a_node_waits_is_waited_out(
    autojump_clock: MockClock,
) -> None:
    ledger = MemoryLedger(DOMAIN)
    bob = MemoryChain(ledger, BOB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bob.wait_height, 10)
        await trio.sleep(5)
        ledger.lagging(BOB.address, 20)
    assert trio.current_time() == pytest.approx(29.0, abs=1e-3)


async def test_without_native_coin_a_call_fails_and_costs_nothing(
    autojump_clock: MockClock,
) -> None:
    ledger = MemoryLedger(DOMAIN, gas=2 * FEE)
    ledger.fund(ALICE.address, 3 * MCC)
    alice = MemoryChain(ledger, ALICE)
    for key in ("a", "b", "c"):
        await alice.send(key, Transfer(BOB.address, MCC))
    assert [(await alice.wait(key)).error for key in ("a", "b", "c")] == [
        None,
        None,
        "insufficient funds for gas",
    ]
    assert await alice.balance(BOB.address) == 2 * MCC
    assert await alice.gas_balance(ALICE.address) == 0
    ledger.set_gas(ALICE.address, FEE)
    await alice.send("d", Transfer(BOB.address, MCC))
    assert (await alice.wait("d")).error is None


async def test_the_books_show_what_does_not_add_up(autojump_clock: MockClock) -> None:
    ledger = MemoryLedger(DOMAIN)
    ledger.fund(ALICE.address, MCC)
    assert ledger.imbalances() == []
    state = ledger.state()
    state.balances[ALICE.address] -= 1
    assert len(ledger.imbalances()) == 1
    state.balances[DOMAIN.escrow] = 1
    state.balances[registry_account(DOMAIN)] = 1
    assert len(ledger.imbalances()) == 3


@pytest.mark.parametrize(
    ("members", "quorum"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (7, 5), (21, 14)]
)
def test_a_quorum_is_two_thirds_rounded_up(members: int, quorum: int) -> None:
    assert quorum_of(members) == quorum


def test_a_committee_has_at_most_as_many_different_members_as_asked() -> None:
    weights = {Address(bytes([place]) * 20): place + 1 for place in range(30)}
    committee = draw_committee(weights, b"\x01" * 32, 21)
    assert len(committee) == len(set(committee)) == 21
    assert draw_committee({}, b"\x01" * 32, 21) == ()
    drawn = {draw_committee(weights, bytes([seed]) * 32, 1) for seed in range(100)}
    assert len(drawn) > 10


PEOPLE = [Identity(bytes([place]) * 32) for place in range(1, 7)]


class Chaos:
    """Random calls by random people: most succeed, all entry points, several jobs at once."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.state = ContractState(balances={who.address: 1000 * MCC for who in PEOPLE})
        self.height = 1
        self.seen: dict[str, int] = {}
        self.trees: dict[tuple[bytes, int], tuple[Tree, list[ClaimValue]]] = {}

    def call(self) -> tuple[Identity, Call]:
        pick, who = self.random, self.random.choice(PEOPLE)
        jobs = list(self.state.pots) or [bytes(32)]
        job = pick.choice(jobs)
        kind = pick.choice(
            [
                "register",
                "stake",
                "transfer",
                "open",
                "start",
                "cancel",
                "anchor",
                "anchor",
                "claim",
                "claim",
                "refund",
            ]
        )
        match kind:
            case "register":
                return who, Register(pick.randint(0, 4), who.address)
            case "stake":
                return who, Stake(pick.randint(0, 50) * MCC)
            case "transfer":
                return who, Transfer(pick.choice(PEOPLE).address, pick.randint(0, 30) * MCC)
            case "open":
                cap, window = pick.randint(0, 80 * MCC), pick.randint(1, 4)
                end = self.height + pick.randint(10, 60)
                return who, OpenJob(
                    bytes(32), pick.randbytes(32), cap, cap, window, end, end + 4 * window
                )
            case "start":
                return who, StartJob(job)
            case "cancel":
                return who, CancelJob(job)
            case "anchor":
                return who, self.anchor(job)
            case "claim":
                return who, self.claim(job)
            case _:
                return who, RefundJob(job)

    def anchor(self, job: bytes) -> AnchorSettlement:
        pot = self.state.pots.get(job)
        members = pot.committee if pot else ()
        epoch = (pot.last_epoch if pot else 0) + self.random.randint(0, 2)
        values = [
            ClaimValue(job, who.address, self.random.randint(0, 20 * MCC), bytes(32))
            for who in self.random.sample(PEOPLE, 3)
        ]
        tree = Tree([value.leaf() for value in values])
        total = sum(value.earned for value in values) - self.random.choice([0, 0, MCC])
        settlement = Settlement(
            job_id=job,
            committee_term=0,
            epoch=epoch,
            prev_root=bytes(32),
            root=tree.root,
            total=max(total, 0),
            receipts=3,
            log_seq=1,
            log_head=bytes(32),
            data_hash=bytes(32),
            is_final=self.random.random() < 0.2,
        )
        digest = DOMAIN.digest(settlement)
        keys = {who.address: who for who in PEOPLE}
        signatures = tuple(keys[member].sign(digest) for member in members)
        self.trees[job, epoch] = (tree, values)
        return AnchorSettlement(settlement, members, 2 ** len(members) - 1, signatures)

    def claim(self, job: bytes) -> ClaimMany:
        known = [key for key in self.trees if key[0] == job] or list(self.trees)
        if not known:
            return ClaimMany(())
        key = self.random.choice(known)
        tree, values = self.trees[key]
        return ClaimMany(
            tuple(
                Claim(*key, value.account, value.earned, bytes(32), tree.proof(value.leaf()))
                for value in values
            )
        )

    def step(self) -> None:
        self.height += self.random.choice([0, 1, 1, 4])
        who, call = self.call()
        at = Setting(
            domain=DOMAIN,
            epoch_length=5,
            minimum_stake=10 * MCC,
            height=self.height,
            timestamp=self.height,
            tx=bytes(32),
            sender=who.address,
            block_hash=lambda height: height.to_bytes(32, "big"),
        )
        state = self.state.copy()
        name = type(call).__name__
        try:
            memory_contracts.apply(state, call, at)
        except CallFailed:
            name += " refused"
        else:
            self.state = state
        self.seen[name] = self.seen.get(name, 0) + 1

    def check(self) -> None:
        state = self.state
        assert sum(state.balances.values()) + state.burnt == 1000 * MCC * len(PEOPLE)
        assert min(state.balances.values()) >= 0
        assert state.balances.get(DOMAIN.escrow, 0) == sum(p.held for p in state.pots.values())
        bonded = sum(node.bonded for node in state.nodes.values())
        assert state.balances.get(registry_account(DOMAIN), 0) == bonded
        for job, pot in state.pots.items():
            claimed = sum(paid for (of, _), paid in state.claimed.items() if of == job)
            assert pot.paid == claimed <= pot.settled_total <= pot.payable
            assert pot.held >= 0
            if pot.status is Status.REFUNDED:
                assert pot.held == pot.settled_total - pot.paid


def test_no_order_of_calls_pays_twice_or_from_another_pot() -> None:
    seen: dict[str, int] = {}
    for seed in range(20):
        chaos = Chaos(seed)
        for _ in range(200):
            chaos.step()
            chaos.check()
        for name, count in chaos.seen.items():
            seen[name] = seen.get(name, 0) + count
    for name in [
        "Register",
        "Stake",
        "Transfer",
        "OpenJob",
        "StartJob",
        "CancelJob",
        "AnchorSettlement",
        "ClaimMany",
        "RefundJob",
    ]:
        assert seen[name] > 5, seen


def test_a_job_id_is_bound_to_chain_contract_researcher_terms_and_salt() -> None:
    one, two = b"\x01" * 32, b"\x02" * 32
    other_chain = Domain("sim", 2, DOMAIN.escrow)
    other_escrow = Domain("sim", 1, Address(b"\xdd" * 20))
    ids = {
        job_id(DOMAIN, ALICE.address, one, two),
        job_id(DOMAIN, ALICE.address, two, one),
        job_id(DOMAIN, BOB.address, one, two),
        job_id(other_chain, ALICE.address, one, two),
        job_id(other_escrow, ALICE.address, one, two),
    }
    assert len(ids) == 5
