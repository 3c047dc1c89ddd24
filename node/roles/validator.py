"""The validator: certifies the log, audits what the beacon draws for it, signs settlements."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.audits import Subject
from meshd.ledger.jobstate import JobState
from meshd.node.audits import Audit, AuditContext, reveal_due
from meshd.node.compute.executor import ExecutorError
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.kinds.choice import kind_of
from meshd.node.kinds.kind import AUDIT_SLOT, JobContext
from meshd.node.log.member import Member
from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.rounds import RoundCheck
from meshd.node.settling import SettlementSigner, Settler
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.codec import Signed
from meshd.p2p.messages import JobTerms, Message, OutputAck, SettlementRequest

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

STEP_S = 2.0
"""Seconds after which a validator looks again though nothing happened."""
BACKUP_BLOCKS = 20
"""Blocks after which a member carries a settlement to the chain itself, times its place."""
SERVE_BLOCKS = 5
AGAIN_S = 10.0
"""Seconds after which an audit that is not through is taken up again."""


class Validator:
    """Takes its seat in every committee that the chain draws it for."""

    def __init__(self, ports: Ports, jobs: Jobs, *, audits_at_once: int = 1) -> None:
        self._ports = ports
        self._jobs = jobs
        self._slots = trio.CapacityLimiter(audits_at_once)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Validate until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for record in self._jobs.ready():
                assert record.started is not None
                if self._ports.address in record.started.committee:
                    nursery.start_soon(self._serve_job, record)

    async def _serve_job(self, record: JobRecord) -> None:
        try:
            plan = await self._jobs.load_plan(record)
        except WorkloadError as error:
            log.warning("job cannot be audited", job=record.id.hex()[:8], why=str(error))
            return
        view = self._jobs.view(record, plan)
        job = JobContext(self._ports, self._jobs, record, plan, view)
        await _Seat(AuditContext(job, kind_of(job), self._slots)).run()


class _Seat:
    """One member of one job's committee."""

    def __init__(self, context: AuditContext) -> None:
        self._context = context
        self._ports = context.job.ports
        self._view: LogView = context.job.view
        self._record = context.job.record
        self._terms: JobTerms = self._view.job.terms
        self._signer = SettlementSigner(self._ports, self._view)
        self._settler = Settler(self._ports, self._view)
        self._taken: set[tuple[bytes, int, int, int]] = set()
        """Audits at work: (commitment, kind, beacon's height, slot)."""
        self._revealed: set[bytes] = set()

    async def run(self) -> None:
        """Hold the seat until the job's settle deadline is over."""
        plan = self._context.job.plan
        check = RoundCheck(self._context.job, plan) if isinstance(plan, TrainPlan) else None
        member = Member(self._ports, self._view, check.problem if check is not None else None)
        dispatch, job_id = self._ports.dispatch, self._record.id
        async with trio.open_nursery() as nursery:
            await nursery.start(member.run)
            with (
                dispatch.on(SettlementRequest, job_id, self._signer.on_request),
                dispatch.on(OutputAck, job_id, self._on_ack),
            ):
                if check is not None:
                    nursery.start_soon(self._follow_rounds, check)
                nursery.start_soon(self._audit_all, nursery)
                await self._settle_and_serve()
                nursery.cancel_scope.cancel()

    # ---- rounds and audits ---------------------------------------------------------------

    async def _follow_rounds(self, check: RoundCheck) -> None:
        """Show which bits this machine computes, then compute every round as it closes."""
        try:
            kind = self._context.kind
            await kind.numeric_class(AUDIT_SLOT, kind.audit_limits)
        except (ExecutorError, WorkloadError) as error:
            job = self._record.id.hex()[:8]
            log.warning("job's shards cannot be computed here", job=job, why=str(error))
        await check.run()

    async def _audit_all(self, nursery: trio.Nursery) -> None:
        while not self._view.state.book.closed:
            height = (await self._ports.chain.head()).height
            for subject in await self._view.audits(height):
                track = subject.track
                assert track is not None
                key = (subject.hash, int(track.kind), track.beacon_height, track.index)
                if track.auditor == self._ports.address and key not in self._taken:
                    self._taken.add(key)
                    nursery.start_soon(self._audit, subject, key)
            reveal_due(self._context, self._revealed, nursery)
            with trio.move_on_after(STEP_S) as step:
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(self._wake_on_block, height, step)
                    await self._view.changed(STEP_S)
                    step.cancel()

    async def _wake_on_block(self, height: int, step: trio.CancelScope) -> None:
        await self._ports.chain.wait_height(height + 1)
        step.cancel()

    async def _audit(self, subject: Subject, key: tuple[bytes, int, int, int]) -> None:
        """Audit; what the log has not taken by then is sent again by another run."""
        try:
            await Audit(self._context, subject).run()
        except (ExecutorError, WorkloadError) as error:
            log.warning("audit failed", shard=subject.place[0], why=str(error))
        await trio.sleep(AGAIN_S)
        self._taken.discard(key)

    async def _on_ack(self, signed: Signed[Message]) -> None:
        """The aggregator holds an output: it need not be kept here any more."""
        if signed.signer != self._record.orchestrator:
            return
        message = cast(OutputAck, signed.message)
        for work in self._view.state.works.values():
            if work.commitment.message.output_root == message.output_root:
                for finding in work.findings:
                    if finding.auditor == self._ports.address:
                        self._ports.blobs.remove(finding.attestation.message.output)

    # ---- settlement ----------------------------------------------------------------------

    async def _settle_and_serve(self) -> None:
        """Carry the settlement to the chain if nobody else does; serve the log to whoever asks
        for it late, until the settle deadline is over.
        """
        waited = 0
        patience = BACKUP_BLOCKS * (1 + self._view.job.genesis.committee.index(self._ports.address))
        while True:
            head = await self._ports.chain.head()
            if await self._settler.too_late(head):
                return
            job = await self._ports.chain.job(self._record.id)
            paid = job is not None and job.settled and job.paid >= job.total
            state = await self._signer.closing.state()
            if state.book.closed and not paid:
                waited += 1
                if waited > patience:
                    await self._settle_all(state)
            blocks = 1 if state.book.closed and not paid else SERVE_BLOCKS
            await self._ports.chain.wait_height(head.height + blocks)

    async def _settle_all(self, state: JobState) -> None:
        epoch = 0
        while epoch < state.book.epoch:
            before, epoch = epoch, await self._settler.settle_newest(state)
            if epoch <= before:
                return
