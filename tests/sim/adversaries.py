"""Cheaters, liars and idlers: wrappers around the ports of a node that runs the real roles."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import trio
from sim.forging import Opened, closed, is_canary, layout_for, opened, shortened
from sim.wiretap import Relay

from meshd.ledger.joblog import entries_root
from meshd.node.compute.executor import (
    CloseRequest,
    CloseResult,
    Executor,
    InferRequest,
    TrainRequest,
    TrainResult,
)
from meshd.node.workloads.rows import Rows, pack, unpack
from meshd.node.workloads.training.plain import Floats
from meshd.node.workloads.training.settings import TrainSettings
from meshd.p2p.codec import Signed, digest
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
    RoundClose,
    VerdictCommit,
)
from meshd.p2p.network import Handler, Network, RequestRefused

M = TypeVar("M", bound=Message)


def signed_anew(identity: Identity, network: Network, message: M, like: Signed[Message]) -> Any:
    """Return *message* under the liar's own signature."""
    return network.domain.sign(identity, message, expires=like.expires)


# ---- workers -----------------------------------------------------------------------------


class Wrapped:
    """An executor around an honest one."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    async def infer(self, job: InferRequest) -> bytes:
        return await self._inner.infer(job)

    async def train(self, job: TrainRequest) -> TrainResult:
        return await self._inner.train(job)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        return await self._inner.close_round(job)

    async def measure(self) -> int:
        return await self._inner.measure()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Inventing(Wrapped):
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


class Caching(Wrapped):
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


class Hoarding(Wrapped):
    """Takes leases, says it is at work, and never comes to an end."""

    async def infer(self, job: InferRequest) -> bytes:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async def train(self, job: TrainRequest) -> TrainResult:
        if is_canary(job):  # it has to show its numeric class
            return await super().train(job)
        await trio.sleep_forever()
        raise AssertionError("unreachable")


# ---- workers that train ------------------------------------------------------------------


class Training(Wrapped):
    """Cheats in shards number *first* to *last* of those it is given; elsewhere it is honest."""

    def __init__(self, inner: Executor, *, first: int = 0, last: int | None = None) -> None:
        super().__init__(inner)
        self._first, self._last = first, last
        self._count = 0

    async def train(self, job: TrainRequest) -> TrainResult:
        if job.slot < 0 or is_canary(job):
            return await super().train(job)
        number = self._count
        self._count += 1
        if number < self._first or (self._last is not None and number > self._last):
            return await super().train(job)
        return await self.cheat(job)

    @abstractmethod
    async def cheat(self, job: TrainRequest) -> TrainResult:
        """Return what is not what the shard comes to."""


Poison = Callable[[Opened, random.Random], Opened]


def flipped(numbers: Opened, _: random.Random) -> Opened:
    """Return the contribution with its sign turned."""
    return numbers.each(lambda x: -x, lambda x: -x)


def zeroed(numbers: Opened, _: random.Random) -> Opened:
    """Return a contribution of nothing."""
    return numbers.each(lambda _: 0.0, lambda _: 0.0)


def noise(numbers: Opened, luck: random.Random) -> Opened:
    """Return random numbers, ten times as large."""

    def some(values: Floats) -> Floats:
        size = 10 * max(map(abs, values), default=0.0) + 1e-6
        return [luck.uniform(-size, size) for _ in values]

    changes, fresh = [[some(v) for v in part] for part in (numbers.changes, numbers.fresh)]
    return replace(numbers, changes=changes, fresh=fresh)


class Poisoning(Training):
    """Computes its shards and contributes something else."""

    def __init__(
        self,
        inner: Executor,
        poison: Poison,
        *,
        first: int = 0,
        last: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, first=first, last=last)
        self._poison = poison
        self._random = random.Random(seed)

    async def cheat(self, job: TrainRequest) -> TrainResult:
        honest = await self._inner.train(job)
        layout = layout_for(job)
        numbers = self._poison(opened(honest.contribution, layout), self._random)
        settings = TrainSettings.parse(job.settings)
        return replace(honest, contribution=closed(numbers, layout, settings))


class Skipping(Training):
    """Leaves a share of the steps out and extrapolates the rest."""

    def __init__(
        self, inner: Executor, share: float = 0.25, *, first: int = 0, last: int | None = None
    ) -> None:
        super().__init__(inner, first=first, last=last)
        self._share = share

    async def cheat(self, job: TrainRequest) -> TrainResult:
        settings = TrainSettings.parse(job.settings)
        steps = max(1, round(settings.steps * (1 - self._share)))
        short = shortened(job, steps)
        done = await self._inner.train(short)
        numbers = opened(done.contribution, layout_for(short))
        more = settings.steps / steps
        losses = [*numbers.losses, *[numbers.losses[-1]] * (settings.steps - steps)]
        longer = replace(numbers.each(lambda x: x * more, lambda x: x), losses=losses)
        return TrainResult(closed(longer, layout_for(job), settings), done.end_digest)


class Copying(Training):
    """Hands in what another contributed to the same round, if anybody did so yet."""

    def __init__(self, inner: Executor, others: Callable[[TrainRequest], bytes | None]) -> None:
        super().__init__(inner)
        self._others = others

    async def cheat(self, job: TrainRequest) -> TrainResult:
        copied = self._others(job)
        if copied is None:
            return await self._inner.train(job)
        await trio.lowlevel.checkpoint()
        return TrainResult(copied, bytes(digest(copied)))


class Misremembering(Training):
    """Contributes what it computed and commits to another end state."""

    async def cheat(self, job: TrainRequest) -> TrainResult:
        honest = await self._inner.train(job)
        return replace(honest, end_digest=digest(honest.end_digest))


class Inexact(Wrapped):
    """Computes other bits than most machines: those of a numeric class of its own."""

    async def train(self, job: TrainRequest) -> TrainResult:
        done = await super().train(job)
        return replace(done, end_digest=digest(b"other rounding" + done.end_digest))


class NeverOpening(Relay):
    """Commits, and opens nothing to anybody."""

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        if isinstance(signed.message, OpenRequest):
            raise RequestRefused("no")
        return await super().answer(signed, handler)


class OpeningMalformed(Relay):
    """Opens rows, or end digests, under salts that lead nowhere."""

    def __init__(self, inner: Network, identity: Identity) -> None:
        super().__init__(inner)
        self._identity = identity

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        said = await super().answer(signed, handler)
        if said is not None and isinstance(said.message, Open):
            rows = tuple(row.model_copy(update={"salt": ZERO}) for row in said.message.rows)
            lie = {"rows": rows, "digests": (ZERO,) * len(said.message.digests)}
            message = said.message.model_copy(update=lie)
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


class HeadForger(Relay):
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
                signed = self.batch_with(message, head.message, entries, signed)
        return await super().request(to, signed, deadline_s=deadline_s)

    @abstractmethod
    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return the entries to send instead of *entries*."""

    def batch_with(
        self, batch: LogBatch, head: LogHead, entries: tuple[bytes, ...], like: Signed[Message]
    ) -> Signed[Message]:
        root = entries_root([self.domain.open(raw) for raw in entries])
        forged = self.domain.sign(self.identity, head.model_copy(update={"entries_root": root}))
        message = batch.model_copy(update={"head": forged.raw, "entries": entries})
        return cast(Signed[Message], signed_anew(self.identity, self, message, like))

    def sign(self, message: Message) -> bytes:
        return self.domain.sign(self.identity, message).raw


class Equivocating(HeadForger):
    """Two heads for one place: half of the committee sees one without its last entry."""

    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return entries[:-1] if to[-1] % 2 else entries


class Overpaying(HeadForger):
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


class _CloseForger(HeadForger):
    """An orchestrator that closes rounds otherwise than its honest half does."""

    def __init__(self, inner: Network, identity: Identity) -> None:
        super().__init__(inner, identity, 1.0, 0)

    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return tuple(self._forged_entry(raw) for raw in entries)

    def _forged_entry(self, raw: bytes) -> bytes:
        message = self.domain.open(raw).message
        return self.sign(self.close(message)) if isinstance(message, RoundClose) else raw

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        await super().publish(topic, self._forged(signed))

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        return await super().request(to, self._forged(signed), deadline_s=deadline_s)

    def _forged(self, signed: Signed[Message]) -> Signed[Message]:
        if not isinstance(signed.message, RoundClose):
            return signed
        return cast(
            Signed[Message], signed_anew(self.identity, self, self.close(signed.message), signed)
        )

    @abstractmethod
    def close(self, close: RoundClose) -> RoundClose:
        """Return the close to tell of instead."""


class ClosingWrongly(_CloseForger):
    """Names another state than the one that follows."""

    def close(self, close: RoundClose) -> RoundClose:
        return close.model_copy(update={"state_after": digest(close.state_after)})


class ClosingWithout(_CloseForger):
    """Leaves one contribution out of every round."""

    def close(self, close: RoundClose) -> RoundClose:
        kept = {"commitments": close.commitments[1:], "weights": close.weights[1:], "gated": ()}
        return close.model_copy(update=kept)


class Favouring(HeadForger):
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
