"""The orchestrator's side of a training job's rounds: when one closes, and who is told."""

from __future__ import annotations

import math
import statistics

import structlog
import trio

from meshd.node.compute.executor import ExecutorError
from meshd.node.kinds.kind import JobContext
from meshd.node.log.author import Author
from meshd.node.rounds import fetch_contribution, outcome
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import Commitment, RoundClose
from meshd.p2p.network import NetworkError, RequestRefused

log = structlog.get_logger()

SLACK_S = 2.0
"""A shard is late only so many seconds after the round's deadline by its settings."""
TELL_S = 5.0
"""Seconds that a party has to take a close before it is left to gossip."""


class Pace:
    """How long the shards of a round take, and which of them are late."""

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        """How many median absolute deviations above the median are late."""
        self._seconds: list[float] = []
        self._round = -1

    def note(self, round_: int, seconds: float) -> None:
        """Take the time of a shard from assignment to commitment."""
        if round_ != self._round:
            self._round, self._seconds = round_, []
        self._seconds.append(seconds)

    def patience_s(self, round_: int) -> float:
        """Return the seconds after which a shard of *round_* is late."""
        if round_ != self._round or not self._seconds:
            return math.inf
        median = statistics.median(self._seconds)
        deviation = statistics.median(abs(value - median) for value in self._seconds)
        return median + self._deviations * deviation + SLACK_S


class RoundKeeper:
    """Closes the rounds of one job as their contributions come in."""

    def __init__(self, context: JobContext, plan: TrainPlan, author: Author) -> None:
        self._context = context
        self._ports = context.ports
        self._plan = plan
        self._author = author
        self._pace = Pace(plan.settings.deadline_mads)
        self._began: dict[bytes, float] = {}
        """When each assignment was made, as far as this run knows."""
        self._round, self._round_began = -1, 0.0

    async def start(self) -> None:
        """Bring the first state here; take up the closes that were logged before a restart."""
        terms = self._context.view.job.terms
        await self._context.jobs.fetch(
            self._context.record, terms.initial_state, self._plan.state_bytes_limit
        )
        for close in self._author.live.rounds.closes:
            self._context.view.closes.hear(close)

    def assigned(self, assignment: bytes) -> None:
        """Note that a shard is being computed from now on."""
        self._began[assignment] = trio.current_time()

    async def admit(self, commitment: Signed[Commitment]) -> None:
        """Bring a commitment's contribution here before it is logged.

        Raises RequestRefused if it cannot be had or is none.
        """
        try:
            await fetch_contribution(self._context, self._plan, commitment)
        except (NetworkError, WorkloadError) as error:
            raise RequestRefused(f"contribution not taken: {error}") from error
        began = self._began.pop(commitment.message.assignment_hash, None)
        lease = self._author.live.leases.get(commitment.message.assignment_hash)
        if began is not None and lease is not None:
            seconds = trio.current_time() - began
            self._pace.note(lease.assignment.message.round, seconds)

    async def close_if_due(self) -> Signed[RoundClose] | None:
        """Close the open round if all of it is in, or what is missing is late; return the close."""
        state = self._author.live
        rounds = state.rounds
        if rounds.done or rounds.failed or state.stop is not None:
            return None
        works = state.round_works()
        if len(works) < self._context.view.job.terms.shards and not (
            rounds.may_close(works) and self._late(rounds.open)
        ):
            return None
        before, round_ = rounds.state, rounds.open
        commitments = [work.commitment for work in works]
        try:
            found = await outcome(self._context, self._plan, commitments, round_, before)
        except (ExecutorError, WorkloadError) as error:
            log.warning("round not closed yet", round=round_, why=str(error))
            return None
        close = self._ports.sign(
            RoundClose(
                job_id=self._context.record.id,
                term=state.term,
                round=round_,
                state_before=before,
                commitments=tuple(commitment.digest for commitment in commitments),
                weights=tuple(work.population for work in works),
                gated=found.gated,
                state_after=found.state,
                loss=found.loss,
            )
        )
        (why,) = await self._author.append(close)
        if why is not None:
            log.info("close not logged", round=round_, why=why)
            return None
        self._context.view.closes.hear(close)
        log.info("round closed", round=round_, loss=found.loss, gated=len(found.gated))
        return close

    def _late(self, round_: int) -> bool:
        """Return whether whatever is missing of a round has had its time."""
        now = trio.current_time()
        if round_ != self._round:
            self._round, self._round_began = round_, now
        patience = self._pace.patience_s(round_)
        if math.isinf(patience):
            return False
        began = [
            self._began.setdefault(lease.assignment.digest, now)
            for lease in self._author.live.leases.values()
            if lease.open and lease.assignment.message.round == round_
        ]
        if self._author.live.free_shards():
            began.append(self._round_began)
        return all(now - at > patience for at in began)

    async def tell(self, close: Signed[RoundClose], parties: list[Address]) -> None:
        """Bring a close to everybody who computes or checks rounds; gossip it to the rest."""
        await self._ports.publish(self._context.record.id, close)
        async with trio.open_nursery() as nursery:
            for party in parties:
                nursery.start_soon(self.tell_one, party, close)

    async def tell_one(self, party: Address, close: Signed[RoundClose]) -> None:
        """Bring a close to one party, which may be gone."""
        try:
            await self._ports.request(party, close, deadline_s=TELL_S)
        except NetworkError as error:
            log.debug("close not brought", party=party.hex()[:8], why=str(error))
