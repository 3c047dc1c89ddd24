"""The aggregator: gathers accepted outputs, combines them in order, and settles the job."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import structlog
import trio

from meshd.ledger.works import Work
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.log.follower import Follower
from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.settling import Closing, Settler
from meshd.node.verification.outputs import OutputError, ResultPlace, open_output, packed_rows
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan
from meshd.node.workloads.plans import Plan
from meshd.node.workloads.training.plan import TrainPlan
from meshd.node.workloads.training.state import result_file
from meshd.p2p.identity import Address
from meshd.p2p.messages import AuditResult, OutputAck
from meshd.p2p.network import NetworkError

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

STEP_S = 2.0
GATHER_AT_ONCE = 4
FETCH_S, MAX_FETCH_S = 15.0, 960.0
"""Seconds that bringing an output here may take at the first try, and at the last ones."""


class Aggregator:
    """Compiles the output of every job that this node keeps."""

    def __init__(self, ports: Ports, jobs: Jobs) -> None:
        self.ports = ports
        self.jobs = jobs
        self._outputs: dict[bytes, tuple[tuple[bytes, ...], bytes]] = {}
        """Job -> commitments that its output is made of, and the output's blob."""
        self._done = trio.Event()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Aggregate until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for record in self.jobs.ready():
                if record.orchestrator == self.ports.address:
                    nursery.start_soon(self._serve_job, record)

    async def _serve_job(self, record: JobRecord) -> None:
        try:
            plan = await self.jobs.load_plan(record)
        except WorkloadError as error:
            log.warning("job cannot be aggregated", job=record.id.hex()[:8], why=str(error))
            return
        await _JobOutput(self, record, plan).run()

    def finished(self, job_id: bytes, made_of: tuple[bytes, ...], output: bytes) -> None:
        """Take a job's combined output, by its blob's digest."""
        self._outputs[job_id] = (made_of, output)
        self._done.set()
        self._done = trio.Event()

    async def output(self, job_id: bytes, made_of: tuple[bytes, ...]) -> bytes:
        """Wait for a job's output, combined of the results with these commitments (one a shard,
        in order), and return its blob's digest.
        """
        while self._outputs.get(job_id, ((), b""))[0] != made_of:
            await self._done.wait()
        return self._outputs[job_id][1]


class _JobOutput:
    """One job's output, shard by shard, and its settlements."""

    def __init__(
        self,
        aggregator: Aggregator,
        record: JobRecord,
        plan: Plan,
    ) -> None:
        self._aggregator = aggregator
        self._ports = aggregator.ports
        self._record = record
        self._plan = plan
        self._view: LogView = aggregator.jobs.view(record, plan)
        self._held: dict[int, tuple[bytes, bytes]] = {}
        """Shard -> (commitment, blob of its packed rows)."""
        self._gathering: set[bytes] = set()
        self._patience: dict[bytes, float] = {}
        self._slots = trio.CapacityLimiter(GATHER_AT_ONCE)
        self._settled_epochs = 0
        self._closing = Closing(self._ports, self._view)

    async def run(self) -> None:
        """Gather, combine and settle until the job is over on chain."""
        await self._load()
        async with trio.open_nursery() as nursery:
            await nursery.start(Follower(self._ports, self._view).run)
            if isinstance(self._plan, InferPlan):
                nursery.start_soon(self._gather_all, self._plan)
            else:
                nursery.start_soon(self._keep_last_state, self._plan)
            await self._settle_all()
            nursery.cancel_scope.cancel()

    # ---- outputs -------------------------------------------------------------------------

    async def _load(self) -> None:
        rows = await self._ports.store.rows(
            "select shard, commitment, blob from output where job_id=?", (self._record.id,)
        )
        self._held = {
            shard: (commitment, blob)
            for shard, commitment, blob in rows
            if blob in self._ports.blobs
        }

    async def _keep_last_state(self, plan: TrainPlan) -> None:
        """Make a training job's output of its last round's state."""
        while not self._view.state.rounds.done:
            await self._view.changed(STEP_S)
        state = self._view.state.rounds.state
        members = self._view.job.genesis.committee
        jobs, limit = self._aggregator.jobs, plan.state_bytes_limit
        await jobs.fetch(self._record, state, limit, others=members)
        output = result_file(self._ports.blobs.read(state), plan.program)
        name = self._ports.blobs.put(output, readers=[Address(self._view.job.terms.researcher)])
        self._aggregator.finished(self._record.id, (state,), name)

    async def _gather_all(self, plan: InferPlan) -> None:
        shards = range(self._view.job.terms.shards)
        combined: tuple[bytes, ...] = ()
        async with trio.open_nursery() as nursery:
            while True:
                works = [self._view.state.shard_done(shard) for shard in shards]
                for shard, work in zip(shards, works, strict=True):
                    if work is None or self._has(shard, work) or work.hash in self._gathering:
                        continue
                    self._gathering.add(work.hash)
                    nursery.start_soon(self._gather, plan, shard, work)
                made_of = tuple(work.hash for work in works if work is not None)
                held = tuple(self._held[shard][0] for shard in shards if shard in self._held)
                if len(made_of) == len(works) and made_of == held and made_of != combined:
                    self._combine(plan, made_of)
                    combined = made_of
                await self._view.changed(STEP_S)

    def _has(self, shard: int, work: Work) -> bool:
        return self._held.get(shard, (b"",))[0] == work.hash

    async def _gather(self, plan: InferPlan, shard: int, work: Work) -> None:
        try:
            async with self._slots:
                await self._try_gather(plan, shard, work)
        finally:
            self._gathering.discard(work.hash)

    async def _try_gather(self, plan: InferPlan, shard: int, work: Work) -> None:
        """Fetch an accepted output, check it, keep it, then tell its auditors."""
        commitment = work.commitment.message
        place = ResultPlace(self._record.id, shard, work.worker)
        for finding in work.findings:
            if finding.result is not AuditResult.ACCEPTED:
                continue
            name = finding.attestation.message.output
            try:
                await self._ports.network.fetch(
                    name,
                    max_bytes=commitment.output_bytes + 1024,
                    holders=[finding.auditor, work.worker],
                    deadline_s=self._patience.get(work.hash, FETCH_S),
                )
                # It may have been brought here with no list of readers: it is the researcher's.
                self._ports.blobs.restrict(name, [Address(self._view.job.terms.researcher)])
                blob = self._ports.blobs.read(name)
                open_output(place, commitment, blob, plan.output_schema)
            except (NetworkError, OutputError) as error:
                log.info("output not had yet", shard=shard, why=str(error))
                longer = 2 * self._patience.get(work.hash, FETCH_S)
                self._patience[work.hash] = min(longer, MAX_FETCH_S)
                continue
            await self._keep(shard, work, blob)
            await self._acknowledge(shard, finding.auditor, commitment.output_root)
            return

    async def _keep(self, shard: int, work: Work, blob: bytes) -> None:
        rows = self._ports.blobs.put(packed_rows(blob), readers=())
        values = (self._record.id, shard, work.hash, rows)

        def step(db: sqlite3.Connection) -> None:
            db.execute("insert or replace into output values(?,?,?,?)", values)

        await self._ports.store.write(step)
        self._held[shard] = (work.hash, rows)

    async def _acknowledge(self, shard: int, auditor: Address, output_root: bytes) -> None:
        ack = OutputAck(job_id=self._record.id, shard=shard, output_root=output_root)
        try:
            await self._ports.request(auditor, self._ports.sign(ack), deadline_s=5.0)
        except NetworkError as error:
            log.debug("output not acknowledged", shard=shard, why=str(error))

    def _combine(self, plan: InferPlan, made_of: tuple[bytes, ...]) -> None:
        shards = range(self._view.job.terms.shards)
        blobs = self._ports.blobs
        output = plan.combine([blobs.read(self._held[shard][1]) for shard in shards])
        readers = [Address(self._view.job.terms.researcher)]
        self._aggregator.finished(self._record.id, made_of, blobs.put(output, readers=readers))

    # ---- settlement ----------------------------------------------------------------------

    async def _settle_all(self) -> None:
        """Carry each final cut to the chain, until the last one is there and paid."""
        settler = Settler(self._ports, self._view)
        while True:
            state = await self._closing.state()
            while self._settled_epochs < state.book.epoch:
                epoch = await settler.settle_newest(state)
                if epoch <= self._settled_epochs:
                    break
                self._settled_epochs = epoch
                log.info("settled", job=self._record.id.hex()[:8], epoch=epoch)
            head = await self._ports.chain.head()
            done = state.book.closed and self._settled_epochs == state.book.epoch
            if done or await settler.too_late(head):
                return
            await self._view.changed(STEP_S)
