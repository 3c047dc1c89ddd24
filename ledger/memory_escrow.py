"""JobEscrow in Python: one isolated pot for every job, as contracts/src/JobEscrow.sol says."""

from __future__ import annotations

from dataclasses import replace

from eth_hash.auto import keccak

from meshd.ledger import merkle
from meshd.ledger.chain import (
    Anchored,
    AnchorSettlement,
    CallFailed,
    CancelJob,
    ChainEvent,
    Claim,
    Claimed,
    ClaimMany,
    JobCancelled,
    JobOpened,
    JobStarted,
    OpenJob,
    Refunded,
    RefundJob,
    StartJob,
)
from meshd.ledger.memory_state import ContractState, Pot, Setting, Status
from meshd.p2p.codec import Domain
from meshd.p2p.identity import Address, IdentityError, recover
from meshd.p2p.messages import Settlement

VALIDATOR = 2
"""Role bit of a node that may be drawn into committees."""
MAX_COMMITTEE = 21
SEED_DELAY_BLOCKS = 2
"""Blocks from a job's opening to the block whose hash draws its committee."""
START_BLOCKS = 200
"""Blocks from a job's opening within which it can be started."""
SETTLE_WINDOWS = 4
"""Windows that fit at least between a job's two deadlines."""


def job_id(domain: Domain, researcher: Address, spec_hash: bytes, salt: bytes) -> bytes:
    """Return keccak256(abi.encode(chainid, escrow, researcher, specHash, salt))."""
    pad = bytes(12)
    chain_id = domain.chain_id.to_bytes(32, "big")
    return bytes(keccak(chain_id + pad + domain.escrow + pad + researcher + spec_hash + salt))


def quorum_of(members: int) -> int:
    """Return how many of a committee must sign: two thirds, rounded up."""
    return -(-2 * members // 3)


def draw_committee(weights: dict[Address, int], seed: bytes, size: int) -> tuple[Address, ...]:
    """Draw up to *size* different nodes by stake, as `NodeRegistry.drawCommittee` does."""
    left = dict(weights)
    committee: list[Address] = []
    for k in range(min(size, len(left))):
        draw = keccak(seed + k.to_bytes(32, "big"))
        point = int.from_bytes(draw, "big") % sum(left.values())
        for node, weight in list(left.items()):
            if point < weight:
                committee.append(node)
                del left[node]
                break
            point -= weight
    return tuple(committee)


def _pot(state: ContractState, job: bytes, *allowed: Status) -> Pot:
    pot = state.pots.get(job)
    if pot is None or pot.status not in allowed:
        raise CallFailed("JobEscrowWrongStatus")
    return pot


def open(state: ContractState, call: OpenJob, at: Setting) -> JobOpened:
    """Open a job: take its cap from the sender and burn a hundredth of it."""
    for name, value, bits in (
        ("cap", call.cap, 96),
        ("epochLimit", call.epoch_limit, 96),
        ("window", call.window, 32),
        ("workDeadline", call.work_deadline, 40),
        ("settleDeadline", call.settle_deadline, 40),
    ):
        if not 0 <= value < 2**bits:
            raise CallFailed(f"{name} {value} does not fit uint{bits}")
    opened = job_id(at.domain, at.sender, call.spec_hash, call.salt)
    pot = Pot(opened, at.sender, call, at.height)
    if opened in state.pots:
        raise CallFailed("JobEscrowJobExists")
    if call.cap <= pot.burnt:
        raise CallFailed("JobEscrowCapTooSmall")
    if call.epoch_limit == 0:
        raise CallFailed("JobEscrowZeroEpochLimit")
    if call.window == 0:
        raise CallFailed("JobEscrowZeroWindow")
    if call.work_deadline <= at.timestamp:
        raise CallFailed("JobEscrowWorkDeadlinePassed")
    if call.settle_deadline < call.work_deadline + SETTLE_WINDOWS * call.window:
        raise CallFailed("JobEscrowSettleDeadlineTooEarly")
    state.pots[opened] = pot
    state.move(at.sender, at.escrow, call.cap)
    state.burn(at.escrow, pot.burnt)
    return JobOpened(at.height, opened, at.sender, call.spec_hash, call.cap)


def start(state: ContractState, call: StartJob, at: Setting) -> JobStarted:
    """Draw the job's committee, once, and end cancellation."""
    pot = _pot(state, call.job_id, Status.OPEN)
    seed_block = pot.opened + SEED_DELAY_BLOCKS
    if at.height <= seed_block:
        raise CallFailed("JobEscrowStartTooEarly")
    if at.height > pot.opened + START_BLOCKS:
        raise CallFailed("JobEscrowStartTooLate")
    if at.timestamp >= pot.terms.work_deadline:
        raise CallFailed("JobEscrowWorkDeadlinePassed")
    beacon = at.block_hash(seed_block)
    weights = state.active(VALIDATOR, seed_block // at.epoch_length)
    committee = draw_committee(weights, keccak(beacon + pot.job_id), MAX_COMMITTEE)
    if not committee:
        raise CallFailed("JobEscrowNoValidator")
    state.pots[pot.job_id] = replace(pot, status=Status.STARTED, committee=committee)
    return JobStarted(at.height, pot.job_id, committee, quorum_of(len(committee)), beacon)


def cancel(state: ContractState, call: CancelJob, at: Setting) -> JobCancelled:
    """Return the deposit less the burnt part, as long as nobody started the job."""
    pot = _pot(state, call.job_id, Status.OPEN)
    if at.sender != pot.researcher:
        raise CallFailed("JobEscrowUnauthorized")
    state.pots[pot.job_id] = replace(pot, status=Status.CANCELLED)
    state.move(at.escrow, pot.researcher, pot.payable)
    return JobCancelled(at.height, pot.job_id)


def anchor(state: ContractState, call: AnchorSettlement, at: Setting) -> list[ChainEvent]:
    """Anchor a settlement that a quorum signed; the same anchor again changes nothing."""
    settlement = call.settlement
    pot = state.pots.get(settlement.job_id)
    if pot is not None and _is_anchored(state, pot, settlement):
        return []
    _check_quorum(pot.committee if pot else (), call, at)
    pot = _raise_total(_pot(state, settlement.job_id, Status.STARTED), settlement, at.timestamp)
    state.pots[pot.job_id] = pot
    state.roots[pot.job_id, settlement.epoch] = settlement.root
    return [
        Anchored(
            height=at.height,
            job_id=pot.job_id,
            epoch=settlement.epoch,
            root=settlement.root,
            total=settlement.total,
            is_final=settlement.is_final,
            tx=at.tx,
        )
    ]


def _is_anchored(state: ContractState, pot: Pot, settlement: Settlement) -> bool:
    """Whether this very anchor stands; of the last one, total and finality are known too."""
    if state.roots.get((pot.job_id, settlement.epoch)) != settlement.root:
        return False
    return settlement.epoch < pot.last_epoch or (
        settlement.total == pot.anchored_total and settlement.is_final == pot.is_final
    )


def _check_quorum(committee: tuple[Address, ...], call: AnchorSettlement, at: Setting) -> None:
    if call.settlement.committee_term != 0:
        raise CallFailed("JobEscrowWrongCommitteeTerm")
    if not committee or call.committee != committee:
        raise CallFailed("JobEscrowWrongCommittee")
    if call.bitmap >> len(committee):
        raise CallFailed("JobEscrowInvalidSignerBitmap")
    signers = [member for index, member in enumerate(committee) if call.bitmap >> index & 1]
    joined = b"".join(call.signatures)
    digest = at.domain.digest(call.settlement)
    for index, member in enumerate(signers):
        try:
            valid = recover(digest, joined[65 * index : 65 * index + 65]) == member
        except IdentityError:
            valid = False
        if not valid:
            raise CallFailed("JobEscrowInvalidSignature")
    if len(joined) != 65 * len(signers):
        raise CallFailed("JobEscrowInvalidSignerBitmap")
    if len(signers) < quorum_of(len(committee)):
        raise CallFailed("JobEscrowQuorumNotReached")


def _raise_total(pot: Pot, settlement: Settlement, now: int) -> Pot:
    """Check a settlement against the job's terms and its last anchor, and make it the last."""
    if pot.is_final:
        raise CallFailed("JobEscrowFinalised")
    if now > pot.anchor_deadline:
        raise CallFailed("JobEscrowAnchorDeadlinePassed")
    if settlement.root == bytes(32):
        raise CallFailed("JobEscrowZeroRoot")
    if settlement.epoch <= pot.last_epoch:
        raise CallFailed("JobEscrowEpochNotIncreasing")
    if pot.in_window(pot.last_epoch, now):
        raise CallFailed("JobEscrowWindowOpen")
    pot = pot.settle(now)
    if settlement.total < pot.settled_total:
        raise CallFailed("JobEscrowTotalDecreased")
    if settlement.total - pot.settled_total > pot.terms.epoch_limit:
        raise CallFailed("JobEscrowEpochLimitExceeded")
    if settlement.total > pot.payable:
        raise CallFailed("JobEscrowPotExceeded")
    return replace(
        pot,
        claimable_at=now + pot.terms.window,
        pending=True,
        anchored_total=settlement.total,
        last_epoch=settlement.epoch,
        is_final=settlement.is_final,
    )


def claim_many(state: ContractState, call: ClaimMany, at: Setting) -> list[ChainEvent]:
    """Pay accounts what surviving roots say they earned and have not been paid."""
    events: list[ChainEvent] = []
    for claim in call.claims:
        amount = _claim(state, claim, at)
        if amount:
            events.append(Claimed(at.height, claim.job_id, claim.account, amount, at.tx))
    return events


def _claim(state: ContractState, claim: Claim, at: Setting) -> int:
    root = state.roots.get((claim.job_id, claim.epoch))
    if root is None:
        raise CallFailed("JobEscrowUnknownRoot")
    pot = state.pots[claim.job_id]
    if pot.in_window(claim.epoch, at.timestamp):
        raise CallFailed("JobEscrowWindowOpen")
    value = merkle.ClaimValue(claim.job_id, claim.account, claim.earned, claim.receipts_root)
    if not merkle.verify(root, value.leaf(), claim.proof):
        raise CallFailed("JobEscrowInvalidProof")
    key = (claim.job_id, claim.account)
    before = state.claimed.get(key, 0)
    pot = pot.settle(at.timestamp)
    amount = min(claim.earned - before, pot.settled_total - pot.paid)
    if amount <= 0:
        return 0
    state.claimed[key] = before + amount
    state.pots[pot.job_id] = replace(pot, paid=pot.paid + amount)
    state.transfer(at.escrow, claim.account, amount)
    return amount


def refund(state: ContractState, call: RefundJob, at: Setting) -> Refunded:
    """Return to the researcher what no surviving settlement promises, once."""
    pot = _pot(state, call.job_id, Status.OPEN, Status.STARTED)
    if pot.is_final:
        if at.timestamp < pot.claimable_at:
            raise CallFailed("JobEscrowWindowOpen")
    elif at.timestamp <= pot.anchor_deadline:
        raise CallFailed("JobEscrowNotRefundable")
    pot = replace(pot.settle(at.timestamp), status=Status.REFUNDED)
    state.pots[pot.job_id] = pot
    state.move(at.escrow, pot.researcher, pot.refunded)
    return Refunded(at.height, pot.job_id, pot.refunded, at.tx)
