"""Shards that fail on every machine alike, such as training that diverges.

A worker's word that its shard fails counts for nothing. Whoever wants to know computes the shard:
the orchestrator before it ends the job, the researcher's node to say why it ended.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from meshd.ledger.jobstate import JobState
from meshd.ledger.rounds import fewest, is_training
from meshd.node.compute.executor import ExecutorError, ShardFailed
from meshd.node.kinds.choice import kind_of
from meshd.node.kinds.kind import JobContext
from meshd.node.workloads.datasets import parse_manifest
from meshd.node.workloads.errors import WorkloadError
from meshd.p2p.blobs import BlobStore
from meshd.p2p.messages import ZERO, JobEndReason, JobTerms, LeaseEndReason

log = structlog.get_logger()

TRIES = 2
"""Leases of a shard that end as failed before it is computed here."""
STEP_S = 2.0
UNSHOWN_S = 60.0
"""Seconds in which nobody shows a numeric class before the job's first steps are tried here."""
END_S = 120.0
"""Seconds that the audits of a job that fails may still take."""
WHY_S = 120.0
"""Seconds that finding out why a job failed may take."""


class Failing:
    """Finds out whether one job can go on; for its orchestrator."""

    def __init__(self, context: JobContext, live: Callable[[], JobState]) -> None:
        self._context = context
        self._live = live
        self._found: dict[tuple[int, int], str] = {}
        """Why each shard that was tried here fails; empty if it does not."""
        self.why = ""
        """Why the job cannot go on; empty: it can, as far as is known."""
        self._since = 0.0

    @property
    def hopeless(self) -> bool:
        """Whether the job fails and its audits have had their time."""
        return bool(self.why) and trio.current_time() - self._since > END_S

    async def run(self) -> None:
        """Look until the job is known to fail, or cancelled."""
        began = trio.current_time()
        while not self.why:
            await trio.sleep(STEP_S)
            state = self._live()
            rounds = state.rounds
            shards = [(rounds.open, shard) for shard in suspects(state)]
            if rounds.training and not rounds.canaries and trio.current_time() - began > UNSHOWN_S:
                shards.append((0, -1))
            for place in shards:
                if place not in self._found:
                    self._found[place] = await why_it_fails(self._context, *place)
            self.why = self._fatal(rounds.open)
        self._since = trio.current_time()
        log.warning(
            "job fails on every machine", job=self._context.record.id.hex()[:8], why=self.why
        )

    def _fatal(self, round_: int) -> str:
        """Return what keeps the open round from ever closing, if that is known."""
        here = {shard: why for (r, shard), why in self._found.items() if r == round_ and why}
        terms = self._context.view.job.terms
        spare = terms.shards - fewest(terms) if is_training(terms) else 0
        failed = [shard for shard in sorted(here) if shard >= 0]
        return here.get(-1, here[failed[0]] if len(failed) > spare else "")


def suspects(state: JobState, tries: int = TRIES) -> list[int]:
    """Return the shards of the open round at which leases failed *tries* times, and none held."""
    return [
        shard
        for shard in range(state.terms.shards)
        if sum(lease.ended is LeaseEndReason.FAILED for lease in state.attempts(shard)) >= tries
        and not any(lease.work is not None for lease in state.attempts(shard))
    ]


async def why_it_fails(context: JobContext, round_: int, shard: int) -> str:
    """Compute a shard here (-1: a training job's first steps) and return why it fails.

    Empty if it does not, or if this machine cannot tell.
    """
    try:
        await kind_of(context).attempt(round_, shard)
    except ShardFailed as error:
        return str(error)
    except (ExecutorError, WorkloadError) as error:
        log.info("shard not tried", round=round_, shard=shard, why=str(error))
    return ""


def missing_blobs(blobs: BlobStore, terms: JobTerms) -> list[str]:
    """Return what a job is computed from and is not here: what it is, and its digest.

    Raises WorkloadError if the data's manifest is damaged.
    """
    needed = [("its program", terms.program), ("its data's manifest", terms.data)]
    if terms.data in blobs:
        chunks = parse_manifest(blobs.read(terms.data)).chunks
        needed += [(f"chunk {at} of its data", chunk.digest) for at, chunk in enumerate(chunks)]
    if terms.initial_state != ZERO:
        needed.append(("its initial state", terms.initial_state))
    return [f"{what} (blob {name.hex()})" for what, name in needed if name not in blobs]


async def failure_of(context: JobContext, reason: JobEndReason) -> str:
    """Return why a job that came to nothing did, in words for its researcher."""
    missing = missing_blobs(context.ports.blobs, context.view.job.terms)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return (
            f"{missing[0]}{more} is not on this machine any more, and nobody else served it: "
            "submit the job's description again"
        )
    if reason is JobEndReason.FAILED:
        return await _why_failed(context)
    return "its deadline passed"


async def _why_failed(context: JobContext) -> str:
    state = context.view.state
    rounds = state.rounds
    if rounds.failed:
        return (
            f"the gate accepted nothing of round {rounds.open}, twice: the contributions agree in "
            "nothing; lower lr, raise batch, or widen the gate (norm_low, norm_high, min_cosine)"
        )
    why, failed = "", suspects(state, 1)
    with trio.move_on_after(WHY_S):
        if rounds.training and not state.works:
            why = await why_it_fails(context, 0, -1)
        for shard in failed[:TRIES]:
            why = why or await why_it_fails(context, rounds.open, shard)
    if not why and failed:
        place = (
            f"round {rounds.open}, shard {failed[0]}" if rounds.training else f"shard {failed[0]}"
        )
        why = f"{place} failed on {len(state.attempts(failed[0]))} machines"
    return why or "its orchestrator gave it up"
