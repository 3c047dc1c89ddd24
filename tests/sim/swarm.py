"""A whole swarm in one process: the unchanged roles on memory adapters and virtual time."""

from __future__ import annotations

import functools
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import trio
import trio.testing
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from sim.wiretap import Wiretap

from meshd.ledger.beacon import BlockHashBeacon
from meshd.ledger.chain import Register, Stake
from meshd.ledger.memory_chain import GENESIS_TIME, MemoryChain, MemoryLedger
from meshd.ledger.patient import PatientChain
from meshd.node.compute.executor import Executor
from meshd.node.compute.toy import ToyExecutor, affine_dataset, affine_program, run_program
from meshd.node.compute.toy_training import training_program
from meshd.node.node import Node, NodeSettings
from meshd.node.ports import Dispatch, Ports
from meshd.node.roles.worker import WorkerSettings
from meshd.node.store import Store
from meshd.node.submitted import SubmittedJob
from meshd.node.workloads.datasets import Dataset, parse_manifest, slice_rows
from meshd.node.workloads.infer import shard_count
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.parameters import trained_weights
from meshd.node.workloads.training.plan import optimizer_units
from meshd.node.workloads.training.settings import TrainSettings, Value
from meshd.node.workloads.training.state import initial_state
from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain, digest
from meshd.p2p.identity import NOBODY, Address, Identity
from meshd.p2p.memory import MemorySwarm
from meshd.p2p.messages import ZERO, JobTerms
from meshd.p2p.network import Network

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

T = TypeVar("T")
NodeFactory = Callable[[Ports, NodeSettings], Node]
NetworkWrapper = Callable[["SimNode", Network], Network]

MCC = 10**18
DOMAIN = Domain("sim", 31373, Address(b"\x0e" * 20))
WIDTH, STEPS = 4, 4
"""The toy program: rows of so many numbers, so many products and sums."""
UNIT_PRICE = 10**12
"""MCC (smallest unit) a compute unit."""
SETTLE_IN_S = 12
"""Seconds until stakes are active."""


@functools.cache
def identity_of(name: str) -> Identity:
    """Return the same identity for the same name, always."""
    return Identity(digest(b"meshd.sim." + name.encode()))


@dataclass
class SimNode:
    """A node that can be killed and started again: its disk outlives it."""

    name: str
    identity: Identity
    settings: NodeSettings
    executor: Executor
    wrap: NetworkWrapper | None = None
    """Puts an adversary between the node's roles and the network."""
    factory: NodeFactory = Node
    store: Store = field(default_factory=Store)
    blobs: BlobStore = field(default_factory=BlobStore)
    node: Node | None = None
    scope: trio.CancelScope | None = None

    @property
    def address(self) -> Address:
        """The node's address and account."""
        return self.identity.address

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return self.node is not None


class Swarm:
    """Builds nodes over one memory swarm and one memory chain, and injects faults."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        seed: int,
        loss: float = 0.0,
        duplicate: float = 0.0,
        latency_s: tuple[float, float] = (0.02, 0.02),
    ) -> None:
        self.random = random.Random(seed)
        self.nursery = nursery
        self.ledger = MemoryLedger(DOMAIN, seed=seed)
        self._origin = trio.current_time()
        self.network = MemorySwarm(
            DOMAIN,
            nursery,
            seed=seed,
            wall=self.wall,
            latency_s=latency_s,
            loss=loss,
            duplicate=duplicate,
        )
        self.wiretap = Wiretap(DOMAIN)
        self.nodes: dict[str, SimNode] = {}
        self.injected: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        """Virtual seconds since the swarm was made."""
        return trio.current_time() - self._origin

    def wall(self) -> float:
        """Return Unix seconds."""
        return GENESIS_TIME + self.seconds

    @property
    def faults(self) -> Counter[str]:
        """Every fault so far, by kind."""
        return self.injected + self.network.faults

    # ---- nodes ---------------------------------------------------------------------------

    async def add(
        self,
        name: str,
        *roles: str,
        executor: Executor | None = None,
        slots: int = 1,
        wrap: NetworkWrapper | None = None,
        factory: NodeFactory = Node,
    ) -> SimNode:
        """Fund, register and stake a node as its *roles* need it, and start it."""
        node = SimNode(
            name,
            identity_of(name),
            NodeSettings(frozenset(roles), WorkerSettings(slots=slots)),
            executor or ToyExecutor(units_per_second=1000),
            wrap,
            factory,
        )
        self.nodes[name] = node
        self.ledger.fund(node.address, 1000 * MCC)
        chain = MemoryChain(self.ledger, node.identity)
        bits = ("orchestrator" in roles) * 1 + ("validator" in roles) * 2
        if bits:
            await chain.send("register", Register(bits, node.address))
            await chain.send("stake", Stake(100 * MCC))
        await self.start(node)
        return node

    async def start(self, node: SimNode) -> None:
        """Start *node*, for the first time or again."""
        join = self.network.rejoin if node.scope else self.network.join
        network: Network = self.wiretap.tap(join(node.identity, node.blobs))
        if node.wrap is not None:
            network = node.wrap(node, network)
        chain = PatientChain(MemoryChain(self.ledger, node.identity))
        ports = Ports(
            identity=node.identity,
            network=network,
            chain=chain,
            beacon=BlockHashBeacon(chain),
            store=node.store,
            blobs=node.blobs,
            executor=node.executor,
            dispatch=Dispatch(),
            payee=node.address,
            wall=self.wall,
        )
        node.node = node.factory(ports, node.settings)
        node.scope = trio.CancelScope()
        await self.nursery.start(self._run, node)

    async def _run(
        self, node: SimNode, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        assert node.scope is not None
        assert node.node is not None
        with node.scope:
            await node.node.run(task_status=task_status)

    def kill(self, node: SimNode) -> None:
        """End *node* where it is, as SIGKILL does."""
        assert node.scope is not None
        self.network.crash(node.address)
        node.scope.cancel()
        node.node = None

    async def restart(self, node: SimNode, *, after_s: float) -> None:
        """Kill *node* and start it again from its disk."""
        self.kill(node)
        await trio.sleep(after_s)
        await self.start(node)

    def by_address(self, address: Address) -> SimNode:
        """Return the node of *address*."""
        return next(node for node in self.nodes.values() if node.address == address)

    # ---- jobs ----------------------------------------------------------------------------

    async def submit(
        self, researcher: SimNode, *, rows: int = 64, rows_per_shard: int = 8, **over: Any
    ) -> SubmittedJob:
        """Submit a job; *over* replaces terms. It must be awaited over with `wait_over`."""
        terms = self.terms(researcher, rows=rows, rows_per_shard=rows_per_shard, **over)
        assert researcher.node is not None
        return await researcher.node.researcher.submit(terms)

    async def submit_training(
        self,
        researcher: SimNode,
        *,
        rounds: int = 4,
        shards: int = 4,
        steps: int = 4,
        batch: int = 2,
        settings: Mapping[str, Value] | None = None,
        program: bytes = b"",
        **over: Any,
    ) -> SubmittedJob:
        """Submit a job that trains *program*, or else the toy's own; *over* replaces terms."""
        program = program or training_program()
        filled = TrainSettings.fill(
            {"total_steps": rounds * steps, "batch": batch, "steps": steps, **(settings or {})}
        )
        parsed = parse_program(program)
        each = units(parsed, batch, training=True)
        each += optimizer_units(trained_weights(parsed), filled)
        cap = 5 * rounds * shards * steps * each * UNIT_PRICE
        values: dict[str, Any] = {
            "workload": "train",
            "rounds": rounds,
            "shards": shards,
            "initial_state": researcher.blobs.put(initial_state(program, filled)),
            "hyperparameters": filled.encode(),
            "max_unsettled": 96,
            "cap": cap,
            "epoch_limit": cap,
        }
        return await self.submit(
            researcher, rows_per_shard=steps * batch, program=program, **(values | over)
        )

    async def wait_over(self, researcher: SimNode, job_id: bytes, *, limit_s: float) -> None:
        """Wait until the job is over, whatever happens to the researcher meanwhile."""
        with trio.fail_after(limit_s):
            while not self.over(researcher, job_id):
                await trio.sleep(1)

    def over(self, researcher: SimNode, job_id: bytes) -> bool:
        """Return whether the researcher's node says that its job is over."""
        job = self.job(researcher, job_id)
        return job is not None and job.state.value in ("settled", "cancelled", "failed")

    def job(self, researcher: SimNode, job_id: bytes) -> SubmittedJob | None:
        """Return a job as the researcher's node sees it; None while that node is down."""
        return researcher.node.researcher.submitted.get(job_id) if researcher.node else None

    def terms(
        self,
        researcher: SimNode,
        *,
        rows: int,
        rows_per_shard: int,
        orchestrator: Address = NOBODY,
        work_s: int = 300,
        settle_s: int = 100,
        program: bytes = b"",
        dataset: Dataset | None = None,
        **over: Any,
    ) -> JobTerms:
        """Return a job's terms, with its program and data (the toy's, if none are given) in the
        researcher's blobs.
        """
        program = program or affine_program(width=WIDTH, steps=STEPS)
        if dataset is None:
            width = parse_program(program).inputs[0].shape[0]
            dataset = affine_dataset(rows, width=width, rows_per_chunk=16)
        for chunk in dataset.chunks:
            researcher.blobs.put(chunk)
        now = int(self.wall())
        total = units(parse_program(program), rows) * UNIT_PRICE
        values: dict[str, Any] = {
            "network": "sim",
            "workload": "infer",
            "researcher": researcher.address,
            "orchestrator": orchestrator,
            "program": researcher.blobs.put(program),
            "data": researcher.blobs.put(dataset.manifest_bytes),
            "rows": rows,
            "shards": shard_count(rows, rows_per_shard),
            "rows_per_shard": rows_per_shard,
            "rounds": 1,
            "initial_state": ZERO,
            "hyperparameters": (),
            "seed": ZERO,
            "price": 10**9 * UNIT_PRICE,
            "cap": 2 * total,
            "orchestrator_share": 20_000,
            "aggregator_share": 20_000,
            "audit_budget": 200_000,
            "audit_rows": 2,
            "probation_rows": 4,
            "probation_shards": 4,
            "span_shards": 32,
            "audit_shards": 1,
            "probation_span_shards": 8,
            "second_audit_share": 100_000,
            "retention": 8,
            "max_unsettled": 32,
            "epoch_limit": 2 * total,
            "window": 5,
            "work_deadline": now + work_s,
            "settle_deadline": now + work_s + settle_s,
            "beacon_source": "blockhash",
            "lag": 5,
            "silence": 10,
            "challenge_blocks": 10,
            "audit_blocks": 20,
            "lease_blocks": 60,
            "memory_bytes": 1 << 20,
            "device": "any",
            "workers": (),
            "allow_tolerance": False,
        }
        return JobTerms(**(values | over))


@functools.cache
def reference_rows(rows: int) -> tuple[bytes, ...]:
    """Return the right output of a toy job: all its rows computed in one go."""
    data = affine_program(width=WIDTH, steps=STEPS)
    program = parse_program(data)
    dataset = affine_dataset(rows, width=WIDTH, rows_per_chunk=rows)
    manifest = parse_manifest(dataset.manifest_bytes)
    chunks = {digest(chunk): chunk for chunk in dataset.chunks}
    packed = run_program(program, data, unpack(slice_rows(manifest, chunks, range(rows))))
    return tuple(unpack(packed).rows())


# ---- running ---------------------------------------------------------------------------------


@contextmanager
def seeded_secrets(seed: int) -> Iterator[None]:
    """While open, nonces and salts follow from *seed*: what a run does is repeated by it."""
    source = random.Random(f"secrets/{seed}")
    with patch.object(secrets, "token_bytes", lambda size=32: source.randbytes(size)):
        yield


def simulate(
    scenario: Callable[[Swarm], Awaitable[T]],
    *,
    seed: int = 0,
    loss: float = 0.0,
    duplicate: float = 0.0,
    latency_s: tuple[float, float] = (0.02, 0.02),
) -> T:
    """Run *scenario* on a new swarm under virtual time and return its result.

    It runs inside hypothesis, which makes trio's scheduler deterministic: the same seed is the
    same run.
    """
    results: list[T] = []

    async def main() -> None:
        error: Exception | None = None
        async with trio.open_nursery() as nursery:
            swarm = Swarm(nursery, seed=seed, loss=loss, duplicate=duplicate, latency_s=latency_s)
            try:
                results.append(await scenario(swarm))
            except Exception as raised:
                error = raised  # without the groups of the nurseries around it
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    @settings(phases=[Phase.explicit], deadline=None)
    @example(seed)
    @given(st.just(seed))
    def run(_: int) -> None:
        with seeded_secrets(seed):
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    run()
    return results[0]


def simulated(
    scenario: Callable[[Swarm], Awaitable[None]],
) -> Callable[[], None]:
    """Turn a coroutine function over a swarm into a test under virtual time."""

    def test() -> None:
        simulate(scenario)

    test.__name__ = getattr(scenario, "__name__", "test")
    test.__doc__ = scenario.__doc__
    return test
