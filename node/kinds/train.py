"""Training: shards over public state. Who audits one computes it whole, from public bytes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import structlog
import trio

from meshd.ledger.audits import Finding, Subject
from meshd.ledger.works import Work, works_of
from meshd.node.compute.executor import Limits, TrainRequest, TrainResult
from meshd.node.kinds.infer import read_inputs
from meshd.node.kinds.kind import AUDIT_SLOT, TRIAL_SLOT, Computed, JobContext, Shard
from meshd.node.verification.traces import trace_root
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.codec import Signed, digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    Assignment,
    AuditResult,
    Canary,
    Challenge,
    Open,
)

log = structlog.get_logger()

DIGEST = 32
AGAIN_S = 3.0
"""Seconds after which a refused numeric class is sent again: an orchestrator may just begin."""


class TrainKind:
    """The shards of one training job."""

    def __init__(self, context: JobContext, plan: TrainPlan) -> None:
        self._context = context
        self._ports = context.ports
        self._plan = plan
        self._terms = context.view.job.terms
        self._class: bytes | None = None
        self._lock = trio.Lock()

    async def numeric_class(self, slot: int, limits: Limits) -> bytes:
        """Return the end digest of the job's own first steps, computed once and logged."""
        async with self._lock:
            if self._class is None:
                self._class = await self._announce_class(slot, limits)
        return self._class

    async def _announce_class(self, slot: int, limits: Limits) -> bytes:
        record = self._context.record
        raw = await self._ports.store.signed(record.id, "canary")
        if raw is None:
            message = Canary(
                job_id=record.id,
                party=self._ports.address,
                digest=await self.own_class(slot, limits),
            )
            raw = await self._ports.store.sign_once(
                record.id, "canary", self._ports.sign(message).raw
            )
        canary_entry = self._ports.domain.open(raw)
        known = self._context.view.state.rounds.canaries
        while why := await self._ports.deliver(
            record.orchestrator, canary_entry, until=lambda: self._ports.address in known
        ):
            log.info("numeric class refused", job=record.id.hex()[:8], why=why)
            await trio.sleep(AGAIN_S)
        return cast(Canary, canary_entry.message).digest

    async def own_class(self, slot: int, limits: Limits) -> bytes:
        """Return the end digest of the job's own first steps on this machine."""
        rows = self._plan.canary_rows()
        settings = self._plan.settings.of_canary().encode()
        return (await self._run(0, 0, rows, settings, slot, limits)).end_digest

    async def recompute(self, work: Work, slot: int = -1) -> bytes:
        """Return the contribution that *work* should be, computed anew."""
        result = await self._run_shard(work.assignment.message, slot, self.audit_limits)
        return result.contribution

    @property
    def audit_limits(self) -> Limits:
        """What computing a shard again may use."""
        return Limits(memory_bytes=max(Limits().memory_bytes, self._plan.memory_bytes))

    def assignment_problem(self, assignment: Assignment) -> str | None:
        """Return why *assignment* is not one of this job's shards, None if it is."""
        if assignment.shard >= self._terms.shards or assignment.round >= self._terms.rounds:
            return f"the job has no shard {assignment.shard} in round {assignment.round}"
        state = self._context.view.closes.state_of(assignment.round)
        if state is None:
            return f"the state of round {assignment.round} is not known here yet"
        if (assignment.units, assignment.input_hash) != (
            self._plan.units(assignment.shard),
            self._plan.input_hash(assignment.round, assignment.shard, state),
        ):
            return "the assignment's units or input are not those of its shard"
        return None

    async def bring_state(self, round_: int) -> bytes | Path:
        """Return the state that a round starts from, fetched by its digest."""
        view = self._context.view
        while (name := view.closes.state_of(round_)) is None:
            await view.closes.changed()
        others = [view.job.genesis.orchestrator, *view.job.genesis.committee]
        limit = self._plan.state_bytes_limit
        await self._context.jobs.fetch(self._context.record, name, limit, others)
        blobs = self._ports.blobs
        return blobs.path(name) if blobs.on_disk else blobs.read(name)

    async def _run(
        self,
        round_: int,
        shard: int,
        rows: Sequence[int],
        settings: tuple[str, ...],
        slot: int,
        limits: Limits,
    ) -> TrainResult:
        blobs, program = self._ports.blobs, self._terms.program
        request = TrainRequest(
            job_id=self._context.record.id,
            slot=slot,
            program=blobs.path(program) if blobs.on_disk else blobs.read(program),
            state=await self.bring_state(round_),
            inputs=await read_inputs(self._context, rows),
            settings=settings,
            seed=self._terms.seed,
            round=round_,
            shard=shard,
            limits=limits,
        )
        return await self._ports.executor.train(request)

    async def _run_shard(self, assignment: Assignment, slot: int, limits: Limits) -> TrainResult:
        rows = self._plan.rows(assignment.round, assignment.shard)
        settings = self._terms.hyperparameters
        return await self._run(assignment.round, assignment.shard, rows, settings, slot, limits)

    async def attempt(self, round_: int, shard: int) -> None:
        """Train a shard for nobody (-1: the job's first steps)."""
        if shard < 0:
            await self.own_class(TRIAL_SLOT, self.audit_limits)
        else:
            rows, settings = self._plan.rows(round_, shard), self._terms.hyperparameters
            await self._run(round_, shard, rows, settings, TRIAL_SLOT, self.audit_limits)

    # ---- the worker's side ---------------------------------------------------------------

    async def compute(self, shard: Shard, slot: int, limits: Limits) -> Computed:
        """Compute a contribution, public at once; the end state's digest stays here, salted."""
        message = shard.assignment.message
        await self.bring_state(message.round)
        began = trio.current_time()
        result = await self._run_shard(message, slot, limits)
        seconds = trio.current_time() - began
        contribution = self._ports.blobs.put(result.contribution)
        return Computed(
            output=self._ports.blobs.put(result.end_digest + contribution, readers=()),
            output_root=contribution,
            output_bytes=len(result.contribution),
            trace_root=trace_root(shard.seed, result.end_digest, shard.assignment.digest),
            n=self._terms.rows_per_shard,
            seconds=seconds,
        )

    def share(self, shard: Shard) -> None:
        """Do nothing: contributions are public from the first."""

    def open(
        self, subject: Subject, shards: Sequence[Shard], challenge: Challenge, auditor: Address
    ) -> Open:
        """Open salt and end digest of each drawn shard of a span."""
        digests: list[bytes] = []
        for at in challenge.drawn:
            shard = shards[at]
            assert shard.output is not None
            digests += [shard.seed, self._ports.blobs.read(shard.output)[:DIGEST]]
        return Open(
            job_id=self._context.record.id,
            commitment_hash=subject.hash,
            rows=(),
            salt_seed=shards[0].seed,
            output=works_of(subject)[0].commitment.message.output_root,
            digests=tuple(digests),
        )

    # ---- the auditor's side --------------------------------------------------------------

    async def own(self, subject: Subject, drawn: Sequence[int]) -> bytes:
        """Return end digest and contribution digest of each drawn shard, computed anew."""
        found = b""
        for at in drawn:
            assignment = works_of(subject)[at].assignment.message
            result = await self._run_shard(assignment, AUDIT_SLOT, self.audit_limits)
            found += result.end_digest + self._ports.blobs.put(result.contribution)
        return found

    async def judge(
        self,
        subject: Subject,
        challenge: Signed[Challenge],
        own: bytes,
        opened: Open,
        wait_s: float,
    ) -> tuple[AuditResult, bytes | None]:
        """Compare the opened end digests and the public contributions with this node's own."""
        await trio.lowlevel.checkpoint()
        drawn = challenge.message.drawn
        if len(opened.digests) != 2 * len(drawn):
            return AuditResult.MALFORMED, None
        works = [works_of(subject)[at] for at in drawn]
        theirs = b""
        for place, work in enumerate(works):
            salt, end = opened.digests[2 * place : 2 * place + 2]
            commitment = work.commitment.message
            if trace_root(salt, end, work.assignment.digest) != commitment.trace_root:
                return AuditResult.MALFORMED, None
            theirs += end + commitment.output_root
        if theirs != own:
            return AuditResult.MISMATCH, None
        return AuditResult.ACCEPTED, works[0].commitment.message.output_root

    async def agrees(self, subject: Subject, own: bytes, finding: Finding) -> bool:
        """Return whether another auditor's revealed result is this node's own, bit for bit."""
        await trio.lowlevel.checkpoint()
        assert finding.reveal is not None
        return finding.reveal.message.digest == digest(own)
