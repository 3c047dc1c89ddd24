"""Canonical bytes: strict msgpack of messages, EIP-712 digests, signed envelopes.

Decoding is the border: bytes from a peer become a checked type here or a `CodecError`. Sizes
are bounded before anything is allocated, and what is decoded must encode to the same bytes
again, so one value has one encoding.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import msgpack
from blake3 import blake3
from eth_hash.auto import keccak
from pydantic import ValidationError

from meshd.p2p.identity import NOBODY, Address, Identity, IdentityError, recover
from meshd.p2p.messages import MESSAGES, MIB, PROTOCOL, Encoded, Message

M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)

ENVELOPE_TAG = b"meshd.envelope.v1\0"
MAX_FRAME = 12 * MIB
"""Bytes of the largest frame: a message, its signature and what is attached."""
MAX_ATTACHED = 4096
_OVERHEAD = 1024


class CodecError(Exception):
    """Bytes that are no canonical, well-signed message of this network."""


def digest(data: bytes) -> bytes:
    """Return the BLAKE3 digest (32 bytes) that names blobs and log entries."""
    return blake3(data).digest()


# ---- message bodies ---------------------------------------------------------------------


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


@dataclass(frozen=True)
class _Shape:
    """How one message class is laid out: (attribute, wire name, Solidity type) a field."""

    fields: tuple[tuple[str, str, str], ...]
    type_hash: bytes


_SHAPES: dict[type[Message], _Shape] = {}


def _shape(model: type[Message]) -> _Shape:
    if model not in _SHAPES:
        fields = tuple(
            (name, _camel(name), _solidity(model, name, info.metadata))
            for name, info in model.model_fields.items()
        )
        _SHAPES[model] = _Shape(fields, keccak(type_string(model, fields).encode()))
    return _SHAPES[model]


def _solidity(model: type[Message], name: str, metadata: list[Any]) -> str:
    for item in metadata:
        if isinstance(item, Encoded):
            return item.solidity
    raise TypeError(f"{model.__name__}.{name} says no Encoded(...) type")


def type_string(
    model: type[Message], fields: tuple[tuple[str, str, str], ...] | None = None
) -> str:
    """Return the EIP-712 type of *model*, e.g. ``Cut(bytes32 jobId,uint32 term,uint64 epoch)``."""
    fields = fields or _shape(model).fields
    return f"{model.__name__}({','.join(f'{solidity} {wire}' for _, wire, solidity in fields)})"


def _to_plain(message: Message) -> dict[str, Any]:
    return {
        wire: _value_to_plain(getattr(message, name), solidity)
        for name, wire, solidity in _shape(type(message)).fields
    }


def _value_to_plain(value: Any, solidity: str) -> Any:
    if solidity == "uint256":
        return str(value)
    if isinstance(value, tuple):
        return [_to_plain(item) if isinstance(item, Message) else item for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def encode(message: Message) -> bytes:
    """Return *message*'s canonical msgpack: a map of its fields in declared order."""
    return cast(bytes, msgpack.packb(_to_plain(message), use_bin_type=True))


_DOMAIN_TYPE = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,77}")


def _from_plain(model: type[Message], plain: Any) -> Message:
    if not isinstance(plain, dict):
        raise CodecError(f"{model.kind}: body is {type(plain).__name__}, not a map")
    shape = _shape(model)
    unknown = plain.keys() - {wire for _, wire, _ in shape.fields}
    if unknown:
        raise CodecError(f"{model.kind}: unknown field {str(next(iter(unknown)))[:64]!r}")
    values: dict[str, Any] = {}
    for name, wire, solidity in shape.fields:
        if wire not in plain:
            raise CodecError(f"{model.kind}: field {wire!r} is missing")
        value = plain[wire]
        if solidity == "uint256":
            if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
                raise CodecError(f"{model.kind}: {wire} is no decimal string")
            value = int(value)
        elif isinstance(value, list):
            nested = MESSAGES_BY_TYPE.get(solidity.removesuffix("[]"))
            value = tuple(_from_plain(nested, item) if nested else item for item in value)
        values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CodecError(f"{model.kind}: {where}: {first['msg']}") from error


MESSAGES_BY_TYPE = {model.__name__: model for model in MESSAGES.values()}


def unpack(data: bytes, max_items: int = 4096) -> Any:
    """Decode one msgpack value of bounded collections; raises CodecError for anything else."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=max_items,
            max_map_len=128,
            max_bin_len=len(data),
            max_str_len=4096,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises ValueError, UnicodeDecodeError, its own types
        raise CodecError(f"not msgpack within the limits: {type(error).__name__}") from error


def decode(kind: str, data: bytes) -> Message:
    """Return the message of *kind* in *data*.

    Raises CodecError if the kind is unknown, the bytes exceed its limit, or they are not the
    canonical encoding of a valid message.
    """
    model = MESSAGES.get(kind)
    if model is None:
        raise CodecError(f"unknown message kind {kind[:32]!r}")
    if len(data) > model.max_size:
        raise CodecError(f"{kind}: {len(data)} bytes exceed the limit of {model.max_size}")
    message = _from_plain(model, unpack(data))
    if encode(message) != data:
        raise CodecError(f"{kind}: encoding is not canonical")
    return message


# ---- EIP-712 ----------------------------------------------------------------------------


def struct_hash(message: Message) -> bytes:
    """Return the EIP-712 `hashStruct` of *message* (https://eips.ethereum.org/EIPS/eip-712)."""
    shape = _shape(type(message))
    parts = [shape.type_hash]
    for name, _, solidity in shape.fields:
        parts.append(_word(getattr(message, name), solidity))
    return bytes(keccak(b"".join(parts)))


def _word(value: Any, solidity: str) -> bytes:
    if solidity.endswith("[]"):
        return bytes(keccak(b"".join(_word(item, solidity[:-2]) for item in value)))
    match solidity:
        case "bytes32":
            return bytes(value)
        case "address":
            return bytes(12) + value
        case "string":
            return bytes(keccak(value.encode()))
        case "bytes":
            return bytes(keccak(value))
        case _:  # uintN, bool
            return int(value).to_bytes(32, "big")


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
        if message.typed:
            return keccak(b"\x19\x01" + self.separator + struct_hash(message))
        return self._envelope_digest(message.kind, expires, encode(message))

    def _envelope_digest(self, kind: str, expires: int, body: bytes) -> bytes:
        header = msgpack.packb([self.network, self.chain_id, self.escrow, PROTOCOL, kind, expires])
        return keccak(ENVELOPE_TAG + cast(bytes, header) + body)

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
        """
        if message.typed:
            expires = 0
        value = self.digest(message, expires)
        signature = identity.sign(value)
        raw = self._frame(message, expires, signature, attached)
        signed = Signed(message, identity.address, value, expires, signature, attached, raw)
        _VERIFIED.put((self, raw), signed)
        return signed

    def _frame(
        self, message: Message, expires: int, signature: bytes, attached: tuple[bytes, ...]
    ) -> bytes:
        frame = [self.network, PROTOCOL, message.kind, expires, encode(message), signature]
        return cast(bytes, msgpack.packb([*frame, list(attached)]))

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
        network, protocol, kind, expires, body, signature, attached = _frame_fields(raw)
        if network != self.network or protocol != PROTOCOL:
            raise CodecError(
                f"frame is for network {network[:64]!r} protocol {protocol}, "
                f"not {self.network!r} protocol {PROTOCOL}"
            )
        message = decode(kind, body)
        if message.typed and expires:
            raise CodecError(f"{kind}: what may reach the chain carries no expiry")
        if self._frame(message, expires, signature, attached) != raw:
            raise CodecError(f"{kind}: frame is not canonical")
        value = self.digest(message, expires)
        try:
            signer = recover(value, signature)
        except IdentityError as error:
            raise CodecError(f"{kind}: {error}") from error
        signed = Signed(message, signer, value, expires, signature, attached, raw)
        _VERIFIED.put((self, raw), signed)
        return signed


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


def _frame_fields(raw: bytes) -> tuple[str, int, str, int, bytes, bytes, tuple[bytes, ...]]:
    fields = unpack(raw, MAX_ATTACHED)
    if not isinstance(fields, list) or len(fields) != 7:
        raise CodecError("frame is not an array of 7")
    types = (str, int, str, int, bytes, bytes, list)
    for value, expected in zip(fields, types, strict=True):
        if type(value) is not expected:
            raise CodecError(f"frame holds {type(value).__name__} where {expected.__name__} goes")
    *head, attached = fields
    if head[3] < 0 or not all(type(item) is bytes for item in attached):
        raise CodecError("frame holds a negative expiry or an attachment that is not bytes")
    return (*head, tuple(attached))


class _Cache:
    """Frames already verified in this process: gossip brings each one several times."""

    def __init__(self, size: int, max_bytes: int) -> None:
        self._items: OrderedDict[tuple[Domain, bytes], Signed[Message]] = OrderedDict()
        self._size = size
        self._max_bytes = max_bytes

    def get(self, key: tuple[Domain, bytes]) -> Signed[Message] | None:
        return self._items.get(key)

    def put(self, key: tuple[Domain, bytes], signed: Signed[Message]) -> None:
        if len(key[1]) > self._max_bytes:
            return
        self._items[key] = signed
        if len(self._items) > self._size:
            self._items.popitem(last=False)


_VERIFIED = _Cache(size=4096, max_bytes=4096)
