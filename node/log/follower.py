"""Following a job's log from outside: hear of certificates, pull the batches, check them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

import structlog
import trio

from meshd.ledger.joblog import LogError
from meshd.node.log.view import LogView, open_batch
from meshd.node.ports import Ports
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    Certificate,
    Commitment,
    LogBatch,
    LogRequest,
    Message,
    RoundClose,
    job_topic,
)
from meshd.p2p.network import NetworkError, RequestRefused

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

PULL_S, MAX_PULL_S = 2.0, 8.0
"""Seconds between two questions whether the log has grown, when gossip is silent: at first, and
at most as long as it does not grow.
"""
IDLE_S = 60.0
"""The same once everything is settled."""
ANSWER_S = 2.0
"""Seconds that a peer has to answer such a question."""


class Follower:
    """Keeps a LogView up with the swarm's, and serves what it has to others."""

    def __init__(
        self,
        ports: Ports,
        view: LogView,
        *,
        on_certificate: Callable[[Certificate], Awaitable[None]] | None = None,
    ) -> None:
        self._ports = ports
        self._view = view
        self._on_certificate = on_certificate
        self._heard = trio.Event()
        self._turn = 0

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled."""
        job_id = self._view.job.id
        topic = job_topic(self._ports.domain.network, job_id)
        async with self._ports.network.subscribe(topic) as gossip, trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, gossip)
            with (
                self._ports.dispatch.on(LogRequest, job_id, self._serve),
                self._ports.dispatch.on(RoundClose, job_id, self._on_close),
            ):
                task_status.started()
                patience = PULL_S
                while True:
                    self._heard = trio.Event()
                    before = self._view.log.tip
                    await self.pull()
                    grown = self._view.log.tip is not before
                    most = IDLE_S if self._view.state.book.closed else MAX_PULL_S
                    patience = PULL_S if grown else min(2 * patience, most)
                    with trio.move_on_after(patience):
                        await self._heard.wait()

    async def _hear(self, gossip: trio.MemoryReceiveChannel[Signed[Message]]) -> None:
        async for signed in gossip:
            if isinstance(signed.message, Certificate):
                if self._on_certificate is not None:
                    try:
                        await self._on_certificate(signed.message)
                    except LogError as error:
                        log.info("certificate refused", why=str(error))
                if self._view.log.known(signed.message.head_hash) is None:
                    self._heard.set()
            elif isinstance(signed.message, RoundClose):
                self._view.closes.hear(cast(Signed[RoundClose], signed))
            elif isinstance(signed.message, Commitment):
                self._view.closes.note(cast(Signed[Commitment], signed))

    async def _on_close(self, signed: Signed[Message]) -> None:
        why = self._view.closes.hear(cast(Signed[RoundClose], signed))
        if why is not None:
            raise RequestRefused(why)

    async def _serve(self, signed: Signed[Message]) -> Signed[Message]:
        message = cast(LogRequest, signed.message)
        return self._ports.sign(self._view.batch_message(message.after_seq))

    async def pull(self) -> None:
        """Fetch the certified batches that others have and this view lacks.

        Asks the orchestrator and, in turn, one member more than it: whoever withholds the log
        or is dead does not hold this view up.
        """
        answered = 0
        for source in self._sources():
            try:
                if await self._pull_from(source):
                    return
                answered += 1
            except (NetworkError, LogError) as error:
                log.debug("log not pulled", source=source.hex()[:8], why=str(error))
            if answered == 2:
                return

    def _sources(self) -> list[Address]:
        genesis = self._view.job.genesis
        self._turn += 1
        turn = self._turn % len(genesis.committee)
        members = genesis.committee[turn:] + genesis.committee[:turn]
        sources = dict.fromkeys([genesis.orchestrator, *members])
        return [source for source in sources if source != self._ports.address]

    async def _pull_from(self, source: Address) -> bool:
        """Take batches from *source*; return whether it had any that were not here."""
        job, view = self._view.job, self._view
        tip = view.log.tip
        after = view.seq
        while True:
            request = self._ports.sign(LogRequest(job_id=job.id, after_seq=after))
            answer = await self._ports.request(source, request, deadline_s=ANSWER_S)
            if answer is None or not isinstance(answer.message, LogBatch):
                return False
            if not answer.message.head:
                final = len(view.log.final)
                if view.log.tip is not tip or not final < after:
                    return view.log.tip is not tip
                after = final  # perhaps a later term has dropped what is not final here
                continue
            batch = open_batch(job.domain, answer.message)
            if batch.head.message.seq != after + 1:
                raise LogError(f"batch {batch.head.message.seq} answers for {after + 1}")
            if view.holds(batch.head):
                if batch.head.message.seq >= view.seq:
                    return view.log.tip is not tip
                after = batch.head.message.seq
                continue
            try:
                await view.add(batch)
                after = view.seq
            except LogError:
                if after <= len(view.log.final):
                    raise
                after -= 1
                continue
            if after >= answer.message.highest_seq:
                return view.log.tip is not tip
