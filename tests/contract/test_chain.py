"""What every Chain adapter keeps to: the contracts' rules and the outbox's promises."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest
from eth_abi.abi import encode as abi_encode
from eth_hash.auto import keccak
from trio.abc import Clock
from trio.testing import MockClock

from meshd.ledger.chain import (
    Anchored,
    AnchorSettlement,
    Call,
    CancelJob,
    Chain,
    ChainError,
    Claim,
    Claimed,
    ClaimMany,
    JobCancelled,
    JobOnChain,
    JobOpened,
    JobStarted,
    OpenJob,
    Outcome,
    Refunded,
    RefundJob,
    Register,
    Stake,
    StartJob,
    Transfer,
)
from meshd.ledger.memory_chain import MemoryChain, MemoryLedger
from meshd.ledger.merkle import ClaimValue, Tree
from meshd.p2p.codec import Domain
from meshd.p2p.identity import NOBODY, Address, Identity
from meshd.p2p.messages import Settlement

MCC = 10**18
ALICE = Identity(b"\x0a" * 32)
BOB = Identity(b"\x0b" * 32)
CAROL = Identity(b"\x0c" * 32)
VALIDATORS = tuple(Identity(bytes([place]) * 32) for place in range(1, 6))
WINDOW = 3
CAP = 100 * MCC
DOMAIN = Domain("testnet", 31337, Address(b"\xee" * 20))
_keys = itertools.count()


class World(Protocol):
    """A chain with meshd's contracts, a node's account on it, and money for it."""

    minimum_stake: int
    epoch_length: int

    def chain(self, who: Identity) -> Chain:
        """Return a new adapter of *who*, as after a restart of its node."""
        ...

    async def fund(self, who: Identity, amount: int) -> None:
        """Give MCC, and what transactions cost."""
        ...


class MemoryWorld:
    minimum_stake = 10 * MCC
    epoch_length = 5

    def __init__(self) -> None:
        self.ledger = MemoryLedger(
            DOMAIN, seed=7, epoch_length=self.epoch_length, minimum_stake=self.minimum_stake
        )

    def chain(self, who: Identity) -> Chain:
        return MemoryChain(self.ledger, who)

    async def fund(self, who: Identity, amount: int) -> None:
        self.ledger.fund(who.address, amount)


@pytest.fixture(params=["memory"])
def adapter(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def clock(adapter: str) -> Clock:
    return {"memory": lambda: MockClock(autojump_threshold=0)}[adapter]()


@pytest.fixture
def world(adapter: str) -> World:
    worlds: dict[str, Callable[[], World]] = {"memory": MemoryWorld}
    return worlds[adapter]()


async def made(chain: Chain, call: Call) -> Outcome:
    key = f"call {next(_keys)}"
    await chain.send(key, call)
    return await chain.wait(key)


async def make(chain: Chain, call: Call) -> Outcome:
    outcome = await made(chain, call)
    assert outcome.error is None
    return outcome


async def refused(chain: Chain, call: Call, error: str) -> None:
    assert (await made(chain, call)).error == error


async def wait_time(chain: Chain, timestamp: int) -> None:
    while (head := await chain.head()).timestamp < timestamp:
        await chain.wait_height(head.height + 1)


async def wait_epoch(world: World, chain: Chain) -> None:
    height = (await chain.head()).height
    await chain.wait_height((height // world.epoch_length + 1) * world.epoch_length)


async def terms(chain: Chain, *, window: int = WINDOW, **changes: Any) -> OpenJob:
    now = (await chain.head()).timestamp
    call = OpenJob(
        spec_hash=b"\x5e" * 32,
        salt=next(_keys).to_bytes(32, "big"),
        cap=CAP,
        epoch_limit=60 * MCC,
        window=window,
        work_deadline=now + 40,
        settle_deadline=now + 40 + 4 * window,
    )
    return replace(call, **changes)


async def open_job(chain: Chain, call: OpenJob) -> bytes:
    await make(chain, call)
    return chain.job_id(chain.address, call.spec_hash, call.salt)


async def staked(world: World, who: Identity, amount: int, roles: int = 2) -> Chain:
    await world.fund(who, amount)
    chain = world.chain(who)
    await make(chain, Register(roles, who.address))
    await make(chain, Stake(amount))
    return chain


@dataclass
class Job:
    """A started job with five validators and what their quorum signs."""

    chain: Chain
    job_id: bytes
    committee: tuple[Address, ...]

    def settlement(self, epoch: int, tree: Tree, total: int, **changes: Any) -> Settlement:
        fields = {
            "job_id": self.job_id,
            "committee_term": 0,
            "epoch": epoch,
            "prev_root": bytes(32),
            "root": tree.root,
            "total": total,
            "receipts": 3,
            "log_seq": 9,
            "log_head": b"\x01" * 32,
            "data_hash": b"\x02" * 32,
            "is_final": False,
        }
        return Settlement(**{**fields, **changes})

    def anchor(self, settlement: Settlement, bitmap: int = 0b01111) -> AnchorSettlement:
        keys = {who.address: who for who in VALIDATORS}
        digest = self.chain.domain.digest(settlement)
        signatures = tuple(
            keys[member].sign(digest)
            for place, member in enumerate(self.committee)
            if bitmap >> place & 1
        )
        return AnchorSettlement(settlement, self.committee, bitmap, signatures)

    def earnings(self, **earned: int) -> "Earnings":
        people = {"bob": BOB.address, "carol": CAROL.address}
        return Earnings(
            self.job_id,
            [
                ClaimValue(self.job_id, people[name], amount, b"\x03" * 32)
                for name, amount in earned.items()
            ],
        )

    async def view(self) -> JobOnChain:
        job = await self.chain.job(self.job_id)
        assert job is not None
        return job


@dataclass
class Earnings:
    job_id: bytes
    values: list[ClaimValue]

    @property
    def tree(self) -> Tree:
        return Tree([value.leaf() for value in self.values])

    @property
    def total(self) -> int:
        return sum(value.earned for value in self.values)

    def claims(self, epoch: int) -> ClaimMany:
        return ClaimMany(
            tuple(
                Claim(
                    value.job_id,
                    epoch,
                    value.account,
                    value.earned,
                    value.receipts_root,
                    self.tree.proof(value.leaf()),
                )
                for value in self.values
            )
        )


async def started_job(world: World, **changes: Any) -> Job:
    for who in VALIDATORS:
        if not await world.chain(who).stake_of(who.address):
            await staked(world, who, 100 * MCC)
    await world.fund(ALICE, CAP)
    alice = world.chain(ALICE)
    await wait_epoch(world, alice)
    job_id = await open_job(alice, await terms(alice, **changes))
    view = await alice.job(job_id)
    assert view is not None
    await alice.wait_height(view.opened + 2)
    outcome = await make(alice, StartJob(job_id))
    (event,) = await alice.events(outcome.height, outcome.height)
    assert isinstance(event, JobStarted)
    return Job(alice, job_id, event.committee)


async def anchored(job: Job, epoch: int, earnings: Earnings, **changes: Any) -> None:
    settlement = job.settlement(epoch, earnings.tree, earnings.total, **changes)
    await make(job.chain, job.anchor(settlement))


async def survive_window(job: Job) -> None:
    view = await job.view()
    await wait_time(job.chain, view.anchored_at + view.window)


# ---- blocks -----------------------------------------------------------------------------


async def test_blocks_follow_one_another_and_do_not_change(world: World, clock: Clock) -> None:
    chain = world.chain(ALICE)
    first = await chain.head()
    later = await chain.wait_height(first.height + 3)
    assert later.height == first.height + 3
    assert later.timestamp > first.timestamp
    assert await chain.block(first.height) == first
    hashes = {(await chain.wait_height(first.height + step)).hash for step in range(4)}
    assert len(hashes) == 4
    assert all(len(value) == 32 for value in hashes)


async def test_a_block_that_is_not_there_yet_is_none(world: World, clock: Clock) -> None:
    chain = world.chain(ALICE)
    assert await chain.block((await chain.head()).height + 50) is None


async def test_a_past_height_is_returned_at_once(world: World, clock: Clock) -> None:
    chain = world.chain(ALICE)
    await chain.wait_height(4)
    head = await chain.head()
    assert (await chain.wait_height(2)).height == 2
    assert await chain.head() == head


async def test_the_job_id_is_the_hash_that_the_contract_computes(
    world: World, clock: Clock
) -> None:
    chain = world.chain(ALICE)
    encoded = abi_encode(
        ["uint256", "address", "address", "bytes32", "bytes32"],
        [chain.domain.chain_id, chain.domain.escrow, BOB.address, b"\x01" * 32, b"\x02" * 32],
    )
    assert chain.job_id(BOB.address, b"\x01" * 32, b"\x02" * 32) == keccak(encoded)


# ---- the outbox -------------------------------------------------------------------------


async def test_a_transfer_arrives_with_its_block(world: World, clock: Clock) -> None:
    await world.fund(ALICE, 5 * MCC)
    alice = world.chain(ALICE)
    before = await alice.gas_balance(ALICE.address)
    outcome = await make(alice, Transfer(BOB.address, 2 * MCC))
    assert len(outcome.tx) == 32
    assert outcome.height <= (await alice.head()).height
    assert await alice.balance(ALICE.address) == 3 * MCC
    assert await alice.balance(BOB.address) == 2 * MCC
    assert await alice.gas_balance(ALICE.address) < before


async def test_the_same_key_is_sent_once_whatever_it_says_later(world: World, clock: Clock) -> None:
    await world.fund(ALICE, 5 * MCC)
    alice = world.chain(ALICE)
    await alice.send("rent", Transfer(BOB.address, MCC))
    await alice.send("rent", Transfer(BOB.address, MCC))
    first = await alice.wait("rent")
    await alice.send("rent", Transfer(CAROL.address, 2 * MCC))
    assert await alice.wait("rent") == first
    await alice.wait_height(first.height + 3)
    assert await alice.balance(BOB.address) == MCC
    assert await alice.balance(CAROL.address) == 0


async def test_a_restarted_node_finds_its_call_and_does_not_repeat_it(
    world: World, clock: Clock
) -> None:
    await world.fund(ALICE, 5 * MCC)
    await world.chain(ALICE).send("rent", Transfer(BOB.address, MCC))
    restarted = world.chain(ALICE)
    await restarted.send("rent", Transfer(BOB.address, MCC))
    assert (await restarted.wait("rent")).error is None
    assert await restarted.balance(BOB.address) == MCC


async def test_keys_of_two_nodes_are_apart(world: World, clock: Clock) -> None:
    for who in (ALICE, BOB):
        await world.fund(who, 5 * MCC)
        await world.chain(who).send("rent", Transfer(CAROL.address, MCC))
    for who in (ALICE, BOB):
        assert (await world.chain(who).wait("rent")).error is None
    assert await world.chain(CAROL).balance(CAROL.address) == 2 * MCC


async def test_a_call_that_was_never_sent_has_no_outcome(world: World, clock: Clock) -> None:
    with pytest.raises(ChainError, match="unpaid"):
        await world.chain(ALICE).wait("unpaid")


async def test_a_failed_call_says_the_contracts_error_and_changes_nothing(
    world: World, clock: Clock
) -> None:
    await world.fund(ALICE, MCC)
    alice = world.chain(ALICE)
    await refused(alice, Transfer(BOB.address, 2 * MCC), "ERC20InsufficientBalance")
    await refused(alice, Transfer(NOBODY, MCC), "ERC20InvalidReceiver")
    assert await alice.balance(ALICE.address) == MCC


# ---- the registry -----------------------------------------------------------------------


async def test_stake_counts_from_the_next_registry_epoch(world: World, clock: Clock) -> None:
    await world.fund(ALICE, world.minimum_stake)
    alice = world.chain(ALICE)
    await make(alice, Register(1, ALICE.address))
    await wait_epoch(world, alice)
    staked_at = (await make(alice, Stake(world.minimum_stake))).height
    active_from = (staked_at // world.epoch_length + 1) * world.epoch_length
    assert await alice.stake_of(ALICE.address) == world.minimum_stake
    assert (await alice.head()).height < active_from
    assert ALICE.address not in await alice.orchestrators()
    await alice.wait_height(active_from)
    assert list(await alice.orchestrators()) == [ALICE.address]


async def test_only_orchestrators_with_enough_stake_are_listed(world: World, clock: Clock) -> None:
    await staked(world, ALICE, world.minimum_stake - 1, roles=1)
    await staked(world, BOB, world.minimum_stake, roles=2)
    carol = await staked(world, CAROL, world.minimum_stake, roles=3)
    await wait_epoch(world, carol)
    assert list(await carol.orchestrators()) == [CAROL.address]


async def test_bad_registrations_are_refused(world: World, clock: Clock) -> None:
    await world.fund(ALICE, 5 * MCC)
    alice = world.chain(ALICE)
    await refused(alice, Stake(MCC), "NodeRegistryNotRegistered")
    await refused(alice, Register(2, NOBODY), "NodeRegistryInvalidPayout")
    await refused(alice, Register(0, ALICE.address), "NodeRegistryInvalidRoles")
    await refused(alice, Register(4, ALICE.address), "NodeRegistryInvalidRoles")
    await make(alice, Register(3, BOB.address))
    await refused(alice, Register(3, BOB.address), "NodeRegistryAlreadyRegistered")
    await refused(alice, Stake(0), "NodeRegistryInvalidAmount")
    await refused(alice, Stake(6 * MCC), "ERC20InsufficientBalance")
    assert await alice.stake_of(ALICE.address) == 0
    assert await alice.balance(ALICE.address) == 5 * MCC


# ---- open, start, cancel ----------------------------------------------------------------


async def test_an_opened_job_burns_a_hundredth_rounded_up(world: World, clock: Clock) -> None:
    await world.fund(ALICE, CAP + 1)
    alice = world.chain(ALICE)
    call = await terms(alice, cap=CAP + 1)
    outcome = await make(alice, call)
    job_id = alice.job_id(ALICE.address, call.spec_hash, call.salt)
    job = await alice.job(job_id)
    assert job is not None
    assert (job.deposited, job.burnt, job.paid, job.refunded) == (CAP + 1, MCC + 1, 0, 0)
    assert (job.researcher, job.spec_hash) == (ALICE.address, call.spec_hash)
    assert (job.opened, job.started, job.cancelled, job.settled) == (
        outcome.height,
        False,
        False,
        False,
    )
    assert (job.last_epoch, job.last_root, job.total, job.anchored_at) == (0, bytes(32), 0, 0)
    assert list(await alice.events(outcome.height, outcome.height)) == [
        JobOpened(outcome.height, job_id, ALICE.address, call.spec_hash, CAP + 1)
    ]
    assert await alice.balance(ALICE.address) == 0


async def test_there_is_no_job_where_none_was_opened(world: World, clock: Clock) -> None:
    assert await world.chain(ALICE).job(bytes(32)) is None


async def test_bad_terms_are_refused(world: World, clock: Clock) -> None:
    await world.fund(ALICE, CAP)
    alice = world.chain(ALICE)
    good = await terms(alice)
    now = (await alice.head()).timestamp
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cap": 0}, "JobEscrowCapTooSmall"),
        ({"cap": 1}, "JobEscrowCapTooSmall"),
        ({"epoch_limit": 0}, "JobEscrowZeroEpochLimit"),
        ({"window": 0}, "JobEscrowZeroWindow"),
        ({"window": WINDOW + 1}, "JobEscrowSettleDeadlineTooEarly"),
        ({"work_deadline": now}, "JobEscrowWorkDeadlinePassed"),
        ({"settle_deadline": good.settle_deadline - 1}, "JobEscrowSettleDeadlineTooEarly"),
        ({"cap": CAP + 1}, "ERC20InsufficientBalance"),
    ]
    for changes, error in cases:
        await refused(alice, replace(good, **changes), error)
    await make(alice, good)
    await refused(alice, good, "JobEscrowJobExists")
    assert await alice.balance(ALICE.address) == 0


async def test_the_committee_follows_from_stake_and_beacon(world: World, clock: Clock) -> None:
    stakes = {who.address: (place + 1) * 20 for place, who in enumerate(VALIDATORS)}
    for who in VALIDATORS:
        await staked(world, who, stakes[who.address] * MCC)
    job = await started_job(world)
    view = await job.view()
    seed_block = await job.chain.block(view.opened + 2)
    assert seed_block is not None
    seed = keccak(seed_block.hash + job.job_id)
    expected: list[Address] = []
    while len(expected) < len(VALIDATORS):
        lots = [node for node in stakes if node not in expected for _ in range(stakes[node])]
        draw = int.from_bytes(keccak(seed + len(expected).to_bytes(32, "big")), "big")
        expected.append(lots[draw % len(lots)])
    assert list(job.committee) == expected
    assert view.started


async def test_quorums_are_two_thirds_rounded_up(world: World, clock: Clock) -> None:
    job = await started_job(world)
    starts = [event for event in await job.chain.events(0, 10**6) if isinstance(event, JobStarted)]
    assert [(len(event.committee), event.quorum) for event in starts] == [(5, 4)]


async def test_a_job_starts_only_between_its_third_and_two_hundredth_block(
    world: World, clock: Clock
) -> None:
    await staked(world, BOB, 100 * MCC)
    await world.fund(ALICE, 2 * CAP)
    alice, bob = world.chain(ALICE), world.chain(BOB)
    await wait_epoch(world, alice)
    now = (await alice.head()).timestamp
    call = await terms(alice, work_deadline=now + 10_000, settle_deadline=now + 20_000)
    job_id = alice.job_id(ALICE.address, call.spec_hash, call.salt)
    await alice.send("open", call)
    await alice.send("at once", StartJob(job_id))
    opened = (await alice.wait("open")).height
    assert (await alice.wait("at once")).error == "JobEscrowStartTooEarly"
    await alice.wait_height(opened + 200)
    await refused(bob, StartJob(job_id), "JobEscrowStartTooLate")
    await make(alice, CancelJob(job_id))


async def test_a_job_without_validators_or_after_its_work_deadline_does_not_start(
    world: World, clock: Clock
) -> None:
    await world.fund(ALICE, 2 * CAP)
    alice = world.chain(ALICE)
    await refused(alice, StartJob(bytes(32)), "JobEscrowWrongStatus")
    job_id = await open_job(alice, await terms(alice))
    job = await alice.job(job_id)
    assert job is not None
    await alice.wait_height(job.opened + 2)
    await refused(alice, StartJob(job_id), "JobEscrowNoValidator")
    await wait_time(alice, job.work_deadline)
    await refused(alice, StartJob(job_id), "JobEscrowWorkDeadlinePassed")


async def test_stake_that_came_after_the_seed_is_not_drawn(world: World, clock: Clock) -> None:
    await staked(world, BOB, 100 * MCC)
    await world.fund(ALICE, CAP)
    alice = world.chain(ALICE)
    await wait_epoch(world, alice)
    job_id = await open_job(alice, await terms(alice))
    await staked(world, CAROL, 10_000 * MCC)
    await wait_epoch(world, alice)
    await wait_epoch(world, alice)
    outcome = await make(alice, StartJob(job_id))
    (event,) = await alice.events(outcome.height, outcome.height)
    assert isinstance(event, JobStarted)
    assert event.committee == (BOB.address,)
    assert event.quorum == 1


async def test_a_job_starts_once(world: World, clock: Clock) -> None:
    job = await started_job(world)
    await refused(job.chain, StartJob(job.job_id), "JobEscrowWrongStatus")


async def test_the_researcher_cancels_before_the_start_only(world: World, clock: Clock) -> None:
    await world.fund(ALICE, CAP)
    alice, bob = world.chain(ALICE), world.chain(BOB)
    job_id = await open_job(alice, await terms(alice))
    await world.fund(BOB, MCC)
    await refused(bob, CancelJob(job_id), "JobEscrowUnauthorized")
    outcome = await make(alice, CancelJob(job_id))
    assert list(await alice.events(outcome.height, outcome.height)) == [
        JobCancelled(outcome.height, job_id)
    ]
    job = await alice.job(job_id)
    assert job is not None
    assert job.cancelled
    assert job.refunded == CAP * 99 // 100 == await alice.balance(ALICE.address)
    for call in (CancelJob(job_id), StartJob(job_id), RefundJob(job_id)):
        await refused(alice, call, "JobEscrowWrongStatus")


async def test_the_start_ends_cancellation(world: World, clock: Clock) -> None:
    job = await started_job(world)
    await refused(job.chain, CancelJob(job.job_id), "JobEscrowWrongStatus")


# ---- anchor -----------------------------------------------------------------------------


async def test_anybody_anchors_what_a_quorum_signed(world: World, clock: Clock) -> None:
    job = await started_job(world)
    earnings = job.earnings(bob=10 * MCC, carol=5 * MCC)
    settlement = job.settlement(1, earnings.tree, earnings.total)
    await world.fund(CAROL, MCC)
    carol = world.chain(CAROL)
    outcome = await make(carol, job.anchor(settlement))
    assert list(await carol.events(outcome.height, outcome.height)) == [
        Anchored(outcome.height, job.job_id, 1, settlement.root, 15 * MCC, False, outcome.tx)
    ]
    view = await job.view()
    block = await carol.block(outcome.height)
    assert block is not None
    assert (view.last_epoch, view.last_root, view.total) == (1, settlement.root, 15 * MCC)
    assert (view.anchored_at, view.settled) == (block.timestamp, False)


async def test_the_same_anchor_again_changes_nothing(world: World, clock: Clock) -> None:
    job = await started_job(world)
    earnings = job.earnings(bob=10 * MCC)
    await anchored(job, 1, earnings)
    before = await job.view()
    again = await make(job.chain, job.anchor(job.settlement(1, earnings.tree, earnings.total)))
    assert await job.view() == before
    assert list(await job.chain.events(again.height, again.height)) == []


async def test_an_anchor_without_a_true_quorum_is_refused(world: World, clock: Clock) -> None:
    job = await started_job(world)
    earnings = job.earnings(bob=10 * MCC)
    settlement = job.settlement(1, earnings.tree, earnings.total)
    good = job.anchor(settlement)
    one = good.signatures[0]
    s = int.from_bytes(one[32:64], "big")
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    high_s = one[:32] + (order - s).to_bytes(32, "big") + bytes([one[64] ^ 7])
    elsewhere = Domain("testnet", job.chain.domain.chain_id + 1, job.chain.domain.escrow)
    keys = {who.address: who for who in VALIDATORS}
    foreign = tuple(keys[m].sign(elsewhere.digest(settlement)) for m in job.committee[:4])
    for call, error in (
        (job.anchor(settlement, 0b00111), "JobEscrowQuorumNotReached"),
        (job.anchor(settlement, 0), "JobEscrowQuorumNotReached"),
        (replace(good, bitmap=0b11110), "JobEscrowInvalidSignature"),
        (replace(good, bitmap=0b11111), "JobEscrowInvalidSignature"),
        (replace(good, bitmap=0b00111), "JobEscrowInvalidSignerBitmap"),
        (replace(good, bitmap=0b101111), "JobEscrowInvalidSignerBitmap"),
        (replace(good, signatures=(one,) * 4), "JobEscrowInvalidSignature"),
        (replace(good, signatures=(high_s, *good.signatures[1:])), "JobEscrowInvalidSignature"),
        (replace(good, signatures=foreign), "JobEscrowInvalidSignature"),
        (replace(good, committee=job.committee[::-1]), "JobEscrowWrongCommittee"),
        (replace(good, committee=(job.committee[0],) * 5), "JobEscrowWrongCommittee"),
        (replace(good, committee=()), "JobEscrowWrongCommittee"),
        (
            replace(good, settlement=settlement.model_copy(update={"total": MCC})),
            "JobEscrowInvalidSignature",
        ),
        (
            replace(good, settlement=settlement.model_copy(update={"job_id": b"\x09" * 32})),
            "JobEscrowWrongCommittee",
        ),
        (
            job.anchor(job.settlement(1, earnings.tree, MCC, committee_term=1)),
            "JobEscrowWrongCommitteeTerm",
        ),
    ):
        await refused(job.chain, call, error)
    assert (await job.view()).last_epoch == 0


async def test_a_job_that_has_not_started_takes_no_anchor(world: World, clock: Clock) -> None:
    await world.fund(ALICE, CAP)
    alice = world.chain(ALICE)
    job = Job(alice, await open_job(alice, await terms(alice)), ())
    earnings = job.earnings(bob=MCC)
    call = job.anchor(job.settlement(1, earnings.tree, MCC), 0)
    await refused(alice, call, "JobEscrowWrongCommittee")


async def test_an_anchor_keeps_to_limit_pot_and_order(world: World, clock: Clock) -> None:
    job = await started_job(world)
    tree = job.earnings(bob=10 * MCC).tree

    async def tried(epoch: int, total: int, error: str, **changes: Any) -> None:
        await refused(job.chain, job.anchor(job.settlement(epoch, tree, total, **changes)), error)

    await tried(1, 60 * MCC + 1, "JobEscrowEpochLimitExceeded")
    await tried(1, 10 * MCC, "JobEscrowZeroRoot", root=bytes(32))
    await tried(0, 10 * MCC, "JobEscrowEpochNotIncreasing")
    await make(job.chain, job.anchor(job.settlement(3, tree, 60 * MCC)))
    await survive_window(job)
    await tried(4, 60 * MCC - 1, "JobEscrowTotalDecreased")
    await tried(4, 99 * MCC + 1, "JobEscrowPotExceeded")
    await tried(3, 61 * MCC, "JobEscrowEpochNotIncreasing")
    await tried(2, 60 * MCC, "JobEscrowEpochNotIncreasing", root=b"\x07" * 32)
    await make(job.chain, job.anchor(job.settlement(4, tree, 99 * MCC)))


async def test_no_new_root_while_one_is_in_its_window(world: World, clock: Clock) -> None:
    job = await started_job(world, window=6)
    await anchored(job, 1, job.earnings(bob=MCC))
    later = job.earnings(bob=2 * MCC)
    call = job.anchor(job.settlement(2, later.tree, later.total))
    await refused(job.chain, call, "JobEscrowWindowOpen")
    await survive_window(job)
    await make(job.chain, call)


async def test_nothing_is_anchored_after_a_final_settlement(world: World, clock: Clock) -> None:
    job = await started_job(world)
    await anchored(job, 1, job.earnings(bob=MCC), is_final=True)
    assert (await job.view()).settled
    await survive_window(job)
    later = job.earnings(bob=2 * MCC)
    call = job.anchor(job.settlement(2, later.tree, later.total))
    await refused(job.chain, call, "JobEscrowFinalised")


async def test_nothing_is_anchored_after_the_settle_deadline(world: World, clock: Clock) -> None:
    job = await started_job(world)
    view = await job.view()
    await wait_time(job.chain, view.settle_deadline)
    earnings = job.earnings(bob=MCC)
    call = job.anchor(job.settlement(1, earnings.tree, earnings.total))
    await refused(job.chain, call, "JobEscrowAnchorDeadlinePassed")


async def test_a_stale_anchor_at_the_deadline_does_not_shut_out_its_successor(
    world: World, clock: Clock
) -> None:
    job = await started_job(world, window=4)
    view = await job.view()
    await wait_time(job.chain, view.settle_deadline - 3)
    await anchored(job, 1, job.earnings(bob=MCC))
    await survive_window(job)
    assert (await job.chain.head()).timestamp >= view.settle_deadline
    later = job.earnings(bob=2 * MCC)
    await anchored(job, 2, later, is_final=True)
    await survive_window(job)
    await make(job.chain, later.claims(2))
    assert await job.chain.claimed(job.job_id, BOB.address) == 2 * MCC


# ---- claim and refund -------------------------------------------------------------------


async def test_a_claim_pays_after_the_window_and_once(world: World, clock: Clock) -> None:
    job = await started_job(world, window=6)
    earnings = job.earnings(bob=10 * MCC, carol=5 * MCC)
    await anchored(job, 1, earnings)
    await refused(job.chain, earnings.claims(1), "JobEscrowWindowOpen")
    await survive_window(job)
    outcome = await make(job.chain, earnings.claims(1))
    assert set(await job.chain.events(outcome.height, outcome.height)) == {
        Claimed(outcome.height, job.job_id, BOB.address, 10 * MCC, outcome.tx),
        Claimed(outcome.height, job.job_id, CAROL.address, 5 * MCC, outcome.tx),
    }
    assert await job.chain.balance(BOB.address) == 10 * MCC
    assert await job.chain.claimed(job.job_id, CAROL.address) == 5 * MCC
    again = await make(job.chain, earnings.claims(1))
    assert list(await job.chain.events(again.height, again.height)) == []
    assert (await job.view()).paid == 15 * MCC


async def test_claims_are_cumulative_over_epochs(world: World, clock: Clock) -> None:
    job = await started_job(world)
    first, second = job.earnings(bob=10 * MCC), job.earnings(bob=25 * MCC, carol=MCC)
    await anchored(job, 1, first)
    await survive_window(job)
    await make(job.chain, first.claims(1))
    await anchored(job, 2, second)
    await survive_window(job)
    await make(job.chain, second.claims(2))
    await make(job.chain, first.claims(1))
    assert await job.chain.balance(BOB.address) == 25 * MCC
    assert (await job.view()).paid == 26 * MCC


async def test_a_later_root_does_not_erase_a_worker(world: World, clock: Clock) -> None:
    job = await started_job(world)
    first = job.earnings(bob=10 * MCC, carol=5 * MCC)
    await anchored(job, 1, first)
    await survive_window(job)
    omitting = job.earnings(bob=20 * MCC)
    await anchored(job, 2, omitting, is_final=True)
    await make(job.chain, first.claims(1))
    assert await job.chain.balance(CAROL.address) == 5 * MCC
    await survive_window(job)
    await make(job.chain, omitting.claims(2))
    # The roots contradict one another: together they never pay more than the last total.
    assert (await job.view()).paid == 20 * MCC
    assert await job.chain.balance(BOB.address) == 15 * MCC


async def test_forged_claims_are_refused(world: World, clock: Clock) -> None:
    job = await started_job(world)
    earnings = job.earnings(bob=10 * MCC, carol=5 * MCC)
    await anchored(job, 1, earnings)
    await survive_window(job)
    bob, carol = earnings.claims(1).claims
    for claim, error in (
        (replace(bob, earned=11 * MCC), "JobEscrowInvalidProof"),
        (replace(bob, account=ALICE.address), "JobEscrowInvalidProof"),
        (replace(bob, receipts_root=bytes(32)), "JobEscrowInvalidProof"),
        (replace(bob, proof=carol.proof), "JobEscrowInvalidProof"),
        (replace(bob, proof=()), "JobEscrowInvalidProof"),
        (replace(bob, epoch=2), "JobEscrowUnknownRoot"),
        (replace(bob, job_id=bytes(32)), "JobEscrowUnknownRoot"),
    ):
        await refused(job.chain, ClaimMany((carol, claim)), error)
    assert await job.chain.balance(CAROL.address) == 0


async def test_the_rest_is_refunded_after_a_final_settlement_and_claims_stay(
    world: World, clock: Clock
) -> None:
    job = await started_job(world)
    earnings = job.earnings(bob=10 * MCC, carol=5 * MCC)
    await refused(job.chain, RefundJob(job.job_id), "JobEscrowNotRefundable")
    settlement = job.settlement(1, earnings.tree, earnings.total, is_final=True)
    await job.chain.send("anchor", job.anchor(settlement))
    await job.chain.send("early", RefundJob(job.job_id))
    assert (await job.chain.wait("anchor")).error is None
    assert (await job.chain.wait("early")).error == "JobEscrowWindowOpen"
    await survive_window(job)
    await make(job.chain, ClaimMany(earnings.claims(1).claims[:1]))
    outcome = await make(job.chain, RefundJob(job.job_id))
    assert list(await job.chain.events(outcome.height, outcome.height)) == [
        Refunded(outcome.height, job.job_id, 84 * MCC, outcome.tx)
    ]
    assert await job.chain.balance(ALICE.address) == 84 * MCC
    await refused(job.chain, RefundJob(job.job_id), "JobEscrowWrongStatus")
    await make(job.chain, earnings.claims(1))
    view = await job.view()
    assert view.deposited == view.burnt + view.paid + view.refunded
    assert (view.burnt, view.paid, view.refunded) == (MCC, 15 * MCC, 84 * MCC)


async def test_without_a_settlement_the_pot_is_refunded_after_the_deadline(
    world: World, clock: Clock
) -> None:
    job = await started_job(world)
    view = await job.view()
    await refused(job.chain, RefundJob(job.job_id), "JobEscrowNotRefundable")
    await wait_time(job.chain, view.settle_deadline)
    await make(job.chain, RefundJob(job.job_id))
    assert await job.chain.balance(ALICE.address) == 99 * MCC
    earnings = job.earnings(bob=MCC)
    call = job.anchor(job.settlement(1, earnings.tree, earnings.total))
    await refused(job.chain, call, "JobEscrowWrongStatus")


async def test_a_refund_leaves_what_was_anchored_in_the_last_second(
    world: World, clock: Clock
) -> None:
    job = await started_job(world, window=4)
    view = await job.view()
    await wait_time(job.chain, view.settle_deadline - 3)
    earnings = job.earnings(bob=10 * MCC)
    await anchored(job, 1, earnings)
    await wait_time(job.chain, view.settle_deadline + 1)
    await refused(job.chain, RefundJob(job.job_id), "JobEscrowNotRefundable")
    anchored_at = (await job.view()).anchored_at
    await wait_time(job.chain, anchored_at + 2 * 4 + 1)
    await make(job.chain, RefundJob(job.job_id))
    await make(job.chain, earnings.claims(1))
    assert await job.chain.balance(BOB.address) == 10 * MCC
    assert await job.chain.balance(ALICE.address) == 89 * MCC


async def test_an_open_job_that_nobody_started_is_refunded_after_its_deadline(
    world: World, clock: Clock
) -> None:
    await world.fund(ALICE, CAP)
    alice = world.chain(ALICE)
    job_id = await open_job(alice, await terms(alice))
    job = await alice.job(job_id)
    assert job is not None
    await wait_time(alice, job.settle_deadline)
    await make(alice, RefundJob(job_id))
    assert await alice.balance(ALICE.address) == 99 * MCC


async def test_one_job_never_pays_from_anothers_pot(world: World, clock: Clock) -> None:
    first, second = await started_job(world), await started_job(world)
    earnings = first.earnings(bob=60 * MCC)
    # The quorum of the first job signs a root that promises more than its total.
    settlement = first.settlement(1, earnings.tree, 10 * MCC, is_final=True)
    await make(first.chain, first.anchor(settlement))
    await survive_window(first)
    await make(first.chain, earnings.claims(1))
    await make(first.chain, RefundJob(first.job_id))
    await make(first.chain, earnings.claims(1))
    assert await first.chain.balance(BOB.address) == 10 * MCC
    view = await second.view()
    assert (view.paid, view.refunded) == (0, 0)
    await refused(
        first.chain,
        ClaimMany(tuple(replace(c, job_id=second.job_id) for c in earnings.claims(1).claims)),
        "JobEscrowUnknownRoot",
    )


async def test_events_come_by_height_and_in_order(world: World, clock: Clock) -> None:
    job = await started_job(world)
    earnings = job.earnings(bob=10 * MCC)
    await anchored(job, 1, earnings, is_final=True)
    await survive_window(job)
    await make(job.chain, earnings.claims(1))
    await make(job.chain, RefundJob(job.job_id))
    events = await job.chain.events(0, (await job.chain.head()).height)
    assert [type(event) for event in events] == [
        JobOpened,
        JobStarted,
        Anchored,
        Claimed,
        Refunded,
    ]
    heights = [event.height for event in events]
    assert heights == sorted(heights)
    middle = await job.chain.events(heights[1], heights[2])
    assert list(middle) == list(events[1:3])
    assert list(await job.chain.events(heights[-1] + 1, 10**6)) == []
