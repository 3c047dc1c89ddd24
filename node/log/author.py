"""The orchestrator's side of a job's log: entries into batches, heads, certificates, terms."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.joblog import Batch, entries_root, open_as, term_start
from meshd.node.log.quorum import collect_certificate, collect_votes
from meshd.node.log.view import LogView, apply_batch, open_certificate
from meshd.node.ports import Ports
from meshd.p2p.codec import Signed, encode
from meshd.p2p.messages import (
    Certificate,
    LogHead,
    LogRequest,
    Message,
    TermStart,
)

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

MAX_ENTRIES = 64
"""Entries of one batch."""
BATCH_S = 2.0
"""Seconds after which a batch is closed at the latest."""
MAX_BACKOFF_S = 10.0


class Author:
    """Keeps one job's log as its orchestrator.

    All entries of a batch count at one height, so a batch is closed when a block arrives; its
    head then waits its turn to be certified, in order. Everything is on disk before it is sent.
    """

    def __init__(self, ports: Ports, view: LogView) -> None:
        self._ports = ports
        self.view = view
        self.job = view.job
        self.live = view.fresh_state()
        """What the log means with every entry so far, certified or not."""
        self._pending: list[Batch] = []
        self._entries: list[Signed[Message]] = []
        self._term, self._seq, self._next_place = 0, 1, 0
        self._opened_at = -math.inf
        self._lock = trio.Lock()
        self._wake = trio.Event()
        self.grown = trio.Event()
        """Set, and replaced, whenever entries are logged or a head is certified."""

    # ---- entries -------------------------------------------------------------------------

    async def append(self, *entries: Signed[Message]) -> list[str | None]:
        """Log *entries* in order; return for each why it was not logged, None if it was.

        What was logged is on disk on return.
        """
        async with self._lock:
            await self._reach((await self._ports.chain.head()).height)
            return await self._append(entries)

    async def _append(self, entries: Sequence[Signed[Message]]) -> list[str | None]:
        reasons: list[str | None] = []
        while len(reasons) < len(entries):
            if len(self._entries) >= MAX_ENTRIES:
                await self._close()
            room = MAX_ENTRIES - len(self._entries)
            part = entries[len(reasons) : len(reasons) + room]
            why = [self.live.apply(entry) for entry in part]
            reasons += why
            await self._note([e for e, refused in zip(part, why, strict=True) if refused is None])
        return reasons

    async def _note(self, fresh: Sequence[Signed[Message]]) -> None:
        """Put entries that have their effect into the open batch and on disk."""
        if not fresh:
            return
        if not self._entries:
            self._opened_at = trio.current_time()
        self._entries += fresh
        place = (self.job.id, self._term, self._seq)
        rows = [(*place, self._next_place + i, entry.raw) for i, entry in enumerate(fresh)]
        self._next_place += len(fresh)
        await self._ports.store.write(
            lambda db: db.executemany("insert or replace into entry values(?,?,?,?,?)", rows)
        )
        if len(self._entries) >= MAX_ENTRIES:
            await self._close()
        else:
            self._notify()

    def _notify(self) -> None:
        self._wake.set()
        self.grown.set()
        self.grown = trio.Event()

    async def _reach(self, height: int) -> None:
        """Take the open batch to *height*, closing it first if entries are in it already."""
        if height > self.live.height:
            if self._entries:
                await self._close()
            await self._begin(height)

    async def _begin(self, height: int) -> None:
        needed = sorted(self.live.needed_beacons(height))
        beacons = {at: await self._ports.beacon.at(at) for at in needed}
        self.live.begin_batch(self._term, self._seq, height, beacons)

    async def _close(self) -> None:
        prev = self._pending[-1].head if self._pending else self.view.log.tip
        genesis = self.job.genesis
        prev_hash = prev.digest if prev else genesis.hash
        start = prev.message.start if prev else genesis.start
        if self._entries and isinstance(message := self._entries[0].message, TermStart):
            start, prev_hash = self._entries[0].digest, message.prev
        head = self._ports.sign(
            LogHead(
                job_id=self.job.id,
                term=self._term,
                seq=self._seq,
                prev=prev_hash,
                start=start,
                entries_root=entries_root(self._entries),
                height=self.live.height,
                block_hash=await self._ports.beacon.at(self.live.height),
            )
        )
        batch = Batch(head, tuple(self._entries))
        await self._ports.store.write(lambda db: _put_batch(db, self.job.id, batch))
        self._pending.append(batch)
        self._entries = []
        self._seq, self._next_place = self._seq + 1, 0
        await self._begin(self.live.height)
        self._notify()

    # ---- running -------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load what is on disk, then keep the log until cancelled."""
        await self._load()
        with self._ports.dispatch.on(LogRequest, self.job.id, self._serve_log):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_heights)
                nursery.start_soon(self._certify_all)
                task_status.started()

    async def _serve_log(self, signed: Signed[Message]) -> Signed[Message]:
        message = cast(LogRequest, signed.message)
        return self._ports.sign(self.view.batch_message(message.after_seq))

    async def _follow_heights(self) -> None:
        while True:
            with trio.move_on_after(BATCH_S):
                await self._ports.chain.wait_height(self.live.height + 1)
            async with self._lock:
                height = (await self._ports.chain.head()).height
                if self._entries and trio.current_time() - self._opened_at >= BATCH_S:
                    await self._close()
                await self._reach(height)
                if not self._entries and not self._pending and self._wants_empty(height):
                    await self._close()

    def _wants_empty(self, height: int) -> bool:
        """An empty head makes the one before it final, or the passing of time part of the log: an
        auditor's silence, or a beacon that lets the verdicts on what was accepted be revealed.
        """
        batches = self.view.log.batches
        unfinished = bool(batches) and bool(batches[-1].entries)
        overdue = self.live.audits.overdue(self.view.height, height)
        final = self.view.state
        return unfinished or overdue or final.audits.undecided(final.height, height)

    async def _certify_all(self) -> None:
        while True:
            while not self._pending:
                self._wake = trio.Event()
                await self._wake.wait()
            batch = self._pending[0]
            prev = self.view.log.known(batch.head.message.prev)
            before = prev.certificate if prev is not None else None
            certificate = await collect_certificate(
                self._ports, self.job, batch, before, self.view.seq
            )
            if certificate is not None:
                await self._certified(batch, certificate)
            else:
                name = f"{batch.head.message.term}.{batch.head.message.seq}"
                log.warning("head not certified in time", job=self.job.id.hex()[:8], head=name)
                await self._change_term(batch.head.message.term + 1)

    async def _certified(self, batch: Batch, certificate: Certificate) -> None:
        async with self._lock:
            message = batch.head.message
            await self._ports.store.execute(
                "update head set certificate=? where job_id=? and term=? and seq=?",
                (encode(certificate), self.job.id, message.term, message.seq),
            )
            await self.view.add(Batch(batch.head, batch.entries, certificate))
            self._pending.pop(0)
            self._notify()
        await self._ports.publish(self.job.id, self._ports.sign(certificate))

    # ---- terms ---------------------------------------------------------------------------

    async def _change_term(self, term: int) -> None:
        """Begin *term*, or a later one, on a quorum of votes; lost entries are entered again."""
        backoff = 0.5
        while True:
            tip = self.view.log.batches[-1] if self.view.log.batches else None
            votes = await collect_votes(self._ports, self.job, term, tip)
            now = [content for content in votes if content.vote.message.term == term]
            if len(now) >= self.job.genesis.quorum:
                break
            higher = [c.vote.message.term for c in votes if c.vote.message.term > term]
            term = max(higher, default=term - 1) + 1
            await trio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)
        start, attached, _ = term_start(self.job.genesis, term, now)
        async with self._lock:
            lost = await self._truncate(start.prev) + self._pending
            again = [e for batch in lost for e in batch.entries] + self._entries
            self._pending, self._entries = [], []
            self._term, self._seq, self._next_place = term, start.seq, 0
            await self._begin((await self._ports.chain.head()).height)
            again = [entry for entry in again if not isinstance(entry.message, TermStart)]
            await self._append([self._ports.sign(start, attached), *again])
            self._notify()
        log.info("term begun", job=self.job.id.hex()[:8], term=term, entered_again=len(again))

    async def _truncate(self, prev: bytes) -> list[Batch]:
        """Fold anew from the certified batches up to the head *prev*; return those it drops."""
        kept = self.view.log.branch(prev)
        live = self.view.fresh_state()
        for batch in kept:
            await apply_batch(live, batch, self._ports.beacon)
        self.live = live
        heads = {batch.head.digest for batch in kept}
        return [batch for batch in self.view.log.batches if batch.head.digest not in heads]

    # ---- restart -------------------------------------------------------------------------

    async def _load(self) -> None:
        """Rebuild the log from disk, checking the chain of hashes and every signature."""
        rows = await self._ports.store.rows(
            "select term, seq, raw, certificate from head where job_id=? order by term, seq",
            (self.job.id,),
        )
        waiting = []
        for term, seq, raw, certificate in rows:
            head = open_as(self.job.domain, raw, LogHead)
            entries = await self._entries_on_disk(term, seq)
            if certificate is None:
                waiting.append(Batch(head, entries))
            else:
                await self.view.add(Batch(head, entries, open_certificate(certificate)))
        tip = self.view.log.tip
        base = tip.digest if tip else self.job.genesis.hash
        self._term, self._seq = (tip.message.term, tip.message.seq + 1) if tip else (0, 1)
        begun = await self._term_begun_after(self._term)
        if begun is not None:
            base, self._term, self._seq = begun.prev, begun.term, begun.seq
        await self._truncate(base)
        for batch in waiting:
            if batch.head.message.prev == base and batch.head.message.term == self._term:
                await apply_batch(self.live, batch, self._ports.beacon)
                self._pending.append(batch)
                base, self._seq = batch.head.digest, batch.head.message.seq + 1
        entries = await self._entries_on_disk(self._term, self._seq)
        self._next_place = len(entries)
        await self._begin(max((await self._ports.chain.head()).height, self.live.height))
        self._entries = [entry for entry in entries if self.live.apply(entry) is None]
        self._opened_at = trio.current_time()

    async def _term_begun_after(self, term: int) -> TermStart | None:
        rows = await self._ports.store.rows(
            "select raw from entry where job_id=? and term>? and place=0 order by term desc, seq",
            (self.job.id, term),
        )
        for (raw,) in rows:
            message = self.job.domain.open(raw).message
            if isinstance(message, TermStart):
                return message
        return None

    async def _entries_on_disk(self, term: int, seq: int) -> tuple[Signed[Message], ...]:
        rows = await self._ports.store.rows(
            "select raw from entry where job_id=? and term=? and seq=? order by place",
            (self.job.id, term, seq),
        )
        return tuple(self.job.domain.open(raw) for (raw,) in rows)


def _put_batch(db: sqlite3.Connection, job_id: bytes, batch: Batch) -> None:
    """Put a closed batch on disk: of the entries noted as they came, those that it holds."""
    message = batch.head.message
    place = (job_id, message.term, message.seq)
    db.execute("delete from entry where job_id=? and term=? and seq=?", place)
    rows = [(*place, i, entry.raw) for i, entry in enumerate(batch.entries)]
    db.executemany("insert into entry values(?,?,?,?,?)", rows)
    db.execute("insert into head values(?,?,?,?,null)", (*place, batch.head.raw))
