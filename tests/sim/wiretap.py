"""What travels: a wire tap that remembers everything nodes sign, and a relay to tamper with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import trio

from meshd.p2p.codec import CodecError, Domain, Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    Assignment,
    Attestation,
    Capability,
    Challenge,
    Commitment,
    HeadSignature,
    LeaseAccept,
    LogBatch,
    LogHead,
    Message,
    Reveal,
    SettlementSignature,
    TermStart,
    TermVote,
    VerdictCommit,
)
from meshd.p2p.network import Departure, Handler, Network, Peer


class Relay:
    """A Network that passes everything on; what lies or listens overrides a method."""

    def __init__(self, inner: Network) -> None:
        self.inner = inner

    @property
    def domain(self) -> Domain:
        """The network whose messages are accepted."""
        return self.inner.domain

    @property
    def address(self) -> Address:
        """This node."""
        return self.inner.address

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        """Gossip on *topic*."""
        await self.inner.publish(topic, signed)

    def subscribe(
        self, topic: str
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Signed[Message]]]:
        """Open a bounded subscription."""
        return self.inner.subscribe(topic)

    def departures(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Departure]]:
        """Open a bounded subscription of lost connections."""
        return self.inner.departures()

    def serve(self, model: type[Message], handler: Handler) -> AbstractAsyncContextManager[None]:
        """While open, answer requests of *model*."""

        async def answer(signed: Signed[Message]) -> Signed[Message] | None:
            return await self.answer(signed, handler)

        return self.inner.serve(model, answer)

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        """Answer one request."""
        return await handler(signed)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        """Send *signed* to *to* and return its answer."""
        return await self.inner.request(to, signed, deadline_s=deadline_s)

    async def fetch(
        self,
        digest: bytes,
        *,
        max_bytes: int,
        holders: Sequence[Address],
        deadline_s: float = 120.0,
    ) -> None:
        """Bring a blob here."""
        await self.inner.fetch(digest, max_bytes=max_bytes, holders=holders, deadline_s=deadline_s)

    async def advertise(self, capability: Signed[Capability]) -> None:
        """Put this node's capability where others find it."""
        await self.inner.advertise(capability)

    def capabilities(self) -> Sequence[Signed[Capability]]:
        """Return the capabilities known now."""
        return self.inner.capabilities()

    def peers(self) -> Sequence[Peer]:
        """Return who is connected now."""
        return self.inner.peers()


class Wiretap:
    """Everything that nodes signed and sent, by what may be signed only once."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._said: dict[tuple[Address, str, object], bytes] = {}
        self._heads: dict[bytes, tuple[bytes, int, int]] = {}
        self.contradictions: list[tuple[Address, str, object]] = []
        """Who said two different things where one may be said, and what about."""
        self.settlements: dict[tuple[bytes, int], dict[Address, bytes]] = {}
        """(job, epoch) -> which settlement each member signed."""
        self._rounds: dict[bytes, int] = {}
        self._committed: dict[bytes, Commitment] = {}
        self._committers: dict[bytes, Address] = {}

    def tap(self, network: Network) -> Network:
        """Return *network*, listened to."""
        return _Tapped(network, self)

    def contributions(self, job_id: bytes, round_: int) -> list[tuple[Address, bytes]]:
        """Return who contributed which blob to a round of a training job, as it was gossiped."""
        return [
            (self._committers[name], message.output_root)
            for name, message in self._committed.items()
            if message.job_id == job_id and self._rounds.get(message.assignment_hash) == round_
        ]

    def commitments(self) -> list[tuple[Address, Commitment]]:
        """Return every commitment that was sent, with its author, in order."""
        return [(self._committers[name], m) for name, m in self._committed.items()]

    def hear(self, signed: Signed[Message]) -> None:
        """Take what a node sends."""
        message = signed.message
        if isinstance(message, LogBatch) and message.head:
            self._hear_frame(message.head)
        if isinstance(message, LogHead):
            self._heads[signed.digest] = (message.job_id, message.term, message.seq)
        if isinstance(message, SettlementSignature):
            named = self.settlements.setdefault((message.job_id, message.epoch), {})
            named[signed.signer] = message.settlement_hash
        if isinstance(message, Assignment):
            self._rounds[signed.digest] = message.round
        if isinstance(message, Commitment):
            self._committed[signed.digest] = message
            self._committers[signed.digest] = signed.signer
        about, said = _once(signed, self._heads)
        if about is None:
            return
        key = (signed.signer, message.kind, about)
        if self._said.setdefault(key, said) != said:
            self.contradictions.append(key)

    def _hear_frame(self, raw: bytes) -> None:
        try:
            self.hear(self._domain.open(raw))
        except CodecError:
            return  # a liar's; honest nodes refuse it too


def _once(
    signed: Signed[Message], heads: dict[bytes, tuple[bytes, int, int]]
) -> tuple[object, bytes]:
    """Return what *signed* is the only word about (None: may be said again), and what it says."""
    match signed.message:
        case LogHead() as m:
            return (m.job_id, m.term, m.seq), signed.digest
        case HeadSignature() as m:
            return heads.get(m.head_hash), m.head_hash
        case TermVote() | TermStart() as m:
            return (m.job_id, m.term), signed.digest
        case Commitment() | LeaseAccept() as m:
            return m.assignment_hash, signed.digest
        case Challenge() as m:
            return (m.commitments, m.audit_kind, m.draw_index, m.beacon_height), signed.digest
        case VerdictCommit() as m:
            return m.challenge, signed.digest
        case Attestation() | Reveal() as m:
            return m.verdict_commit, signed.digest
        case SettlementSignature() as m:
            return (m.job_id, m.epoch), m.settlement_hash
        case _:
            return None, b""


class _Tapped(Relay):
    def __init__(self, inner: Network, tap: Wiretap) -> None:
        super().__init__(inner)
        self._tap = tap

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        self._tap.hear(signed)
        await super().publish(topic, signed)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        self._tap.hear(signed)
        return await super().request(to, signed, deadline_s=deadline_s)

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        said = await super().answer(signed, handler)
        if said is not None:
            self._tap.hear(said)
        return said
