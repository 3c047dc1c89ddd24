"""What the daemon's user is told and can order: the control API's Node over this node."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import trio

from meshd.config.amounts import format_mcc
from meshd.config.job import JobSpec
from meshd.config.schema import Config
from meshd.ledger.audits import Status as WorkStatus
from meshd.ledger.chain import Anchored, Register, Stake
from meshd.ledger.evm_chain import EvmChain
from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import WorkerRecord
from meshd.node.control.api import (
    ENDED,
    Anchor,
    AuditInfo,
    ChainStatus,
    ControlError,
    JobDetail,
    JobEvent,
    JobSummary,
    PeerInfo,
    ReceiptInfo,
    ResultFile,
    SendEvent,
    ShardCounts,
    Staked,
    Status,
    Submitted,
    Wallet,
    WorkerShare,
)
from meshd.node.control.api import JobState as JobStateName
from meshd.node.node import Node
from meshd.node.researcher import SubmitError, SubmittedJob
from meshd.node.submission import draft_job
from meshd.node.workloads.errors import RowsError
from meshd.node.workloads.rows import unpack
from meshd.p2p.blobs import BlobError
from meshd.p2p.identity import hex_address
from meshd.p2p.libp2p import Libp2pNetwork
from meshd.p2p.messages import JobTerms

WATCH_S = 2.0
ROLE_BITS = {"orchestrator": 1, "validator": 2}
"""NodeRegistry's bits; workers and aggregators need no registration."""


@dataclass(frozen=True)
class Desk:
    """Answers the control API."""

    config: Config
    node: Node
    network: Libp2pNetwork
    chain: EvmChain
    started_at: float

    # ---- the daemon ----------------------------------------------------------------------

    async def status(self) -> Status:
        """Return the daemon in one glance; from memory, without asking anybody."""
        jobs = [
            job for job in self.node.researcher.submitted.values() if job.state.value not in ENDED
        ]
        return Status(
            version=version("meshd"),
            pid=os.getpid(),
            network=self.config.network,
            address=hex_address(self.chain.address),
            peer_id=self.node.ports.identity.peer_id,
            roles=sorted(self.config.roles),
            listen=list(self.network.multiaddrs),
            uptime_s=round(trio.current_time() - self.started_at, 3),
            peers=len(self.network.peers()),
            jobs=len(jobs),
            shards=len(self.node.worker.running),
            chain=ChainStatus(
                rpc=self.config.chain.rpc,
                chain_id=self.chain.domain.chain_id,
                height=self.node.jobs.height,
            ),
            warnings=list(self.config.warnings),
        )

    async def peers(self) -> list[PeerInfo]:
        """Return the connected peers."""
        known = {signed.signer: signed.message for signed in self.network.capabilities()}
        answer = []
        for peer in self.network.peers():
            capability = known.get(peer.address)
            answer.append(
                PeerInfo(
                    address=hex_address(peer.address),
                    peer_id=peer.peer_id,
                    multiaddrs=list(peer.multiaddrs),
                    roles=list(capability.roles) if capability else [],
                    latency_ms=None if peer.latency_s is None else round(peer.latency_s * 1e3, 2),
                    device=capability.device if capability else "",
                    ask=format_mcc(capability.ask) if capability else None,
                )
            )
        return answer

    async def wallet(self) -> Wallet:
        """Return what the node's account holds, asked of the chain now."""
        own = self.chain.address
        return Wallet(
            address=hex_address(own),
            payout=hex_address(self.node.ports.payee),
            chain_id=self.chain.domain.chain_id,
            mcc=format_mcc(await self.chain.balance(own)),
            coin=format_mcc(await self.chain.gas_balance(own)),
            stake=format_mcc(await self.chain.stake_of(own)),
        )

    async def stake(self, amount: int) -> Staked:
        """Register if need be, stake *amount* (smallest unit), return when it is on chain."""
        roles = sum(ROLE_BITS[role] for role in self.config.roles if role in ROLE_BITS)
        if not roles:
            raise ControlError(
                "usage",
                "this daemon has no role that stakes",
                'start it with roles = ["validator"] or ["orchestrator"]',
            )
        balance = await self.chain.balance(self.chain.address)
        if balance < amount:
            raise ControlError(
                "failed",
                f"the account holds {format_mcc(balance)} MCC, the stake is {format_mcc(amount)}",
                f"send it {format_mcc(amount - balance)} MCC more",
            )
        await self.chain.send("register", Register(roles, self.node.ports.payee))
        registered = await self.chain.wait("register")
        if registered.error is not None and "AlreadyRegistered" not in registered.error:
            raise ControlError("failed", f"not registered: {registered.error}")
        before = await self.chain.stake_of(self.chain.address)
        key = f"stake:{before}:{amount}"
        await self.chain.send(key, Stake(amount))
        outcome = await self.chain.wait(key)
        if outcome.error is not None:
            raise ControlError("failed", f"not staked: {outcome.error}")
        stake = await self.chain.stake_of(self.chain.address)
        return Staked(tx="0x" + outcome.tx.hex(), height=outcome.height, stake=format_mcc(stake))

    # ---- jobs ----------------------------------------------------------------------------

    async def job_submit(self, spec: JobSpec) -> Submitted:
        """Check and store program and data, open the escrow, announce the job."""
        await self.chain.head()  # one that cannot be reached is told at once, not waited for
        try:
            draft = await draft_job(self.node.ports, spec)
            job = await self.node.researcher.submit(draft.terms)
            outcome = await self.chain.wait(f"open:{job.id.hex()}")
        except SubmitError as error:
            raise ControlError("usage", str(error)) from error
        if outcome.error is not None:
            raise ControlError("failed", f"the escrow was not opened: {outcome.error}")
        return Submitted(
            id="0x" + job.id.hex(),
            state=job.state.value,
            shards=draft.terms.shards,
            cap=format_mcc(draft.terms.cap),
            deadline=draft.terms.work_deadline,
            warnings=list(draft.warnings),
        )

    async def job_list(self) -> list[JobSummary]:
        """Return the jobs that this daemon submitted, the newest first."""
        return [self._summary(job) for job in reversed(self.node.researcher.submitted.values())]

    def _job(self, job_id: bytes) -> SubmittedJob:
        job = self.node.researcher.submitted.get(job_id)
        if job is None:
            raise ControlError(
                "not-found",
                f"no job 0x{job_id.hex()} was submitted by this daemon",
                "see `meshd job ls`",
            )
        return job

    def _summary(self, job: SubmittedJob) -> JobSummary:
        terms = job.terms.message
        state: JobStateName = job.state.value
        return JobSummary(
            id="0x" + job.id.hex(),
            kind=terms.workload,
            state=state,
            researcher=hex_address(terms.researcher),
            shards=shard_counts(terms, job.view.state if job.view else None),
            cap=format_mcc(terms.cap),
            deadline=terms.work_deadline,
            seconds=round((job.ended or self.node.ports.wall()) - job.created, 1),
            note=job.detail,
        )

    async def job_show(self, job_id: bytes) -> JobDetail:
        """Return everything known of a job."""
        job = self._job(job_id)
        terms = job.terms.message
        on_chain = await self.chain.job(job_id)
        view = job.view
        record = self.node.jobs.records.get(job_id)
        started = record.started if record else None
        amounts = (0, 0, 0, 0)
        if on_chain is not None:
            amounts = (on_chain.deposited, on_chain.burnt, on_chain.paid, on_chain.refunded)
        deposited, burnt, paid, refunded = (format_mcc(amount) for amount in amounts)
        return JobDetail(
            **self._summary(job),
            program="0x" + terms.program.hex(),
            data="0x" + terms.data.hex(),
            rows=terms.rows,
            price=format_mcc(terms.price),
            orchestrator=hex_address(record.orchestrator if record else terms.orchestrator),
            committee=[hex_address(member) for member in started.committee] if started else [],
            quorum=started.quorum if started else 0,
            term=view.state.term if view else 0,
            certified_seq=view.seq if view else 0,
            workers=_worker_shares(view.state) if view else [],
            audits=_audits(view.state) if view else [],
            escrow={"deposited": deposited, "burnt": burnt, "paid": paid, "refunded": refunded},
            anchors=await self._anchors(job_id),
            output="0x" + job.output.hex() if job.output else "",
        )

    async def _anchors(self, job_id: bytes) -> list[Anchor]:
        record = self.node.jobs.records.get(job_id)
        if record is None:
            return []
        head = await self.chain.head()
        events = await self.chain.events(record.opened.height, head.height)
        return [
            Anchor(
                epoch=event.epoch,
                root="0x" + event.root.hex(),
                total=format_mcc(event.total),
                tx="0x" + event.tx.hex(),
            )
            for event in events
            if isinstance(event, Anchored) and event.job_id == job_id
        ]

    async def job_watch(self, job_id: bytes, send: SendEvent) -> None:
        """Send the job as it is now, then every event; return when it has ended."""
        job = self._job(job_id)
        last: tuple[object, ...] = ()
        while True:
            summary = self._summary(job)
            counts = summary["shards"]
            now = (summary["state"], *counts.values())
            if now != last:
                name = "state" if not last or last[0] != now[0] else "shards"
                text = f"{counts['accepted']} of {counts['total']} shards accepted"
                await send(
                    JobEvent(
                        time=self.node.ports.wall(),
                        event=name,
                        text=summary["note"] or text,
                        state=summary["state"],
                        shards=counts,
                    )
                )
                last = now
            if summary["state"] in ENDED:
                return
            await self.node.researcher.wait_changed(WATCH_S)

    async def job_cancel(self, job_id: bytes) -> JobSummary:
        """Take the job back before its start; after it, stop it: what passed is paid."""
        job = self._job(job_id)
        try:
            await self.node.researcher.cancel(job_id)
        except SubmitError as error:
            raise ControlError("failed", str(error)) from error
        return self._summary(job)

    async def job_result(self, job_id: bytes, path: Path) -> ResultFile:
        """Write the final output to *path*, replacing it only when complete."""
        job = self._job(job_id)
        if job.output is None:
            raise ControlError(
                "again",
                f"job 0x{job_id.hex()} is {job.state.value} and has no output yet",
                "wait for it with `meshd job watch`",
            )
        temporary = path.with_name(f".{path.name}.part")
        try:
            data = self.node.ports.blobs.read(job.output)
            temporary.write_bytes(data)
            temporary.replace(path)
            count = unpack(data).count
        except OSError as error:
            raise ControlError("failed", f"{path} cannot be written: {error.strerror}") from error
        except (BlobError, RowsError) as error:
            raise ControlError("failed", f"the output is damaged: {error}") from error
        return ResultFile(
            path=str(path), bytes=len(data), digest="0x" + job.output.hex(), rows=count
        )

    async def job_receipts(self, job_id: bytes) -> list[ReceiptInfo]:
        """Return the job's receipts so far, in the order of its log."""
        job = self._job(job_id)
        receipts = job.view.state.book.receipts if job.view else []
        return [
            ReceiptInfo(
                kind=receipt.receipt_kind,
                shard=receipt.shard,
                attempt=receipt.attempt,
                account=hex_address(receipt.account),
                units=receipt.units,
                charged=format_mcc(receipt.charged),
                amount=format_mcc(receipt.amount),
                log_seq=receipt.log_seq,
            )
            for receipt in receipts
        ]


def shard_counts(terms: JobTerms, state: JobState | None) -> ShardCounts:
    """Return a job's counts; `reissued` counts attempts after the first of their shard."""
    if state is None:
        return ShardCounts(total=terms.shards, accepted=0, rejected=0, reissued=0)
    return ShardCounts(
        total=terms.shards,
        accepted=sum(state.shard_done(shard) is not None for shard in range(terms.shards)),
        rejected=sum(work.status is WorkStatus.REJECTED for work in state.works.values()),
        reissued=sum(len(leases) - 1 for leases in state.shards.values()),
    )


def _worker_shares(state: JobState) -> list[WorkerShare]:
    lost: Counter[bytes] = Counter(
        lease.assignment.message.worker for leases in state.shards.values() for lease in leases[:-1]
    )
    return [
        WorkerShare(
            account=hex_address(address),
            accepted=_count(worker, WorkStatus.ACCEPTED),
            rejected=_count(worker, WorkStatus.REJECTED),
            voided=_count(worker, WorkStatus.VOID),
            leases=len(worker.leases),
            lost=lost[address],
            finding=next((w.reason for w in worker.works if w.status is WorkStatus.REJECTED), ""),
        )
        for address, worker in state.workers.items()
    ]


def _audits(state: JobState) -> list[AuditInfo]:
    return [
        AuditInfo(
            shard=work.assignment.message.shard,
            attempt=work.assignment.message.attempt,
            worker=hex_address(work.worker),
            auditor=hex_address(finding.auditor),
            kind=finding.kind.name.lower(),
            result=finding.result.name.lower(),
            rows=len(finding.challenge.message.drawn),
            units=finding.attestation.message.units_reexecuted,
        )
        for work in state.works.values()
        for finding in work.findings
    ]


def _count(worker: WorkerRecord, status: WorkStatus) -> int:
    return sum(work.status is status for work in worker.works)
