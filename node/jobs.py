"""How a node comes to know jobs: events of the chain are believed, gossip only hints."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast
from weakref import WeakValueDictionary

import structlog
import trio

from meshd.ledger.chain import Anchored, ChainUnavailable, JobCancelled, JobOpened, JobStarted
from meshd.ledger.draws import orchestrator_ranking
from meshd.ledger.joblog import Genesis
from meshd.ledger.terms import terms_problem
from meshd.node.log.view import Job, LogView
from meshd.node.ports import Ports
from meshd.node.store import StoreError
from meshd.node.workloads.datasets import MAX_MANIFEST, parse_manifest
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.plans import Plan, make_plan
from meshd.node.workloads.program import parse_program
from meshd.p2p.codec import CodecError, Signed
from meshd.p2p.identity import NOBODY, Address
from meshd.p2p.messages import MIB, JobAnnounce, JobTerms, Message, jobs_topic
from meshd.p2p.network import NetworkError

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

MAX_TERMS = 64 * 1024
MAX_HOLDERS = 16
MAX_PROGRAM = 8 * 1024 * MIB
RETRY_S = 2.0
IDLE_S = 2.0
"""Seconds between two looks at the chain while no job waits for its start."""
FETCH_S, MAX_FETCH_S = 15.0, 960.0
"""Seconds that a fetch may take at the first try, and at the last ones."""
TERMS_S = 10.0
"""Seconds that the holders of a job's terms have: anybody may be named as one."""


@dataclass(frozen=True)
class JobRecord:
    """What this node knows of a job before its log."""

    opened: JobOpened
    terms: Signed[JobTerms] | None = None
    started: JobStarted | None = None
    cancelled: bool = False
    settled: bool = False
    """Its final settlement is anchored."""
    orchestrator: Address = NOBODY
    holders: tuple[Address, ...] = ()
    """Who is said to have its terms, program and data."""

    @property
    def id(self) -> bytes:
        """The job's id on chain."""
        return self.opened.job_id

    @property
    def open(self) -> bool:
        """Whether more can be heard of it from the chain."""
        return not self.cancelled and not self.settled

    @property
    def ready(self) -> bool:
        """Whether its log can be followed: terms known, committee drawn."""
        return self.terms is not None and self.started is not None and not self.cancelled


@dataclass
class _Hint:
    announce: JobAnnounce
    holders: tuple[Address, ...] = field(default_factory=tuple)


class Jobs:
    """The jobs of this network, as far as this node has seen them."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self.records: dict[bytes, JobRecord] = {}
        self._hints: dict[bytes, _Hint] = {}
        self._views: WeakValueDictionary[bytes, LogView] = WeakValueDictionary()
        self._next_height = 0
        self._changed = trio.Event()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the chain's events and the jobs' topic until cancelled."""
        await self._load()
        topic = jobs_topic(self._ports.domain.network)
        async with self._ports.network.subscribe(topic) as gossip, trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, gossip)
            nursery.start_soon(self._follow_chain)
            nursery.start_soon(self._fetch_terms)
            task_status.started()

    @property
    def height(self) -> int | None:
        """The highest block whose events were seen; None: none yet."""
        return self._next_height - 1 if self._next_height else None

    async def ready(self) -> AsyncIterator[JobRecord]:
        """Yield every job once its log can be followed."""
        seen: set[bytes] = set()
        while True:
            event = self._changed
            for record in list(self.records.values()):
                if record.ready and record.id not in seen:
                    seen.add(record.id)
                    yield record
            await event.wait()

    async def wait_changed(self, deadline_s: float) -> None:
        """Wait until something is learnt of any job, *deadline_s* at most."""
        with trio.move_on_after(deadline_s):
            await self._changed.wait()

    async def know(self, opened: JobOpened, terms: Signed[JobTerms]) -> None:
        """Take the terms of a job of this node's own."""
        record = self.records.get(opened.job_id, JobRecord(opened))
        if record.terms is None:
            await self._settle(replace(record, terms=terms, holders=(self._ports.address,)))

    def _update(self, record: JobRecord) -> None:
        self.records[record.id] = record
        self._changed.set()
        self._changed = trio.Event()

    # ---- chain ---------------------------------------------------------------------------

    async def _follow_chain(self) -> None:
        while True:
            try:
                head = await self._ports.chain.head()
                if head.height < self._next_height:
                    head = await self._ports.chain.wait_height(self._next_height)
                events = await self._ports.chain.events(self._next_height, head.height)
            except ChainUnavailable as error:
                log.warning("chain unavailable", why=str(error))
                await trio.sleep(RETRY_S)
                continue
            for event in events:
                await self._take_event(event)
            self._next_height = head.height + 1
            if not any(r.open and r.started is None for r in self.records.values()):
                await trio.sleep(IDLE_S)

    async def _take_event(self, event: object) -> None:
        match event:
            case JobOpened(job_id=job_id) if job_id not in self.records:
                self._update(JobRecord(event))
            case JobStarted(job_id=job_id) if self._not_started(job_id):
                record = replace(self.records[job_id], started=event)
                await self._settle(record)
            case JobCancelled(job_id=job_id) if job_id in self.records:
                self._update(replace(self.records[job_id], cancelled=True))
            case Anchored(job_id=job_id, is_final=True) if job_id in self.records:
                self._update(replace(self.records[job_id], settled=True))
            case _:
                pass

    def _not_started(self, job_id: bytes) -> bool:
        return job_id in self.records and self.records[job_id].started is None

    async def _settle(self, record: JobRecord) -> None:
        """Say who keeps the job's log, once terms and start are known; keep it on disk."""
        if record.terms is not None and record.started is not None:
            terms = record.terms.message
            orchestrator = Address(terms.orchestrator)
            if orchestrator == NOBODY:
                candidates = await self._ports.chain.orchestrators()
                ranking = orchestrator_ranking(candidates, record.id, record.started.beacon)
                orchestrator = ranking[0] if ranking else NOBODY
            record = replace(record, orchestrator=orchestrator)
        if record.terms is not None:
            try:
                await self._keep(record)
            except StoreError as error:
                log.error("job not kept", job=record.id.hex()[:8], why=str(error))
        self._update(record)

    async def _keep(self, record: JobRecord) -> None:
        """Keep a job on disk, so that a restarted node knows it at once; it can do without."""
        assert record.terms is not None
        started = None
        if record.started is not None:
            started = json.dumps(
                {
                    "height": record.started.height,
                    "committee": [member.hex() for member in record.started.committee],
                    "quorum": record.started.quorum,
                    "beacon": record.started.beacon.hex(),
                    "orchestrator": record.orchestrator.hex(),
                    "opened": record.opened.height,
                }
            )
        await self._ports.store.execute(
            "insert into job(job_id, terms, researcher, started, state, created) "
            "values(?,?,?,?,'announced',?) on conflict(job_id) do update set "
            "started=excluded.started, terms=excluded.terms",
            (record.id, record.terms.raw, record.opened.researcher, started, self._ports.wall()),
        )

    async def _load(self) -> None:
        """Take up the jobs on disk; the chain is read again from the oldest of them."""
        rows = await self._ports.store.rows(
            "select job_id, terms, researcher, started from job where ended is null"
        )
        for row in rows:
            self._update(self._record(*row))

    def _record(
        self, job_id: bytes, raw: bytes, researcher: bytes, started: str | None
    ) -> JobRecord:
        """Return a job as its row in the database has it."""
        terms = cast(Signed[JobTerms], self._ports.domain.open(raw))
        facts = json.loads(started) if started else None
        opened = JobOpened(
            facts["opened"] if facts else 0,
            job_id,
            Address(researcher),
            terms.digest,
            terms.message.cap,
        )
        record = JobRecord(opened, terms)
        if facts:
            committee = tuple(Address(bytes.fromhex(m)) for m in facts["committee"])
            beacon = bytes.fromhex(facts["beacon"])
            record = replace(
                record,
                started=JobStarted(facts["height"], job_id, committee, facts["quorum"], beacon),
                orchestrator=Address(bytes.fromhex(facts["orchestrator"])),
            )
        return record

    async def recall(self, job_id: bytes) -> JobRecord | None:
        """Return what is known of a job, of one that is long over too."""
        record = self.records.get(job_id)
        if record is None or not record.ready:
            rows = await self._ports.store.rows(
                "select job_id, terms, researcher, started from job where job_id=?", (job_id,)
            )
            record = self._record(*rows[0]) if rows else record
        return record

    # ---- gossip and terms ----------------------------------------------------------------

    async def _hear(self, gossip: trio.MemoryReceiveChannel[Signed[Message]]) -> None:
        async for signed in gossip:
            if isinstance(signed.message, JobAnnounce):
                holders = (signed.signer, *(Address(h) for h in signed.message.holders))
                self._hints[signed.message.job_id] = _Hint(signed.message, holders)
                record = self.records.get(signed.message.job_id)
                if record is not None and not set(holders) <= set(record.holders):
                    named = tuple(dict.fromkeys((*holders, *record.holders)))
                    self._update(replace(record, holders=named[:MAX_HOLDERS]))

    async def _fetch_terms(self) -> None:
        while True:
            event = self._changed
            for record in list(self.records.values()):
                hint = self._hints.get(record.id)
                if record.terms is None and hint is not None:
                    await self._try_terms(record, hint)
            with trio.move_on_after(RETRY_S):
                await event.wait()

    async def _try_terms(self, record: JobRecord, hint: _Hint) -> None:
        name = hint.announce.terms
        try:
            await self._ports.network.fetch(
                name, max_bytes=MAX_TERMS, holders=hint.holders, deadline_s=TERMS_S
            )
            terms = self._ports.domain.open(self._ports.blobs.read(name))
        except (NetworkError, CodecError, OSError) as error:
            log.info("terms not had", job=record.id.hex()[:8], why=str(error))
            return
        if (
            isinstance(terms.message, JobTerms)
            and terms.digest == record.opened.spec_hash
            and terms.signer == record.opened.researcher == terms.message.researcher
        ):
            signed = cast(Signed[JobTerms], terms)
            await self._settle(replace(self.records[record.id], terms=signed, holders=hint.holders))
        else:
            log.warning("announced terms are not the job's", job=record.id.hex()[:8])
            self._hints.pop(record.id, None)

    # ---- what a role needs to take part --------------------------------------------------

    async def load_plan(self, record: JobRecord) -> Plan:
        """Fetch a job's program and manifest and return how it splits.

        Tries until they are had. Raises WorkloadError if they are not what the terms say.
        """
        assert record.terms is not None
        terms = record.terms.message
        problem = terms_problem(terms)
        if problem is not None:
            raise WorkloadError(problem)
        await self.fetch(record, terms.program, MAX_PROGRAM)
        await self.fetch(record, terms.data, MAX_MANIFEST)
        blobs = self._ports.blobs
        program = parse_program(blobs.read(terms.program))
        return make_plan(terms, program, parse_manifest(blobs.read(terms.data)))

    async def fetch(
        self, record: JobRecord, digest: bytes, max_bytes: int, others: Sequence[Address] = ()
    ) -> None:
        """Bring a blob of the job here; try its holders until one has it.

        A holder that fell silent is given up sooner at first than later on. Raises OSError if it
        cannot be kept here.
        """
        deadline_s = FETCH_S
        while digest not in self._ports.blobs:
            known = self.records.get(record.id, record)
            holders = [*others, *known.holders, known.opened.researcher, known.orchestrator]
            holders = [h for h in dict.fromkeys(holders) if h not in (NOBODY, self._ports.address)]
            try:
                await self._ports.network.fetch(
                    digest, max_bytes=max_bytes, holders=holders, deadline_s=deadline_s
                )
                return
            except NetworkError as error:
                log.info("blob not had yet", blob=digest.hex()[:8], why=str(error))
            deadline_s = min(2 * deadline_s, MAX_FETCH_S)
            await trio.sleep(RETRY_S)

    def known_view(self, job_id: bytes) -> LogView | None:
        """Return this node's view of a job's log while a role of it follows that log."""
        return self._views.get(job_id)

    def view(self, record: JobRecord, plan: Plan | None) -> LogView:
        """Return this node's view of the job's log: one for all its roles, empty at first."""
        assert record.started is not None
        assert record.terms is not None
        view = self._views.get(record.id)
        if view is None:
            terms = record.terms.message
            genesis = Genesis.from_start(record.started, record.orchestrator, terms.lag)
            view = LogView(Job(self._ports.domain, genesis, terms, plan), self._ports.beacon)
            self._views[record.id] = view
        return view
