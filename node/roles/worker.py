"""The worker: takes leases on shards, computes them, and opens what is audited."""

from __future__ import annotations

import secrets
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.audits import Status
from meshd.node.compute.executor import ExecutorError, Limits
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.kinds.choice import kind_of
from meshd.node.kinds.kind import JobContext, Kind, Shard
from meshd.node.log.follower import Follower
from meshd.node.log.view import LogView
from meshd.node.openings import Openings
from meshd.node.ports import Ports
from meshd.node.rounds import OldStates
from meshd.node.store import StoreError
from meshd.node.workloads.errors import WorkloadError
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    Assignment,
    Commitment,
    JobTerms,
    LeaseAccept,
    LeaseEnd,
    LeaseEndReason,
    Message,
    Offer,
    OpenRequest,
    Progress,
)
from meshd.p2p.network import NetworkError, RequestRefused

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

OFFER_S = 3.0
"""Seconds between two offers to the same orchestrator."""
AGAIN_S = 10.0
"""Seconds after which a commitment that was taken and is not in the log yet is sent again."""
PROGRESS_S = 5.0
"""Seconds between two signs of life for a running shard."""


@dataclass(frozen=True)
class WorkerSettings:
    """What this machine offers."""

    slots: int = 1
    ask: int = 0
    """MCC (smallest unit) per 10^9 compute units below which it does not work."""
    memory_bytes: int = 2 << 30
    wall_s: float = 3600.0
    device: str = "cpu"


class Worker:
    """Computes shards for every job that matches."""

    def __init__(self, ports: Ports, jobs: Jobs, settings: WorkerSettings) -> None:
        self.ports = ports
        self.jobs = jobs
        self.settings = settings
        self._free = list(range(settings.slots))
        self._freed = trio.Event()
        self.running: dict[bytes, Shard] = {}
        """Shards being computed, by assignment."""

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for record in self.jobs.ready():
                why = self.mismatch(record)
                if why is not None:
                    log.info("job does not match", job=record.id.hex()[:8], why=why)
                else:
                    nursery.start_soon(_JobWork(self, record).run)

    def mismatch(self, record: JobRecord) -> str | None:
        """Return why this machine does not work for a job, None if it does."""
        assert record.terms is not None
        terms = record.terms.message
        if terms.price < self.settings.ask:
            return f"it pays {terms.price} a giga unit, this machine asks {self.settings.ask}"
        if terms.workers and self.ports.address not in terms.workers:
            return "only other workers are allowed"
        if terms.memory_bytes > self.settings.memory_bytes:
            return f"it needs {terms.memory_bytes} bytes, this machine offers " + str(
                self.settings.memory_bytes
            )
        if terms.device not in ("any", self.settings.device):
            return f"it needs a {terms.device}, this machine has a {self.settings.device}"
        return None

    async def take_slot(self) -> int:
        """Wait for a free slot and take it."""
        while not self._free:
            await self._freed.wait()
        return self._free.pop()

    def give_slot(self, slot: int) -> None:
        """Return a slot."""
        self._free.append(slot)
        self._freed.set()
        self._freed = trio.Event()

    async def note_speed(self, units: int, seconds: float) -> None:
        """Keep the compute units a second of the shard just computed, for the capability."""
        await self.ports.store.execute(
            "insert into setting values('units_per_second', ?) "
            "on conflict(name) do update set value=excluded.value",
            (str(int(units / max(seconds, 1e-3))),),
        )

    @property
    def limits(self) -> Limits:
        """What one shard may use here."""
        settings = self.settings
        return Limits(memory_bytes=settings.memory_bytes, wall_s=settings.wall_s)


class _JobWork:
    """One worker's part in one job."""

    def __init__(self, worker: Worker, record: JobRecord) -> None:
        self._worker = worker
        self._ports = worker.ports
        self._record = record
        self._terms: JobTerms = cast(Signed[JobTerms], record.terms).message
        self._shards: dict[bytes, Shard] = {}
        self._shared: set[bytes] = set()
        self._taking = trio.Lock()
        self._kind: Kind
        self._view: LogView
        self._nursery: trio.Nursery

    @property
    def _orchestrator(self) -> Address:
        return self._record.orchestrator

    async def run(self) -> None:
        """Take part until the job's log ends."""
        jobs, record, room = self._worker.jobs, self._record, self._ports.availability
        try:
            plan = await room.until_kept(lambda: jobs.load_plan(record))
        except WorkloadError as error:
            log.warning("job cannot be worked on", job=record.id.hex()[:8], why=str(error))
            return
        self._view = jobs.view(record, plan)
        context = JobContext(self._ports, jobs, record, plan, self._view)
        self._kind = kind_of(context)
        dispatch, job_id = self._ports.dispatch, self._record.id
        follower = Follower(self._ports, self._view)
        old_states = OldStates(context)
        openings = Openings(context, self._kind, self._shards, follower.pull)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(follower.run)
            await self._load()
            with (
                dispatch.on(Assignment, job_id, self._on_assignment),
                dispatch.on(OpenRequest, job_id, openings.on_request),
                self._ports.availability.before_leaving(self._leave),
            ):
                nursery.start_soon(self._offer)
                while not await self._ended():
                    await self._view.changed(OFFER_S)
                    self._share_accepted()
                    old_states.drop()
                nursery.cancel_scope.cancel()

    async def _ended(self) -> bool:
        """Return whether nothing more can come of this job, whether or not its log says so."""
        if self._view.state.end is not None:
            return True
        return (await self._ports.chain.head()).timestamp > self._terms.settle_deadline

    def _share_accepted(self) -> None:
        """Let whoever compiles the output have what was accepted."""
        for name, shard in self._shards.items():
            lease = self._view.state.leases.get(name)
            work = lease.work if lease is not None else None
            if work is not None and work.status is Status.ACCEPTED and name not in self._shared:
                self._kind.share(shard)
                self._shared.add(name)

    async def _offer(self) -> None:
        """Ask for shards again and again; in training with the bits of this machine shown."""
        availability = self._ports.availability
        try:
            numeric_class = await availability.until_kept(self._show_class)
        except (ExecutorError, WorkloadError) as error:
            log.warning("job cannot be worked on", job=self._record.id.hex()[:8], why=str(error))
            return
        while True:
            offer = Offer(
                job_id=self._record.id,
                payee=self._ports.payee,
                ask=self._worker.settings.ask,
                slots=self._worker.settings.slots if availability.taking else 0,
                numeric_class=numeric_class,
            )
            try:
                await self._ports.request(self._orchestrator, self._ports.sign(offer))
            except NetworkError as error:
                log.debug("offer not taken", job=self._record.id.hex()[:8], why=str(error))
            await availability.changed(OFFER_S)

    async def _show_class(self) -> bytes:
        """Show, where the job asks for it, which bits this machine computes."""
        slot = await self._worker.take_slot()
        try:
            return await self._kind.numeric_class(slot, self._worker.limits)
        finally:
            self._worker.give_slot(slot)

    async def _leave(self) -> None:
        """Hand back every lease that is not committed to: others go on with those shards."""
        async with trio.open_nursery() as nursery:
            for shard in list(self._shards.values()):
                if shard.commitment is None and not self._over(shard):
                    nursery.start_soon(self._hand_back, shard, LeaseEndReason.HANDED_BACK)

    # ---- leases --------------------------------------------------------------------------

    async def _on_assignment(self, signed: Signed[Message]) -> Signed[LeaseAccept]:
        """Take a lease: on disk, with the seed of its salts, before it is accepted."""
        assignment = cast(Signed[Assignment], signed)
        message = assignment.message
        if signed.signer != self._orchestrator or message.worker != self._ports.address:
            raise RequestRefused("the assignment is not from this job's orchestrator to me")
        why = self._kind.assignment_problem(message)
        if why is None and self._ports.availability.leaving:
            why = "this node is about to leave"
        if why is not None:
            raise RequestRefused(why)
        accept = self._ports.sign(
            LeaseAccept(
                job_id=self._record.id,
                assignment_hash=assignment.digest,
                payee=self._ports.payee,
            )
        )
        async with self._taking:
            if assignment.digest not in self._shards:
                shard = Shard(assignment, secrets.token_bytes(32))
                row = (assignment.digest, self._record.id, assignment.raw, accept.raw, shard.seed)
                try:
                    await self._ports.store.execute(
                        "insert into shard values(?,?,?,?,?,null,null,0)", row
                    )
                except StoreError as error:
                    self._ports.availability.rest(error)
                    raise RequestRefused("the lease cannot be kept here now") from error
                self._shards[assignment.digest] = shard
                self._nursery.start_soon(self._work, shard)
        return accept

    async def _load(self) -> None:
        """Take up the leases on disk: compute what is missing, send commitments again."""
        rows = await self._ports.store.rows(
            "select raw, seed, output, commitment from shard where job_id=? and ended=0",
            (self._record.id,),
        )
        for raw, seed, output, committed in rows:
            assignment = cast(Signed[Assignment], self._ports.domain.open(raw))
            commitment = None
            if committed is not None:
                commitment = cast(Signed[Commitment], self._ports.domain.open(committed))
            shard = Shard(assignment, seed, output, commitment)
            self._shards[assignment.digest] = shard
            self._nursery.start_soon(self._work, shard)

    # ---- computing -----------------------------------------------------------------------

    async def _work(self, shard: Shard) -> None:
        """Compute a shard, commit to it, and see the commitment into the log."""
        if shard.commitment is None:
            if self._over(shard):
                return
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._show_progress, shard)
                    shard = await self._compute_in_turn(shard)
                    nursery.cancel_scope.cancel()
            except* (ExecutorError, WorkloadError) as errors:
                why = "; ".join(str(error) for error in errors.exceptions)
                log.warning("shard failed", shard=shard.assignment.message.shard, why=why)
            except* (OSError, StoreError) as errors:
                self._ports.availability.rest(errors.exceptions[0])
        if shard.commitment is not None:
            await self._hand_in(shard, shard.commitment)
        elif not self._over(shard):
            await self._hand_back(shard, LeaseEndReason.FAILED)

    async def _hand_in(self, shard: Shard, commitment: Signed[Commitment]) -> None:
        """Send a commitment until the log has it, or the lease is over without it."""
        while not self._logged(commitment.digest) and not self._over(shard):
            why = await self._ports.deliver(
                self._orchestrator, commitment, until=lambda: self._logged(commitment.digest)
            )
            if why is not None:
                log.info("commitment refused", shard=shard.assignment.message.shard, why=why)
            head = await self._ports.chain.head()
            if head.height > shard.assignment.message.lease_until + self._terms.lease_blocks:
                return
            await trio.sleep(AGAIN_S)

    def _logged(self, name: bytes) -> bool:
        return name in self._view.state or self._view.state.end is not None

    def _over(self, shard: Shard) -> bool:
        """Return whether the log says that this lease is over."""
        lease = self._view.state.leases.get(shard.assignment.digest)
        return lease is not None and not lease.open

    async def _compute_in_turn(self, shard: Shard) -> Shard:
        slot = await self._worker.take_slot()
        self._worker.running[shard.assignment.digest] = shard
        try:
            return shard if self._over(shard) else await self._compute(shard, slot)
        finally:
            self._worker.running.pop(shard.assignment.digest, None)
            self._worker.give_slot(slot)

    async def _compute(self, shard: Shard, slot: int) -> Shard:
        message = shard.assignment.message
        computed = await self._kind.compute(shard, slot, self._worker.limits)
        await self._worker.note_speed(message.units, computed.seconds)
        commitment = self._ports.sign(
            Commitment(
                job_id=self._record.id,
                assignment_hash=shard.assignment.digest,
                hash_alg=1,
                trace_root=computed.trace_root,
                n=computed.n,
                output_root=computed.output_root,
                output_bytes=computed.output_bytes,
                numeric_class=message.numeric_class,
            )
        )
        done = Shard(shard.assignment, shard.seed, computed.output, commitment)

        def step(db: sqlite3.Connection) -> None:
            db.execute(
                "update shard set output=?, commitment=? where assignment=?",
                (computed.output, commitment.raw, shard.assignment.digest),
            )

        await self._ports.store.write(step)
        self._shards[shard.assignment.digest] = done
        return done

    async def _show_progress(self, shard: Shard) -> None:
        """Give signs of life for a leased shard, while it waits for its turn too."""
        while True:
            progress = Progress(
                job_id=self._record.id,
                assignment_hash=shard.assignment.digest,
                done=0,
                total=0,
            )
            try:
                await self._ports.request(self._orchestrator, self._ports.sign(progress))
            except NetworkError as error:
                log.debug("progress not sent", why=str(error))
            await trio.sleep(PROGRESS_S)

    async def _hand_back(self, shard: Shard, reason: LeaseEndReason) -> None:
        end = LeaseEnd(
            job_id=self._record.id,
            assignment_hash=shard.assignment.digest,
            reason=reason,
            height=(await self._ports.chain.head()).height,
        )
        try:
            await self._ports.store.execute(
                "update shard set ended=1 where assignment=?", (shard.assignment.digest,)
            )
        except StoreError as error:  # after a restart its log says that the lease is over
            log.info("end of a lease not kept", why=str(error))
        await self._ports.deliver(
            self._orchestrator, self._ports.sign(end), until=lambda: self._over(shard)
        )
