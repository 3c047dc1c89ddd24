"""The job log: batches of entries under certified heads, and how a copy of it is checked.

A head is *certified* by a quorum of the job's committee, and *final* once a certified head of
the same term follows it: then a quorum has verified its certificate, so no later term can
drop it. See docs/job-log.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, cast

from meshd.ledger.chain import JobStarted
from meshd.p2p import merkle
from meshd.p2p.codec import CodecError, Domain, Signed, decode, digest
from meshd.p2p.identity import Address, IdentityError, recover
from meshd.p2p.messages import (
    JOB_LOG_KINDS,
    Certificate,
    LogHead,
    Message,
    TermStart,
    TermVote,
)

M = TypeVar("M", bound=Message)


_recover = lru_cache(maxsize=4096)(recover)
"""Certificates come by several ways: each of their signatures is checked once."""


class LogError(Exception):
    """A head, batch, certificate or term start breaks a rule; the text says which."""


@dataclass(frozen=True)
class Genesis:
    """What a job's log starts from: the draw on chain, and who may write the log."""

    job_id: bytes
    committee: tuple[Address, ...]
    quorum: int
    beacon: bytes
    orchestrator: Address
    lag: int

    @classmethod
    def from_start(cls, started: JobStarted, orchestrator: Address, lag: int) -> Genesis:
        """Return the genesis that follows from the chain's JobStarted event."""
        return cls(
            started.job_id, started.committee, started.quorum, started.beacon, orchestrator, lag
        )

    @property
    def hash(self) -> bytes:
        """The `prev` of the first head."""
        body = b"".join(self.committee) + self.quorum.to_bytes(4, "big") + self.beacon
        return digest(b"meshd.genesis.v1\0" + self.job_id + body)

    @property
    def start(self) -> bytes:
        """The `start` of term 0."""
        return digest(b"meshd.term0.v1\0" + self.hash + self.orchestrator)


@dataclass(frozen=True)
class Batch:
    """A head, its entries in order, and the quorum's certificate once there is one."""

    head: Signed[LogHead]
    entries: tuple[Signed[Message], ...]
    certificate: Certificate | None = None

    @property
    def height(self) -> int:
        """The block height at which these entries count as made."""
        return self.head.message.height


def entries_root(entries: Iterable[Signed[Message]]) -> bytes:
    """Return the Merkle root that a head binds its entries (and their number) with."""
    return merkle.root([entry.raw for entry in entries])


def open_as(domain: Domain, raw: bytes, model: type[M]) -> Signed[M]:
    """Open the frame *raw*; raises LogError unless it is a well-signed *model*."""
    try:
        signed = domain.open(raw)
    except CodecError as error:
        raise LogError(str(error)) from error
    if not isinstance(signed.message, model):
        raise LogError(f"{signed.message.kind} where {model.kind} goes")
    return cast(Signed[M], signed)


def check_certificate(genesis: Genesis, head: bytes, certificate: Certificate) -> None:
    """Raise LogError unless a quorum of distinct members signed the head of digest *head*."""
    if certificate.head_hash != head or certificate.job_id != genesis.job_id:
        raise LogError("certificate is for another head")
    if len(certificate.signers) != len(certificate.signatures):
        raise LogError("certificate has not one signature for each signer")
    signers = set(certificate.signers)
    if len(signers) != len(certificate.signers):
        raise LogError("certificate names a signer twice")
    for signer, signature in zip(certificate.signers, certificate.signatures, strict=True):
        check_signature(genesis, head, Address(signer), signature)
    if len(signers) < genesis.quorum:
        raise LogError(f"certificate has {len(signers)} signers, the quorum is {genesis.quorum}")


def check_signature(genesis: Genesis, value: bytes, signer: Address, signature: bytes) -> None:
    """Raise LogError unless *signer* is a member and *signature* its one over *value*."""
    if signer not in genesis.committee:
        raise LogError(f"0x{signer.hex()} is not in the committee")
    try:
        if _recover(value, signature) != signer:
            raise LogError(f"signature is not that of 0x{signer.hex()}")
    except IdentityError as error:
        raise LogError(str(error)) from error


@dataclass(frozen=True)
class VoteContent:
    """A checked TermVote: the highest certified head its voter knew, and what it signed above."""

    vote: Signed[TermVote]
    high: Signed[LogHead] | None
    signed: tuple[Signed[LogHead], ...]


def open_vote(domain: Domain, genesis: Genesis, raw: bytes) -> VoteContent:
    """Open and check a vote with its attachments; raises LogError."""
    vote = open_as(domain, raw, TermVote)
    message = vote.message
    if message.job_id != genesis.job_id or vote.signer not in genesis.committee:
        raise LogError("vote is of another job or of no member")
    if message.orchestrator != genesis.orchestrator:
        raise LogError("vote is for another orchestrator")
    attached = list(vote.attached)
    high = None
    if message.high != genesis.hash:
        if len(attached) < 2:
            raise LogError("vote does not attach its highest head and certificate")
        high = _earlier_head(domain, genesis, attached.pop(0), message.term)
        if high.digest != message.high:
            raise LogError("vote attaches another head than its highest")
        try:
            certificate = decode(Certificate.kind, attached.pop(0))
        except CodecError as error:
            raise LogError(str(error)) from error
        check_certificate(genesis, high.digest, cast(Certificate, certificate))
    signed = tuple(_earlier_head(domain, genesis, item, message.term) for item in attached)
    if tuple(head.digest for head in signed) != message.signed:
        raise LogError("vote attaches other heads than it lists")
    return VoteContent(vote, high, signed)


def _earlier_head(domain: Domain, genesis: Genesis, raw: bytes, term: int) -> Signed[LogHead]:
    """Open a head of this job from a term before *term*; a liar may list any frame it likes."""
    head = open_as(domain, raw, LogHead)
    if head.signer != genesis.orchestrator or head.message.job_id != genesis.job_id:
        raise LogError("vote attaches a head that is not this job's")
    if head.message.term >= term:
        raise LogError(f"vote for term {term} attaches a head of term {head.message.term}")
    return head


def _place(head: Signed[LogHead] | None) -> tuple[int, int]:
    return (head.message.term, head.message.seq) if head else (-1, 0)


def term_start(
    genesis: Genesis, term: int, votes: Sequence[VoteContent]
) -> tuple[TermStart, tuple[bytes, ...], tuple[Signed[LogHead], ...]]:
    """Return the only valid start of *term* on *votes*, what is attached, and the lost heads.

    It extends the highest certified head (by term, then seq) that any voter knew. Raises
    LogError if the votes are no quorum.
    """
    voters = {content.vote.signer for content in votes}
    if len(voters) != len(votes) or len(voters) < genesis.quorum:
        raise LogError(f"{len(voters)} distinct votes for term {term}, {genesis.quorum} needed")
    if any(content.vote.message.term != term for content in votes):
        raise LogError(f"a vote is not for term {term}")
    high = max((content.high for content in votes), key=_place)
    if _place(high)[0] >= term:
        raise LogError(f"term {term} is not above the highest certified head's")
    lost = {
        head.digest: head
        for content in votes
        for head in content.signed
        if _place(head) > _place(high)
    }
    attached = tuple(content.vote.raw for content in votes)
    message = TermStart(
        job_id=genesis.job_id,
        term=term,
        orchestrator=genesis.orchestrator,
        committee=genesis.committee,
        prev=high.digest if high else genesis.hash,
        seq=_place(high)[1] + 1,
        lost=tuple(sorted(lost)),
        votes_root=merkle.root(attached),
    )
    return message, attached, tuple(lost[name] for name in sorted(lost))


def check_term_start(
    domain: Domain, genesis: Genesis, start: Signed[TermStart]
) -> tuple[Signed[LogHead], ...]:
    """Return the heads a term start declares lost; raises LogError unless it is valid."""
    votes = [open_vote(domain, genesis, raw) for raw in start.attached]
    expected, _, lost = term_start(genesis, start.message.term, votes)
    if start.signer != genesis.orchestrator or start.message != expected:
        raise LogError(f"the start of term {start.message.term} does not follow from its votes")
    return lost


def check_batch(
    domain: Domain, genesis: Genesis, prev: Signed[LogHead] | None, batch: Batch
) -> None:
    """Raise LogError unless *batch* may follow the head *prev* (None: the genesis).

    Checks links, signatures and kinds of entries; whether each entry has its effect is
    JobState's to say, whether members may sign it `signing`'s.
    """
    head = batch.head.message
    if batch.head.signer != genesis.orchestrator:
        raise LogError("head is not signed by the job's orchestrator")
    if head.job_id != genesis.job_id:
        raise LogError("head is of another job")
    if head.prev != (prev.digest if prev else genesis.hash):
        raise LogError(f"head {head.term}.{head.seq} does not follow the one before")
    if head.seq != (prev.message.seq if prev else 0) + 1:
        raise LogError(f"head {head.term}.{head.seq} skips a number")
    if prev and head.height < prev.message.height:
        raise LogError(f"head {head.term}.{head.seq} goes back in height")
    if head.entries_root != entries_root(batch.entries):
        raise LogError(f"head {head.term}.{head.seq} binds other entries")
    for place, entry in enumerate(batch.entries):
        if entry.message.kind not in JOB_LOG_KINDS:
            raise LogError(f"{entry.message.kind} is no entry of a job log")
        if isinstance(entry.message, TermStart) and place:
            raise LogError("a term start is not the first entry of its batch")
    term = prev.message.term if prev else 0
    start = prev.message.start if prev else genesis.start
    first = batch.entries[0] if batch.entries else None
    if head.term == term and head.start == start:
        if first is not None and isinstance(first.message, TermStart):
            raise LogError(f"head {head.term}.{head.seq} starts its term a second time")
        return
    if first is None or not isinstance(first.message, TermStart) or head.term <= term:
        raise LogError(f"head {head.term}.{head.seq} changes the term without a term start")
    check_term_start(domain, genesis, cast(Signed[TermStart], first))
    message = first.message
    if (message.term, message.prev, message.seq) != (head.term, head.prev, head.seq) or (
        head.start != first.digest
    ):
        raise LogError(f"head {head.term}.{head.seq} does not match its term start")


class JobLog:
    """A checked copy of one job's certified batches.

    A late head of a lower term may still become certified, so batches form a tree; the log is
    the branch whose tip is highest by (term, seq). What is final is on every such branch.
    """

    def __init__(self, domain: Domain, genesis: Genesis) -> None:
        self.domain = domain
        self.genesis = genesis
        self.batches: list[Batch] = []
        self._known: dict[bytes, Batch] = {}
        self._final = 0

    @property
    def tip(self) -> Signed[LogHead] | None:
        """The highest certified head."""
        return self.batches[-1].head if self.batches else None

    @property
    def final(self) -> Sequence[Batch]:
        """The batches that no term change can drop."""
        return self.batches[: self._final]

    def known(self, digest: bytes) -> Batch | None:
        """Return the certified batch whose head is *digest*, on whatever branch."""
        return self._known.get(digest)

    def branch(self, digest: bytes) -> list[Batch]:
        """Return the batches up to the head *digest* (the genesis: none), oldest first.

        Raises LogError if that head is not here.
        """
        branch = []
        while digest != self.genesis.hash:
            batch = self._known.get(digest)
            if batch is None:
                raise LogError(f"head {digest.hex()[:16]} is not here")
            branch.append(batch)
            digest = batch.head.message.prev
        return branch[::-1]

    def add(self, batch: Batch) -> None:
        """Take a certified batch; one that is here already changes nothing.

        Raises LogError if it is not certified, does not fit on what is here, or contradicts
        what is final.
        """
        head = batch.head
        name = f"{head.message.term}.{head.message.seq}"
        if head.digest in self._known:
            return
        if batch.certificate is None:
            raise LogError(f"head {name} has no certificate")
        check_certificate(self.genesis, head.digest, batch.certificate)
        prev = self._known.get(head.message.prev)
        if prev is None and head.message.prev != self.genesis.hash:
            raise LogError(f"the head before {name} is not here")
        check_batch(self.domain, self.genesis, prev.head if prev else None, batch)
        self._known[head.digest] = batch
        if _place(head) > _place(self.tip):
            self._go_to(head)

    def _go_to(self, head: Signed[LogHead]) -> None:
        """Make the branch of *head* the log."""
        if not self.batches or head.message.prev == self.batches[-1].head.digest:
            self.batches.append(self._known[head.digest])
        else:
            branch = self.branch(head.digest)
            if [b.head.digest for b in branch[: self._final]] != [
                b.head.digest for b in self.final
            ]:
                raise LogError(f"head {head.message.term}.{head.message.seq} drops a final one")
            self.batches = branch
        prev = self.batches[-2].head if len(self.batches) > 1 else None
        if prev is not None and prev.message.term == head.message.term:
            self._final = len(self.batches) - 1
