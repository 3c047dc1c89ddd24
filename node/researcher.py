"""The researcher's side: open a job's escrow, announce it, follow its log, fetch its output."""

from __future__ import annotations

import secrets
import sqlite3
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.chain import (
    CancelJob,
    JobOnChain,
    JobOpened,
    OpenJob,
    RefundJob,
    StartJob,
)
from meshd.ledger.terms import terms_problem
from meshd.node.archive import keep_log, load_log, read_log
from meshd.node.counts import Counts
from meshd.node.failing import failure_of
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.kinds.kind import JobContext
from meshd.node.log.follower import Follower
from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.submitted import OVER, JobState, SubmittedJob
from meshd.node.workloads.errors import WorkloadError
from meshd.p2p.codec import Signed
from meshd.p2p.messages import (
    ZERO,
    JobAnnounce,
    JobEndReason,
    JobTerms,
    Stop,
    jobs_topic,
)

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

ANNOUNCE_S, REPEAT_S = 3.0, 15.0
"""Seconds between two announcements of a job: before its start, and after."""
STEP_S = 2.0
START_BLOCKS = 3
"""Blocks after `open` before the committee can be drawn."""
REFUND_BLOCKS = 20
"""Blocks that the aggregator has for the refund before the researcher asks for it itself."""
GIVE_UP_BLOCKS = 60
"""Blocks after which the job is over for its researcher, though others have not claimed all."""
MAX_OUTPUT = 16 << 30


class SubmitError(Exception):
    """A job cannot be submitted, or an order about it not be followed; the text says the cure."""


class Researcher:
    """Sees this node's own jobs through."""

    def __init__(self, ports: Ports, jobs: Jobs) -> None:
        self._ports = ports
        self._jobs = jobs
        self.submitted: dict[bytes, SubmittedJob] = {}
        self._nursery: trio.Nursery | None = None
        self._changed, self._reading = trio.Event(), trio.Lock()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tend the jobs on disk and those submitted meanwhile, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for job in await self._load():
                self.submitted[job.id] = job
                if job.state not in OVER:
                    nursery.start_soon(self._tend, job)
            task_status.started()
            await trio.sleep_forever()

    async def _load(self) -> list[SubmittedJob]:
        rows = await self._ports.store.rows(
            "select job_id, terms, salt, state, detail, created, ended, output, counts from job "
            "where submitted=1 order by created"
        )
        return [
            SubmittedJob(
                job_id,
                cast(Signed[JobTerms], self._ports.domain.open(raw)),
                salt,
                JobState(state),
                detail,
                output=output,
                created=created,
                ended=ended,
                kept=Counts.decode(counts) if counts else None,
            )
            for job_id, raw, salt, state, detail, created, ended, output, counts in rows
        ]

    async def view_of(self, job: SubmittedJob) -> LogView | None:
        """Return a job's log: as it is followed now, or as it was when the job ended."""
        async with self._reading:
            if job.view is None and job.state in OVER:
                job.view = await read_log(self._ports, job.id, job.terms.message)
        return job.view

    async def submit(self, terms: JobTerms) -> SubmittedJob:
        """Open the escrow of a job whose program and data are in this node's blob store.

        It is on disk before anything is sent. Raises SubmitError.
        """
        assert self._nursery is not None
        problem = terms_problem(terms)
        if problem is not None:
            raise SubmitError(problem)
        balance = await self._ports.chain.balance(self._ports.address)
        if balance < terms.cap:
            raise SubmitError(
                f"the cap is {terms.cap} but this account holds {balance} (smallest units of "
                f"MCC): {terms.cap - balance} are missing"
            )
        signed, salt = self._ports.domain.sign(self._ports.identity, terms), secrets.token_bytes(32)
        job_id = self._ports.chain.job_id(self._ports.address, signed.digest, salt)
        job = SubmittedJob(job_id, signed, salt, created=self._ports.wall())
        await self._ports.store.execute(
            "insert into job(job_id, terms, salt, researcher, state, created, submitted) "
            "values(?,?,?,?,?,?,1)",
            (job_id, signed.raw, salt, self._ports.address, job.state.value, job.created),
        )
        self.submitted[job_id] = job
        await self._ports.chain.send(f"open:{job_id.hex()}", _open_call(job))
        self._nursery.start_soon(self._tend, job)
        return job

    async def cancel(self, job_id: bytes) -> None:
        """Take a job back: before its start wholly, after it what has not passed an audit."""
        job = self.submitted.get(job_id)
        if job is None:
            raise SubmitError(f"no job 0x{job_id.hex()} was submitted by this node")
        if job.state in OVER:
            raise SubmitError(f"job 0x{job_id.hex()} is over: it is {job.state.value}")
        record = self._jobs.records.get(job_id)
        if record is None or record.started is None:
            await self._ports.chain.send(f"cancel:{job_id.hex()}", CancelJob(job_id))
            outcome = await self._ports.chain.wait(f"cancel:{job_id.hex()}")
            if outcome.error is None:
                return
            record = self._jobs.records.get(job_id)
        if record is None or record.started is None:
            raise SubmitError(f"job 0x{job_id.hex()} cannot be cancelled now: try again")
        stop = self._ports.sign(Stop(job_id=job_id))
        why = await self._ports.deliver(record.orchestrator, stop, until=lambda: _ended(job))
        if why is not None:
            raise SubmitError(f"the orchestrator refused to stop the job: {why}")

    async def wait_changed(self, deadline_s: float) -> None:
        """Wait until one of the jobs has come further, *deadline_s* at most."""
        with trio.move_on_after(deadline_s):
            await self._changed.wait()

    async def wait_over(self, job_id: bytes) -> SubmittedJob:
        """Return the job when it is settled, cancelled or failed."""
        while self.submitted[job_id].state not in OVER:
            await self._changed.wait()
        return self.submitted[job_id]

    async def _enter(self, job: SubmittedJob, state: JobState, detail: str = "") -> None:
        if job.state in OVER:
            return
        job.state, job.detail = state, detail
        job.ended = self._ports.wall() if state in OVER else None
        ends = state in (*OVER, JobState.SETTLING)
        batches = list(job.view.log.batches) if job.view and ends else []
        counts = job.counts.encode()

        def step(db: sqlite3.Connection) -> None:
            db.execute(
                "update job set state=?, detail=?, ended=?, output=?, counts=? where job_id=?",
                (state.value, detail, job.ended, job.output, counts, job.id),
            )
            keep_log(db, job.id, batches)

        await self._ports.store.write(step)
        log.info("job " + state.value, job=job.id.hex()[:8], detail=detail)
        self._changed.set()
        self._changed = trio.Event()

    # ---- one job -------------------------------------------------------------------------

    async def _tend(self, job: SubmittedJob) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, job)
            await self._see_through(job)
            nursery.cancel_scope.cancel()

    async def _announce(self, job: SubmittedJob) -> None:
        name = self._ports.blobs.put(job.terms.raw)
        announce = JobAnnounce(
            job_id=job.id,
            terms=name,
            terms_bytes=len(job.terms.raw),
            holders=(self._ports.address,),
        )
        topic = jobs_topic(self._ports.domain.network)
        while not _ended(job):
            await self._ports.network.publish(topic, self._ports.sign(announce))
            new = job.state is JobState.ANNOUNCED
            await trio.sleep(ANNOUNCE_S if new else REPEAT_S)

    async def _see_through(self, job: SubmittedJob) -> None:
        await self._ports.chain.send(f"open:{job.id.hex()}", _open_call(job))
        outcome = await self._ports.chain.wait(f"open:{job.id.hex()}")
        if outcome.error is not None:
            await self._enter(job, JobState.FAILED, f"the escrow was not opened: {outcome.error}")
            return
        record = await self._wait_started(job, outcome.height)
        if record is None:
            return
        if job.state is JobState.ANNOUNCED:
            await self._enter(job, JobState.RUNNING)
        try:
            plan = await self._jobs.load_plan(record)
        except WorkloadError as error:
            await self._wait_paid_out(job)
            await self._enter(job, JobState.FAILED, f"{error}; the deposit is back")
            return
        job.view = self._jobs.view(record, plan)
        context = JobContext(self._ports, self._jobs, record, plan, job.view)
        if job.state is JobState.SETTLING:  # those who served its log may be gone by now
            await load_log(self._ports, job.view)
        async with trio.open_nursery() as nursery:
            await nursery.start(Follower(self._ports, job.view).run)
            nursery.start_soon(self._follow, job, record)
            settled = await self._wait_paid_out(job)
            await self._finish(job, context, settled=settled)
            nursery.cancel_scope.cancel()

    async def _wait_started(self, job: SubmittedJob, opened: int) -> JobRecord | None:
        """Have the committee drawn; return the record, None if the job ends before."""
        key = f"start:{job.id.hex()}"
        await self._ports.chain.wait_height(opened + START_BLOCKS)
        sent = False
        while True:
            record = self._jobs.records.get(job.id)
            if record is None or record.terms is None:
                cap = job.terms.message.cap
                own = JobOpened(opened, job.id, self._ports.address, job.terms.digest, cap)
                await self._jobs.know(own, job.terms)
            elif record.cancelled:
                await self._enter(job, JobState.CANCELLED)
                return None
            elif record.started is not None and record.ready:
                return record
            elif not sent:
                await self._ports.chain.send(key, StartJob(job.id))
                outcome = await self._ports.chain.wait(key)
                sent = True
                if outcome.error is not None and not await self._is_started(job):
                    await self._ports.chain.send(f"cancel:{job.id.hex()}", CancelJob(job.id))
                    back = await self._ports.chain.wait(f"cancel:{job.id.hex()}")
                    if back.error is None:
                        why = f"no committee could be drawn ({outcome.error}); the deposit is back"
                        await self._enter(job, JobState.FAILED, why)
                        return None
            await self._jobs.wait_changed(STEP_S)

    async def _is_started(self, job: SubmittedJob) -> bool:
        found = await self._ports.chain.job(job.id)
        return found is not None and (found.started or found.cancelled)

    async def _follow(self, job: SubmittedJob, record: JobRecord) -> None:
        """Wait for the log's end and fetch the output."""
        view = cast(LogView, job.view)
        while view.state.end is None:
            await view.changed(STEP_S)
            self._changed.set()
            self._changed = trio.Event()
        end = view.state.end.message
        await self._enter(job, JobState.SETTLING, JobEndReason(end.reason).name.lower())
        if end.output_root != ZERO:
            await self._jobs.fetch(record, end.output_root, MAX_OUTPUT)
            job.output = end.output_root
            self._changed.set()
            self._changed = trio.Event()

    async def _wait_paid_out(self, job: SubmittedJob) -> bool:
        """Wait until everybody is paid and the rest is back; ask for the refund if need be.

        Returns whether a final settlement is anchored.
        """
        refundable = 0
        while True:
            on_chain = await self._ports.chain.job(job.id)
            head = await self._ports.chain.head()
            assert on_chain is not None
            paid_out = on_chain.paid >= on_chain.total
            if on_chain.held == 0 or (paid_out and on_chain.refundable == 0):
                return on_chain.settled
            if head.timestamp > _refundable_after(on_chain):
                refundable += 1
                if refundable > REFUND_BLOCKS or not on_chain.settled:
                    await self._refund(job)
                if refundable > GIVE_UP_BLOCKS:  # what others may still claim is not ours
                    return on_chain.settled
            await self._ports.chain.wait_height(head.height + 1)

    async def _refund(self, job: SubmittedJob) -> None:
        key = f"refund:{job.id.hex()}"
        await self._ports.chain.send(key, RefundJob(job.id))
        await self._ports.chain.wait(key)

    async def _finish(self, job: SubmittedJob, context: JobContext, *, settled: bool) -> None:
        """Say how the job ended. A log that ended is waited for, and so is its output."""
        deadline = job.terms.message.settle_deadline
        view = cast(LogView, job.view)
        while settled and view.state.end is None and await self._before(deadline):
            await view.changed(STEP_S)
        end = view.state.end.message if view.state.end is not None else None
        if end is not None and end.reason == JobEndReason.COMPLETE and settled:
            while job.output is None and await self._before(deadline):
                await self.wait_changed(STEP_S)
            if job.output is None:
                await self._enter(job, JobState.FAILED, "its output was not delivered")
            else:
                await self._enter(job, JobState.SETTLED)
        elif end is not None and end.reason == JobEndReason.STOPPED:
            await self._enter(job, JobState.CANCELLED, "stopped: what passed was paid")
        else:
            reason = JobEndReason.DEADLINE if end is None else JobEndReason(end.reason)
            why = await failure_of(context, reason)
            await self._enter(
                job, JobState.FAILED, f"{why}; what passed was paid, the rest is back"
            )

    async def _before(self, deadline: int) -> bool:
        return (await self._ports.chain.head()).timestamp <= deadline


def _refundable_after(job: JobOnChain) -> int:
    """Return the timestamp after which the escrow gives back what it does not owe."""
    window = job.anchored_at + job.window if job.anchored_at else 0
    after = max(job.settle_deadline, window + job.window if window else 0)
    return window if job.settled else after


def _open_call(job: SubmittedJob) -> OpenJob:
    terms = job.terms.message
    return OpenJob(
        spec_hash=job.terms.digest,
        salt=job.salt,
        cap=terms.cap,
        epoch_limit=terms.epoch_limit,
        window=terms.window,
        work_deadline=terms.work_deadline,
        settle_deadline=terms.settle_deadline,
    )


def _ended(job: SubmittedJob) -> bool:
    over = job.state in (*OVER, JobState.SETTLING)
    return over or (job.view is not None and job.view.state.end is not None)
