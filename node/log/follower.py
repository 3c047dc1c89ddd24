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
from meshd.p2p.messages import Certificate, LogBatch, LogRequest, Message, job_topic
from meshd.p2p.network import NetworkError

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

PULL_S = 2.0
"""Seconds between two questions whether the log has grown, when gossip is silent."""


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

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled."""
        job_id = self._view.job.id
        topic = job_topic(self._ports.domain.network, job_id)
        async with self._ports.network.subscribe(topic) as gossip, trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, gossip)
            with self._ports.dispatch.on(LogRequest, job_id, self._serve):
                task_status.started()
                while True:
                    self._heard = trio.Event()
                    await self.pull()
                    with trio.move_on_after(PULL_S):
                        await self._heard.wait()

    async def _hear(self, gossip: trio.MemoryReceiveChannel[Signed[Message]]) -> None:
        async for signed in gossip:
            if isinstance(signed.message, Certificate):
                if self._on_certificate is not None:
                    try:
                        await self._on_certificate(signed.message)
                    except LogError as error:
                        log.info("certificate refused", why=str(error))
                self._heard.set()

    async def _serve(self, signed: Signed[Message]) -> Signed[Message]:
        message = cast(LogRequest, signed.message)
        return self._ports.sign(self._view.batch_message(message.after_seq))

    async def pull(self) -> None:
        """Fetch the certified batches that others have and this view lacks."""
        genesis = self._view.job.genesis
        sources = [genesis.orchestrator, *genesis.committee]
        for source in sources:
            if source == self._ports.address:
                continue
            try:
                if await self._pull_from(source):
                    return
            except (NetworkError, LogError) as error:
                log.debug("log not pulled", source=source.hex()[:8], why=str(error))

    async def _pull_from(self, source: Address) -> bool:
        """Take batches from *source*, going back where a term change dropped ours."""
        job = self._view.job
        after = self._view.seq
        while True:
            request = self._ports.sign(LogRequest(job_id=job.id, after_seq=after))
            answer = await self._ports.request(source, request, deadline_s=5.0)
            if answer is None or not isinstance(answer.message, LogBatch):
                return False
            message = answer.message
            if not message.head:
                return message.highest_seq >= self._view.seq
            try:
                await self._view.add(open_batch(job.domain, message))
                after = self._view.seq
            except LogError:
                if after <= len(self._view.log.final):
                    raise
                after -= 1
