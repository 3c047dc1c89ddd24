"""What the daemon's user is told and can order: the control API's Node over this node."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version

import trio

from meshd.config.amounts import format_mcc, parse_mcc
from meshd.config.schema import Config
from meshd.ledger.chain import Register, Stake
from meshd.node import answers
from meshd.node.control.api import (
    ENDED,
    ChainStatus,
    ControlError,
    Earnings,
    PaymentInfo,
    PeerInfo,
    Staked,
    Status,
    Wallet,
)
from meshd.node.earnings import read_payments
from meshd.node.jobdesk import JobDesk
from meshd.p2p.identity import hex_address

PAUSED = "paused"
"""The setting that keeps a pause over restarts."""
ROLE_BITS = {"orchestrator": 1, "validator": 2}
"""NodeRegistry's bits; workers and aggregators need no registration."""


@dataclass(frozen=True)
class Desk(JobDesk):
    """Answers the control API."""

    config: Config
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
            paused=self.node.ports.availability.paused,
            chain=ChainStatus(
                rpc=self.config.chain.rpc,
                chain_id=self.chain.domain.chain_id,
                height=self.node.jobs.height,
            ),
            warnings=[*self.config.warnings, *self._troubles()],
        )

    def _troubles(self) -> list[str]:
        availability = self.node.ports.availability
        if not availability.resting:
            return []
        return [f"it takes no shards now, since nothing can be kept here: {availability.trouble}"]

    async def pause(self) -> Status:
        """Take no new shards until `resume`, over restarts too; those it has are finished."""
        await self.node.ports.store.set(PAUSED, "1")
        self.node.ports.availability.pause()
        return await self.status()

    async def resume(self) -> Status:
        """Take shards again."""
        await self.node.ports.store.set(PAUSED, "")
        self.node.ports.availability.resume()
        return await self.status()

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

    async def earnings(self) -> Earnings:
        """Return what the account that is paid has earned."""
        account = self.node.ports.payee
        payments = await read_payments(self.chain, self.node.ports.store, account)
        paid: dict[bytes, int] = {}
        for payment in payments:
            paid[payment.job_id] = paid.get(payment.job_id, 0) + payment.amount
        jobs, pending = [], 0
        for job_id in dict.fromkeys([*paid, *self.node.jobs.records]):
            view = self.node.jobs.known_view(job_id)
            state = view.state if view is not None else None
            told = answers.job_earnings(job_id, state, account, paid.get(job_id, 0))
            if told["receipts"] or job_id in paid:
                jobs.append(told)
                earned = parse_mcc(told["earned"]) if told["earned"] is not None else 0
                pending += max(earned - paid.get(job_id, 0), 0)
        return Earnings(
            account=hex_address(account),
            paid=format_mcc(sum(paid.values())),
            pending=format_mcc(pending),
            jobs=jobs,
            payments=[
                PaymentInfo(
                    job="0x" + payment.job_id.hex(),
                    amount=format_mcc(payment.amount),
                    height=payment.height,
                    tx="0x" + payment.tx.hex(),
                )
                for payment in payments
            ],
        )
