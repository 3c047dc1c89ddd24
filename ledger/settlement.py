"""What a job owes: receipts and their tree, a pure function of the log up to a Cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshd.ledger import draws, merkle
from meshd.ledger.audits import Finding, Status, Subject
from meshd.ledger.rounds import is_training
from meshd.ledger.works import Work, works_of
from meshd.p2p.codec import digest, encode, struct_hash
from meshd.p2p.identity import Address
from meshd.p2p.messages import ZERO, AccountLeaf, AuditKind, JobTerms, Receipt, Settlement

GIGA = 10**9
"""Prices are per 10^9 compute units."""

BURN_PPM = 10_000
"""Share of a deposit that the escrow burns at `open`, in parts per million."""

NOBODY_EARNED = merkle.leaf_hash(b"meshd.nobody-earned.v1")
"""The root of a settlement without receipts: the escrow takes no zero, and no claim fits it."""

AUDIT_PPM = 1_250_000
"""An audit earns 1.25 times the price of the units that it re-executed."""


def amount_of(units: int, price: int, ppm: int = draws.PPM) -> int:
    """Return the MCC (smallest unit) for *units* at *price*, times *ppm*, rounded up once."""
    return -(-units * price * ppm // (GIGA * draws.PPM))


class Book:
    """The receipts of one job, entered cut by cut."""

    def __init__(self, job_id: bytes, terms: JobTerms) -> None:
        self.job_id = job_id
        self.terms = terms
        self.receipts: list[Receipt] = []
        self.epochs: list[int] = []
        """How many receipts there were after each cut."""
        self.seqs: list[int] = []
        """The batch that held each cut."""
        self.finals: list[bool] = []
        """Whether each cut is the last: the job has ended and nothing more can be entered."""
        self.total = 0
        self._audit_budget = terms.cap * terms.audit_budget // draws.PPM
        self._paid_audits: set[bytes] = set()

    @property
    def epoch(self) -> int:
        """The number of cuts so far."""
        return len(self.epochs)

    @property
    def closed(self) -> bool:
        """Whether the last cut was made: nothing can be entered any more."""
        return bool(self.finals) and self.finals[-1]

    def total_at(self, epoch: int) -> int:
        """Return what all receipts up to cut number *epoch* come to."""
        return sum(receipt.amount for receipt in self.receipts[: self.epochs[epoch - 1]])

    @property
    def pot(self) -> int:
        """What the escrow can pay in all."""
        return self.terms.cap + -self.terms.cap * BURN_PPM // draws.PPM

    def payable(self, subjects: Sequence[Subject], *, ended: bool) -> list[Subject]:
        """Return what may enter a settlement now, in the log's order.

        In inference a shard that passed enters once `retention` later shards of its worker
        passed too, or at the job's end: until then, being caught voids it. In training that is
        what a span is for.
        """
        later: dict[Address, int] = {}
        ready = []
        at_once = ended or is_training(self.terms)
        for subject in reversed(subjects):
            if subject.status is not Status.ACCEPTED:
                continue
            passed = subject.settled or (ended and subject.contested is None)
            kept = at_once or later.get(subject.worker, 0) >= self.terms.retention
            if passed and kept and not subject.epoch:
                ready.append(subject)
            later[subject.worker] = later.get(subject.worker, 0) + 1
        return ready[::-1]

    def cut(
        self,
        subjects: Sequence[Subject],
        *,
        payee: Address,
        signer: Address,
        seq: int,
        ended: bool,
    ) -> None:
        """Enter what is payable, as far as the epoch limit and the pot reach.

        *payee* is paid the shares of orchestration and aggregation.
        """
        room = min(self.terms.epoch_limit, self.pot - self.total)
        gross = 0
        entered: list[Receipt] = []
        for subject in self.payable(subjects, ended=ended):
            if sum(self._values(subject)) > room:
                break  # no receipt can name such an amount
            receipts, value, budget = self._of_subject(subject, seq)
            spent = sum(r.amount for r in [*entered, *receipts])
            if spent + sum(self._shares(gross + value)) > room:
                break
            entered += receipts
            gross += value
            self._audit_budget = budget
            subject.epoch = self.epoch + 1
        for subject in subjects:
            if subject.status in (Status.REJECTED, Status.VOID):
                receipts, _, budget = self._audits(subject, seq, charge=0)
                spent = sum(r.amount for r in [*entered, *receipts])
                if spent + sum(self._shares(gross)) <= room:
                    entered += receipts
                    self._audit_budget = budget
        for kind, amount in zip(("orchestrate", "aggregate"), self._shares(gross), strict=True):
            if amount:
                entered.append(self._service(kind, amount, payee, signer, seq))
        self._paid_audits.update(r.output_hash for r in entered if r.receipt_kind == "audit")
        self.receipts += entered
        self.total += sum(r.amount for r in entered)
        self.epochs.append(len(self.receipts))
        self.seqs.append(seq)
        # What is left fits no later cut either if it did not fit into an empty one.
        left = self.payable(subjects, ended=True)
        self.finals.append(ended and (not left or not entered))

    def _shares(self, gross: int) -> tuple[int, int]:
        orchestrator, aggregator = self.terms.orchestrator_share, self.terms.aggregator_share
        return gross * orchestrator // draws.PPM, gross * aggregator // draws.PPM

    def _of_subject(self, subject: Subject, seq: int) -> tuple[list[Receipt], int, int]:
        """Return the receipts of what passed and of its audits, the gross value of the work,
        and what is left of the audit budget.

        The first audits of a worker on probation are charged to it, as far as its work earns.
        """
        works, values = works_of(subject), self._values(subject)
        most = sum(values) if subject.probation else 0
        audits, charged, budget = self._audits(subject, seq, charge=most)
        receipts = []
        for work, value in zip(works, values, strict=True):
            own = min(value, charged)
            charged -= own
            receipts.append(self._work_receipt(work, seq, gross=value, charged=own))
        return [*receipts, *audits], sum(values), budget

    def _values(self, subject: Subject) -> list[int]:
        """Return the price of each work that *subject* decides on."""
        price = self.terms.price
        return [amount_of(work.assignment.message.units, price) for work in works_of(subject)]

    def _work_receipt(self, work: Work, seq: int, *, gross: int, charged: int) -> Receipt:
        assignment = work.assignment.message
        return Receipt(
            receipt_kind="work",
            job_id=self.job_id,
            shard=work.number,
            attempt=assignment.attempt,
            account=work.payee,
            signer=work.worker,
            commitment_hash=work.hash,
            output_hash=work.commitment.message.output_root,
            units=assignment.units,
            charged=charged,
            amount=gross - charged,
            log_seq=seq,
        )

    def _fee(self, finding: Finding) -> int:
        units = finding.attestation.message.units_reexecuted
        return amount_of(units, self.terms.price, AUDIT_PPM)

    def _due(self, subject: Subject) -> list[Finding]:
        """Return the audits to be paid: in the majority, revealed and not paid yet."""
        return [
            finding
            for finding in subject.findings
            if finding.in_majority
            and finding.reveal is not None
            and finding.attestation.digest not in self._paid_audits
        ]

    def _audits(self, subject: Subject, seq: int, *, charge: int) -> tuple[list[Receipt], int, int]:
        """Return receipts of a subject's audits, what of them its worker pays and what is then left
        of the audit budget.

        Up to *charge* the worker pays its first audits; all else comes from the budget, and an
        audit for which that does not suffice is not paid.
        """
        receipts = []
        charged, budget = 0, self._audit_budget
        first = works_of(subject)[0]
        for finding in self._due(subject):
            amount = self._fee(finding)
            own = min(amount, charge - charged) if _is_first(finding) else 0
            if amount - own > budget:
                continue
            charged += own
            budget -= amount - own
            receipts.append(
                Receipt(
                    receipt_kind="audit",
                    job_id=self.job_id,
                    shard=first.number,
                    attempt=first.assignment.message.attempt,
                    account=finding.challenge.message.payee,
                    signer=finding.auditor,
                    commitment_hash=subject.hash,
                    output_hash=finding.attestation.digest,
                    units=finding.attestation.message.units_reexecuted,
                    charged=0,
                    amount=amount,
                    log_seq=seq,
                )
            )
        return receipts, charged, budget

    def _service(
        self, kind: str, amount: int, payee: Address, signer: Address, seq: int
    ) -> Receipt:
        return Receipt(
            receipt_kind=kind,
            job_id=self.job_id,
            shard=0,
            attempt=self.epoch,
            account=payee,
            signer=signer,
            commitment_hash=ZERO,
            output_hash=ZERO,
            units=0,
            charged=0,
            amount=amount,
            log_seq=seq,
        )

    def statement(self, *, epoch: int, log_head: bytes, committee_term: int) -> Statement:
        """Return the settlement of cut number *epoch* (cumulative), with every account's leaf."""
        before = self.receipts[: self.epochs[epoch - 2]] if epoch > 1 else []
        receipts = self.receipts[: self.epochs[epoch - 1]]
        claims = self._claims(receipts)
        root = _root(claims)
        settlement = Settlement(
            job_id=self.job_id,
            committee_term=committee_term,
            epoch=epoch,
            prev_root=_root(self._claims(before)),
            root=root,
            total=sum(receipt.amount for receipt in receipts),
            receipts=len(receipts),
            log_seq=self.seqs[epoch - 1],
            log_head=log_head,
            data_hash=digest(b"".join(encode(receipt) for receipt in receipts)),
            is_final=self.finals[epoch - 1],
        )
        tree = merkle.Tree([claim.leaf() for claim in claims]) if claims else None
        leaves = tuple(
            AccountLeaf(
                job_id=self.job_id,
                epoch=epoch,
                account=claim.account,
                earned=claim.earned,
                receipts_root=claim.receipts_root,
                proof=tree.proof(claim.leaf()) if tree else (),
            )
            for claim in claims
        )
        return Statement(settlement, leaves, tuple(receipts))

    def _claims(self, receipts: Sequence[Receipt]) -> list[merkle.ClaimValue]:
        by_account: dict[Address, list[Receipt]] = {}
        for receipt in receipts:
            by_account.setdefault(Address(receipt.account), []).append(receipt)
        return [
            merkle.ClaimValue(
                self.job_id,
                account,
                sum(receipt.amount for receipt in own),
                merkle.receipts_root([struct_hash(receipt) for receipt in own]),
            )
            for account, own in sorted(by_account.items())
        ]


def _is_first(finding: Finding) -> bool:
    return finding.kind is AuditKind.FIRST


def _root(claims: Sequence[merkle.ClaimValue]) -> bytes:
    return merkle.Tree([claim.leaf() for claim in claims]).root if claims else NOBODY_EARNED


@dataclass(frozen=True)
class Statement:
    """A settlement with what every account needs to claim under it."""

    settlement: Settlement
    leaves: tuple[AccountLeaf, ...]
    receipts: tuple[Receipt, ...]
