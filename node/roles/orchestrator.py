"""The orchestrator: keeps a job's log, leases its shards to workers, and ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import Lease
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.log.author import Author
from meshd.node.offers import Offers
from meshd.node.ports import Ports
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    ZERO,
    Assignment,
    Attestation,
    Challenge,
    Commitment,
    Cut,
    JobAnnounce,
    JobEnd,
    JobEndReason,
    JobTerms,
    LeaseAccept,
    LeaseEnd,
    LeaseEndReason,
    Message,
    Offer,
    Progress,
    Reveal,
    Stop,
    VerdictCommit,
    jobs_topic,
)
from meshd.p2p.network import NetworkError, RequestRefused, RequestTimeout

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

STEP_S = 1.0
"""Seconds after which the orchestrator looks again though nothing happened."""
SILENT_S = 20.0
"""Seconds without a sign of life after which a lease lapses."""
ANNOUNCE_S = 10.0
SERVE_BLOCKS = 10
CUT_EVERY = 16
"""Payable shards that make an intermediate cut worth its anchor."""
DEADLINE_MARGIN_S = 60
"""A job that is not done so long before its work deadline is ended with what passed."""

ENTRY_KINDS: tuple[type[Message], ...] = (
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

HAND_OUT_S = 4.0
HAND_OUTS = 3
"""An assignment is brought to its worker so many times before its lease is ended."""

Combine = Callable[[bytes, tuple[bytes, ...]], Awaitable[bytes]]
"""Waits for the aggregator's output of a job, made of the results with these commitments (one a
shard, in order), and returns its digest.
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
        self, ports: Ports, jobs: Jobs, record: JobRecord, plan: InferPlan, combine: Combine
    ) -> None:
        self._ports = ports
        self._jobs = jobs
        self._record = record
        self._plan = plan
        self._combine = combine
        self._terms: JobTerms = cast(Signed[JobTerms], record.terms).message
        self._author = Author(ports, jobs.view(record, plan))
        self._offers = Offers(self._terms)
        self._alive: dict[bytes, float] = {}
        """When a lease's worker last gave a sign of life."""
        self._gone: set[Address] = set()
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
            await nursery.start(self._author.run)
            self._take_up_leases()
            if not self._live.position:
                await self._author.append(cast(Signed[JobTerms], self._record.terms))
            nursery.start_soon(self._listen)
            nursery.start_soon(self._announce)
            nursery.start_soon(self._notice_departures)
            await self._drive()
            await self._until_over()
            nursery.cancel_scope.cancel()

    def _take_up_leases(self) -> None:
        """Go on with the leases that were open before a restart: hand them out if need be."""
        for lease in self._live.leases.values():
            if lease.open and lease.accept is None:
                self._nursery.start_soon(self._hand_out, lease.assignment)

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
        (why,) = await self._author.append(signed)
        if why is not None and signed.digest not in self._live:
            raise RequestRefused(why)

    async def _on_offer(self, signed: Signed[Message]) -> None:
        why = self._offers.take(signed.signer, cast(Offer, signed.message))
        if why is not None:
            raise RequestRefused(why)
        self._gone.discard(signed.signer)
        self._offered.set()

    async def _on_progress(self, signed: Signed[Message]) -> None:
        lease = self._live.leases.get(cast(Progress, signed.message).assignment_hash)
        if lease is None or lease.assignment.message.worker != signed.signer:
            raise RequestRefused("no such lease of yours")
        self._alive[lease.assignment.digest] = trio.current_time()

    async def _on_hand_back(self, signed: Signed[Message]) -> None:
        message = cast(LeaseEnd, signed.message)
        lease = self._live.leases.get(message.assignment_hash)
        if lease is None or lease.assignment.message.worker != signed.signer:
            raise RequestRefused("no such lease of yours")
        back = message.reason == LeaseEndReason.HANDED_BACK
        reason = LeaseEndReason.HANDED_BACK if back else LeaseEndReason.FAILED
        if lease.open:
            await self._end_lease(lease, reason)

    async def _notice_departures(self) -> None:
        async with self._ports.network.departures() as departures:
            async for departure in departures:
                self._gone.add(departure.address)
                self._offers.drop(departure.address)
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
                await self._end_dead_leases()
                await self._assign()
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

    async def _assign(self) -> None:
        """Lease free shards, fewest in flight first, and to each no more than it may have."""
        state = self._live
        if state.stop is not None:
            return
        free = [
            shard
            for shard in range(self._terms.shards)
            if not any(lease.holds_shard for lease in state.shards.get(shard, []))
        ]
        height = (await self._ports.chain.head()).height
        for shard in free:
            worker = self._offers.next_worker(state)
            if worker is None:
                return
            assignment = self._ports.sign(
                Assignment(
                    job_id=self._record.id,
                    term=state.term,
                    round=0,
                    shard=shard,
                    attempt=len(state.shards.get(shard, [])),
                    worker=worker,
                    input_hash=self._plan.input_hash(0, shard),
                    units=self._plan.units(shard),
                    lease_until=height + self._terms.lease_blocks,
                    numeric_class=ZERO,
                )
            )
            (why,) = await self._author.append(assignment)
            if why is not None:
                log.info("assignment not possible", shard=shard, why=why)
                return
            self._alive[assignment.digest] = trio.current_time()
            self._nursery.start_soon(self._hand_out, assignment)
            state = self._live

    async def _hand_out(self, assignment: Signed[Assignment]) -> None:
        """Bring an assignment, which is on disk, to its worker; end the lease if it won't."""
        worker = Address(assignment.message.worker)
        for _ in range(HAND_OUTS):
            try:
                accept = await self._ports.request(worker, assignment, deadline_s=HAND_OUT_S)
                if accept is not None and isinstance(accept.message, LeaseAccept):
                    await self._author.append(accept)
                    return
            except RequestTimeout as error:
                log.info("assignment unanswered", shard=assignment.message.shard, why=str(error))
                continue
            except NetworkError as error:
                log.info("lease not taken", shard=assignment.message.shard, why=str(error))
            break
        lease = self._live.leases.get(assignment.digest)
        if lease is not None and lease.open:
            self._offers.drop(worker)
            await self._end_lease(lease, LeaseEndReason.FAILED)

    async def _end_dead_leases(self) -> None:
        now = trio.current_time()
        height = (await self._ports.chain.head()).height
        for lease in list(self._live.leases.values()):
            if not lease.open:
                continue
            worker = Address(lease.assignment.message.worker)
            alive = self._alive.setdefault(lease.assignment.digest, now)
            if worker in self._gone:
                await self._end_lease(lease, LeaseEndReason.DISCONNECTED)
            elif height > lease.until:
                await self._end_lease(lease, LeaseEndReason.LAPSED)
            elif now - alive > SILENT_S:
                await self._end_lease(lease, LeaseEndReason.NO_PROGRESS)

    async def _end_lease(self, lease: Lease, reason: LeaseEndReason) -> None:
        end = LeaseEnd(
            job_id=self._record.id,
            assignment_hash=lease.assignment.digest,
            reason=reason,
            height=(await self._ports.chain.head()).height,
        )
        shard = lease.assignment.message.shard
        log.info("lease ended", shard=shard, reason=reason.name.lower())
        await self._author.append(self._ports.sign(end))

    # ---- the end -------------------------------------------------------------------------

    async def _reason_to_end(self) -> JobEndReason | None:
        state = self._live
        if state.stop is not None:
            return JobEndReason.STOPPED
        head = await self._ports.chain.head()
        if head.timestamp > self._terms.work_deadline - DEADLINE_MARGIN_S:
            return JobEndReason.DEADLINE
        if not state.complete or not state.audited:
            self._waiting_since = None
            return None
        return JobEndReason.COMPLETE if self._revealed_or_late() else None

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
        payable = len(state.book.payable(list(state.works.values()), ended=False))
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
