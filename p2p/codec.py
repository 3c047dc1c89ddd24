"""Signed messages: EIP-712 digests and envelopes of one network, and the frames they travel in.

A frame is the msgpack list [network, protocol, kind, expires, body, signature, attached]; its
body is canonical (`meshd.p2p.canonical`) and so is the frame itself.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import msgpack
from blake3 import blake3
from eth_hash.auto import keccak

from meshd.p2p.canonical import CodecError, Reader, decode, encode, struct_hash, type_string
from meshd.p2p.identity import NOBODY, Address, Identity, IdentityError, recover
from meshd.p2p.messages import MESSAGES, MIB, PROTOCOL, Message

__all__ = [
    "ATTACHING",
    "ENVELOPE_TAG",
    "MAX_ATTACHED",
    "MAX_FRAME",
    "CodecError",
    "Domain",
    "Signed",
    "decode",
    "digest",
    "encode",
    "struct_hash",
    "type_string",
]

M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)

ENVELOPE_TAG = b"meshd.envelope.v1\0"
MAX_FRAME = 12 * MIB
"""Bytes of the largest frame: a message, its signature and what is attached."""
MAX_ATTACHED = 4096
ATTACHING = frozenset({"term-vote", "term-start"})
"""Kinds that may carry attachments: those that bind them. All else in a frame is signed, so only
the signer of another kind can make a second frame of one message."""

_DOMAIN_TYPE = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"


def digest(data: bytes) -> bytes:
    """Return the BLAKE3 digest (32 bytes) that names blobs and log entries."""
    return blake3(data).digest()


@dataclass(frozen=True)
class Domain:
    """The network whose messages are valid: its name, chain and JobEscrow contract."""

    network: str
    chain_id: int
    escrow: Address = NOBODY

    def __post_init__(self) -> None:
        separator = keccak(
            keccak(_DOMAIN_TYPE)
            + keccak(b"meshd")
            + keccak(b"1")
            + self.chain_id.to_bytes(32, "big")
            + bytes(12)
            + self.escrow
        )
        object.__setattr__(self, "separator", separator)

    separator: bytes = field(default=b"", init=False, repr=False)

    def digest(self, message: Message, expires: int = 0) -> bytes:
        """Return what a signer of *message* signs: 32 bytes, which also name the message."""
        return self._digest(message, expires, b"" if message.typed else encode(message))

    def _digest(self, message: Message, expires: int, body: bytes) -> bytes:
        if message.typed:
            return bytes(keccak(b"\x19\x01" + self.separator + struct_hash(message)))
        header = [self.network, self.chain_id, self.escrow, PROTOCOL, message.kind, expires]
        return bytes(keccak(ENVELOPE_TAG + cast(bytes, msgpack.packb(header)) + body))

    def sign(
        self,
        identity: Identity,
        message: M,
        *,
        expires: int = 0,
        attached: tuple[bytes, ...] = (),
    ) -> Signed[M]:
        """Return *message* signed by *identity*.

        *expires* (Unix seconds) is for envelopes only; what may reach the chain does not expire.
        Raises CodecError for what no peer would take: too large, or *attached* to a kind that
        binds no attachments.
        """
        if message.typed:
            expires = 0
        body = encode(message)
        _check_kind(message.kind, len(body), attached)
        value = self._digest(message, expires, body)
        signature = identity.sign(value)
        raw = self._frame(message.kind, expires, body, signature, attached)
        signed = Signed(message, identity.address, value, expires, signature, attached, raw)
        _VERIFIED.put((self, raw), signed)
        return signed

    def _frame(
        self, kind: str, expires: int, body: bytes, signature: bytes, attached: tuple[bytes, ...]
    ) -> bytes:
        frame = [self.network, PROTOCOL, kind, expires, body, signature, list(attached)]
        return cast(bytes, msgpack.packb(frame))

    def open(self, raw: bytes) -> Signed[Message]:
        """Check a frame and return its message and signer.

        Raises CodecError if it is too large, malformed, not canonical, of another network or
        protocol, or badly signed. Expiry is the receiver's to check (`Signed.expired`).
        """
        if len(raw) > MAX_FRAME:
            raise CodecError(f"frame of {len(raw)} bytes exceeds the limit of {MAX_FRAME}")
        known = _VERIFIED.get((self, raw))
        if known is not None:
            return known
        network, protocol, kind, expires, body, signature, attached = _read_frame(raw)
        if network != self.network or protocol != PROTOCOL:
            raise CodecError(
                f"frame is for network {network[:64]!r} protocol {protocol}, "
                f"not {self.network!r} protocol {PROTOCOL}"
            )
        _check_kind(kind, len(body), attached)
        message = decode(kind, body)
        if message.typed and expires:
            raise CodecError(f"{kind}: what may reach the chain carries no expiry")
        if self._frame(kind, expires, body, signature, attached) != raw:
            raise CodecError(f"{kind}: frame is not canonical")
        value = self._digest(message, expires, body)
        try:
            signer = recover(value, signature)
        except IdentityError as error:
            raise CodecError(f"{kind}: {error}") from error
        signed = Signed(message, signer, value, expires, signature, attached, raw)
        _VERIFIED.put((self, raw), signed)
        return signed


def _check_kind(kind: str, size: int, attached: tuple[bytes, ...]) -> None:
    model = MESSAGES.get(kind)
    if model is None:
        raise CodecError(f"unknown message kind {kind[:32]!r}")
    if attached and kind not in ATTACHING:
        raise CodecError(f"{kind}: carries {len(attached)} attachments and binds none")
    if len(attached) > MAX_ATTACHED:
        raise CodecError(f"{kind}: {len(attached)} attachments exceed the limit of {MAX_ATTACHED}")
    size += sum(len(item) for item in attached)
    if size > model.max_size:
        raise CodecError(f"{kind}: {size} bytes exceed the limit of {model.max_size}")


@dataclass(frozen=True)
class Signed(Generic[M_co]):
    """A message whose signature holds: made by `Domain.sign` and `Domain.open` only."""

    message: M_co
    signer: Address
    digest: bytes
    """The signed digest: the message's name in other messages."""
    expires: int
    signature: bytes
    attached: tuple[bytes, ...]
    """Bytes that the message binds by a digest of its own; checked by who reads them."""
    raw: bytes

    def expired(self, now: float) -> bool:
        """Return whether the envelope's time is over at *now* (Unix seconds)."""
        return bool(self.expires) and now > self.expires


def _read_frame(raw: bytes) -> tuple[str, int, str, int, bytes, bytes, tuple[bytes, ...]]:
    reader = Reader(raw, "frame")
    if reader.array(7) != 7:
        raise reader.fail("not a list of 7")
    head = (reader.scalar(str), reader.scalar(int), reader.scalar(str), reader.scalar(int))
    if head[3] < 0:
        raise reader.fail(f"expiry {head[3]} is negative")
    signed = (reader.scalar(bytes), reader.scalar(bytes))
    attached = tuple(reader.scalar(bytes) for _ in range(reader.array(MAX_ATTACHED)))
    reader.end()
    return (*head, *signed, attached)


class _Cache:
    """Frames already verified in this process: gossip brings each one several times."""

    def __init__(self, max_bytes: int, max_frame: int) -> None:
        self._items: OrderedDict[tuple[Domain, bytes], Signed[Message]] = OrderedDict()
        self._max_bytes = max_bytes
        self._max_frame = max_frame
        self._bytes = 0

    def get(self, key: tuple[Domain, bytes]) -> Signed[Message] | None:
        return self._items.get(key) if len(key[1]) <= self._max_frame else None

    def put(self, key: tuple[Domain, bytes], signed: Signed[Message]) -> None:
        if len(key[1]) > self._max_frame or key in self._items:
            return
        self._items[key] = signed
        self._bytes += len(key[1])
        while self._bytes > self._max_bytes:
            (_, oldest), _ = self._items.popitem(last=False)
            self._bytes -= len(oldest)


_VERIFIED = _Cache(max_bytes=2 * MIB, max_frame=4096)
