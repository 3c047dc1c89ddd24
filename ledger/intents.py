"""Intents and attempts on disk: what the outbox wants to happen, and what it signed for it.

Several outboxes may work on one database, in one process or in two: whatever decides something is
one transaction, and looks again at what it rests on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

import trio

from meshd.ledger.chain import ChainError, Outcome
from meshd.p2p.identity import Address

T = TypeVar("T")

_SCHEMA = (
    """create table if not exists intent(
        id integer primary key, chain blob not null, sender blob not null,
        key text not null, step integer not null,
        target blob, data blob not null, value text not null, gas integer not null,
        state text not null default 'new'
            check(state in ('new', 'signed', 'sent', 'mined', 'final', 'failed')),
        nonce integer, taken_at integer, tx blob, height integer, error text,
        unique(chain, sender, key, step)) strict""",
    """create unique index if not exists intent_nonce
        on intent(chain, sender, nonce) where nonce is not null""",
    """create table if not exists attempt(
        hash blob primary key, intent integer not null references intent(id),
        nonce integer not null, raw blob not null, gas integer not null,
        max_fee text not null, tip text not null, sent_at integer) strict""",
)


class State(StrEnum):
    """How far an intent has come."""

    NEW = "new"
    SIGNED = "signed"
    """It has a nonce and an attempt."""
    SENT = "sent"
    MINED = "mined"
    FINAL = "final"
    FAILED = "failed"
    """Mined and confirmed, but the contract refused it."""


@dataclass(frozen=True)
class Transaction:
    """What an intent wants: a message to *to* (None: a new contract), *value* in wei.

    *gas* is what it gets if the chain cannot estimate it.
    """

    to: Address | None
    data: bytes
    gas: int
    value: int = 0


@dataclass(frozen=True)
class Intent:
    """A transaction that is to land exactly once."""

    id: int
    key: str
    state: State
    transaction: Transaction
    nonce: int | None = None
    taken_at: int | None = None
    """Height at which its nonce was first seen used without a receipt of its attempts."""
    error: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A signed transaction for an intent; fees in wei per gas."""

    hash: bytes
    raw: bytes
    nonce: int
    gas: int
    max_fee: int
    tip: int
    sent_at: int | None = None
    """Height at which it was last sent."""


class Database(Protocol):
    """A SQLite database that somebody else may own: the node's store, or `InlineDatabase`."""

    async def write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run *step* in one transaction: all of it is durable on return, or none."""
        ...

    async def read(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run *step*, which only reads."""
        ...


class InlineDatabase:
    """A database in memory, for a program that stays until its transactions are final."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None)

    async def write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run *step* in one transaction."""
        self._connection.execute("begin")
        try:
            result = step(self._connection)
        except BaseException:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")
        return result

    async def read(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run *step*, which only reads."""
        return step(self._connection)

    def close(self) -> None:
        """Forget everything."""
        self._connection.close()


class Intents:
    """The intents of one account on one chain, which its genesis hash names."""

    def __init__(self, database: Database, genesis: bytes, sender: Address) -> None:
        self._database = database
        self._scope = (genesis, bytes(sender))
        self._is_prepared = False
        self.changed = trio.Event()
        """Set, and replaced, whenever something was written here."""

    async def put(self, key: str, transactions: Sequence[Transaction]) -> None:
        """Take *transactions*, to be sent in this order, under *key*; on disk on return.

        The same key again is a no-op, whatever the transactions.
        """
        rows = [
            (*self._scope, key, step, t.to, t.data, str(t.value), t.gas)
            for step, t in enumerate(transactions)
        ]

        def insert(db: sqlite3.Connection) -> None:
            known = "select 1 from intent where chain=? and sender=? and key=?"
            if db.execute(known, (*self._scope, key)).fetchone() is None:
                db.executemany(
                    "insert into intent(chain, sender, key, step, target, data, value, gas)"
                    " values(?,?,?,?,?,?,?,?)",
                    rows,
                )

        await self._write(insert)

    async def outcome(self, key: str) -> Outcome | None:
        """Return what became of the last transaction under *key*; None while it is not final.

        Raises ChainError if nothing was put under *key*.
        """
        query = (
            "select state, tx, height, error from intent where chain=? and sender=? and key=?"
            " order by step desc limit 1"
        )
        row = await self._read(lambda db: db.execute(query, (*self._scope, key)).fetchone())
        if row is None:
            raise ChainError(f"no call was sent under key {key!r}: call send() first")
        state, tx, height, error = row
        return Outcome(tx, height, error) if state in (State.FINAL, State.FAILED) else None

    async def new(self) -> list[Intent]:
        """Return what has no nonce yet, oldest first."""
        return await self._select("state='new' order by id")

    async def in_flight(self) -> list[Intent]:
        """Return what has a nonce and is not done, in the order of the nonces."""
        return await self._select("state in ('signed', 'sent', 'mined') order by nonce")

    async def has_work(self) -> bool:
        """Return whether there is anything that is not done."""
        return bool(await self._select("state not in ('final', 'failed') limit 1"))

    async def sign(self, intent: Intent, nonce: int, make: Callable[[int], Attempt]) -> None:
        """Give a new *intent* its nonce, at least *nonce*, and the attempt that *make* signs.

        Nothing happens if it is not new any more.
        """

        def step(db: sqlite3.Connection) -> None:
            query = "select state from intent where id=?"
            if db.execute(query, (intent.id,)).fetchone() != (State.NEW,):
                return
            query = "select max(nonce) from intent where chain=? and sender=?"
            (highest,) = db.execute(query, self._scope).fetchone()
            attempt = make(nonce if highest is None else max(nonce, highest + 1))
            _insert(db, intent, attempt)
            db.execute(
                "update intent set state='signed', nonce=? where id=?", (attempt.nonce, intent.id)
            )

        await self._write(step)

    async def add_attempt(self, intent: Intent, attempt: Attempt) -> None:
        """Keep one more attempt for *intent*; one that is known already is kept once."""
        await self._write(lambda db: _insert(db, intent, attempt))

    async def attempts(self, intent: Intent) -> list[Attempt]:
        """Return the attempts for *intent*, those of its present nonce first, best paid first."""
        query = "select hash, raw, nonce, gas, max_fee, tip, sent_at from attempt where intent=?"
        rows = await self._read(lambda db: db.execute(query, (intent.id,)).fetchall())
        found = [
            Attempt(tx, raw, nonce, gas, int(max_fee), int(tip), sent_at)
            for tx, raw, nonce, gas, max_fee, tip, sent_at in rows
        ]
        return sorted(found, key=lambda a: (a.nonce == intent.nonce, a.max_fee), reverse=True)

    async def record_sent(self, intent: Intent, attempt: Attempt, height: int) -> None:
        """Note that *attempt* went out when the chain was at *height*."""

        def step(db: sqlite3.Connection) -> None:
            db.execute("update attempt set sent_at=? where hash=?", (height, attempt.hash))
            db.execute("update intent set state='sent', error=null where id=?", (intent.id,))

        await self._write(step)

    async def record_mined(
        self, intent: Intent, state: State, attempt: Attempt, height: int, error: str | None
    ) -> None:
        """Note that *attempt* is in block *height*, and whether that is final."""
        statement = "update intent set state=?, tx=?, height=?, error=?, taken_at=null where id=?"
        values = (state, attempt.hash, height, error, intent.id)
        await self._write(lambda db: db.execute(statement, values))

    async def record_refused(self, intent: Intent, reason: str) -> None:
        """Note why the chain did not take *intent*; it is tried again."""
        statement = "update intent set error=? where id=?"
        await self._write(lambda db: db.execute(statement, (reason, intent.id)))

    async def record_taken(self, intent: Intent, height: int) -> None:
        """Note that at *height* the nonce of *intent* was found used by somebody else."""
        statement = "update intent set taken_at=? where id=?"
        await self._write(lambda db: db.execute(statement, (height, intent.id)))

    async def give_up_nonce(self, intent: Intent) -> None:
        """Make *intent* new again: its nonce is somebody else's for good."""
        statement = (
            "update intent set state='new', nonce=null, taken_at=null where id=? and nonce=?"
        )
        await self._write(lambda db: db.execute(statement, (intent.id, intent.nonce)))

    async def _select(self, condition: str) -> list[Intent]:
        query = (
            "select id, key, state, target, data, gas, value, nonce, taken_at, error from intent"
            f" where chain=? and sender=? and {condition}"
        )
        rows = await self._read(lambda db: db.execute(query, self._scope).fetchall())
        return [
            Intent(
                number,
                key,
                State(state),
                Transaction(None if to is None else Address(to), data, gas, int(value)),
                *progress,
            )
            for number, key, state, to, data, gas, value, *progress in rows
        ]

    async def _write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        await self._prepare()
        result = await self._database.write(step)
        self.changed.set()
        self.changed = trio.Event()
        return result

    async def _read(self, step: Callable[[sqlite3.Connection], T]) -> T:
        await self._prepare()
        return await self._database.read(step)

    async def _prepare(self) -> None:
        if not self._is_prepared:
            await self._database.write(lambda db: [db.execute(table) for table in _SCHEMA])
            self._is_prepared = True


def _insert(db: sqlite3.Connection, intent: Intent, attempt: Attempt) -> None:
    db.execute(
        "insert or ignore into attempt values(?,?,?,?,?,?,?,null)",
        (
            attempt.hash,
            intent.id,
            attempt.nonce,
            attempt.raw,
            attempt.gas,
            str(attempt.max_fee),
            str(attempt.tip),
        ),
    )
