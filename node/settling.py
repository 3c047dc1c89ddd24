"""From a job's final log to money: sign settlements, anchor them under a quorum, claim, refund."""

from __future__ import annotations

from typing import cast

import structlog
import trio

from meshd.ledger.chain import (
    AnchorSettlement,
    Block,
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
ASKS = 5
"""How often the committee is asked for its signatures before one looks at the log again."""
CLOSE_S = 10
"""Seconds that a log without an end has, after its work deadline, to reach everybody."""
MAX_CLAIMS = 50
"""Accounts paid by one transaction."""


def statement_at(view: LogView, state: JobState, epoch: int) -> Statement:
    """Return the settlement of cut number *epoch* of a folded log."""
    seq = state.book.seqs[epoch - 1]
    head = view.log.batches[seq - 1].head.digest if seq else view.job.genesis.hash
    return state.book.statement(epoch=epoch, log_head=head, committee_term=0)


class Closing:
    """What a job's final log says, and what it owes if its deadline passes without a last cut.

    The log has CLOSE_S seconds after the work deadline to reach everybody; then what passed is
    entered as if the job had ended there.
    """

    def __init__(self, ports: Ports, view: LogView) -> None:
        self._ports = ports
        self._view = view
        self._began = trio.current_time()
        self._closed: JobState | None = None
        self._closed_at = 0

    async def state(self) -> JobState:
        """Return the state to settle by."""
        state = self._view.state
        head = await self._ports.chain.head()
        overdue = head.timestamp > self._view.job.terms.work_deadline + CLOSE_S
        here_long = trio.current_time() > self._began + CLOSE_S  # long enough to hear of all
        if state.book.closed or not (overdue and here_long):
            return state
        final = len(self._view.log.final)
        if self._closed is None or self._closed_at < final:
            self._closed, self._closed_at = await closed_state(self._view), final
        return self._closed


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

    async def too_late(self, head: Block) -> bool:
        """Return whether nothing can be anchored any more at *head*."""
        job = await self._on_chain()
        follow = job.anchored_at + 2 * job.window if job.anchored_at else 0
        return head.timestamp > max(job.settle_deadline, follow)

    async def settle_newest(self, state: JobState) -> int:
        """Settle the newest cut of a log that the escrow takes in one step; return its epoch, or
        0 if none could be. Later cuts contain the earlier ones, which need no anchor then.
        """
        job = await self._on_chain()
        room = job.total + self._view.job.terms.epoch_limit
        fit = [
            epoch
            for epoch in range(max(job.last_epoch, 1), state.book.epoch + 1)
            if state.book.total_at(epoch) <= room
        ]
        if fit and await self.settle(statement_at(self._view, state, fit[-1])):
            return fit[-1]
        return 0

    async def settle(self, statement: Statement) -> bool:
        """Anchor *statement* under a quorum's signatures and pay every account it names.

        Returns whether it is on chain and paid; where the chain has it already that is soon. It
        is not if no quorum signs it for a while, or nothing can be anchored any more. After a
        final one the rest is refunded.
        """
        settlement = statement.settlement
        job = await self._on_chain()
        if job.last_epoch < settlement.epoch:
            await self._wait_window(job)
            signatures = await self.collect(settlement)
            if len(signatures) < self._view.job.genesis.quorum:
                job = await self._on_chain()
                if job.last_epoch < settlement.epoch:
                    return False
            else:
                await self._anchor(settlement, signatures)
        job = await self._on_chain()
        if job.last_epoch < settlement.epoch:
            return False
        await self._wait_window(job)
        await self._claim(statement)
        if settlement.is_final and job.settled:
            await self._refund()
        return True

    async def collect(self, settlement: Settlement) -> dict[Address, bytes]:
        """Ask the committee for signatures of *settlement*, some times; return those had."""
        genesis = self._view.job.genesis
        value = self._view.job.domain.digest(settlement)
        found: dict[Address, bytes] = {}
        for _ in range(ASKS):
            async with trio.open_nursery() as nursery:
                for member in genesis.committee:
                    if member not in found:
                        nursery.start_soon(self._ask, member, settlement.epoch, value, found)
            if len(found) >= genesis.quorum:
                break
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
        chain, leaves = self._ports.chain, statement.leaves
        for first in range(0, len(leaves), MAX_CLAIMS):
            part = leaves[first : first + MAX_CLAIMS]
            paid = [await chain.claimed(self._job_id, Address(leaf.account)) for leaf in part]
            if all(had >= leaf.earned for had, leaf in zip(paid, part, strict=True)):
                continue
            claims = tuple(
                Claim(
                    self._job_id,
                    leaf.epoch,
                    Address(leaf.account),
                    leaf.earned,
                    leaf.receipts_root,
                    leaf.proof,
                )
                for leaf in part
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
        self.closing = Closing(ports, view)

    async def on_request(self, signed: Signed[Message]) -> Signed[SettlementSignature] | None:
        """Answer a SettlementRequest; raises RequestRefused if there is no such cut yet."""
        epoch = cast(SettlementRequest, signed.message).epoch
        state = await self.closing.state()
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
