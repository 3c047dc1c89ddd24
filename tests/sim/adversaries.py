"""Cheaters, liars and idlers: wrappers around the ports of a node that runs the real roles."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, cast

import trio
from sim.wiretap import Relay

from meshd.ledger.joblog import entries_root
from meshd.node.compute.executor import Executor, InferRequest
from meshd.node.workloads.rows import Rows, pack, unpack
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import (
    ZERO,
    Assignment,
    Attestation,
    AuditResult,
    Certificate,
    Challenge,
    Commitment,
    Cut,
    LogBatch,
    LogHead,
    LogRequest,
    Message,
    Open,
    OpenRequest,
    VerdictCommit,
)
from meshd.p2p.network import Handler, Network, RequestRefused

M = TypeVar("M", bound=Message)


def signed_anew(identity: Identity, network: Network, message: M, like: Signed[Message]) -> Any:
    """Return *message* under the liar's own signature."""
    return network.domain.sign(identity, message, expires=like.expires)


# ---- workers -----------------------------------------------------------------------------


class _Wrapped:
    """An executor around an honest one."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    async def infer(self, job: InferRequest) -> bytes:
        return await self._inner.infer(job)

    async def measure(self) -> int:
        return await self._inner.measure()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Inventing(_Wrapped):
    """Invents a share of the rows of every shard."""

    def __init__(self, inner: Executor, share: float, seed: int = 0) -> None:
        super().__init__(inner)
        self._share = share
        self._random = random.Random(seed)

    async def infer(self, job: InferRequest) -> bytes:
        rows = unpack(await super().infer(job))
        count = max(1, round(self._share * rows.count))
        bad = set(self._random.sample(range(rows.count), count))
        honest = rows.rows()
        return pack(
            rows.schema, [spoilt(rows, i) if i in bad else honest[i] for i in range(rows.count)]
        )


def spoilt(rows: Rows, index: int) -> bytes:
    """Return a row that looks right and is not."""
    row = bytearray(rows.rows()[index])
    row[2] ^= 0x20  # a middling bit of the first number's mantissa
    return bytes(row)


class Caching(_Wrapped):
    """Computes its first shard and answers all others with the same rows."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self._cached: list[bytes] = []

    async def infer(self, job: InferRequest) -> bytes:
        wanted = unpack(job.inputs).count
        if len(self._cached) < wanted:
            self._cached = unpack(await super().infer(job)).rows()
        schema = unpack(await super().infer(job)).schema
        return pack(schema, self._cached[:wanted])


class Hoarding(_Wrapped):
    """Takes leases, says it is at work, and never comes to an end."""

    async def infer(self, job: InferRequest) -> bytes:
        await trio.sleep_forever()
        raise AssertionError("unreachable")


class NeverOpening(Relay):
    """Commits, and opens nothing to anybody."""

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        if isinstance(signed.message, OpenRequest):
            raise RequestRefused("no")
        return await super().answer(signed, handler)


class OpeningMalformed(Relay):
    """Opens rows under paths that lead nowhere."""

    def __init__(self, inner: Network, identity: Identity) -> None:
        super().__init__(inner)
        self._identity = identity

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        said = await super().answer(signed, handler)
        if said is not None and isinstance(said.message, Open):
            rows = tuple(row.model_copy(update={"salt": ZERO}) for row in said.message.rows)
            message = said.message.model_copy(update={"rows": rows})
            return cast(Signed[Message], signed_anew(self._identity, self, message, said))
        return said


class CommittingAndDying(Relay):
    """Tells when its first commitment has left, so that it can be killed there and then."""

    def __init__(self, inner: Network, die: Callable[[], None]) -> None:
        super().__init__(inner)
        self._die = die

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        answer = await super().request(to, signed, deadline_s=deadline_s)
        if isinstance(signed.message, Commitment):
            self._die()
        return answer


# ---- auditors ----------------------------------------------------------------------------


class _Auditor(Relay):
    """Rewrites, or swallows (None), what an auditor sends."""

    def __init__(self, inner: Network, identity: Identity) -> None:
        super().__init__(inner)
        self._identity = identity
        self._outputs: dict[bytes, bytes] = {}

    async def rewrite(self, signed: Signed[Message]) -> Signed[Message] | None:
        return signed

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        said = await self.rewrite(signed)
        if said is not None:
            await super().publish(topic, said)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        said = await self.rewrite(signed)
        if said is None:
            await trio.sleep(1)
            return None
        answer = await super().request(to, said, deadline_s=deadline_s)
        if answer is not None and isinstance(answer.message, Open):
            self._outputs[answer.message.commitment_hash] = answer.message.output
        return answer

    def _resigned(self, message: M, like: Signed[Message]) -> Signed[Message]:
        return cast(Signed[Message], signed_anew(self._identity, self, message, like))


class FalseAccuser(_Auditor):
    """Finds every result wrong."""

    async def rewrite(self, signed: Signed[Message]) -> Signed[Message] | None:
        message = signed.message
        if not isinstance(message, Attestation):
            return signed
        lie = {"result": int(AuditResult.MISMATCH), "holds_output": False, "output": ZERO}
        return self._resigned(message.model_copy(update=lie), signed)


class RubberStamp(_Auditor):
    """Finds every result right that is opened at all."""

    async def rewrite(self, signed: Signed[Message]) -> Signed[Message] | None:
        message = signed.message
        if not isinstance(message, Attestation) or message.result == AuditResult.ACCEPTED:
            return signed
        output = self._outputs.get(message.commitment_hash)
        if output is None:
            return signed
        lie = {"result": int(AuditResult.ACCEPTED), "holds_output": True, "output": output}
        return self._resigned(message.model_copy(update=lie), signed)


class Swallowing(_Auditor):
    """Never sends messages of some kinds: never challenges, never attests, no verdict first."""

    def __init__(self, inner: Network, identity: Identity, *kinds: type[Message]) -> None:
        super().__init__(inner, identity)
        self._kinds = kinds

    async def rewrite(self, signed: Signed[Message]) -> Signed[Message] | None:
        return None if isinstance(signed.message, self._kinds) else signed


def never_challenging(inner: Network, identity: Identity) -> Swallowing:
    """Return an auditor that never begins."""
    return Swallowing(inner, identity, Challenge, VerdictCommit, Attestation)


def never_attesting(inner: Network, identity: Identity) -> Swallowing:
    """Return an auditor that begins and never ends."""
    return Swallowing(inner, identity, Attestation)


def attesting_unjudged(inner: Network, identity: Identity) -> Swallowing:
    """Return an auditor that attests without having committed to rows of its own."""
    return Swallowing(inner, identity, VerdictCommit)


# ---- orchestrators -----------------------------------------------------------------------


class Dropping(Relay):
    """An orchestrator that takes everything from one party and logs nothing of it."""

    def __init__(self, inner: Network, victim: Address) -> None:
        super().__init__(inner)
        self._victim = victim

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        about_log = isinstance(signed.message, LogRequest | OpenRequest | LogBatch)
        if signed.signer == self._victim and not about_log:
            return None
        return await super().answer(signed, handler)


class Withholding(Relay):
    """An orchestrator that tells nobody of certificates but in the next head's request."""

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        if not isinstance(signed.message, Certificate):
            await super().publish(topic, signed)

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        if isinstance(signed.message, LogRequest):
            raise RequestRefused("no")
        return await super().answer(signed, handler)


class _HeadForger(Relay):
    """An orchestrator that sends other heads than its honest half made."""

    def __init__(self, inner: Network, identity: Identity, share: float, seed: int) -> None:
        super().__init__(inner)
        self.identity = identity
        self._share = share
        self._seed = seed

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        message = signed.message
        if isinstance(message, LogBatch) and message.head:
            head = cast(Signed[LogHead], self.domain.open(message.head))
            luck = random.Random(f"{self._seed}/{head.message.term}/{head.message.seq}").random()
            if luck < self._share:
                entries = self.forge(to, head.message, message.entries)
                signed = self._batch_with(message, head.message, entries, signed)
        return await super().request(to, signed, deadline_s=deadline_s)

    @abstractmethod
    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return the entries to send instead of *entries*."""

    def _batch_with(
        self, batch: LogBatch, head: LogHead, entries: tuple[bytes, ...], like: Signed[Message]
    ) -> Signed[Message]:
        root = entries_root([self.domain.open(raw) for raw in entries])
        forged = self.domain.sign(self.identity, head.model_copy(update={"entries_root": root}))
        message = batch.model_copy(update={"head": forged.raw, "entries": entries})
        return cast(Signed[Message], signed_anew(self.identity, self, message, like))

    def sign(self, message: Message) -> bytes:
        return self.domain.sign(self.identity, message).raw


class Equivocating(_HeadForger):
    """Two heads for one place: half of the committee sees one without its last entry."""

    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return entries[:-1] if to[-1] % 2 else entries


class Overpaying(_HeadForger):
    """Logs a cut that is not due and pays itself for another attempt of a shard."""

    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        cut = Cut(job_id=head.job_id, term=head.term, epoch=10**6, payee=self.address)
        again = Assignment(
            job_id=head.job_id,
            term=head.term,
            round=0,
            shard=0,
            attempt=77,
            worker=self.address,
            input_hash=ZERO,
            units=10**9,
            lease_until=head.height + 5,
            numeric_class=ZERO,
        )
        return (*entries, self.sign(again), self.sign(cut))


class Favouring(_HeadForger):
    """Gives an accomplice more leases than it may have: every shard's next attempt."""

    def __init__(
        self, inner: Network, identity: Identity, share: float, seed: int, friend: Address
    ) -> None:
        super().__init__(inner, identity, share, seed)
        self._friend = friend

    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        known = [self.domain.open(raw).message for raw in entries]
        given = [message for message in known if isinstance(message, Assignment)]
        if not given:
            return entries
        more = [
            given[-1].model_copy(update={"worker": self._friend, "attempt": given[-1].attempt + i})
            for i in (1, 2, 3)
        ]
        return (*entries, *(self.sign(message) for message in more))
