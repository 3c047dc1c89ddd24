"""What a node must not forget: one SQLite file, written by one daemon, one transaction a step."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import trio

T = TypeVar("T")

_TABLES = """
create table job(
    job_id blob primary key, terms blob not null, salt blob, researcher blob not null,
    started text, state text not null, detail text not null default '',
    created real not null, ended real, submitted integer not null default 0,
    output blob) strict;
create table head(
    job_id blob not null, term integer not null, seq integer not null, raw blob not null,
    certificate blob, primary key(job_id, term, seq)) strict;
create table entry(
    job_id blob not null, term integer not null, seq integer not null, place integer not null,
    raw blob not null, primary key(job_id, term, seq, place)) strict;
create table signed(
    job_id blob not null, scope text not null, raw blob not null,
    primary key(job_id, scope)) strict;
create table shard(
    assignment blob primary key, job_id blob not null, raw blob not null, accept blob not null,
    seed blob not null, output blob, commitment blob, ended integer not null default 0) strict;
create table audit(
    challenge blob primary key, job_id blob not null, commitment blob not null,
    raw blob not null, own blob, salt blob, verdict blob, attestation blob, reveal blob) strict;
create table output(
    job_id blob not null, shard integer not null, commitment blob not null, blob blob not null,
    primary key(job_id, shard, commitment)) strict;
create table setting(name text primary key, value text not null) strict;
"""
_OUTCOMES = """
alter table job add column counts text;
create table payment(
    scope text not null, tx blob not null, job_id blob not null, height integer not null,
    amount text not null, primary key(scope, tx, job_id)) strict;
"""

STEPS = (_TABLES, _OUTCOMES)
"""What leads from each version of the database to the next one, beginning with an empty file.

Only ever add to the end: a data directory may come from any of them.
"""
VERSION = len(STEPS)


class StoreError(Exception):
    """The node's database cannot be used; the text says why and the cure."""


class Store:
    """The database of one node.

    With a *path*, statements run in a worker thread and a commit survives power loss; without
    one everything is in memory and runs inline, as virtual time needs it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._threads = path is not None
        self._lock = trio.Lock()
        try:
            self.connection = sqlite3.connect(
                path or ":memory:", isolation_level=None, check_same_thread=False
            )
            self.connection.execute("pragma journal_mode=wal")
            self.connection.execute("pragma synchronous=full")
            (version,) = self.connection.execute("pragma user_version").fetchone()
            if version <= VERSION:
                self._upgrade(version)
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"database {path} cannot be read ({error}): "
                "restore it from a backup, or move it away to start afresh"
            ) from error
        if version > VERSION:
            self.connection.close()
            raise StoreError(
                f"database {path} has version {version}, this meshd knows {VERSION}: a newer "
                "meshd wrote it: upgrade this one, or use another data directory"
            )
        self.upgraded_from: int | None = version if 0 < version < VERSION else None
        """The version that the file had before; None: it is new, or was of this version."""

    def _upgrade(self, version: int) -> None:
        """Take the steps from *version* to this one, all of them or none."""
        if version == VERSION:
            return
        steps = "".join(STEPS[version:])
        try:
            self.connection.executescript(f"begin; {steps} pragma user_version={VERSION}; commit;")
        except sqlite3.DatabaseError:
            if self.connection.in_transaction:
                self.connection.execute("rollback")
            raise

    async def write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run *step* in one transaction: all of it is durable on return, or none.

        Raises StoreError if it cannot be written.
        """
        return await self._run(lambda: self._transaction(step))

    async def read(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run *step*, which only reads."""
        return await self._run(lambda: step(self.connection))

    async def _run(self, work: Callable[[], T]) -> T:
        async with self._lock:
            if self._threads:
                return await trio.to_thread.run_sync(work)
            return work()

    def _transaction(self, step: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self.connection.execute("begin immediate")
            result = step(self.connection)
            self.connection.execute("commit")
        except BaseException as error:
            if self.connection.in_transaction:  # some errors have rolled it back already
                self.connection.execute("rollback")
            if isinstance(error, sqlite3.OperationalError):
                raise StoreError(
                    f"the database cannot be written ({error}): is there room on its disk?"
                ) from error
            raise
        return result

    async def sign_once(self, job_id: bytes, scope: str, raw: bytes) -> bytes:
        """Record that *raw* is what this node signs for *scope*; return what it signed first.

        The caller sends the returned bytes only: a second version never leaves the node.
        """

        def step(db: sqlite3.Connection) -> bytes:
            db.execute("insert or ignore into signed values(?,?,?)", (job_id, scope, raw))
            return _one(db, "select raw from signed where job_id=? and scope=?", (job_id, scope))

        return await self.write(step)

    async def signed(self, job_id: bytes, scope: str) -> bytes | None:
        """Return what this node signed for *scope*, if anything."""
        rows = await self.rows("select raw from signed where job_id=? and scope=?", (job_id, scope))
        return bytes(rows[0][0]) if rows else None

    async def rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a select."""
        return await self.read(lambda db: db.execute(query, values).fetchall())

    async def execute(self, statement: str, values: Sequence[object] = ()) -> None:
        """Run one writing statement in a transaction of its own."""
        await self.write(lambda db: db.execute(statement, values))

    async def setting(self, name: str) -> str | None:
        """Return the value kept under *name*, if any."""
        rows = await self.rows("select value from setting where name=?", (name,))
        return str(rows[0][0]) if rows else None

    async def set(self, name: str, value: str) -> None:
        """Keep *value* under *name*."""
        await self.execute(
            "insert into setting values(?,?) on conflict(name) do update set value=excluded.value",
            (name, value),
        )

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


def _one(db: sqlite3.Connection, query: str, values: Sequence[object]) -> bytes:
    (value,) = db.execute(query, values).fetchone()
    return bytes(value)
