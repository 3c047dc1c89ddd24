"""The orchestrator: keeps a job's log, leases its shards to workers, and ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.jobstate import JobState
from meshd.node.failing import Failing
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.kinds.kind import JobContext
from meshd.node.leasing import Leasing
from meshd.node.log.author import Author
from meshd.node.ports import Ports
from meshd.node.roundkeeper import RoundKeeper
from meshd.node.rounds import OldStates
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.plans import Plan
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.codec import Signed
from meshd.p2p.messages import (
    ZERO,
    Attestation,
    Canary,
    Challenge,
    Commitment,
    Cut,
    JobAnnounce,
    JobEnd,
    JobEndReason,
    JobTerms,
    LeaseEnd,
    Message,
    Offer,
    Progress,
    Reveal,
    Stop,
    VerdictCommit,
    jobs_topic,
)
from meshd.p2p.network import RequestRefused

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

STEP_S = 1.0
"""Seconds after which the orchestrator looks again though nothing happened."""
ANNOUNCE_S = 10.0
SERVE_BLOCKS = 10
CUT_EVERY = 16
"""Payable shards that make an intermediate cut worth its anchor."""
DEADLINE_MARGIN_S = 60
"""A job that is not done so long before its work deadline is ended with what passed."""

ENTRY_KINDS: tuple[type[Message], ...] = (
    Canary,
    Commitment,
    Challenge,
    VerdictCommit,
    Attestation,
    Reveal,
    Stop,
)
"""What others hand in for the log."""

REVEAL_WAIT_S = 20.0
"""Seconds that auditors have to reveal their verdicts when everything else is done."""

Combine = Callable[[bytes, tuple[bytes, ...]], Awaitable[bytes]]
"""Waits for the aggregator's output of a job, made of the results with these commitments (one a
shard, in order) or of this last state, and returns its digest.
"""


class Orchestrator:
    """Keeps every job that falls to this node."""

    def __init__(self, ports: Ports, jobs: Jobs, combine: Combine) -> None:
        self._ports = ports
        self._jobs = jobs
        self._combine = combine

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Orchestrate until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for record in self._jobs.ready():
                if record.orchestrator == self._ports.address:
                    nursery.start_soon(self._keep, record)

    async def _keep(self, record: JobRecord) -> None:
        try:
            plan = await self._jobs.load_plan(record)
        except WorkloadError as error:
            log.warning("job cannot be run", job=record.id.hex()[:8], why=str(error))
            return
        await _JobKeeper(self._ports, self._jobs, record, plan, self._combine).run()


class _JobKeeper:
    """One job, from its first head to its last cut."""

    def __init__(
        self, ports: Ports, jobs: Jobs, record: JobRecord, plan: Plan, combine: Combine
    ) -> None:
        self._ports = ports
        self._record = record
        self._combine = combine
        self._terms: JobTerms = cast(Signed[JobTerms], record.terms).message
        self._context = JobContext(ports, jobs, record, plan, jobs.view(record, plan))
        self._author = Author(ports, self._context.view)
        self._rounds = (
            RoundKeeper(self._context, plan, self._author) if isinstance(plan, TrainPlan) else None
        )
        self._failing = Failing(self._context, lambda: self._live)
        self._old_states = OldStates(self._context)
        self._leasing: Leasing
        self._nursery: trio.Nursery
        self._offered = trio.Event()
        self._waiting_since: float | None = None
        """Since when nothing but reveals is missing."""

    @property
    def _live(self) -> JobState:
        return self._author.live

    async def run(self) -> None:
        """Keep the job until its end is final."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._leasing = Leasing(self._context, self._author, self._rounds, nursery)
            await nursery.start(self._author.run)
            if self._rounds is not None:
                await self._rounds.start()
            self._leasing.take_up()
            if not self._live.position:
                await self._author.append(cast(Signed[JobTerms], self._record.terms))
            nursery.start_soon(self._listen)
            nursery.start_soon(self._announce)
            nursery.start_soon(self._notice_departures)
            nursery.start_soon(self._failing.run)
            await self._drive()
            await self._until_over()
            nursery.cancel_scope.cancel()

    async def _until_over(self) -> None:
        """Serve the log until the settle deadline is over: others may come late to ask for it."""
        while True:
            head = await self._ports.chain.head()
            if head.timestamp > self._terms.settle_deadline:
                return
            await self._ports.chain.wait_height(head.height + SERVE_BLOCKS)

    # ---- what comes in -------------------------------------------------------------------

    async def _listen(self) -> None:
        dispatch, job_id = self._ports.dispatch, self._record.id
        with ExitStack() as stack:
            stack.enter_context(dispatch.on(Offer, job_id, self._on_offer))
            stack.enter_context(dispatch.on(Progress, job_id, self._on_progress))
            stack.enter_context(dispatch.on(LeaseEnd, job_id, self._on_hand_back))
            for kind in ENTRY_KINDS:
                stack.enter_context(dispatch.on(kind, job_id, self._on_entry))
            await trio.sleep_forever()

    async def _on_entry(self, signed: Signed[Message]) -> None:
        """Log what another party hands in; refuse what would have no effect."""
        if signed.digest in self._live:
            return
        if self._rounds is not None and isinstance(signed.message, Commitment):
            await self._rounds.admit(cast(Signed[Commitment], signed))
        (why,) = await self._author.append(signed)
        if why is not None and signed.digest not in self._live:
            raise RequestRefused(why)

    async def _on_offer(self, signed: Signed[Message]) -> None:
        why = self._leasing.offers.take(signed.signer, cast(Offer, signed.message))
        if why is not None:
            raise RequestRefused(why)
        self._leasing.came(signed.signer)
        self._offered.set()

    async def _on_progress(self, signed: Signed[Message]) -> None:
        self._leasing.alive(signed.signer, cast(Progress, signed.message).assignment_hash)

    async def _on_hand_back(self, signed: Signed[Message]) -> None:
        await self._leasing.handed_back(signed.signer, cast(LeaseEnd, signed.message))

    async def _notice_departures(self) -> None:
        async with self._ports.network.departures() as departures:
            async for departure in departures:
                self._leasing.departed(departure.address)
                self._offered.set()

    async def _announce(self) -> None:
        """Repeat the job's announcement while it runs: gossip may have missed anybody."""
        terms = cast(Signed[JobTerms], self._record.terms)
        name = self._ports.blobs.put(terms.raw)
        announce = JobAnnounce(
            job_id=self._record.id,
            terms=name,
            terms_bytes=len(terms.raw),
            holders=(self._ports.address,),
        )
        while True:
            topic = jobs_topic(self._ports.domain.network)
            await self._ports.network.publish(topic, self._ports.sign(announce))
            await trio.sleep(ANNOUNCE_S)

    # ---- the course of the job -----------------------------------------------------------

    async def _drive(self) -> None:
        """Lease shards until the job ends; log its end and the cuts.

        A change of term may drop the end itself: it is over when the final log says so.
        """
        while not self._author.view.state.book.closed:
            if (await self._ports.chain.head()).timestamp > self._terms.settle_deadline:
                return
            if self._live.end is None:
                await self._leasing.end_dead()
                await self._close_round()
                await self._leasing.assign()
                await self._cut_if_worth_it()
                reason = await self._reason_to_end()
                if reason is not None:
                    await self._end(reason)
            elif not self._live.book.closed and self._revealed_or_late():
                await self._cut()
            self._offered = trio.Event()
            with trio.move_on_after(STEP_S):
                async with trio.open_nursery() as waiting:
                    for event in (self._author.grown, self._offered):
                        waiting.start_soon(_cancel_when, event, waiting.cancel_scope)

    async def _close_round(self) -> None:
        """Close a training job's round if it is due, and tell everybody who goes on from it."""
        if self._rounds is None:
            return
        close = await self._rounds.close_if_due()
        if close is not None:
            self._old_states.drop()
            parties = [*self._leasing.offers.workers(), *self._context.view.job.genesis.committee]
            others = [p for p in dict.fromkeys(parties) if p != self._ports.address]
            self._nursery.start_soon(self._rounds.tell, close, others)

    # ---- the end -------------------------------------------------------------------------

    async def _reason_to_end(self) -> JobEndReason | None:
        state = self._live
        head = await self._ports.chain.head()
        if head.timestamp > self._terms.work_deadline - DEADLINE_MARGIN_S:
            return JobEndReason.DEADLINE
        reason = JobEndReason.COMPLETE
        if state.stop is not None:
            reason = JobEndReason.STOPPED
        elif state.rounds.failed or self._failing.why:
            reason = JobEndReason.FAILED
        if reason is JobEndReason.STOPPED and self._rounds is None:
            return reason
        if self._failing.hopeless:
            return reason
        if not state.audited or (reason is JobEndReason.COMPLETE and not state.complete):
            self._waiting_since = None
            return None
        return reason if self._revealed_or_late() else None

    def _revealed_or_late(self) -> bool:
        """Return whether every audit is revealed and can be paid, or had its time to be."""
        if self._waiting_since is None:
            self._waiting_since = trio.current_time()
        waited = trio.current_time() - self._waiting_since > REVEAL_WAIT_S
        return self._live.revealed or waited

    async def _end(self, reason: JobEndReason) -> None:
        output = ZERO
        if reason is JobEndReason.COMPLETE:
            works = [self._live.shard_done(shard) for shard in range(self._terms.shards)]
            made_of = tuple(work.hash for work in works if work is not None)
            if self._rounds is not None:
                made_of = (self._live.rounds.state,)
            with trio.move_on_after(STEP_S):
                output = await self._combine(self._record.id, made_of)
            if output == ZERO:
                return  # not gathered yet: the deadline ends it if need be
        end = JobEnd(
            job_id=self._record.id, term=self._live.term, output_root=output, reason=reason
        )
        (why,) = await self._author.append(self._ports.sign(end))
        self._waiting_since = None
        log.info("job ended", job=self._record.id.hex()[:8], reason=reason.name.lower(), why=why)

    async def _cut_if_worth_it(self) -> None:
        """Cut when enough is payable for an anchor, or a worker waits for it."""
        state = self._live
        payable = len(state.book.payable(list(state.subjects.values()), ended=False))
        most = self._terms.max_unsettled
        waiting = any(worker.unsettled >= most for worker in state.workers.values())
        if payable >= CUT_EVERY or (payable and waiting):
            await self._cut()

    async def _cut(self) -> None:
        cut = Cut(
            job_id=self._record.id,
            term=self._live.term,
            epoch=self._live.book.epoch + 1,
            payee=self._ports.payee,
        )
        (why,) = await self._author.append(self._ports.sign(cut))
        if why is not None:
            log.warning("cut not logged", why=why)


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
