"""A whole swarm in one process: the unchanged roles on memory adapters and virtual time."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import trio

from meshd.ledger.beacon import BlockHashBeacon
from meshd.ledger.chain import Register, Stake
from meshd.ledger.memory_chain import GENESIS_TIME, MemoryChain, MemoryLedger
from meshd.ledger.patient import PatientChain
from meshd.node.compute.executor import Executor
from meshd.node.compute.toy import ToyExecutor, affine_dataset, affine_program
from meshd.node.node import Node, NodeSettings
from meshd.node.ports import Dispatch, Ports
from meshd.node.researcher import SubmittedJob
from meshd.node.roles.worker import WorkerSettings
from meshd.node.store import Store
from meshd.node.workloads.infer import shard_count
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program
from meshd.p2p.blobs import BlobStore
from meshd.p2p.codec import Domain
from meshd.p2p.identity import NOBODY, Address, Identity
from meshd.p2p.memory import MemorySwarm
from meshd.p2p.messages import ZERO, JobTerms

MCC = 10**18
DOMAIN = Domain("sim", 31373, Address(b"\x0e" * 20))


def identity_of(name: str) -> Identity:
    """Return the same identity for the same name, always."""
    from meshd.p2p.codec import digest

    return Identity(digest(b"meshd.sim." + name.encode()))


@dataclass
class SimNode:
    """A node that can be killed and started again: its disk outlives it."""

    name: str
    identity: Identity
    settings: NodeSettings
    executor: Executor
    store: Store = field(default_factory=Store)
    blobs: BlobStore = field(default_factory=BlobStore)
    node: Node | None = None
    scope: trio.CancelScope | None = None

    @property
    def address(self) -> Address:
        return self.identity.address


class Swarm:
    """Builds nodes over one memory swarm and one memory chain, and injects faults."""

    def __init__(self, nursery: trio.Nursery, *, seed: int, loss: float = 0.0, duplicate: float = 0.0):
        self.random = random.Random(seed)
        self.nursery = nursery
        self.ledger = MemoryLedger(DOMAIN, seed=seed)
        self.network = MemorySwarm(
            DOMAIN, nursery, seed=seed, wall=self.wall, loss=loss, duplicate=duplicate
        )
        self.nodes: dict[str, SimNode] = {}
        self.faults: Counter[str] = Counter()

    def wall(self) -> float:
        return GENESIS_TIME + trio.current_time() - self._origin

    @property
    def _origin(self) -> float:
        if not hasattr(self, "_started"):
            self._started = trio.current_time()
        return self._started

    async def add(
        self, name: str, *roles: str, executor: Executor | None = None, slots: int = 1
    ) -> SimNode:
        node = SimNode(
            name,
            identity_of(name),
            NodeSettings(frozenset(roles), WorkerSettings(slots=slots)),
            executor or ToyExecutor(units_per_second=1000),
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
        network = (self.network.rejoin if node.scope else self.network.join)(
            node.identity, node.blobs
        )
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
        node.node = Node(ports, node.settings)
        node.scope = trio.CancelScope()
        await self.nursery.start(self._run, node)

    async def _run(self, node: SimNode, *, task_status=trio.TASK_STATUS_IGNORED) -> None:
        assert node.scope is not None and node.node is not None
        with node.scope:
            await node.node.run(task_status=task_status)

    def kill(self, node: SimNode) -> None:
        assert node.scope is not None
        self.network.crash(node.address)
        node.scope.cancel()
        node.node = None

    async def submit(self, researcher: SimNode, *, rows: int = 64, rows_per_shard: int = 8, **over) -> SubmittedJob:
        terms = self.terms(researcher, rows=rows, rows_per_shard=rows_per_shard, **over)
        assert researcher.node is not None
        return await researcher.node.researcher.submit(terms)

    def terms(self, researcher: SimNode, *, rows: int, rows_per_shard: int, orchestrator: Address = NOBODY, **over) -> JobTerms:
        program = affine_program(width=4, steps=4)
        dataset = affine_dataset(rows, width=4, rows_per_chunk=16)
        for chunk in dataset.chunks:
            researcher.blobs.put(chunk)
        now = int(self.wall())
        total = units(parse_program(program), rows)
        price = 10**9 * 10**12  # 10^12 smallest units a compute unit
        values = dict(
            network="sim",
            workload="infer",
            researcher=researcher.address,
            orchestrator=orchestrator,
            program=researcher.blobs.put(program),
            data=researcher.blobs.put(dataset.manifest_bytes),
            rows=rows,
            shards=shard_count(rows, rows_per_shard),
            rows_per_shard=rows_per_shard,
            rounds=1,
            initial_state=ZERO,
            hyperparameters=(),
            seed=ZERO,
            price=price,
            cap=2 * total * 10**12,
            orchestrator_share=20_000,
            aggregator_share=20_000,
            audit_budget=200_000,
            audit_rows=2,
            probation_rows=4,
            probation_shards=4,
            span_shards=32,
            audit_shards=1,
            probation_span_shards=8,
            second_audit_share=100_000,
            retention=8,
            max_unsettled=32,
            epoch_limit=2 * total * 10**12,
            window=5,
            work_deadline=now + 900,
            settle_deadline=now + 1200,
            beacon_source="blockhash",
            lag=5,
            silence=10,
            challenge_blocks=10,
            audit_blocks=20,
            lease_blocks=60,
            memory_bytes=1 << 20,
            device="any",
            workers=(),
            allow_tolerance=False,
        )
        return JobTerms(**(values | over))
