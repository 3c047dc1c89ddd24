"""Inference: rows stay with their worker until some are drawn, and agree within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import trio

from meshd.ledger.audits import Finding, Subject
from meshd.ledger.works import Work
from meshd.node.compute.executor import InferRequest, Limits
from meshd.node.kinds.kind import AUDIT_SLOT, TRIAL_SLOT, Computed, JobContext, Shard
from meshd.node.verification.outputs import (
    OutputError,
    ResultPlace,
    disagreeing,
    open_output,
    output_blob,
    packed_rows,
)
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan
from meshd.node.workloads.rows import unpack
from meshd.p2p.blobs import BlobError
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import ZERO, Assignment, AuditResult, Challenge, Commitment, Open
from meshd.p2p.network import NetworkError

log = structlog.get_logger()

REVEALED_S = 10.0
"""Seconds to bring another auditor's revealed rows here."""
MAX_ROWS_BYTES = 64 << 20


class InferKind:
    """The shards of one inference job."""

    def __init__(self, context: JobContext, plan: InferPlan) -> None:
        self._context = context
        self._ports = context.ports
        self._plan = plan
        self._terms = context.view.job.terms

    @property
    def _owners(self) -> list[Address]:
        """Whose an accepted result is: who compiles it, and who paid for it."""
        return [self._context.record.orchestrator, Address(self._terms.researcher)]

    @property
    def audit_limits(self) -> Limits:
        """What computing rows again may use."""
        return Limits()

    async def numeric_class(self, slot: int, limits: Limits) -> bytes:
        """Return zero: rows are compared with a tolerance that every machine keeps to."""
        await trio.lowlevel.checkpoint()
        return ZERO

    def assignment_problem(self, assignment: Assignment) -> str | None:
        """Return why *assignment* is not one of this job's shards, None if it is."""
        if assignment.shard >= self._terms.shards:
            return f"the job has no shard {assignment.shard}"
        if (assignment.units, assignment.input_hash) != (
            self._plan.units(assignment.shard),
            self._plan.input_hash(assignment.round, assignment.shard, ZERO),
        ):
            return "the assignment's units or input are not those of its shard"
        return None

    # ---- the worker's side ---------------------------------------------------------------

    async def compute(self, shard: Shard, slot: int, limits: Limits) -> Computed:
        """Compute a shard's rows; its root is over rows with salts of the lease's own seed."""
        message = shard.assignment.message
        rows = self._plan.rows(message.shard)
        request = await self._request(slot, rows, limits)
        began = trio.current_time()
        packed = await self._ports.executor.infer(request)
        seconds = trio.current_time() - began
        place = ResultPlace(self._context.record.id, message.shard, self._ports.address)
        return Computed(
            output=self._ports.blobs.put(output_blob(shard.seed, packed), readers=()),
            output_root=place.root(shard.seed, unpack(packed).rows()),
            output_bytes=len(packed),
            trace_root=ZERO,
            n=len(rows),
            seconds=seconds,
        )

    async def attempt(self, round_: int, shard: int) -> None:
        """Compute a shard's rows for nobody."""
        rows = self._plan.rows(shard)
        await self._ports.executor.infer(await self._request(TRIAL_SLOT, rows, self.audit_limits))

    async def _request(self, slot: int, rows: Sequence[int], limits: Limits) -> InferRequest:
        blobs, program = self._ports.blobs, self._terms.program
        return InferRequest(
            job_id=self._context.record.id,
            slot=slot,
            program=blobs.path(program) if blobs.on_disk else blobs.read(program),
            inputs=await read_inputs(self._context, rows),
            limits=limits,
        )

    def share(self, shard: Shard) -> None:
        """Let the aggregator have what was accepted: its auditor may die with its copy."""
        assert shard.output is not None
        blob = self._ports.blobs.read(shard.output)
        self._ports.blobs.put(blob, readers=self._owners)

    def open(
        self, subject: Subject, shards: Sequence[Shard], challenge: Challenge, auditor: Address
    ) -> Open:
        """Open the drawn rows with their paths, and the whole result, to one auditor."""
        (shard,) = shards
        assert shard.output is not None
        place = ResultPlace(
            self._context.record.id, shard.assignment.message.shard, self._ports.address
        )
        blob = self._ports.blobs.read(shard.output)
        rows = unpack(packed_rows(blob)).rows()
        self._ports.blobs.put(blob, readers=[auditor])
        return Open(
            job_id=self._context.record.id,
            commitment_hash=subject.hash,
            rows=place.open_rows(shard.seed, rows, challenge.drawn),
            salt_seed=shard.seed,
            output=shard.output,
            digests=(),
        )

    # ---- the auditor's side --------------------------------------------------------------

    async def own(self, subject: Subject, drawn: Sequence[int]) -> bytes:
        """Return this node's own rows for those that were drawn."""
        start = self._plan.rows(_work(subject).assignment.message.shard).start
        rows = [start + index for index in drawn]
        request = await self._request(AUDIT_SLOT, rows, self.audit_limits)
        return await self._ports.executor.infer(request)

    async def judge(
        self,
        subject: Subject,
        challenge: Signed[Challenge],
        own: bytes,
        opened: Open,
        wait_s: float,
    ) -> tuple[AuditResult, bytes | None]:
        """Compare the opened rows, then fetch the whole result and check it against its root."""
        commitment = _work(subject).commitment.message
        place = self._place(subject)
        if tuple(row.index for row in opened.rows) != challenge.message.drawn or not all(
            place.holds(commitment, row) for row in opened.rows
        ):
            return AuditResult.MALFORMED, None
        theirs = [row.row for row in opened.rows]
        if disagreeing(unpack(own).rows(), theirs, self._plan.output_schema):
            return AuditResult.MISMATCH, None
        try:
            await self._fetch_output(subject, commitment, opened.output, wait_s)
        except OutputError as error:
            log.info("output malformed", why=str(error))
            return AuditResult.MALFORMED, None
        return AuditResult.ACCEPTED, opened.output

    def _place(self, subject: Subject) -> ResultPlace:
        return ResultPlace(self._context.record.id, subject.place[0], subject.worker)

    async def _fetch_output(
        self, subject: Subject, commitment: Commitment, name: bytes, wait_s: float
    ) -> None:
        """Bring a worker's whole result here and check it; it is kept for the aggregator."""
        limit = commitment.output_bytes + 1024
        await self._ports.network.fetch(
            name, max_bytes=limit, holders=[subject.worker], deadline_s=wait_s
        )
        blob = self._ports.blobs.read(name)
        open_output(self._place(subject), commitment, blob, self._plan.output_schema)
        self._ports.blobs.restrict(name, self._owners)

    async def agrees(self, subject: Subject, own: bytes, finding: Finding) -> bool:
        """Return whether another auditor's revealed rows equal this node's own."""
        assert finding.reveal is not None
        name = finding.reveal.message.digest
        try:
            await self._ports.network.fetch(
                name, max_bytes=MAX_ROWS_BYTES, holders=[finding.auditor], deadline_s=REVEALED_S
            )
            rows = unpack(self._ports.blobs.read(name))
        except (NetworkError, WorkloadError, BlobError) as error:
            log.info("another auditor's rows not had", why=str(error))
            return False
        schema = self._plan.output_schema
        if rows.count != len(finding.challenge.message.drawn) or rows.schema != schema:
            return False
        return not disagreeing(unpack(own).rows(), rows.rows(), schema)


async def read_inputs(context: JobContext, rows: Sequence[int]) -> bytes:
    """Return the packed input rows at *rows*, fetching the chunks that hold them."""
    chunks = {}
    for digest, size in context.plan.chunks(rows):
        await context.jobs.fetch(context.record, digest, size)
        chunks[digest] = context.ports.blobs.read(digest)
    return context.plan.inputs(chunks, rows)


def _work(subject: Subject) -> Work:
    assert isinstance(subject, Work)
    return subject
