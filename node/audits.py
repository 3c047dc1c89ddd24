"""One audit, step by step: challenge, own result, blind verdict, opening, attestation; reveal.

Each step is on disk before it is sent, so an auditor that restarts sends the same bytes again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import cast

import structlog
import trio

from meshd.ledger.audits import Finding, Subject, Track
from meshd.ledger.draws import drawn_rows, salted_verdict
from meshd.node.kinds.kind import JobContext, Kind
from meshd.p2p.codec import Signed
from meshd.p2p.messages import (
    ZERO,
    Attestation,
    AuditKind,
    AuditResult,
    Challenge,
    Message,
    Open,
    OpenRequest,
    Reveal,
    VerdictCommit,
)
from meshd.p2p.network import NetworkError

log = structlog.get_logger()

ASK_S = 1.0
"""Seconds between two requests for the same opening."""
MIN_ASKS = 3
"""Requests before a worker is found silent, however late this auditor came to ask."""
OPEN_S = 5.0
FETCH_S = 5.0
"""Seconds that one request for an opening may take, and half the first try to fetch the output:
each further try may take twice as long."""
AGAIN_S = 10.0
"""Seconds after which a reveal that is not in the log yet is sent again."""
SPARE_BLOCKS = 5
"""How long before its time is over a confirming auditor stops to wait for the first one's rows."""


@dataclass(frozen=True)
class AuditContext:
    """One auditor in one job."""

    job: JobContext
    kind: Kind
    slots: trio.CapacityLimiter
    """How many audits compute at the same time."""


class Audit:
    """One audit that fell to this node."""

    def __init__(self, context: AuditContext, subject: Subject) -> None:
        self._context = context
        self._kind = context.kind
        self._ports = context.job.ports
        self._record = context.job.record
        self._view = context.job.view
        self._job_id = self._record.id
        self._terms = self._view.job.terms
        self._subject = subject
        self._track = cast(Track, subject.track)

    # ---- the steps -----------------------------------------------------------------------

    async def run(self) -> None:
        """Audit and attest; `reveal_due` opens the verdict when nobody can copy it any more."""
        challenge = await self._challenge()
        if not await self._log(challenge):
            return
        own_digest, verdict = await self._verdict(challenge)
        if not await self._log(verdict):
            return
        await self._log(await self._attestation(challenge, verdict, own_digest))

    async def _challenge(self) -> Signed[Challenge]:
        """Fix the draw with a nonce of this node's own."""
        subject, track = self._subject, self._track
        nonce = secrets.token_bytes(32)
        beacon = await self._ports.beacon.at(track.beacon_height)
        drawn = track.drawn or drawn_rows(
            subject.hash, beacon, nonce, subject.population, subject.sample
        )
        challenge = self._ports.sign(
            Challenge(
                job_id=self._job_id,
                commitments=subject.hash,
                audit_kind=track.kind,
                draw_index=track.index,
                beacon_height=track.beacon_height,
                nonce=nonce,
                drawn=drawn,
                payee=self._ports.payee,
            )
        )
        scope = f"audit.{self._subject.hash.hex()}.{track.kind}.{track.beacon_height}.{track.index}"
        raw = await self._ports.store.sign_once(self._job_id, scope, challenge.raw)
        challenge = cast(Signed[Challenge], self._ports.domain.open(raw))
        await self._ports.store.execute(
            "insert or ignore into audit(challenge, job_id, commitment, raw) values(?,?,?,?)",
            (challenge.digest, self._job_id, subject.hash, raw),
        )
        return challenge

    async def _verdict(self, challenge: Signed[Challenge]) -> tuple[bytes, Signed[VerdictCommit]]:
        """Compute what was drawn and commit to it, salted, before seeing the worker's."""
        rows = await self._ports.store.rows(
            "select own, verdict from audit where challenge=? and verdict is not null",
            (challenge.digest,),
        )
        if rows:
            own_digest, raw = rows[0]
            return own_digest, cast(Signed[VerdictCommit], self._ports.domain.open(raw))
        async with self._context.slots:
            own = await self._kind.own(self._subject, challenge.message.drawn)
        own_digest = self._ports.blobs.put(own)
        salt = secrets.token_bytes(32)
        shard, attempt = self._subject.place
        verdict = self._ports.sign(
            VerdictCommit(
                job_id=self._job_id,
                shard=shard,
                attempt=attempt,
                challenge=challenge.digest,
                draw_index=challenge.message.draw_index,
                salted=salted_verdict(
                    salt,
                    own_digest,
                    validator=self._ports.address,
                    challenge=challenge.digest,
                    draw_index=challenge.message.draw_index,
                ),
            )
        )
        await self._ports.store.execute(
            "update audit set own=?, salt=?, verdict=? where challenge=?",
            (own_digest, salt, verdict.raw, challenge.digest),
        )
        return own_digest, verdict

    async def _attestation(
        self, challenge: Signed[Challenge], verdict: Signed[VerdictCommit], own_digest: bytes
    ) -> Signed[Attestation]:
        """Have the worker open, compare, and say what was found."""
        stored = await self._stored_attestation(challenge.digest)
        if stored is not None:
            return stored
        result, output = await self._compare(challenge, verdict, own_digest)
        agrees = ZERO
        objects = result in (AuditResult.MISMATCH, AuditResult.MALFORMED)
        if self._track.kind is AuditKind.CONFIRM and objects:
            agrees = await self._agreement(own_digest)
        attestation = self._ports.sign(
            Attestation(
                job_id=self._job_id,
                commitment_hash=self._subject.hash,
                validator=self._ports.address,
                result=result,
                audit_kind=self._track.kind,
                draw_index=self._track.index,
                beacon_height=self._track.beacon_height,
                units_reexecuted=self._subject.units_of(challenge.message.drawn),
                verdict_commit=verdict.digest,
                holds_output=output is not None,
                output=output or ZERO,
                agrees_with=agrees,
                evidence_hash=ZERO,
            )
        )
        await self._ports.store.execute(
            "update audit set attestation=? where challenge=?",
            (attestation.raw, challenge.digest),
        )
        return attestation

    # ---- the worker's side ---------------------------------------------------------------

    async def _compare(
        self, challenge: Signed[Challenge], verdict: Signed[VerdictCommit], own_digest: bytes
    ) -> tuple[AuditResult, bytes | None]:
        """Return what the worker's opening is worth, and the blob of its output if it is held."""
        own = self._ports.blobs.read(own_digest)
        asked = 0
        while asked < MIN_ASKS or not await self._silence_over(verdict):
            asked += 1
            opened = await self._ask_to_open(challenge, verdict)
            if opened is None:
                await trio.sleep(ASK_S)
                continue
            wait_s = FETCH_S * 2**asked
            try:
                return await self._kind.judge(self._subject, challenge, own, opened, wait_s)
            except NetworkError as error:
                log.debug("output not had", why=str(error))
                await trio.sleep(ASK_S)
        return AuditResult.SILENT, None

    async def _silence_over(self, verdict: Signed[VerdictCommit]) -> bool:
        """Return whether the worker's time to open, `silence` blocks, is over."""
        logged_at = self._view.height_of(verdict.digest)
        if logged_at is None:
            return False
        return (await self._ports.chain.head()).height > logged_at + self._terms.silence

    async def _ask_to_open(
        self, challenge: Signed[Challenge], verdict: Signed[VerdictCommit]
    ) -> Open | None:
        """Ask the worker once; None if it does not open."""
        request = self._ports.sign(
            OpenRequest(
                job_id=self._job_id,
                commitment_hash=self._subject.hash,
                challenge=challenge.raw,
                verdict=verdict.raw,
            )
        )
        try:
            answer = await self._ports.request(self._subject.worker, request, deadline_s=OPEN_S)
            message = answer.message if answer is not None else None
            if isinstance(message, Open) and message.commitment_hash == self._subject.hash:
                return message
        except NetworkError as error:
            log.debug("worker did not open", why=str(error))
        return None

    # ---- the other auditors --------------------------------------------------------------

    async def _agreement(self, own_digest: bytes) -> bytes:
        """Return the attestation of an earlier auditor whose own result equals this node's."""
        patience = self._terms.silence + self._terms.challenge_blocks - SPARE_BLOCKS
        deadline = (await self._ports.chain.head()).height + max(patience, SPARE_BLOCKS)
        own = self._ports.blobs.read(own_digest)
        while (await self._ports.chain.head()).height <= deadline:
            for finding in self._earlier():
                if finding.reveal is None or finding.result is AuditResult.ACCEPTED:
                    continue
                if await self._kind.agrees(self._subject, own, finding):
                    return finding.attestation.digest
            await self._view.changed(1.0)
        return ZERO

    def _earlier(self) -> list[Finding]:
        subject = self._view.state.subjects.get(self._subject.hash)
        return list(subject.findings) if subject is not None else []

    # ---- log and disk --------------------------------------------------------------------

    async def _log(self, signed: Signed[Message]) -> bool:
        """See an entry into the log; return False if the orchestrator refuses it."""
        why = await self._ports.deliver(
            self._record.orchestrator,
            signed,
            until=lambda: signed.digest in self._view.state,
        )
        if why is not None and why != "logged already":
            log.info("entry refused", kind=signed.message.kind, why=why)
            return False
        return True

    async def _stored_attestation(self, challenge: bytes) -> Signed[Attestation] | None:
        rows = await self._ports.store.rows(
            "select attestation from audit where challenge=? and attestation is not null",
            (challenge,),
        )
        return cast(Signed[Attestation], self._ports.domain.open(rows[0][0])) if rows else None


def reveal_due(context: AuditContext, done: set[bytes], nursery: trio.Nursery) -> None:
    """Open this node's verdicts that can help no other auditor to be lazy any more.

    *done* holds the verdicts (by digest) that are in the log or on their way.
    """
    ports, view = context.job.ports, context.job.view
    state = view.state
    if state.book.closed:
        return  # too late to be paid for
    for subject in state.subjects.values():
        for finding in subject.findings:
            verdict = finding.verdict
            if verdict is None or finding.auditor != ports.address or verdict.digest in done:
                continue
            if finding.reveal is not None:
                done.add(verdict.digest)
            elif subject.may_reveal(finding, ended=state.end is not None):
                done.add(verdict.digest)
                nursery.start_soon(_reveal, context, verdict, done)


async def _reveal(context: AuditContext, verdict: Signed[VerdictCommit], done: set[bytes]) -> None:
    ports, record = context.job.ports, context.job.record
    rows = await ports.store.rows(
        "select own, salt, reveal from audit where verdict=?", (verdict.raw,)
    )
    if not rows:
        log.warning("verdict is not on disk: its audit stays unpaid", verdict=verdict.digest.hex())
        return
    own_digest, salt, raw = rows[0]
    if raw is None:
        message = Reveal(
            job_id=record.id, verdict_commit=verdict.digest, salt=salt, digest=own_digest
        )
        raw = ports.sign(message).raw
        await ports.store.execute("update audit set reveal=? where verdict=?", (raw, verdict.raw))
    reveal = ports.domain.open(raw)
    await ports.deliver(
        record.orchestrator,
        reveal,
        until=lambda: reveal.digest in context.job.view.state,
    )
    await trio.sleep(AGAIN_S)
    done.discard(verdict.digest)
