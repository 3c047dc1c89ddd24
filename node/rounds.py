"""Closing a training job's rounds, and checking closes: the same computation on either side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import structlog
import trio

from meshd.node.compute.executor import CloseRequest, ExecutorError, Limits, ShardFailed
from meshd.node.kinds.kind import JobContext
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.training.contribution import check_contribution, losses_of
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.codec import Signed
from meshd.p2p.messages import Commitment, Message, RoundClose
from meshd.p2p.network import NetworkError

log = structlog.get_logger()

FETCH_S = 30.0
"""Seconds that a contribution may take to come."""


@dataclass(frozen=True)
class Outcome:
    """What follows from a round's contributions."""

    state: bytes
    """Digest of the next round's state, which is in the blob store."""
    gated: tuple[int, ...]
    loss: str


async def outcome(
    context: JobContext,
    plan: TrainPlan,
    commitments: Sequence[Signed[Commitment]],
    round_: int,
    state: bytes,
) -> Outcome:
    """Gate and combine what was committed to *round_*, whose state has the digest *state*.

    State and contributions are in the blob store. Where no state follows from them, everything
    is gated. Raises ExecutorError and WorkloadError.
    """
    blobs, terms = context.ports.blobs, context.view.job.terms
    contributions = tuple(blobs.read(c.message.output_root) for c in commitments)
    limits = Limits(memory_bytes=max(Limits().memory_bytes, plan.memory_bytes))
    request = CloseRequest(
        job_id=context.record.id,
        program=blobs.path(terms.program) if blobs.on_disk else blobs.read(terms.program),
        state=blobs.path(state) if blobs.on_disk else blobs.read(state),
        contributions=contributions,
        weights=tuple(c.message.n for c in commitments),
        settings=terms.hyperparameters,
        round=round_,
        limits=limits,
    )
    try:
        closed = await context.ports.executor.close_round(request)
    except ShardFailed as error:
        # No machine can go on from these contributions: the round is repeated, then fails.
        log.warning("nothing follows from a round", round=round_, why=str(error))
        return Outcome(state, tuple(range(len(contributions))), "")
    kept = [c for at, c in enumerate(contributions) if at not in set(closed.gated)]
    if not kept:
        return Outcome(state, closed.gated, "")
    losses = [loss for contribution in kept for loss in losses_of(contribution)]
    mean = math.fsum(losses) / len(losses)
    return Outcome(blobs.put(closed.state), closed.gated, f"{mean:.6f}")


async def fetch_contribution(
    context: JobContext, plan: TrainPlan, commitment: Signed[Commitment]
) -> None:
    """Bring a contribution here; raises NetworkError, or WorkloadError if it is not one."""
    message = commitment.message
    if message.output_bytes != plan.contribution_bytes:
        raise WorkloadError(
            f"a contribution of {message.output_bytes} bytes: this job's have "
            f"{plan.contribution_bytes}"
        )
    if message.output_root not in context.ports.blobs:
        await context.ports.network.fetch(
            message.output_root,
            max_bytes=message.output_bytes,
            holders=[commitment.signer, context.view.job.genesis.orchestrator],
            deadline_s=FETCH_S,
        )
    check_contribution(context.ports.blobs.read(message.output_root), plan.layout)


class RoundCheck:
    """A committee member's own computation of every round, ready when the head comes."""

    def __init__(self, context: JobContext, plan: TrainPlan) -> None:
        self._context = context
        self._plan = plan
        self._found: dict[bytes, str | None] = {}
        self._old_states = OldStates(context)
        self._lock = trio.Lock()

    async def run(self) -> None:
        """Compute every close as soon as it is heard of, until cancelled."""
        closes = self._context.view.closes
        while True:
            newest = closes.newest()[-1:]
            for close in newest:
                await self.problem(close)
            self._old_states.drop()
            if newest == closes.newest()[-1:]:
                await closes.changed()

    async def problem(
        self, close: Signed[RoundClose], entries: Sequence[Signed[Message]] = ()
    ) -> str | None:
        """Return why the state of *close* does not follow from what it names, None if it does.

        *entries* may hold commitments that are not in the log yet.
        """
        for entry in entries:
            if isinstance(entry.message, Commitment):
                self._context.view.closes.note(cast(Signed[Commitment], entry))
        self._context.view.closes.hear(close)
        async with self._lock:
            if close.digest not in self._found:
                try:
                    why = await self._compute(close.message)
                except (NetworkError, ExecutorError, WorkloadError) as error:
                    log.info("close not computed", round=close.message.round, why=str(error))
                    return f"it could not be computed: {error}"
                self._found[close.digest] = why
            return self._found[close.digest]

    async def _compute(self, message: RoundClose) -> str | None:
        commitments = [self._commitment(name) for name in message.commitments]
        known = [commitment for commitment in commitments if commitment is not None]
        if len(known) < len(commitments):
            raise WorkloadError("a commitment that it names has not been heard of")
        for commitment in known:
            await fetch_contribution(self._context, self._plan, commitment)
        if message.state_before not in self._context.ports.blobs:
            genesis = self._context.view.job.genesis
            await self._context.ports.network.fetch(
                message.state_before,
                max_bytes=self._plan.state_bytes_limit,
                holders=[genesis.orchestrator, *genesis.committee],
                deadline_s=FETCH_S,
            )
        found = await outcome(self._context, self._plan, known, message.round, message.state_before)
        if (found.state, found.gated, found.loss) != (
            message.state_after,
            message.gated,
            message.loss,
        ):
            return f"round {message.round}: another state, gate or loss follows from what it names"
        return None

    def _commitment(self, name: bytes) -> Signed[Commitment] | None:
        work = self._context.view.state.works.get(name)
        return work.commitment if work is not None else self._context.view.closes.commitment(name)


class OldStates:
    """The states of closed rounds that this node may drop."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._dropped = 1
        """The first round whose state was not dropped yet; the initial one stays."""

    def drop(self) -> None:
        """Drop what no audit can ask for any more; keep the newest."""
        state = self._context.view.state
        undecided = [
            work.assignment.message.round
            for work in state.works.values()
            if work.span is None or not work.span.settled
        ]
        oldest = min([state.rounds.open, *undecided])
        for name in state.rounds.states()[self._dropped : oldest]:
            self._context.ports.blobs.remove(name)
        self._dropped = max(self._dropped, oldest)
