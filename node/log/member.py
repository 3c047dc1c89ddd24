"""A committee member's side of a job's log: check each head, sign it once, vote for terms."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.joblog import (
    Batch,
    LogError,
    check_batch,
    open_as,
)
from meshd.ledger.signing import HeadName, SigningRecord, too_late
from meshd.node.log.follower import Follower
from meshd.node.log.view import LogView, apply_batch, open_batch, open_certificate
from meshd.node.ports import Ports
from meshd.p2p.codec import Signed, encode
from meshd.p2p.messages import (
    Assignment,
    Certificate,
    Cut,
    HeadSignature,
    JobEnd,
    LeaseEnd,
    LogBatch,
    LogHead,
    Message,
    RoundClose,
    TermRequest,
    TermVote,
)
from meshd.p2p.network import RequestRefused

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

CheckClose = Callable[[Signed[RoundClose], Sequence[Signed[Message]]], Awaitable[str | None]]
"""Returns why the state that a round's close names does not follow, None if it does; beside the
close it is given the entries of the batch that holds it.
"""

KEEP_S = 10.0
CHAIN_WAIT_S = 5.0
"""How long a member waits for its own chain to have the block that a head names."""


class Member:
    """Signs one job's heads as a member of its committee."""

    def __init__(self, ports: Ports, view: LogView, check_close: CheckClose | None = None) -> None:
        self._ports = ports
        self.view = view
        self._check_close = check_close
        self.job = view.job
        self._record = SigningRecord()
        self._held: dict[bytes, Batch] = {}
        """Batches signed here that are not known to be certified yet, by their head's digest."""
        self._stored: set[bytes] = set()
        """Heads that are on disk with their certificates."""
        self._live = view.fresh_state()
        self._live_tip = self.job.genesis.hash
        self._lock = trio.Lock()
        self._follower = Follower(ports, view, on_certificate=self._on_certificate)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load what was signed, then answer the orchestrator until cancelled."""
        await self._load()
        dispatch = self._ports.dispatch
        with (
            dispatch.on(LogBatch, self.job.id, self._on_batch),
            dispatch.on(TermRequest, self.job.id, self._on_term_request),
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_certified)
                await self._follower.run(task_status=task_status)

    # ---- heads ---------------------------------------------------------------------------

    async def _on_batch(self, request: Signed[Message]) -> Signed[HeadSignature]:
        """Check a head with its entries and return this member's signature of it."""
        message = cast(LogBatch, request.message)
        try:
            batch = open_batch(self.job.domain, message)
            before = open_certificate(message.certificate)
            async with self._lock:
                return await self._sign(Batch(batch.head, batch.entries), before)
        except LogError as error:
            log.info("head refused", job=self.job.id.hex()[:8], why=str(error))
            raise RequestRefused(str(error)) from error

    async def _sign(self, batch: Batch, before: Certificate | None) -> Signed[HeadSignature]:
        head = batch.head
        name = HeadName(
            head.message.term,
            head.message.seq,
            head.digest,
            head.message.prev,
            head.message.start,
        )
        if self._record.signed.get((name.term, name.seq)) == name.hash:
            return self._answer(head)
        prev_certified = await self._learn_prev(head, before)
        if prev_certified:
            prev = self.view.log.known(name.prev)
            check_batch(self.job.domain, self.job.genesis, prev.head if prev else None, batch)
        why = self._record.refusal(name, prev_certified=prev_certified, start_valid=True)
        if why is not None:
            raise LogError(why)
        await self._check_chain(head)
        await self._check_effects(batch)
        await self._keep(batch)
        self._record.note_signed(name)
        self._held[name.hash] = batch
        return self._answer(head)

    def _answer(self, head: Signed[LogHead]) -> Signed[HeadSignature]:
        signature = self._ports.identity.sign(head.digest)
        return self._ports.sign(
            HeadSignature(job_id=self.job.id, head_hash=head.digest, signature=signature)
        )

    async def _learn_prev(self, head: Signed[LogHead], before: Certificate | None) -> bool:
        """Return whether the head before is certified, as far as this member can find out."""
        prev = head.message.prev
        if prev == self.job.genesis.hash:
            return head.message.seq == 1
        if before is not None and before.head_hash == prev:
            await self._on_certificate(before)
        if self.view.log.known(prev) is None:
            await self._follower.pull()
        return self.view.log.known(prev) is not None

    async def _on_certificate(self, certificate: Certificate) -> None:
        """Add a batch held here as soon as its certificate is known."""
        batch = self._held.get(certificate.head_hash)
        if batch is None or certificate.job_id != self.job.id:
            return
        await self.view.add(Batch(batch.head, batch.entries, certificate))
        self._held.pop(certificate.head_hash, None)

    async def _check_chain(self, head: Signed[LogHead]) -> None:
        message = head.message
        block = None
        with trio.move_on_after(CHAIN_WAIT_S):
            block = await self._ports.chain.wait_height(message.height)
        if block is None or block.hash != message.block_hash:
            raise LogError(f"this member's chain has no such block at {message.height}")
        if block.timestamp > self.job.terms.work_deadline:
            raise LogError("the job's work deadline is over: its log is closed")
        own = (await self._ports.chain.head()).height
        if too_late(own, message.height, self.job.genesis.lag):
            raise LogError(f"too late: the chain is at {own}, the head at {message.height}")

    async def _check_effects(self, batch: Batch) -> None:
        """Refuse a head in which something of the orchestrator's own breaks a rule."""
        if self._live_tip != batch.head.message.prev:
            self._live = self.view.fresh_state()
            for known in self.view.log.branch(batch.head.message.prev):
                await apply_batch(self._live, known, self._ports.beacon)
        self._live_tip = b""
        refused = await apply_batch(self._live, batch, self._ports.beacon)
        for entry in batch.entries:
            own = isinstance(entry.message, Assignment | LeaseEnd | RoundClose | Cut | JobEnd)
            if own and entry.digest in refused:
                raise LogError(f"{entry.message.kind}: {refused[entry.digest]}")
            if isinstance(entry.message, RoundClose) and self._check_close is not None:
                close = cast(Signed[RoundClose], entry)
                why = await self._check_close(close, batch.entries)
                if why is not None:
                    raise LogError(why)
        self._live_tip = batch.head.digest

    async def _keep(self, batch: Batch) -> None:
        """Put a head that is about to be signed on disk, with its entries and all before it."""
        fresh = self._not_stored()
        message = batch.head.message

        def step(db: sqlite3.Connection) -> None:
            scope = f"head.{message.term}.{message.seq}"
            db.execute("insert into signed values(?,?,?)", (self.job.id, scope, batch.head.raw))
            for known in [*fresh, batch]:
                _put_batch(db, self.job.id, known)

        await self._ports.store.write(step)
        self._stored.update(known.head.digest for known in fresh)

    async def _keep_certified(self) -> None:
        """Put what others certified on disk too: the last heads of a log have no successor."""
        while True:
            fresh = self._not_stored()

            def step(db: sqlite3.Connection, fresh: list[Batch] = fresh) -> None:
                for known in fresh:
                    _put_batch(db, self.job.id, known)

            if fresh:
                await self._ports.store.write(step)
                self._stored.update(known.head.digest for known in fresh)
            await self.view.changed(KEEP_S)

    def _not_stored(self) -> list[Batch]:
        return [known for known in self.view.log.batches if known.head.digest not in self._stored]

    # ---- terms ---------------------------------------------------------------------------

    async def _on_term_request(self, request: Signed[Message]) -> Signed[TermVote]:
        """Vote for a term of the job's orchestrator, the same vote whenever asked."""
        if request.signer != self.job.genesis.orchestrator:
            raise RequestRefused("only the job's orchestrator may begin a term")
        async with self._lock:
            try:
                await self._take_tip(request)
            except LogError as error:
                log.info("tip refused", job=self.job.id.hex()[:8], why=str(error))
            term = cast(TermRequest, request.message).term
            return await self._vote(term)

    async def _take_tip(self, request: Signed[Message]) -> None:
        """Take the certified batch that the request carries, where it fits."""
        message = cast(TermRequest, request.message)
        if not message.head:
            return
        head = open_as(self.job.domain, message.head, LogHead)
        if self.view.holds(head):
            return
        certificate = open_certificate(message.certificate)
        entries = tuple(open_as(self.job.domain, raw, Message) for raw in message.entries)
        prev = head.message.prev
        if prev != self.job.genesis.hash and self.view.log.known(prev) is None:
            await self._follower.pull()
        await self.view.add(Batch(head, entries, certificate))

    async def _vote(self, term: int) -> Signed[TermVote]:
        why = self._record.vote_refusal(term)
        if why is not None:
            former = await self._ports.store.signed(self.job.id, f"vote.{self._record.voted_term}")
            if former is None or self._record.voted_term <= term:
                raise RequestRefused(why)
            return cast(Signed[TermVote], self.job.domain.open(former))
        tip = self.view.log.batches[-1] if self.view.log.batches else None
        place = (tip.head.message.term, tip.head.message.seq) if tip else (0, 0)
        above = sorted(
            (
                batch
                for batch in self._held.values()
                if (batch.head.message.term, batch.head.message.seq) > place
            ),
            key=lambda batch: (batch.head.message.term, batch.head.message.seq),
        )
        attached = tuple(batch.head.raw for batch in above)
        if tip is not None and tip.certificate is not None:
            attached = (tip.head.raw, encode(tip.certificate), *attached)
        vote = self._ports.sign(
            TermVote(
                job_id=self.job.id,
                term=term,
                orchestrator=self.job.genesis.orchestrator,
                high=tip.head.digest if tip else self.job.genesis.hash,
                signed=tuple(batch.head.digest for batch in above),
            ),
            attached,
        )
        raw = await self._ports.store.sign_once(self.job.id, f"vote.{term}", vote.raw)
        self._record.note_vote(term)
        return cast(Signed[TermVote], self.job.domain.open(raw))

    # ---- restart -------------------------------------------------------------------------

    async def _load(self) -> None:
        """Take up what was signed, and the certified batches that are on disk."""
        rows = await self._ports.store.rows(
            "select scope, raw from signed where job_id=?", (self.job.id,)
        )
        for scope, raw in rows:
            if scope.startswith("vote."):
                self._record.note_vote(int(scope.removeprefix("vote.")))
            elif scope.startswith("head."):
                await self._load_signed(open_as(self.job.domain, raw, LogHead))
        rows = await self._ports.store.rows(
            "select raw, certificate from head where job_id=? and certificate is not null "
            "order by term, seq",
            (self.job.id,),
        )
        for raw, certificate in rows:
            head = open_as(self.job.domain, raw, LogHead)
            batch = Batch(head, await self._entries_of(head), open_certificate(certificate))
            try:
                await self.view.add(batch)
            except LogError as error:
                log.info("stored head waits", job=self.job.id.hex()[:8], why=str(error))
                continue
            self._stored.add(head.digest)
            self._held.pop(head.digest, None)

    async def _load_signed(self, head: Signed[LogHead]) -> None:
        message = head.message
        name = HeadName(message.term, message.seq, head.digest, message.prev, message.start)
        self._record.note_signed(name)
        self._held[head.digest] = Batch(head, await self._entries_of(head))

    async def _entries_of(self, head: Signed[LogHead]) -> tuple[Signed[Message], ...]:
        rows = await self._ports.store.rows(
            "select raw from entry where job_id=? and term=? and seq=? order by place",
            (self.job.id, head.message.term, head.message.seq),
        )
        return tuple(self.job.domain.open(raw) for (raw,) in rows)


def _put_batch(db: sqlite3.Connection, job_id: bytes, batch: Batch) -> None:
    """Put a head and its entries on disk; only a certified one replaces another."""
    message = batch.head.message
    place = (job_id, message.term, message.seq)
    where = "job_id=? and term=? and seq=?"
    known = db.execute(f"select raw from head where {where}", place).fetchone()
    if known is not None and known[0] != batch.head.raw:
        if batch.certificate is None:
            return
        db.execute(f"delete from head where {where}", place)
        db.execute(f"delete from entry where {where}", place)
    db.execute("insert or ignore into head values(?,?,?,?,null)", (*place, batch.head.raw))
    if batch.certificate is not None:
        certificate = encode(batch.certificate)
        db.execute(f"update head set certificate=? where {where}", (certificate, *place))
    entries = [(*place, i, entry.raw) for i, entry in enumerate(batch.entries)]
    db.executemany("insert or ignore into entry values(?,?,?,?,?)", entries)
