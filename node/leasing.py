"""Giving the shards of one job to workers: leases made, brought, watched and ended."""

from __future__ import annotations

from collections import Counter

import structlog
import trio

from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import Lease
from meshd.node.kinds.kind import JobContext
from meshd.node.log.author import Author
from meshd.node.offers import Offers
from meshd.node.roundkeeper import RoundKeeper
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import Assignment, LeaseAccept, LeaseEnd, LeaseEndReason
from meshd.p2p.network import NetworkError, RequestRefused, RequestTimeout

log = structlog.get_logger()

SILENT_S = 20.0
"""Seconds without a sign of life after which a lease lapses."""
HAND_OUT_S = 4.0
HAND_OUTS = 3
"""An assignment is brought to its worker so many times before its lease is ended."""


class Leasing:
    """The leases of one job, as its orchestrator gives them."""

    def __init__(
        self, context: JobContext, author: Author, rounds: RoundKeeper | None, nursery: trio.Nursery
    ) -> None:
        self._context = context
        self._ports = context.ports
        self._terms = context.view.job.terms
        self._author = author
        self._rounds = rounds
        self._nursery = nursery
        self.offers = Offers(self._terms)
        self._alive: dict[bytes, float] = {}
        """When a lease's worker last gave a sign of life."""
        self._gone: set[Address] = set()
        self._told: set[tuple[Address, bytes]] = set()
        """Who was brought which close."""

    @property
    def _live(self) -> JobState:
        return self._author.live

    def take_up(self) -> None:
        """Go on with the leases that were open before a restart: hand them out if need be."""
        for lease in self._live.leases.values():
            if lease.open and lease.accept is None:
                self._nursery.start_soon(self._hand_out, lease.assignment)

    # ---- what comes in -------------------------------------------------------------------

    def came(self, worker: Address) -> None:
        """Note that a worker is there."""
        self._gone.discard(worker)

    def departed(self, worker: Address) -> None:
        """Note that the connection to a worker closed."""
        self._gone.add(worker)
        self.offers.drop(worker)

    def alive(self, worker: Address, assignment: bytes) -> None:
        """Note a sign of life; raises RequestRefused if the lease is not the worker's."""
        self._alive[self._lease_of(worker, assignment).assignment.digest] = trio.current_time()

    async def handed_back(self, worker: Address, message: LeaseEnd) -> None:
        """End a lease that its worker gives up; raises RequestRefused if it is not its own."""
        lease = self._lease_of(worker, message.assignment_hash)
        back = message.reason == LeaseEndReason.HANDED_BACK
        if lease.open:
            if not back:
                self.offers.drop(worker)  # until it offers again: it may fail at once, every time
            await self._end(lease, LeaseEndReason.HANDED_BACK if back else LeaseEndReason.FAILED)

    def _lease_of(self, worker: Address, assignment: bytes) -> Lease:
        lease = self._live.leases.get(assignment)
        if lease is None or lease.assignment.message.worker != worker:
            raise RequestRefused("no such lease of yours")
        return lease

    # ---- giving --------------------------------------------------------------------------

    async def assign(self) -> None:
        """Lease free shards, fewest in flight first, and to each no more than it may have."""
        state = self._live
        if state.stop is not None:
            return
        free = state.free_shards()
        height = (await self._ports.chain.head()).height
        chosen: Counter[Address] = Counter()
        assignments = []
        for shard in free:
            attempts = state.attempts(shard)
            before = [Address(lease.assignment.message.worker) for lease in attempts]
            found = self.offers.next_worker(state, chosen, without=before)
            if found is None:
                break
            worker, numeric_class = found
            chosen[worker] += 1
            assignments.append(self._assignment(shard, worker, numeric_class, height))
        if not assignments:
            return
        reasons = await self._author.append(*assignments)
        for assignment, why in zip(assignments, reasons, strict=True):
            if why is not None:
                log.info("assignment not possible", shard=assignment.message.shard, why=why)
                continue
            self._alive[assignment.digest] = trio.current_time()
            if self._rounds is not None:
                self._rounds.assigned(assignment.digest)
            self._nursery.start_soon(self._hand_out, assignment)

    def _assignment(
        self, shard: int, worker: Address, numeric_class: bytes, height: int
    ) -> Signed[Assignment]:
        state, plan = self._live, self._context.plan
        round_ = state.rounds.open
        return self._ports.sign(
            Assignment(
                job_id=self._context.record.id,
                term=state.term,
                round=round_,
                shard=shard,
                attempt=len(state.attempts(shard)),
                worker=worker,
                input_hash=plan.input_hash(round_, shard, state.rounds.state),
                units=plan.units(shard),
                lease_until=height + self._terms.lease_blocks,
                numeric_class=numeric_class,
            )
        )

    async def _hand_out(self, assignment: Signed[Assignment]) -> None:
        """Bring an assignment, which is on disk, to its worker; end the lease if it won't."""
        worker = Address(assignment.message.worker)
        for _ in range(HAND_OUTS):
            try:
                await self._tell_close(worker, assignment.message.round)
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
            self.offers.drop(worker)
            await self._end(lease, LeaseEndReason.FAILED)

    async def _tell_close(self, worker: Address, round_: int) -> None:
        """Bring the close that a round follows from to a worker that may not have heard of it."""
        close = self._context.view.closes.of(round_ - 1)
        if close is None or self._rounds is None or (worker, close.digest) in self._told:
            return
        await self._rounds.tell_one(worker, close)
        self._told.add((worker, close.digest))

    # ---- ending --------------------------------------------------------------------------

    async def end_dead(self) -> None:
        """End the leases of workers that are gone, silent or late; all of them after a stop."""
        now = trio.current_time()
        height = (await self._ports.chain.head()).height
        for lease in list(self._live.leases.values()):
            if not lease.open:
                continue
            worker = Address(lease.assignment.message.worker)
            alive = self._alive.setdefault(lease.assignment.digest, now)
            if self._live.stop is not None and self._rounds is not None:
                await self._end(lease, LeaseEndReason.HANDED_BACK)
            elif worker in self._gone:
                await self._end(lease, LeaseEndReason.DISCONNECTED)
            elif height > lease.until:
                await self._end(lease, LeaseEndReason.LAPSED)
            elif now - alive > SILENT_S:
                await self._end(lease, LeaseEndReason.NO_PROGRESS)

    async def _end(self, lease: Lease, reason: LeaseEndReason) -> None:
        end = LeaseEnd(
            job_id=self._context.record.id,
            assignment_hash=lease.assignment.digest,
            reason=reason,
            height=(await self._ports.chain.head()).height,
        )
        shard = lease.assignment.message.shard
        log.info("lease ended", shard=shard, reason=reason.name.lower())
        await self._author.append(self._ports.sign(end))
