"""What a worker opens of its results, and to whom: the auditor whose verdict is committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.verification.outputs import ResultPlace, packed_rows
from meshd.node.workloads.rows import unpack
from meshd.p2p.codec import CodecError, Signed
from meshd.p2p.messages import (
    Assignment,
    Challenge,
    Commitment,
    Message,
    Open,
    OpenRequest,
    VerdictCommit,
)
from meshd.p2p.network import RequestRefused


@dataclass(frozen=True)
class Shard:
    """A leased shard and, once computed, what was committed to."""

    assignment: Signed[Assignment]
    seed: bytes
    output: bytes | None = None
    commitment: Signed[Commitment] | None = None


class Openings:
    """Answers the auditors of one worker's shards of one job."""

    def __init__(self, ports: Ports, view: LogView, shards: Mapping[bytes, Shard]) -> None:
        self._ports = ports
        self._view = view
        self._shards = shards

    async def on_request(self, signed: Signed[Message]) -> Signed[Open]:
        """Open the drawn rows to the auditor whose verdict is committed, and to it alone."""
        request = cast(OpenRequest, signed.message)
        shard = next(
            (
                shard
                for shard in self._shards.values()
                if shard.commitment is not None
                and shard.commitment.digest == request.commitment_hash
            ),
            None,
        )
        if shard is None or shard.output is None:
            raise RequestRefused("no such commitment is mine")
        challenge = await self._check_audit(signed, request)
        message = shard.assignment.message
        place = ResultPlace(self._view.job.id, message.shard, self._ports.address)
        blob = self._ports.blobs.read(shard.output)
        rows = unpack(packed_rows(blob)).rows()
        self._ports.blobs.put(blob, readers=[signed.signer])
        return self._ports.sign(
            Open(
                job_id=self._view.job.id,
                commitment_hash=request.commitment_hash,
                rows=place.open_rows(shard.seed, rows, challenge.message.drawn),
                salt_seed=shard.seed,
                output=shard.output,
                digests=(),
            )
        )

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
