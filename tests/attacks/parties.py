"""Cheaters in what they say: they stand between honest roles and the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as replaced
from typing import cast

import trio
from sim.adversaries import FalseAccuser, HeadForger, Wrapped, signed_anew
from sim.wiretap import Relay

from meshd.ledger.chain import AnchorSettlement, Call, ClaimMany
from meshd.ledger.patient import PatientChain
from meshd.node.compute.executor import Executor, TrainRequest, TrainResult
from meshd.node.node import Node, NodeSettings
from meshd.node.ports import Ports
from meshd.p2p.codec import Signed, digest
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import (
    ZERO,
    Attestation,
    AuditKind,
    AuditResult,
    Commitment,
    LogBatch,
    LogHead,
    Message,
    Open,
    OpenedRow,
    TermStart,
)
from meshd.p2p.network import Handler, Network, NetworkError, RequestTimeout

# ---- workers -----------------------------------------------------------------------------


class Speaking(Relay):
    """Says something else than its node does."""

    def __init__(self, inner: Network, identity: Identity) -> None:
        super().__init__(inner)
        self.identity = identity

    def resigned(self, message: Message, like: Signed[Message]) -> Signed[Message]:
        """Return *message* under this node's signature."""
        return cast(Signed[Message], signed_anew(self.identity, self, message, like))

    def said(self, signed: Signed[Message]) -> Signed[Message]:
        """Return what is sent in place of *signed*."""
        return signed

    async def publish(self, topic: str, signed: Signed[Message]) -> None:
        await super().publish(topic, self.said(signed))

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        return await super().request(to, self.said(signed), deadline_s=deadline_s)


class Copycat(Speaking):
    """Signs the roots that another worker committed to."""

    def __init__(
        self, inner: Network, identity: Identity, others: Callable[[], Sequence[Commitment]]
    ) -> None:
        super().__init__(inner, identity)
        self._others = others
        self._mine: dict[bytes, Signed[Message]] = {}

    def said(self, signed: Signed[Message]) -> Signed[Message]:
        message = signed.message
        if not isinstance(message, Commitment):
            return signed
        theirs = self._others()
        if signed.digest not in self._mine and theirs:
            roots = {
                "output_root": theirs[-1].output_root,
                "trace_root": theirs[-1].trace_root,
            }
            self._mine[signed.digest] = self.resigned(message.model_copy(update=roots), signed)
        return self._mine.get(signed.digest, signed)


class Grinding(Speaking):
    """Commits a second time to every shard, under another salt."""

    def __init__(self, inner: Network, identity: Identity) -> None:
        super().__init__(inner, identity)
        self.refused = 0

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        answer = await super().request(to, signed, deadline_s=deadline_s)
        if isinstance(signed.message, Commitment):
            salted = {
                "trace_root": digest(signed.message.trace_root),
                "output_root": digest(signed.message.output_root),
            }
            again = self.resigned(signed.message.model_copy(update=salted), signed)
            try:
                await super().request(to, again, deadline_s=deadline_s)
            except NetworkError:
                self.refused += 1
        return answer


class Claiming(Speaking):
    """Commits to an output of an impossible size."""

    def said(self, signed: Signed[Message]) -> Signed[Message]:
        if not isinstance(signed.message, Commitment):
            return signed
        return self.resigned(signed.message.model_copy(update={"output_bytes": 1 << 50}), signed)


class Miscounting(Speaking):
    """Commits to another number of rows."""

    def said(self, signed: Signed[Message]) -> Signed[Message]:
        if not isinstance(signed.message, Commitment):
            return signed
        more = {"n": signed.message.n + 1}
        return self.resigned(signed.message.model_copy(update=more), signed)


Trick = Callable[[tuple[OpenedRow, ...]], tuple[OpenedRow, ...]]


class Opening(Speaking):
    """Opens other rows, or another output, than it committed to."""

    def __init__(
        self, inner: Network, identity: Identity, trick: Trick, *, withheld: bool = False
    ) -> None:
        super().__init__(inner, identity)
        self._trick = trick
        self._withheld = withheld

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        answer = await super().answer(signed, handler)
        if answer is None or not isinstance(answer.message, Open):
            return answer
        lie: dict[str, object] = {"rows": self._trick(answer.message.rows)}
        if self._withheld:
            lie["output"] = digest(answer.message.output)
        return self.resigned(answer.message.model_copy(update=lie), answer)


def as_it_is(rows: tuple[OpenedRow, ...]) -> tuple[OpenedRow, ...]:
    """Open honestly."""
    return rows


def last_twice(rows: tuple[OpenedRow, ...]) -> tuple[OpenedRow, ...]:
    """Open the last row in place of every other, as trees that duplicate it allow."""
    return tuple(rows[-1].model_copy(update={"index": row.index}) for row in rows)


def node_as_leaf(rows: tuple[OpenedRow, ...]) -> tuple[OpenedRow, ...]:
    """Open the inner node above each row as if it were a row."""
    return tuple(
        row.model_copy(update={"row": row.salt + row.path[0], "path": row.path[1:]})
        if row.path
        else row
        for row in rows
    )


def swapped(rows: tuple[OpenedRow, ...]) -> tuple[OpenedRow, ...]:
    """Open each row under its neighbour's index."""
    indices = [row.index for row in rows]
    turned = indices[1:] + indices[:1]
    moved = [
        row.model_copy(update={"index": index}) for row, index in zip(rows, turned, strict=True)
    ]
    return tuple(sorted(moved, key=lambda row: row.index))


# ---- auditors ----------------------------------------------------------------------------


class Lazy(Wrapped):
    """An auditor's executor that computes nothing but what its numeric class needs."""

    def __init__(self, inner: Executor, steps: int) -> None:
        super().__init__(inner)
        self._steps = steps

    async def train(self, job: TrainRequest) -> TrainResult:
        """Return nothing of use for a shard."""
        if f"steps={self._steps}" not in job.settings:
            return await super().train(job)
        await trio.lowlevel.checkpoint()
        return TrainResult(b"nothing", ZERO)


class Accomplice(FalseAccuser):
    """One of two false accusers: each confirms what the other claims."""

    def __init__(self, inner: Network, identity: Identity, claims: dict[bytes, bytes]) -> None:
        super().__init__(inner, identity)
        self._claims = claims

    async def rewrite(self, signed: Signed[Message]) -> Signed[Message] | None:
        message = signed.message
        if not isinstance(message, Attestation):
            return signed
        lie: dict[str, object] = {
            "result": int(AuditResult.MISMATCH), "holds_output": False, "output": ZERO
        }  # fmt: skip
        if message.audit_kind == AuditKind.CONFIRM:
            lie["agrees_with"] = self._claims.get(message.commitment_hash, ZERO)
        said = self._resigned(message.model_copy(update=lie), signed)
        self._claims.setdefault(message.commitment_hash, said.digest)
        return said


# ---- orchestrators -----------------------------------------------------------------------


class DroppingCommitments(Relay):
    """Takes a rival's commitments and logs none of them."""

    def __init__(self, inner: Network, rival: Address) -> None:
        super().__init__(inner)
        self._rival = rival

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        if signed.signer == self._rival and isinstance(signed.message, Commitment):
            return None
        return await super().answer(signed, handler)


class StallingOut(Relay):
    """Sits on a rival's commitments until their leases have lapsed, then hands them on."""

    def __init__(self, inner: Network, rival: Address, seconds: float) -> None:
        super().__init__(inner)
        self._rival = rival
        self._seconds = seconds

    async def answer(self, signed: Signed[Message], handler: Handler) -> Signed[Message] | None:
        if signed.signer == self._rival and isinstance(signed.message, Commitment):
            await trio.sleep(self._seconds)
        return await super().answer(signed, handler)


class WaitingForTheBeacon(Relay):
    """Has heads with commitments signed by one member, waits until it knows the beacon, and lets
    them be lost: the next term may draw better.
    """

    def __init__(self, inner: Network, first: Address, times: int = 2) -> None:
        super().__init__(inner)
        self._first = first
        self._times = times
        self._heads: set[bytes] = set()

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        message = signed.message
        if isinstance(message, LogBatch) and message.head and to != self._first:
            name = digest(message.head)
            held = any(
                isinstance(self.domain.open(raw).message, Commitment) for raw in message.entries
            )
            if held and (name in self._heads or len(self._heads) < self._times):
                self._heads.add(name)
                await trio.sleep(deadline_s)
                raise RequestTimeout("it was never sent")
        return await super().request(to, signed, deadline_s=deadline_s)


class StartingTwice(HeadForger):
    """Begins each term twice: half of the committee sees another start."""

    def __init__(self, inner: Network, identity: Identity, first: Address) -> None:
        super().__init__(inner, identity, 1.0, 0)
        self._waiting = WaitingForTheBeacon(inner, first)

    async def request(
        self, to: Address, signed: Signed[Message], *, deadline_s: float = 10.0
    ) -> Signed[Message] | None:
        message = signed.message
        if isinstance(message, LogBatch) and message.entries:
            start = self.domain.open(message.entries[0])
            if isinstance(start.message, TermStart) and to[-1] % 2:
                head = cast(Signed[LogHead], self.domain.open(message.head))
                twice = self.domain.sign(
                    self.identity,
                    start.message.model_copy(update={"lost": ()}),
                    attached=start.attached,
                )
                entries = (twice.raw, *message.entries[1:])
                other = head.message.model_copy(update={"start": twice.digest})
                signed = self.batch_with(message, other, entries, signed)
                return await self.inner.request(to, signed, deadline_s=deadline_s)
        return await self._waiting.request(to, signed, deadline_s=deadline_s)

    def forge(self, to: Address, head: LogHead, entries: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return entries


class NeverAnchoring(PatientChain):
    """A chain on which nothing is ever anchored or claimed."""

    async def send(self, key: str, call: Call) -> None:
        """Send everything but what pays others."""
        if isinstance(call, AnchorSettlement | ClaimMany):
            await trio.sleep_forever()
        await super().send(key, call)


def never_anchoring(ports: Ports, settings: NodeSettings) -> Node:
    """Return an orchestrator's node that carries no settlement to the chain."""
    return Node(replaced(ports, chain=NeverAnchoring(ports.chain)), settings)
