"""A daemon that notes when a training job's shards and rounds get on: `python -m ... CONFIG`.

It is the daemon as it is, in any role; a few functions are wrapped. One JSON line an event goes
to the file of the configuration's name with the suffix `.timings`; see `_rounds`. The clock is
the machine's, so that events of several processes can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from meshd.config.paths import read_text
from meshd.config.schema import resolve
from meshd.node import roundkeeper
from meshd.node.compute.executor import Limits
from meshd.node.daemon import main as run_daemon
from meshd.node.kinds.kind import Computed, JobContext, Shard
from meshd.node.kinds.train import TrainKind
from meshd.node.log.author import Author
from meshd.node.roundkeeper import RoundKeeper
from meshd.node.rounds import Outcome, outcome
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.codec import Signed
from meshd.p2p.messages import Assignment, Commitment, LeaseEnd, Message, RoundClose


class Notes:
    """The file of events."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def note(self, kind: str, **what: Any) -> None:
        """Write down that something happened just now."""
        self._output.write(json.dumps({"kind": kind, "at": time.monotonic(), **what}) + "\n")
        self._output.flush()


def watch(notes: Notes) -> None:
    """Have this process write down what its roles do."""
    watch_log(notes)
    watch_rounds(notes)
    watch_shards(notes)


def watch_log(notes: Notes) -> None:
    """Note every entry of a log kept here, once it is on disk."""
    append = Author.append

    async def noted(author: Author, *entries: Signed[Message]) -> list[str | None]:
        reasons = await append(author, *entries)
        for entry, why in zip(entries, reasons, strict=True):
            match entry.message:
                case _ if why is not None:
                    pass
                case Assignment() as message:
                    of = {"name": entry.digest.hex(), "worker": message.worker.hex()}
                    notes.note("assigned", **of, round=message.round, shard=message.shard)
                case Commitment() as message:
                    notes.note("committed", name=message.assignment_hash.hex())
                case LeaseEnd() as message:
                    notes.note("lease-ended", name=message.assignment_hash.hex())
                case RoundClose() as message:
                    notes.note("closed", round=message.round)
                case _:
                    pass
        return reasons

    Author.append = noted  # type: ignore[assignment]


def watch_rounds(notes: Notes) -> None:
    """Note when a contribution is fetched, and when a round's are combined."""
    admit = RoundKeeper.admit

    async def noted_admit(keeper: RoundKeeper, commitment: Signed[Commitment]) -> None:
        name = commitment.message.assignment_hash.hex()
        notes.note("handed-in", name=name)
        await admit(keeper, commitment)
        notes.note("fetched", name=name)

    async def noted_outcome(
        context: JobContext,
        plan: TrainPlan,
        commitments: Sequence[Signed[Commitment]],
        round_: int,
        state: bytes,
    ) -> Outcome:
        notes.note("closing", round=round_)
        found = await outcome(context, plan, commitments, round_, state)
        notes.note("combined", round=round_)
        return found

    RoundKeeper.admit = noted_admit  # type: ignore[assignment]
    roundkeeper.outcome = noted_outcome  # type: ignore[attr-defined]


def watch_shards(notes: Notes) -> None:
    """Note when a worker's shard begins and ends, and the seconds of its inner steps."""
    compute, bring_state = TrainKind.compute, TrainKind.bring_state

    async def noted(kind: TrainKind, shard: Shard, slot: int, limits: Limits) -> Computed:
        name, round_ = shard.assignment.digest.hex(), shard.assignment.message.round
        notes.note("computing", name=name, round=round_)
        await bring_state(kind, round_)
        notes.note("state", name=name)
        computed = await compute(kind, shard, slot, limits)
        notes.note("computed", name=name, seconds=computed.seconds)
        return computed

    TrainKind.compute = noted  # type: ignore[assignment]


def main(arguments: list[str]) -> None:
    """Run a daemon with the configuration file *arguments[0]*, watched."""
    path = Path(arguments[0])
    config = resolve(read_text(path, "configuration"), {}, {}, source=str(path))
    with path.with_suffix(".timings").open("a") as output:
        watch(Notes(output))
        run_daemon(config)


if __name__ == "__main__":
    main(sys.argv[1:])
