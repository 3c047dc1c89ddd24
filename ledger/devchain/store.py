"""The embedded chain on disk: one SQLite file with blocks, state, logs and waiting transactions.

A block, its state, its receipts and the removal of its transactions from the pool are one SQLite
transaction: after a crash the block is there whole or not at all. Every commit is synchronous.

State (trie nodes and code) is kept for ever. A block with transactions keeps its header. An empty
block differs from its parent in number, time, base fee and randomness only, so just these and the
hash are kept, 125 bytes with the index; the header is put together again, and checked against
the hash, when somebody asks. Empty blocks older than `EMPTY_BLOCKS_KEPT` are dropped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import rlp  # type: ignore[import-untyped]
from eth.db.backends.base import BaseDB
from eth.vm.forks.prague.blocks import PragueBlockHeader
from eth_typing import BlockNumber, Hash32

from meshd.ledger.devchain.errors import ChainFileError
from meshd.p2p.identity import Address

GAS_LIMIT = 30_000_000
"""Gas limit of every block."""

EMPTY_BLOCKS_KEPT = 604_800
"""Empty blocks older than this many are dropped: a week of blocks, 76 MB."""

_FORMAT = "1"
_SCHEMA = """
create table if not exists meta(key text primary key, value text not null) strict, without rowid;
create table if not exists node(key blob primary key, value blob not null) strict, without rowid;
create table if not exists block(
    number integer primary key, hash blob not null unique, timestamp integer not null,
    base_fee integer not null, mix_hash blob not null, header blob) strict;
create index if not exists full_block on block(number) where header is not null;
create table if not exists mined(
    block integer not null, position integer not null, hash blob not null unique,
    raw blob not null, sender blob not null, status integer not null,
    gas_used integer not null, cumulative_gas_used integer not null,
    primary key(block, position)) strict, without rowid;
create table if not exists log(
    block integer not null, idx integer not null, position integer not null,
    address blob not null, topics blob not null, data blob not null,
    primary key(block, idx)) strict, without rowid;
create table if not exists pending(
    arrival integer primary key, hash blob not null unique, sender blob not null,
    nonce integer not null, raw blob not null, unique(sender, nonce)) strict;
"""
_PENDING = "select raw from pending order by arrival"


@dataclass(frozen=True)
class MinedTransaction:
    """A transaction in a block, and what its receipt says; *status* is 1 for success."""

    block: int
    position: int
    hash: bytes
    raw: bytes
    sender: Address
    status: int
    gas_used: int
    cumulative_gas_used: int


@dataclass(frozen=True)
class Log:
    """An event: *index* counts within the block, *position* is the transaction's."""

    block: int
    index: int
    position: int
    address: Address
    topics: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True)
class Block:
    """A block with everything in it; *logs* are in the order of their index."""

    header: PragueBlockHeader
    transactions: tuple[MinedTransaction, ...] = ()
    logs: tuple[Log, ...] = ()


@dataclass(frozen=True)
class LogFilter:
    """Which logs to look for: blocks *first* to *last*, inclusive.

    An empty set of addresses means any; so does an empty set at one place of *topics*. A log
    matches only if it has at least as many topics as the filter has places.
    """

    first: int
    last: int
    addresses: frozenset[bytes] = frozenset()
    topics: tuple[frozenset[bytes], ...] = ()


class NodeTable(BaseDB):
    """The table of trie nodes and code as the key-value database that py-evm works on."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getitem__(self, key: bytes) -> bytes:
        row = self._connection.execute("select value from node where key=?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        return bytes(row[0])

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._connection.execute("insert or replace into node values(?,?)", (key, value))

    def __delitem__(self, key: bytes) -> None:
        self._connection.execute("delete from node where key=?", (key,))

    def _exists(self, key: bytes) -> bool:
        found = self._connection.execute("select 1 from node where key=?", (key,)).fetchone()
        return found is not None


def block_header(
    *,
    number: int,
    parent_hash: bytes,
    state_root: bytes,
    timestamp: int,
    base_fee: int,
    mix_hash: bytes,
) -> PragueBlockHeader:
    """Return the header of a block that holds no transaction."""
    return PragueBlockHeader(
        difficulty=0,
        block_number=BlockNumber(number),
        gas_limit=GAS_LIMIT,
        timestamp=timestamp,
        parent_hash=Hash32(parent_hash),
        state_root=Hash32(state_root),
        mix_hash=Hash32(mix_hash),
        base_fee_per_gas=base_fee,
        nonce=bytes(8),
    )


class Store:
    """The chain's database; one process at a time has it."""

    def __init__(self, path: Path) -> None:
        """Open or create the database at *path*.

        Raises ChainFileError if it cannot be opened, is no chain, or is in use.
        """
        self.path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=1)
        except sqlite3.OperationalError as error:
            raise ChainFileError(f"{path}: {error}; make its folder first") from error
        try:
            # Exclusive: a second chain on the same file would fork it.
            self._connection.execute("pragma locking_mode=exclusive")
            self._connection.execute("pragma journal_mode=wal")
            self._connection.execute("pragma synchronous=full")
            self._connection.executescript(f"begin immediate; {_SCHEMA} commit;")
        except sqlite3.OperationalError as error:
            self.close()
            raise ChainFileError(
                f"{path}: {error}; end the other process that uses it, or name another path"
            ) from error
        except sqlite3.DatabaseError as error:
            self.close()
            raise ChainFileError(f"{path} is not a chain: {error}; name another path") from error
        self.nodes = NodeTable(self._connection)

    def close(self) -> None:
        """Close the database; nothing is lost if this is never called."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything written inside durable together when it ends, or nothing on an error."""
        self._connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")

    # -- meta --

    def settings(self) -> dict[str, str]:
        """Return what the chain was created with; empty for a new one.

        Raises ChainFileError if another version of this module wrote it.
        """
        settings = dict(self._connection.execute("select key, value from meta").fetchall())
        if settings and settings.pop("format", None) != _FORMAT:
            raise ChainFileError(f"{self.path} is of another version of meshd; name another path")
        return settings

    def put_settings(self, settings: dict[str, str]) -> None:
        """Keep what the chain is created with."""
        rows = [("format", _FORMAT), *settings.items()]
        self._connection.executemany("insert into meta values(?,?)", rows)

    # -- blocks --

    def put_block(self, block: Block) -> None:
        """Append *block*, take its transactions out of the pool and drop an old empty block."""
        header = block.header
        is_full = bool(block.transactions) or header.block_number == 0
        self._connection.execute(
            "insert into block values(?,?,?,?,?,?)",
            (
                header.block_number,
                header.hash,
                header.timestamp,
                header.base_fee_per_gas,
                header.mix_hash,
                rlp.encode(header) if is_full else None,
            ),
        )
        self._connection.executemany(
            "insert into mined values(?,?,?,?,?,?,?,?)",
            [
                (
                    header.block_number,
                    mined.position,
                    mined.hash,
                    mined.raw,
                    mined.sender,
                    mined.status,
                    mined.gas_used,
                    mined.cumulative_gas_used,
                )
                for mined in block.transactions
            ],
        )
        self._connection.executemany(
            "insert into log values(?,?,?,?,?,?)",
            [
                (log.block, log.index, log.position, log.address, b"".join(log.topics), log.data)
                for log in block.logs
            ],
        )
        self._connection.execute(
            "delete from block where number=? and header is null",
            (header.block_number - EMPTY_BLOCKS_KEPT,),
        )

    def height(self) -> int | None:
        """Return the number of the newest block, None before the genesis block."""
        row = self._connection.execute("select max(number) from block").fetchone()
        return None if row[0] is None else int(row[0])

    def block_number(self, block_hash: bytes) -> int | None:
        """Return the number of the block with *block_hash*."""
        row = self._connection.execute(
            "select number from block where hash=?", (block_hash,)
        ).fetchone()
        return None if row is None else int(row[0])

    def block_hash(self, number: int) -> bytes | None:
        """Return the hash of block *number*."""
        row = self._connection.execute(
            "select hash from block where number=?", (number,)
        ).fetchone()
        return None if row is None else bytes(row[0])

    def header(self, number: int) -> PragueBlockHeader | None:
        """Return the header of block *number*, None if there is none (yet, or any more).

        Raises ChainFileError if it does not fit its hash.
        """
        row = self._connection.execute(
            "select hash, timestamp, base_fee, mix_hash, header from block where number=?",
            (number,),
        ).fetchone()
        if row is None:
            return None
        block_hash, timestamp, base_fee, mix_hash, encoded = row
        if encoded is not None:
            header = _decode(encoded)
        else:
            parent_hash = self.block_hash(number - 1)
            if parent_hash is None:
                return None
            header = block_header(
                number=number,
                parent_hash=parent_hash,
                state_root=self._full_header_before(number).state_root,
                timestamp=timestamp,
                base_fee=base_fee,
                mix_hash=mix_hash,
            )
        if header.hash != block_hash:
            raise ChainFileError(
                f"{self.path}: block {number} is damaged; start a new chain at another path"
            )
        return header

    def _full_header_before(self, number: int) -> PragueBlockHeader:
        row = self._connection.execute(
            "select header from block where number<? and header is not null"
            " order by number desc limit 1",
            (number,),
        ).fetchone()
        return _decode(row[0])

    # -- transactions and logs --

    def mined(self, transaction_hash: bytes) -> MinedTransaction | None:
        """Return the transaction with *transaction_hash* if it is in a block."""
        found = self._mined("hash=?", (transaction_hash,))
        return found[0] if found else None

    def mined_in(self, number: int) -> list[MinedTransaction]:
        """Return the transactions of block *number*, in order."""
        return self._mined("block=? order by position", (number,))

    def _mined(self, condition: str, values: tuple[object, ...]) -> list[MinedTransaction]:
        rows = self._connection.execute(
            "select block, position, hash, raw, sender, status, gas_used, cumulative_gas_used"
            f" from mined where {condition}",
            values,
        )
        return [MinedTransaction(*row) for row in rows]

    def logs_of(self, mined: MinedTransaction) -> list[Log]:
        """Return the logs of one transaction, in order."""
        return self._logs("block=? and position=?", (mined.block, mined.position), -1)

    def logs(self, wanted: LogFilter, limit: int) -> list[Log]:
        """Return the first *limit* logs that match *wanted*, oldest first."""
        conditions = ["block between ? and ?"]
        values: list[object] = [wanted.first, wanted.last]
        if wanted.addresses:
            conditions.append(f"address in ({_marks(wanted.addresses)})")
            values.extend(wanted.addresses)
        if wanted.topics:
            conditions.append("length(topics) >= ?")
            values.append(32 * len(wanted.topics))
        for place, topics in enumerate(wanted.topics):
            if topics:
                conditions.append(f"substr(topics, {32 * place + 1}, 32) in ({_marks(topics)})")
                values.extend(topics)
        return self._logs(" and ".join(conditions), tuple(values), limit)

    def _logs(self, condition: str, values: tuple[object, ...], limit: int) -> list[Log]:
        rows = self._connection.execute(
            "select block, idx, position, address, topics, data from log"
            f" where {condition} order by block, idx limit ?",
            (*values, limit),
        )
        return [
            Log(block, index, position, address, _split(topics), data)
            for block, index, position, address, topics, data in rows
        ]

    # -- the pool --

    def put_pending(self, transaction_hash: bytes, sender: Address, nonce: int, raw: bytes) -> None:
        """Keep a waiting transaction in place of one with the same sender and nonce."""
        self._connection.execute(
            "insert or replace into pending(hash, sender, nonce, raw) values(?,?,?,?)",
            (transaction_hash, sender, nonce, raw),
        )

    def drop_pending(self, slots: Iterable[tuple[Address, int]]) -> None:
        """Forget what waits for these (sender, nonce)."""
        self._connection.executemany("delete from pending where sender=? and nonce=?", slots)

    def drop_pending_hash(self, transaction_hash: bytes) -> None:
        """Forget the waiting transaction with *transaction_hash*."""
        self._connection.execute("delete from pending where hash=?", (transaction_hash,))

    def pending(self) -> Sequence[bytes]:
        """Return the waiting transactions as they were sent, in order of arrival."""
        return [row[0] for row in self._connection.execute(_PENDING)]


def _decode(encoded: bytes) -> PragueBlockHeader:
    return cast(PragueBlockHeader, rlp.decode(encoded, PragueBlockHeader))


def _marks(values: frozenset[bytes]) -> str:
    return ",".join("?" * len(values))


def _split(topics: bytes) -> tuple[bytes, ...]:
    return tuple(topics[start : start + 32] for start in range(0, len(topics), 32))
