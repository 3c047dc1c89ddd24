"""The Chain port's calls, events and views in terms of meshd's three contracts."""

from __future__ import annotations

from typing import Any, assert_never

from meshd.config.deployment import Deployment
from meshd.contracts import artifact
from meshd.ledger.chain import (
    Anchored,
    AnchorSettlement,
    Call,
    CancelJob,
    ChainEvent,
    Claimed,
    ClaimMany,
    JobCancelled,
    JobOnChain,
    JobOpened,
    JobStarted,
    OpenJob,
    Refunded,
    RefundJob,
    Register,
    Stake,
    StartJob,
    Transfer,
)
from meshd.ledger.contract_abi import ContractAbi, Event
from meshd.ledger.intents import Transaction
from meshd.p2p.identity import Address

MCC = ContractAbi(artifact("MCC"))
REGISTRY = ContractAbi(artifact("NodeRegistry"))
ESCROW = ContractAbi(artifact("JobEscrow"))
CONTRACTS = (ESCROW, REGISTRY, MCC)

EVENT_NAMES = ("JobOpened", "JobStarted", "JobCancelled", "Anchored", "Claimed", "Refunded")
"""The escrow's events that are part of the port."""

_CANCELLED = 4  # JobEscrow.Status


def transactions(call: Call, to: Deployment, sender: Address) -> list[Transaction]:
    """Return what *sender* sends for *call*, in order; the last one is the call itself.

    A deposit is preceded by its allowance. The gas is what each may need at worst, for when it
    cannot be estimated. Raises CallFailed if an argument does not fit the contract.
    """
    escrow, registry, token = Address(to.escrow), Address(to.registry), Address(to.mcc)
    match call:
        case Transfer():
            return [Transaction(token, MCC.call("transfer", call.to, call.amount), 100_000)]
        case Register():
            data = REGISTRY.call("register", call.roles, call.payout)
            return [Transaction(registry, data, 200_000)]
        case Stake():
            # A stake may have to look through all seats of both roles for the weakest.
            data = REGISTRY.call("stake", sender, call.amount)
            return [
                _allowance(token, registry, call.amount),
                Transaction(registry, data, 3_000_000),
            ]
        case OpenJob():
            data = ESCROW.call(
                "open",
                call.spec_hash,
                call.salt,
                call.cap,
                call.epoch_limit,
                call.window,
                call.work_deadline,
                call.settle_deadline,
            )
            return [_allowance(token, escrow, call.cap), Transaction(escrow, data, 500_000)]
        case StartJob():
            # Draws from up to 256 seats, with their history.
            return [Transaction(escrow, ESCROW.call("start", call.job_id), 5_000_000)]
        case CancelJob():
            return [Transaction(escrow, ESCROW.call("cancel", call.job_id), 200_000)]
        case AnchorSettlement():
            return [Transaction(escrow, _anchor(call), 300_000 + 12_000 * len(call.committee))]
        case ClaimMany():
            claims = [
                (c.job_id, c.epoch, c.account, c.earned, c.receipts_root, c.proof)
                for c in call.claims
            ]
            gas = 100_000 + 120_000 * len(claims)
            return [Transaction(escrow, ESCROW.call("claimMany", claims), gas)]
        case RefundJob():
            return [Transaction(escrow, ESCROW.call("refund", call.job_id), 200_000)]
        case _:
            assert_never(call)


def _allowance(token: Address, spender: Address, amount: int) -> Transaction:
    return Transaction(token, MCC.call("approve", spender, amount), 100_000)


def _anchor(call: AnchorSettlement) -> bytes:
    settlement = call.settlement
    fields = (
        settlement.job_id,
        settlement.committee_term,
        settlement.epoch,
        settlement.prev_root,
        settlement.root,
        settlement.total,
        settlement.receipts,
        settlement.log_seq,
        settlement.log_head,
        settlement.data_hash,
        settlement.is_final,
    )
    return ESCROW.call("anchor", fields, call.committee, call.bitmap, b"".join(call.signatures))


def chain_event(event: Event, height: int, tx: bytes) -> ChainEvent | None:
    """Return the escrow's *event* as the port tells it; None for one that is not part of it."""
    values = event.arguments
    job_id = values.get("jobId", b"")
    match event.name:
        case "JobOpened":
            researcher = address(values["researcher"])
            return JobOpened(height, job_id, researcher, values["specHash"], values["cap"])
        case "JobStarted":
            committee = tuple(map(address, values["committee"]))
            return JobStarted(height, job_id, committee, values["quorum"], values["beacon"])
        case "JobCancelled":
            return JobCancelled(height, job_id)
        case "Anchored":
            epoch, root, total = values["epoch"], values["root"], values["total"]
            return Anchored(height, job_id, epoch, root, total, values["isFinal"], tx)
        case "Claimed":
            return Claimed(height, job_id, address(values["account"]), values["amount"], tx)
        case "Refunded":
            return Refunded(height, job_id, values["amount"], tx)
        case _:
            return None


def job_on_chain(
    job_id: bytes, view: dict[str, Any], spec_hash: bytes, last_root: bytes
) -> JobOnChain:
    """Return the escrow's *view* of a job as the port tells it."""
    return JobOnChain(
        job_id=job_id,
        researcher=address(view["researcher"]),
        spec_hash=spec_hash,
        deposited=view["cap"],
        burnt=view["burnt"],
        paid=view["paid"],
        refunded=view["refunded"],
        epoch_limit=view["epochLimit"],
        window=view["window"],
        work_deadline=view["workDeadline"],
        settle_deadline=view["settleDeadline"],
        opened=view["openBlock"],
        started=view["committeeHash"] != bytes(32),
        cancelled=view["status"] == _CANCELLED,
        settled=view["isFinal"],
        last_epoch=view["lastEpoch"],
        last_root=last_root,
        total=view["anchoredTotal"],
        anchored_at=view["claimableAt"] - view["window"] if view["claimableAt"] else 0,
    )


def address(text: str) -> Address:
    """Return the address in the ABI decoder's *text*."""
    return Address(bytes.fromhex(text[2:]))
