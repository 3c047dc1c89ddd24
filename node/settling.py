"""From a job's final log to money: sign settlements, anchor them under a quorum, claim, refund."""

from __future__ import annotations

from typing import cast

import structlog
import trio

from meshd.ledger.chain import (
    AnchorSettlement,
    ChainError,
    Claim,
    ClaimMany,
    JobOnChain,
    RefundJob,
)
from meshd.ledger.joblog import LogError, check_signature
from meshd.ledger.jobstate import JobState
from meshd.ledger.settlement import Statement
from meshd.node.log.view import LogView, apply_batch
from meshd.node.ports import Ports
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    Message,
    Settlement,
    SettlementRequest,
    SettlementSignature,
)
from meshd.p2p.network import NetworkError, RequestRefused

log = structlog.get_logger()

ASK_S = 2.0
MAX_CLAIMS = 50
"""Accounts paid by one transaction."""


def statement_at(view: LogView, state: JobState, epoch: int) -> Statement:
    """Return the settlement of cut number *epoch* of a folded log."""
    head = view.log.batches[state.book.seqs[epoch - 1] - 1].head
    return state.book.statement(epoch=epoch, log_head=head.digest, committee_term=0)


async def closed_state(view: LogView) -> JobState:
    """Return the state of a job whose deadline passed without an end: what passed is entered."""
    state = view.fresh_state()
    for batch in view.log.final:
        await apply_batch(state, batch, view.beacon)
    state.close_without_end()
    return state


class Settler:
    """Carries one job's settlements to the chain; anybody may, so several at once do no harm."""

    def __init__(self, ports: Ports, view: LogView) -> None:
        self._ports = ports
        self._view = view
        self._job_id = view.job.id

    async def _on_chain(self) -> JobOnChain:
        while True:
            try:
                job = await self._ports.chain.job(self._job_id)
                if job is not None:
                    return job
            except ChainError as error:
                log.warning("chain unavailable", why=str(error))
            await trio.sleep(ASK_S)

    async def settle(self, statement: Statement) -> None:
        """Anchor *statement* under a quorum's signatures and pay every account it names.

        Returns at once where the chain has it already. Afterwards a final one is refunded.
        """
        settlement = statement.settlement
        job = await self._on_chain()
        if job.last_epoch < settlement.epoch:
            await self._wait_window(job)
            signatures = await self.collect(settlement)
            await self._anchor(settlement, signatures)
        job = await self._on_chain()
        await self._wait_window(job)
        await self._claim(statement)
        if settlement.is_final and job.settled:
            await self._refund()

    async def collect(self, settlement: Settlement) -> dict[Address, bytes]:
        """Ask the committee until a quorum has signed *settlement*; return the signatures."""
        genesis = self._view.job.genesis
        value = self._view.job.domain.digest(settlement)
        found: dict[Address, bytes] = {}
        while len(found) < genesis.quorum:
            async with trio.open_nursery() as nursery:
                for member in genesis.committee:
                    if member not in found:
                        nursery.start_soon(self._ask, member, settlement.epoch, value, found)
            if len(found) < genesis.quorum:
                await trio.sleep(ASK_S)
        return found

    async def _ask(
        self, member: Address, epoch: int, value: bytes, found: dict[Address, bytes]
    ) -> None:
        request = self._ports.sign(SettlementRequest(job_id=self._job_id, epoch=epoch))
        try:
            answer = await self._ports.request(member, request, deadline_s=5.0)
            if answer is None or not isinstance(answer.message, SettlementSignature):
                return
            signature = answer.message.signature
            check_signature(self._view.job.genesis, value, member, signature)
            found[member] = signature
        except (NetworkError, LogError) as error:
            log.info("member did not sign the settlement", member=member.hex()[:8], why=str(error))

    # ---- transactions --------------------------------------------------------------------

    async def _send(self, key: str, call: AnchorSettlement | ClaimMany | RefundJob) -> str | None:
        """Send a call and wait for it; return its error, None if it succeeded."""
        while True:
            try:
                await self._ports.chain.send(key, call)
                return (await self._ports.chain.wait(key)).error
            except ChainError as error:
                log.warning("chain call waits", key=key, why=str(error))
                await trio.sleep(ASK_S)

    async def _anchor(self, settlement: Settlement, signatures: dict[Address, bytes]) -> None:
        committee = self._view.job.genesis.committee
        signed = [(i, signatures[m]) for i, m in enumerate(committee) if m in signatures]
        call = AnchorSettlement(
            settlement=settlement,
            committee=committee,
            bitmap=sum(1 << place for place, _ in signed),
            signatures=tuple(signature for _, signature in signed),
        )
        key = f"anchor:{self._job_id.hex()}:{settlement.epoch}"
        error = await self._send(key, call)
        if error is not None:
            log.info("anchor was not needed, or failed", why=error)

    async def _wait_window(self, job: JobOnChain) -> None:
        """Wait until the last anchored root has outlived its window."""
        while job.anchored_at:
            head = await self._ports.chain.head()
            if head.timestamp >= job.anchored_at + job.window:
                return
            await self._ports.chain.wait_height(head.height + 1)

    async def _claim(self, statement: Statement) -> None:
        unpaid = []
        for leaf in statement.leaves:
            claimed = await self._ports.chain.claimed(self._job_id, Address(leaf.account))
            if claimed < leaf.earned:
                unpaid.append(leaf)
        for first in range(0, len(unpaid), MAX_CLAIMS):
            claims = tuple(
                Claim(
                    self._job_id,
                    leaf.epoch,
                    Address(leaf.account),
                    leaf.earned,
                    leaf.receipts_root,
                    leaf.proof,
                )
                for leaf in unpaid[first : first + MAX_CLAIMS]
            )
            key = f"claim:{self._job_id.hex()}:{statement.settlement.epoch}:{first}"
            error = await self._send(key, ClaimMany(claims))
            if error is not None:
                log.warning("claim failed", why=error)

    async def _refund(self) -> None:
        job = await self._on_chain()
        if job.deposited > job.burnt + job.total + job.refunded:
            error = await self._send(f"refund:{self._job_id.hex()}", RefundJob(self._job_id))
            if error is not None:
                log.info("refund was not needed, or failed", why=error)


class SettlementSigner:
    """A committee member's side: sign only what it computed from the final log, once an epoch."""

    def __init__(self, ports: Ports, view: LogView) -> None:
        self._ports = ports
        self._view = view
        self._job_id = view.job.id
        self._closed: JobState | None = None

    async def on_request(self, signed: Signed[Message]) -> Signed[SettlementSignature] | None:
        """Answer a SettlementRequest; raises RequestRefused if there is no such cut yet."""
        epoch = cast(SettlementRequest, signed.message).epoch
        state = self._closed or self._view.state
        if not 1 <= epoch <= state.book.epoch:
            raise RequestRefused(f"there is no final cut {epoch} yet")
        return await self.sign(statement_at(self._view, state, epoch).settlement)

    async def sign(self, settlement: Settlement) -> Signed[SettlementSignature]:
        """Return this member's signature of *settlement*; one epoch is signed once."""
        digest = self._ports.domain.digest(settlement)
        scope = f"settlement.{settlement.epoch}"
        if await self._ports.store.sign_once(self._job_id, scope, digest) != digest:
            raise RequestRefused(f"another settlement of epoch {settlement.epoch} was signed")
        return self._ports.sign(
            SettlementSignature(
                job_id=self._job_id,
                epoch=settlement.epoch,
                settlement_hash=digest,
                signature=self._ports.identity.sign(digest),
            )
        )

    async def close(self) -> JobState:
        """Settle the job without its end, because its work deadline is over."""
        if self._closed is None:
            self._closed = await closed_state(self._view)
        return self._closed
