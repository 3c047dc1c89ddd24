"""What an account was paid: the escrow's own events, kept on disk as far as they are read."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from meshd.ledger.chain import Chain, ChainEvent, Claimed
from meshd.node.store import Store
from meshd.p2p.identity import Address

AGAIN_BLOCKS = 64
"""Blocks below the head that are read again: a reorganisation may have changed them."""
RANGE_BLOCKS = 5_000
"""Blocks asked for at once: many providers of RPC answer no more."""
_READ = "payments_read_to:"


@dataclass(frozen=True)
class Payment:
    """One transfer out of a job's escrow; amounts in MCC's smallest unit."""

    job_id: bytes
    amount: int
    height: int
    tx: bytes


async def read_payments(chain: Chain, store: Store, account: Address) -> list[Payment]:
    """Return every payment to *account*, in the chain's order; raises ChainUnavailable.

    Only blocks that were not read before are asked for.
    """
    domain = chain.domain
    scope = f"{domain.chain_id}:{domain.escrow.hex()}:{account.hex()}"
    first = int(await store.setting(_READ + scope) or 0)
    last = (await chain.head()).height
    if last < first:  # a development chain that was begun afresh
        first = 0
    await store.execute("delete from payment where scope=? and height>=?", (scope, first))
    while first <= last:
        until = min(first + RANGE_BLOCKS - 1, last)
        paid = _sums(await chain.events(first, until), account)
        first = until + 1
        await store.write(partial(_keep, paid=paid, scope=scope, read_to=first))
    rows = await store.rows(
        "select job_id, amount, height, tx from payment where scope=? order by height, rowid",
        (scope,),
    )
    return [Payment(job_id, int(amount), height, tx) for job_id, amount, height, tx in rows]


def _sums(events: Sequence[ChainEvent], account: Address) -> list[Payment]:
    """Return the payments to *account* among *events*: one for each transaction and job."""
    sums: dict[tuple[bytes, bytes], Payment] = {}
    for event in events:
        if isinstance(event, Claimed) and event.account == account:
            known = sums.get((event.tx, event.job_id))
            amount = event.amount + (known.amount if known else 0)
            payment = Payment(event.job_id, amount, event.height, event.tx)
            sums[event.tx, event.job_id] = payment
    return list(sums.values())


def _keep(db: sqlite3.Connection, paid: Sequence[Payment], scope: str, read_to: int) -> None:
    db.executemany(
        "insert or replace into payment values(?,?,?,?,?)",
        [(scope, one.tx, one.job_id, one.height, str(one.amount)) for one in paid],
    )
    db.execute(
        "insert into setting values(?,?) on conflict(name) do update set value=excluded.value",
        (_READ + scope, str(max(read_to - AGAIN_BLOCKS, 0))),
    )
