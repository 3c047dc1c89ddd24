"""Asking a job's committee: for signatures of a head, and for votes for a term."""

from __future__ import annotations

import structlog
import trio

from meshd.ledger.joblog import Batch, LogError, VoteContent, check_signature, open_vote
from meshd.node.log.view import Job
from meshd.node.ports import Ports
from meshd.p2p.codec import encode
from meshd.p2p.identity import Address
from meshd.p2p.messages import Certificate, HeadSignature, LogBatch, TermRequest, TermVote
from meshd.p2p.network import NetworkError

log = structlog.get_logger()

ASK_S = 0.5
"""Seconds between two requests for the same member's signature."""
ANSWER_S = 2.0
"""Seconds after which a request is sent again: a head has few blocks to be signed in."""


async def collect_certificate(
    ports: Ports, job: Job, batch: Batch, before: Certificate | None, highest_seq: int
) -> Certificate | None:
    """Ask every member to sign *batch*'s head until a quorum has, or it is too late.

    *before* is the certificate of the head before it. Returns None if the head came too late:
    members sign until their chain is at `height + lag - 2`.
    """
    message = LogBatch(
        job_id=job.id,
        highest_seq=highest_seq,
        head=batch.head.raw,
        certificate=encode(before) if before else b"",
        entries=tuple(entry.raw for entry in batch.entries),
    )
    signatures: dict[Address, bytes] = {}
    enough = trio.Event()

    async def ask(member: Address) -> None:
        while True:
            try:
                answer = await ports.request(member, ports.sign(message), deadline_s=ANSWER_S)
                if answer is not None and isinstance(answer.message, HeadSignature):
                    signature = answer.message.signature
                    check_signature(job.genesis, batch.head.digest, member, signature)
                    signatures[member] = signature
                    if len(signatures) >= job.genesis.quorum:
                        enough.set()
                    return
            except (NetworkError, LogError) as error:
                log.debug("member did not sign", member=member.hex()[:8], why=str(error))
            await trio.sleep(ASK_S)

    async def until_late() -> None:
        await ports.chain.wait_height(batch.height + job.genesis.lag)
        await trio.sleep(2 * ASK_S)  # a signature may be under way
        enough.set()

    async with trio.open_nursery() as nursery:
        for member in job.genesis.committee:
            nursery.start_soon(ask, member)
        nursery.start_soon(until_late)
        await enough.wait()
        nursery.cancel_scope.cancel()
    if len(signatures) < job.genesis.quorum:
        return None
    signers = tuple(member for member in job.genesis.committee if member in signatures)
    return Certificate(
        job_id=job.id,
        head_hash=batch.head.digest,
        signers=signers,
        signatures=tuple(signatures[member] for member in signers),
    )


async def collect_votes(ports: Ports, job: Job, term: int, tip: Batch | None) -> list[VoteContent]:
    """Ask every member, once, to vote for *term*; return the votes, some perhaps for a later
    term that its voter had joined before. *tip*, the highest certified batch, goes along.
    """
    certificate = tip.certificate if tip is not None else None
    message = TermRequest(
        job_id=job.id,
        term=term,
        head=tip.head.raw if tip is not None else b"",
        certificate=encode(certificate) if certificate is not None else b"",
        entries=tuple(entry.raw for entry in tip.entries) if tip is not None else (),
    )
    votes: dict[Address, VoteContent] = {}

    async def ask(member: Address) -> None:
        try:
            answer = await ports.request(member, ports.sign(message), deadline_s=5.0)
            if answer is not None and isinstance(answer.message, TermVote):
                content = open_vote(job.domain, job.genesis, answer.raw)
                if content.vote.signer == member:
                    votes[member] = content
        except (NetworkError, LogError) as error:
            log.debug("member did not vote", member=member.hex()[:8], why=str(error))

    async with trio.open_nursery() as nursery:
        for member in job.genesis.committee:
            nursery.start_soon(ask, member)
    return [votes[member] for member in job.genesis.committee if member in votes]
