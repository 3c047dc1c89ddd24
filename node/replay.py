"""Computing a training job again, from its terms, its log and public blobs alone.

Two things are compared, bit for bit. Every shard is trained anew from the state of its round, which
only machines of the same numeric class can do. Every round is closed anew on the contributions that
the log names, a cheater's too, since they stay in it: that gives equal bits on every machine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import structlog
import trio

from meshd.ledger.audits import Status
from meshd.ledger.rounds import accepted
from meshd.ledger.works import Work
from meshd.node.compute.executor import ShardFailed
from meshd.node.kinds.kind import AUDIT_SLOT, JobContext
from meshd.node.kinds.train import TrainKind
from meshd.node.rounds import fetch_contribution, outcome
from meshd.node.workloads.training.plan import TrainPlan
from meshd.node.workloads.training.state import result_file
from meshd.p2p.codec import Signed, digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import ZERO, RoundClose
from meshd.p2p.network import NetworkError

log = structlog.get_logger()

FETCH_S = 30.0
"""Seconds that a blob may take to come, beside those for its length."""
SLOWEST = 1 << 20
"""Bytes a second that a holder delivers at least."""
SEARCH_S = 60.0
"""Seconds in which a state that is still served is looked for, before one is computed."""
SLOT = -2
"""The executor's place for replays: work and audits go on beside them."""


class ReplayError(Exception):
    """A job cannot be replayed.

    ReplayError
    ├── NoSuchRound   the log holds no such closed round
    └── BlobMissing   nobody serves what it takes
    """


class NoSuchRound(ReplayError):
    """The log holds no such closed round."""


class BlobMissing(ReplayError):
    """Nobody serves a blob that cannot be computed from what is here."""


@dataclass(frozen=True)
class ReplayedShard:
    """A shard whose contribution is in a closed round."""

    round: int
    shard: int
    worker: Address
    outcome: Status
    """What its audit came to."""
    equal: bool | None
    """Whether training it again gives the same contribution.

    None: it is of another numeric class and was not trained again.
    """

    @property
    def found(self) -> bool:
        """Whether the job's audits found that it differs, or that its worker's work does."""
        return self.equal is False and self.outcome in (Status.REJECTED, Status.VOID)


@dataclass(frozen=True)
class ReplayedRound:
    """One round, computed again from the state before it."""

    round: int
    state: bytes
    """The state that follows by this node's own computation."""
    logged: bytes
    """The state that the log names."""
    equal: bool
    """Whether state, gate and loss follow, bit for bit, from what entered the round."""
    shards: tuple[ReplayedShard, ...]


@dataclass(frozen=True)
class ReplayedOutput:
    """What the job delivers, made again of its last state."""

    output: bytes
    logged: bytes


Step = ReplayedShard | ReplayedRound | ReplayedOutput


class Replay:
    """One replay of all closed rounds of a job, or of round *only* alone.

    It needs the log of `context.view`; blobs that are not here are fetched, each within a
    deadline: program, data, initial state and contributions. Other states are computed, or
    fetched where a single round is asked for. Raises ReplayError if there is no such round.
    """

    def __init__(self, context: JobContext, plan: TrainPlan, only: int | None = None) -> None:
        self._context = context
        self._plan = plan
        self._kind = TrainKind(context, plan)
        self._state = context.view.state
        closes = [c for c in self._state.rounds.closes if accepted(c.message)]
        if not closes:
            raise NoSuchRound("no round of the job is closed in the log")
        if only is not None and not 0 <= only < len(closes):
            raise NoSuchRound(
                f"round {only} is not closed in the log: it has rounds 0 to {len(closes) - 1}"
            )
        self._closes = closes
        self._only = only
        self._class = b""
        self._search_s = SEARCH_S
        self._made: list[bytes] = []
        """States that this replay has put into the store."""

    @property
    def rounds(self) -> int:
        """How many closed rounds the log has."""
        return len(self._closes)

    @property
    def shards(self) -> int:
        """How many contributions are looked at."""
        return sum(len(close.message.commitments) for close in self._chosen())

    def _chosen(self) -> list[Signed[RoundClose]]:
        return self._closes if self._only is None else [self._closes[self._only]]

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield every shard and every round as it is done, and the output of a job that has one.

        Raises ReplayError, ExecutorError and WorkloadError. Close it when it is left early.
        """
        try:
            await self._bring_state(0)
            await self._bring_rows(0, 0)
            self._class = await self._kind.own_class(AUDIT_SLOT, self._kind.audit_limits)
            if self._only is not None:
                await self._reach_state(self._only)
            for close in self._chosen():
                await self._begin(close.message.round)
                shards = []
                for name in close.message.commitments:
                    shard = await self._train(self._state.works[name])
                    shards.append(shard)
                    yield shard
                yield await self._close(close, tuple(shards))
            end = self._state.end
            if end is not None and end.message.output_root != ZERO and close is self._closes[-1]:
                yield self._output(end.message.output_root)
        finally:
            self._drop(keep=0)

    # ---- shards --------------------------------------------------------------------------

    async def _train(self, work: Work) -> ReplayedShard:
        """Train a shard again and compare its contribution, which is kept if it is equal."""
        message = work.assignment.message
        equal: bool | None = None
        if work.commitment.message.numeric_class == self._class:
            await self._bring_rows(message.round, message.shard)
            try:
                own = await self._kind.recompute(work, SLOT)
                equal = digest(own) == work.commitment.message.output_root
                if equal:
                    self._context.ports.blobs.put(own)
            except ShardFailed as error:  # no machine gets a contribution here
                log.info("shard fails", round=message.round, shard=message.shard, why=str(error))
                equal = False
        return ReplayedShard(message.round, message.shard, work.worker, work.outcome, equal)

    async def _bring_rows(self, round_: int, shard: int) -> None:
        for name, size in self._plan.chunks(self._plan.rows(round_, shard)):
            await self._bring(name, size, "a chunk of the data")

    # ---- states --------------------------------------------------------------------------

    async def _close(
        self, close: Signed[RoundClose], shards: tuple[ReplayedShard, ...]
    ) -> ReplayedRound:
        """Close a round again on what the log says entered it."""
        message = close.message
        works = [self._state.works[name] for name in message.commitments]
        for work in works:
            size = min(work.commitment.message.output_bytes, self._plan.contribution_bytes)
            what = f"the contribution of round {message.round}, shard {work.place[0]}"
            await self._bring(work.commitment.message.output_root, size, what, work.worker)
            await fetch_contribution(self._context, self._plan, work.commitment)
        commitments = [work.commitment for work in works]
        known = message.state_after in self._context.ports.blobs
        found = await outcome(
            self._context, self._plan, commitments, message.round, message.state_before
        )
        if found.state != message.state_before and not (
            known and found.state == message.state_after
        ):
            self._made.append(found.state)
            self._drop(keep=1)
        equal = (found.state, found.gated, found.loss) == (
            message.state_after,
            message.gated,
            message.loss,
        )
        return ReplayedRound(message.round, found.state, message.state_after, equal, shards)

    async def _reach_state(self, round_: int) -> None:
        """Have the state of *round_* here: of the newest that is served, or of the first."""
        states = self._state.rounds.states()
        first = round_
        while first and not await self._served(states[first]):
            first -= 1
        for close in self._closes[first:round_]:
            closed = await self._close(close, ())
            if not closed.equal:
                raise ReplayError(
                    f"the state of round {round_} cannot be computed: another one follows from "
                    f"round {closed.round} than the log says, and nobody serves the logged one"
                )

    async def _served(self, name: bytes) -> bool:
        """Return whether a state is here, or comes from whoever still serves it."""
        if name in self._context.ports.blobs or self._search_s <= 0:
            return name in self._context.ports.blobs
        began = trio.current_time()
        try:
            await self._bring(name, self._plan.state_bytes_limit, "a state")
        except BlobMissing:
            self._search_s -= trio.current_time() - began
            return False
        self._made.append(name)
        return True

    async def _begin(self, round_: int) -> None:
        """Have the state of a round here, and let it be the one that its shards start from."""
        if round_:
            self._context.view.closes.hear(self._closes[round_ - 1])
        await self._bring_state(round_)

    async def _bring_state(self, round_: int) -> None:
        name = self._state.rounds.state_of(round_)
        what = f"the state of round {round_}" if round_ else "the initial state"
        await self._bring(name, self._plan.state_bytes_limit, what)

    def _drop(self, keep: int) -> None:
        """Forget states that nobody else needs; a running job's may be somebody's by now."""
        while len(self._made) > keep:
            name = self._made.pop(0)
            if self._state.end is not None:
                self._context.ports.blobs.remove(name)

    def _output(self, logged: bytes) -> ReplayedOutput:
        name = self._state.rounds.state
        if name not in self._context.ports.blobs:
            return ReplayedOutput(ZERO, logged)  # another state follows: it was told
        made = result_file(self._context.ports.blobs.read(name), self._plan.program)
        return ReplayedOutput(digest(made), logged)

    # ---- blobs ---------------------------------------------------------------------------

    async def _bring(self, name: bytes, size: int, what: str, *first: Address) -> None:
        """Have a blob of *size* bytes at most here; raises BlobMissing."""
        genesis, known = self._context.view.job.genesis, self._context.record
        researcher = known.opened.researcher
        holders = [*first, genesis.orchestrator, *genesis.committee, researcher, *known.holders]
        await bring(self._context, name, size, what, holders)


async def bring(
    context: JobContext, name: bytes, size: int, what: str, holders: Sequence[Address]
) -> None:
    """Have a blob of *size* bytes at most here, from any of *holders*; raises BlobMissing."""
    if name in context.ports.blobs:
        return
    try:
        await context.ports.network.fetch(
            name,
            max_bytes=size,
            holders=list(dict.fromkeys(holders)),
            deadline_s=FETCH_S + size / SLOWEST,
        )
    except NetworkError as error:
        raise BlobMissing(f"{what} is served by nobody who was asked: {error}") from error
