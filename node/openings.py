"""What a worker opens of its results, and to whom: the auditor whose verdict is committed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import cast

from meshd.ledger.works import works_of
from meshd.node.kinds.kind import JobContext, Kind, Shard
from meshd.p2p.codec import CodecError, Signed
from meshd.p2p.messages import Challenge, Message, Open, OpenRequest, VerdictCommit
from meshd.p2p.network import RequestRefused


class Openings:
    """Answers the auditors of one worker's shards of one job."""

    def __init__(
        self,
        context: JobContext,
        kind: Kind,
        shards: Mapping[bytes, Shard],
        pull: Callable[[], Awaitable[None]],
    ) -> None:
        self._ports = context.ports
        self._view = context.view
        self._kind = kind
        self._shards = shards
        """This node's shards, by the digest of their assignments."""
        self._pull = pull
        """Brings the log up to date: whoever withholds it must not make a worker silent."""

    async def on_request(self, signed: Signed[Message]) -> Signed[Open]:
        """Open what was drawn to the auditor whose verdict is committed, and to it alone."""
        request = cast(OpenRequest, signed.message)
        if (
            request.commitment_hash not in self._view.state.subjects
            and signed.signer in self._view.job.genesis.committee
        ):
            await self._pull()
        subject = self._view.state.subjects.get(request.commitment_hash)
        if subject is None or subject.worker != self._ports.address:
            raise RequestRefused("no such commitment of mine is final in the log")
        shards = []
        for work in works_of(subject):
            shard = self._shards.get(work.assignment.digest)
            if shard is None or shard.output is None:
                raise RequestRefused("what was committed to is not here any more")
            shards.append(shard)
        challenge = await self._check_audit(signed, request)
        opened = self._kind.open(subject, shards, challenge.message, signed.signer)
        return self._ports.sign(opened)

    async def _check_audit(
        self, signed: Signed[Message], request: OpenRequest
    ) -> Signed[Challenge]:
        """Return the auditor's challenge; refuse anybody who is not due to audit."""
        try:
            challenge = self._ports.domain.open(request.challenge)
            verdict = self._ports.domain.open(request.verdict)
        except CodecError as error:
            raise RequestRefused(str(error)) from error
        if not (
            isinstance(challenge.message, Challenge)
            and isinstance(verdict.message, VerdictCommit)
            and challenge.signer == verdict.signer == signed.signer
        ):
            raise RequestRefused("challenge and verdict are not this auditor's")
        height = (await self._ports.chain.head()).height
        why = await self._view.audit_refusal(
            request.commitment_hash,
            cast(Signed[Challenge], challenge),
            cast(Signed[VerdictCommit], verdict),
            height,
        )
        if why is not None:
            raise RequestRefused(why)
        return cast(Signed[Challenge], challenge)
