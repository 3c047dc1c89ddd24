"""The log of a job that is over, kept on its researcher's disk: certified batches, as they were."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

import structlog

from meshd.ledger.chain import JobStarted
from meshd.ledger.joblog import Batch, Genesis, LogError, open_as
from meshd.node.log.view import Job, LogView, open_certificate
from meshd.node.ports import Ports
from meshd.p2p.codec import CodecError, encode
from meshd.p2p.identity import Address
from meshd.p2p.messages import JobTerms, LogHead

log = structlog.get_logger()


def keep_log(db: sqlite3.Connection, job_id: bytes, batches: Sequence[Batch]) -> None:
    """Put a log's certified *batches* on disk, in the caller's transaction.

    What is there already stays: this node may be the job's orchestrator too, which keeps them.
    """
    for batch in batches:
        assert batch.certificate is not None
        message = batch.head.message
        place = (job_id, message.term, message.seq)
        certificate = encode(batch.certificate)
        db.execute(
            "insert into head values(?,?,?,?,?) on conflict(job_id, term, seq) "
            "do update set certificate=excluded.certificate where certificate is null",
            (*place, batch.head.raw, certificate),
        )
        rows = [(*place, at, entry.raw) for at, entry in enumerate(batch.entries)]
        db.executemany("insert or ignore into entry values(?,?,?,?,?)", rows)


async def read_log(ports: Ports, job_id: bytes, terms: JobTerms) -> LogView | None:
    """Return a job's log from disk, in a view that no role shares; None if it never started."""
    rows = await ports.store.rows("select started from job where job_id=?", (job_id,))
    if not rows or rows[0][0] is None:
        return None
    facts = json.loads(rows[0][0])
    committee = tuple(Address(bytes.fromhex(member)) for member in facts["committee"])
    beacon = bytes.fromhex(facts["beacon"])
    started = JobStarted(facts["height"], job_id, committee, facts["quorum"], beacon)
    orchestrator = Address(bytes.fromhex(facts["orchestrator"]))
    genesis = Genesis.from_start(started, orchestrator, terms.lag)
    view = LogView(Job(ports.domain, genesis, terms, None), ports.beacon)
    await load_log(ports, view)
    return view


async def load_log(ports: Ports, view: LogView) -> None:
    """Take the batches on disk into *view*, checking hashes, signatures and certificates.

    The first one that is damaged ends it, with a warning.
    """
    heads = await ports.store.rows(
        "select term, seq, raw, certificate from head "
        "where job_id=? and certificate is not null order by term, seq",
        (view.job.id,),
    )
    for term, seq, raw, certificate in heads:
        rows = await ports.store.rows(
            "select raw from entry where job_id=? and term=? and seq=? order by place",
            (view.job.id, term, seq),
        )
        try:
            entries = tuple(ports.domain.open(entry) for (entry,) in rows)
            head = open_as(ports.domain, raw, LogHead)
            await view.add(Batch(head, entries, open_certificate(certificate)))
        except (LogError, CodecError) as error:
            job = view.job.id.hex()[:8]
            log.warning("the log on disk is damaged", job=job, at=f"{term}.{seq}", why=str(error))
            return
