"""From a seed to a swarm with cheaters and faults, run to the job's end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio
from sim import adversaries as bad
from sim.invariants import Cast, check_all
from sim.swarm import SETTLE_IN_S, SimNode, Swarm, identity_of, simulate

from meshd.node.compute.executor import Executor, TrainRequest
from meshd.node.compute.toy import ToyExecutor
from meshd.node.researcher import SubmitError
from meshd.node.submitted import SubmittedJob
from meshd.p2p.identity import Address
from meshd.p2p.network import Network

WORK_S, SETTLE_S = 190, 100
LONG = 1000
"""Seeds from here on may take longer."""
ACTION_S = 50.0
"""Faults begin within so many seconds of the submission."""


@dataclass(frozen=True)
class Fault:
    """Something that breaks, and for how long (for good: None)."""

    kind: str
    at: float
    for_s: float | None
    names: tuple[str, ...] = ()
    blocks: int = 0


@dataclass(frozen=True)
class Training:
    """A training job: how it is cut and when its rounds and spans close."""

    rounds: int
    shards: int
    span_shards: int
    min_share: float


@dataclass(frozen=True)
class Scenario:
    """One run: everything follows from the seed."""

    seed: int
    workers: tuple[str, ...]
    validators: tuple[str, ...]
    """Names of the committee; other roles' names may be among them."""
    rows: int
    rows_per_shard: int
    speed: int
    loss: float
    duplicate: float
    latency_s: tuple[float, float]
    roles: dict[str, str]
    """Name -> what kind of cheater it is."""
    faults: tuple[Fault, ...]
    epoch_share: float
    """Epoch limit as a share of the cap."""
    training: Training | None = None
    """None: the job is one of inference."""

    @property
    def must_settle(self) -> bool:
        """Whether nothing excuses a job that is not done in time."""
        good = set(self.workers) - set(self.roles) - self.troubled
        broken = any(fault.kind in ("death", "cancel") for fault in self.faults)
        honest = "oscar" not in self.roles
        small = self.rows <= 8 * self.rows_per_shard
        if self.training is not None:
            # The gate may well keep everybody out where many contributions are poisoned, and
            # whoever cannot audit its own shards is one auditor less in a small committee.
            small = not POISONS & set(self.roles.values()) and len(self.validators) > 2
        return bool(good) and honest and not broken and self.loss <= 0.02 and small

    @property
    def troubled(self) -> frozenset[str]:
        """Nodes that a fault keeps from answering for a while."""
        return frozenset(name for fault in self.faults for name in fault.names)


WORKERS = ("inventor", "cache", "hoarder", "closed", "malformed", "dying")
POISONS = {"flipping", "zeroing", "noisy", "copying", "skipping"}
TRAINERS = (
    *("flipping", "zeroing", "noisy", "copying", "skipping", "sleeping"),
    *("misremembering", "inexact", "hoarder", "closed", "malformed", "dying"),
)
AUDITORS = ("accuser", "stamp", "unchallenging", "unattesting", "unjudging")
ORCHESTRATORS = ("dropping", "withholding", "equivocating", "overpaying", "favouring")
CLOSERS = (*ORCHESTRATORS, "misclosing", "excluding")


def scenario_of(seed: int) -> Scenario:
    """Return the scenario of *seed*."""
    luck = random.Random(f"scenario/{seed}")
    workers = tuple(f"worker{i}" for i in range(luck.choices((2, 3, 4, 5), (10, 6, 2, 1))[0]))
    validators = [
        f"validator{i}" for i in range(luck.choices((1, 2, 3, 4, 5, 7), (3, 2, 12, 2, 2, 1))[0])
    ]
    if luck.random() < 0.1:
        validators[0] = "oscar"
    if luck.random() < 0.1 and len(validators) > 2:
        validators[-1] = workers[-1]
    training = _training(seed)
    kinds = (WORKERS, ORCHESTRATORS) if training is None else (TRAINERS, CLOSERS)
    roles = _roles(luck, workers, tuple(validators), *kinds)
    return Scenario(
        seed=seed,
        workers=workers,
        validators=tuple(validators),
        rows=luck.choices((1, 2, 3, 4, 6, 12), (3, 6, 6, 4, 2, 1))[0] * 4,
        rows_per_shard=luck.choice((4, 4, 4, 8)),
        speed=luck.choice((40, 100, 1000)),
        loss=luck.choice((0.0, 0.0, 0.02, 0.05, 0.1)),
        duplicate=luck.choice((0.0, 0.0, 0.1)),
        latency_s=luck.choice(((0.02, 0.02), (0.02, 0.02), (0.005, 0.1))),
        roles=roles,
        faults=_faults(luck, workers, tuple(validators)),
        epoch_share=luck.choice((1.0, 1.0, 0.3)),
        training=training,
    )


def _training(seed: int) -> Training | None:
    """Return how the job of *seed* trains; None for every other seed or so."""
    luck = random.Random(f"training/{seed}")
    if luck.random() < 0.5:
        return None
    long = seed >= LONG
    return Training(
        rounds=luck.choice((2, 3, 4) if long else (1, 2, 2)),
        shards=luck.choice((1, 3, 4, 5) if long else (1, 3, 4, 4)),
        span_shards=luck.choice((2, 4, 32)),
        min_share=luck.choice((1.0, 0.75, 0.5)),
    )


def _roles(
    luck: random.Random,
    workers: tuple[str, ...],
    validators: tuple[str, ...],
    cheaters: tuple[str, ...],
    orchestrators: tuple[str, ...],
) -> dict[str, str]:
    roles = {}
    if luck.random() < 0.5:
        for name in luck.sample(workers, luck.randint(1, max(1, len(workers) // 2))):
            if name not in validators:
                roles[name] = luck.choice(cheaters)
    minority = (len(validators) - 1) // 2
    if minority and luck.random() < 0.4:
        for name in luck.sample(validators, luck.randint(1, min(minority, 2))):
            if name not in workers and name != "oscar":
                roles[name] = luck.choice(AUDITORS)
    if luck.random() < 0.15:
        roles["oscar"] = luck.choice(orchestrators)
    return roles


def _faults(
    luck: random.Random, workers: tuple[str, ...], validators: tuple[str, ...]
) -> tuple[Fault, ...]:
    everybody = tuple(dict.fromkeys(("oscar", "rita", *workers, *validators)))
    faults = []
    for _ in range(luck.choice((0, 1, 2, 3, 5))):
        at, lasts = luck.uniform(0, ACTION_S), luck.uniform(1, 30)
        kind = luck.choice(("crash", "crash", "crash", "partition", "outage", "lag"))
        group = everybody
        if kind in ("crash", "lag"):
            group = (luck.choice(everybody),)
        elif kind == "partition":
            group = tuple(luck.sample(everybody, luck.randint(1, len(everybody) // 2)))
        elif luck.random() < 0.7:
            group = (luck.choice(everybody),)
        faults.append(Fault(kind, at, lasts, group, luck.randint(1, 4)))
    if luck.random() < 0.12:
        dead = luck.choice(("oscar", *workers, *validators))
        faults.append(Fault("death", luck.uniform(5, ACTION_S), None, (dead,)))
    if luck.random() < 0.1:
        faults.append(Fault("cancel", luck.uniform(0, ACTION_S), None))
    return tuple(faults)


@dataclass(frozen=True)
class Run:
    """What one run came to."""

    seed: int
    state: str
    virtual_s: float
    faults: Counter[str]


def run_seed(seed: int) -> Run:
    """Run the scenario of *seed*; raises AssertionError where an invariant does not hold."""
    scenario = scenario_of(seed)
    return simulate(
        _Player(scenario).play,
        seed=seed,
        loss=scenario.loss,
        duplicate=scenario.duplicate,
        latency_s=scenario.latency_s,
    )


class _Player:
    """Plays one scenario on one swarm."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._locks: dict[str, trio.Lock] = {}
        self._dead: set[str] = set()

    async def play(self, swarm: Swarm) -> Run:
        plan = self._scenario
        await self._cast(swarm)
        rita = swarm.nodes["rita"]
        await trio.sleep(SETTLE_IN_S)
        job = await self._submit(swarm, rita)
        swarm.injected.update(plan.roles.values())
        async with trio.open_nursery() as nursery:
            for fault in plan.faults:
                nursery.start_soon(self._break, swarm, fault, job.id)
            await trio.sleep(ACTION_S / 2)
            await swarm.wait_over(rita, job.id, limit_s=WORK_S + SETTLE_S + 120)
            nursery.cancel_scope.cancel()
        await self._wait_escrow(swarm, job.id)
        if rita.node is None:
            await swarm.start(rita)
        troubled = set(plan.troubled)
        if plan.loss > 0.05:
            troubled |= set(plan.workers)
        cast = Cast(frozenset(plan.roles), frozenset(troubled))
        await check_all(swarm, rita, job.id, cast)
        final = swarm.job(rita, job.id)
        assert final is not None
        assert final.state.value == "settled" or not plan.must_settle, final.detail
        return Run(plan.seed, final.state.value, swarm.seconds, swarm.faults)

    async def _submit(self, swarm: Swarm, rita: SimNode) -> SubmittedJob:
        plan, training = self._scenario, self._scenario.training
        terms: dict[str, Any] = {"work_s": WORK_S, "settle_s": SETTLE_S, "lease_blocks": 40}
        if training is None:
            cap = 2 * plan.rows * 32 * 10**12
            terms["epoch_limit"] = int(cap * plan.epoch_share)
            return await swarm.submit(
                rita, rows=plan.rows, rows_per_shard=plan.rows_per_shard, **terms
            )
        return await swarm.submit_training(
            rita,
            rounds=training.rounds,
            shards=training.shards,
            settings={"min_share": training.min_share},
            span_shards=training.span_shards,
            probation_span_shards=max(1, training.span_shards // 4),
            **terms,
        )

    async def _wait_escrow(self, swarm: Swarm, job_id: bytes) -> None:
        """Let the others be paid: the researcher's job is over when its own money is."""
        while swarm.ledger.escrow(job_id).held and swarm.seconds < WORK_S + 2 * SETTLE_S + 60:
            await trio.sleep(5)

    # ---- the cast ------------------------------------------------------------------------

    async def _cast(self, swarm: Swarm) -> None:
        plan = self._scenario
        await self._add(swarm, "oscar", "orchestrator", "aggregator")
        for name in plan.validators:
            if name not in ("oscar", *plan.workers):
                await self._add(swarm, name, "validator")
        for name in plan.workers:
            await self._add(swarm, name, "worker")
        await self._add(swarm, "rita")

    async def _add(self, swarm: Swarm, name: str, *roles: str) -> None:
        if name in self._scenario.validators and "validator" not in roles:
            roles = (*roles, "validator")
        kind = self._scenario.roles.get(name, "")
        executor = _executor(kind, self._scenario, swarm, worker="worker" in roles)
        wrap = self._wrapper(swarm, kind)
        await swarm.add(name, *roles, executor=executor, wrap=wrap)

    def _wrapper(self, swarm: Swarm, kind: str) -> Callable[[SimNode, Network], Network] | None:
        seed = self._scenario.seed
        friend = identity_of(self._scenario.workers[0]).address
        by_kind: dict[str, Callable[[SimNode, Network], Network]] = {
            "closed": lambda _, net: bad.NeverOpening(net),
            "malformed": lambda node, net: bad.OpeningMalformed(net, node.identity),
            "dying": lambda node, net: bad.CommittingAndDying(net, lambda: self._die(swarm, node)),
            "accuser": lambda node, net: bad.FalseAccuser(net, node.identity),
            "stamp": lambda node, net: bad.RubberStamp(net, node.identity),
            "unchallenging": lambda node, net: bad.never_challenging(net, node.identity),
            "unattesting": lambda node, net: bad.never_attesting(net, node.identity),
            "unjudging": lambda node, net: bad.attesting_unjudged(net, node.identity),
            "dropping": lambda _, net: bad.Dropping(net, friend),
            "withholding": lambda _, net: bad.Withholding(net),
            "equivocating": lambda node, net: bad.Equivocating(net, node.identity, 0.3, seed),
            "misclosing": lambda node, net: bad.ClosingWrongly(net, node.identity),
            "excluding": lambda node, net: bad.ClosingWithout(net, node.identity),
            "overpaying": lambda node, net: bad.Overpaying(net, node.identity, 0.2, seed),
            "favouring": lambda node, net: bad.Favouring(net, node.identity, 0.3, seed, friend),
        }
        return by_kind.get(kind)

    def _die(self, swarm: Swarm, node: SimNode) -> None:
        if node.name not in self._dead:
            self._dead.add(node.name)
            swarm.nursery.start_soon(self._kill, swarm, node)

    async def _kill(self, swarm: Swarm, node: SimNode) -> None:
        async with self._lock(node.name):
            if node.up:
                swarm.kill(node)

    def _lock(self, name: str) -> trio.Lock:
        return self._locks.setdefault(name, trio.Lock())

    # ---- faults --------------------------------------------------------------------------

    async def _break(self, swarm: Swarm, fault: Fault, job_id: bytes) -> None:
        await trio.sleep(fault.at)
        swarm.injected[f"fault {fault.kind}"] += 1
        nodes = [swarm.nodes[name] for name in fault.names]
        match fault.kind:
            case "crash":
                async with self._lock(nodes[0].name):
                    if nodes[0].up and nodes[0].name not in self._dead:
                        await swarm.restart(nodes[0], after_s=fault.for_s or 0)
            case "death":
                self._dead.add(nodes[0].name)
                await self._kill(swarm, nodes[0])
            case "partition":
                async with self._lock("partition"):
                    swarm.network.partition([[node.address for node in nodes]])
                    await trio.sleep(fault.for_s or 0)
                    swarm.network.heal()
            case "outage":
                everybody = len(nodes) == len(swarm.nodes)
                until = trio.current_time() + (fault.for_s or 0)
                only: Address | None = None if everybody else nodes[0].address
                swarm.ledger.outage(until, only)
            case "lag":
                swarm.ledger.lagging(nodes[0].address, fault.blocks)
                await trio.sleep(fault.for_s or 0)
                swarm.ledger.lagging(nodes[0].address, 0)
            case "cancel":
                await self._cancel(swarm, job_id)

    async def _cancel(self, swarm: Swarm, job_id: bytes) -> None:
        async with self._lock("rita"):
            rita = swarm.nodes["rita"]
            if rita.node is None:
                return
            with trio.move_on_after(30):
                try:
                    await rita.node.researcher.cancel(job_id)
                except SubmitError:
                    return  # it is over already, or nobody is there to stop it


def _executor(kind: str, scenario: Scenario, swarm: Swarm, *, worker: bool) -> Executor:
    speed, seed = scenario.speed, scenario.seed
    if scenario.training is not None:  # a shard takes 0.5, 2 or 5 s, closing a round nearly none
        speed = 10 * speed if worker and speed < 1000 else 4000 if worker else 100_000
    honest = ToyExecutor(units_per_second=speed)
    by_kind: dict[str, Callable[[], Executor]] = {
        "inventor": lambda: bad.Inventing(honest, 0.5, seed),
        "cache": lambda: bad.Caching(honest),
        "hoarder": lambda: bad.Hoarding(honest),
        "flipping": lambda: bad.Poisoning(honest, bad.flipped),
        "zeroing": lambda: bad.Poisoning(honest, bad.zeroed),
        "noisy": lambda: bad.Poisoning(honest, bad.noise, seed=seed),
        "copying": lambda: bad.Copying(honest, lambda job: contributed(swarm, job)),
        "skipping": lambda: bad.Skipping(honest),
        "sleeping": lambda: bad.Skipping(honest, first=2),
        "misremembering": lambda: bad.Misremembering(honest),
        "inexact": lambda: bad.Inexact(honest),
    }
    return by_kind.get(kind, lambda: honest)()


def contributed(swarm: Swarm, job: TrainRequest) -> bytes | None:
    """Return what somebody contributed to the round of *job*; contributions are public."""
    for worker, name in swarm.wiretap.contributions(job.job_id, job.round):
        blobs = swarm.by_address(worker).blobs
        if name in blobs:
            return blobs.read(name)
    return None
