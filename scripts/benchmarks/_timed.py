"""An orchestrator that notes when entries reach its log: `python -m _timed CONFIG`.

It is the daemon as it is; only `Author.append` is wrapped. One JSON line an entry goes to the
file of the configuration's name with the suffix `.timings`; see `_timings`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from meshd.config.paths import read_text
from meshd.config.schema import resolve
from meshd.node.daemon import main as run_daemon
from meshd.node.log.author import Author
from meshd.p2p.codec import Signed
from meshd.p2p.messages import (
    Assignment,
    Attestation,
    Challenge,
    Commitment,
    Message,
    VerdictCommit,
)


def watch(output: TextIO) -> None:
    """Have every Author of this process write down what it logs."""
    append = Author.append
    receipts: dict[bytes, int] = {}

    async def timed(author: Author, *entries: Signed[Message]) -> list[str | None]:
        came = time.monotonic()
        reasons = await append(author, *entries)
        logged = time.monotonic()
        for entry, why in zip(entries, reasons, strict=True):
            if why is None:
                event = described(entry) | {"came": came, "logged": logged}
                output.write(json.dumps(event) + "\n")
        book = author.live.book
        known = receipts.get(author.job.id, 0)
        if len(book.receipts) > known:
            fresh = book.receipts[known:]
            receipts[author.job.id] = len(book.receipts)
            paid = [[receipt.receipt_kind, receipt.commitment_hash.hex()] for receipt in fresh]
            output.write(json.dumps({"kind": "receipts", "paid": paid, "came": logged}) + "\n")
        output.flush()
        return reasons

    Author.append = timed  # type: ignore[assignment]


def described(entry: Signed[Message]) -> dict[str, Any]:
    """Return an entry's kind, its name, and the name of the entry that it is about."""
    event: dict[str, Any] = {"kind": entry.message.kind, "name": entry.digest.hex()}
    match entry.message:
        case Assignment() as message:
            event |= {"shard": message.shard, "worker": message.worker.hex()}
            event |= {"units": message.units}
        case Commitment() as message:
            event |= {"of": message.assignment_hash.hex()}
        case Challenge() as message:
            event |= {"of": message.commitments.hex(), "audit": int(message.audit_kind)}
            event |= {"rows": len(message.drawn)}
        case VerdictCommit() as message:
            event |= {"of": message.challenge.hex()}
        case Attestation() as message:
            event |= {
                "of": message.commitment_hash.hex(),
                "audit": int(message.audit_kind),
                "result": int(message.result),
                "units": message.units_reexecuted,
            }
        case _:
            pass
    return event


def main(arguments: list[str]) -> None:
    """Run a daemon with the configuration file *arguments[0]*, watched."""
    path = Path(arguments[0])
    config = resolve(read_text(path, "configuration"), {}, {}, source=str(path))
    with path.with_suffix(".timings").open("a") as output:
        watch(output)
        run_daemon(config)


if __name__ == "__main__":
    main(sys.argv[1:])
