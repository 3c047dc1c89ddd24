"""Canonical bytes of message bodies: strict msgpack, one encoding a value, and EIP-712 structs.

Decoding is the border: bytes from a peer become a checked type here or a `CodecError`. They are
read item by item along the message's declaration, so nothing undeclared is ever allocated, and
what is decoded must encode to the same bytes again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgpack
from eth_hash.auto import keccak
from pydantic import ValidationError

from meshd.p2p.messages import MESSAGES, Encoded, Message

T = TypeVar("T")

_MAX_TEXT = 4096
"""Bytes of the longest string."""


class CodecError(Exception):
    """Bytes that are no canonical, well-signed message of this network."""


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


@dataclass(frozen=True)
class _Field:
    """How one field is laid out."""

    name: str
    wire: str
    solidity: str
    max_items: int
    """Longest list allowed; 0 for what is no list."""


@dataclass(frozen=True)
class _Shape:
    """How one message class is laid out."""

    fields: tuple[_Field, ...]
    wires: frozenset[str]
    type_hash: bytes


_SHAPES: dict[type[Message], _Shape] = {}


def _shape(model: type[Message]) -> _Shape:
    if model not in _SHAPES:
        fields = tuple(
            _field(model, name, info.metadata) for name, info in model.model_fields.items()
        )
        wires = frozenset(item.wire for item in fields)
        _SHAPES[model] = _Shape(fields, wires, keccak(_type_string(model, fields).encode()))
    return _SHAPES[model]


def _field(model: type[Message], name: str, metadata: list[Any]) -> _Field:
    solidity = next((item.solidity for item in metadata if isinstance(item, Encoded)), None)
    if solidity is None:
        raise TypeError(f"{model.__name__}.{name} says no Encoded(...) type")
    longest = 0
    if solidity.endswith("[]"):
        limits = [item.max_length for item in metadata if hasattr(item, "max_length")]
        if not limits:
            raise TypeError(f"{model.__name__}.{name} is a list without a max_length")
        longest = int(limits[0])
    return _Field(name, _camel(name), solidity, longest)


def type_string(model: type[Message]) -> str:
    """Return the EIP-712 type of *model*, e.g. ``Reveal(bytes32 jobId,bytes32 salt)``."""
    return _type_string(model, _shape(model).fields)


def _type_string(model: type[Message], fields: tuple[_Field, ...]) -> str:
    return f"{model.__name__}({','.join(f'{item.solidity} {item.wire}' for item in fields)})"


def _to_plain(message: Message) -> dict[str, Any]:
    return {
        item.wire: _value_to_plain(getattr(message, item.name), item.solidity)
        for item in _shape(type(message)).fields
    }


def _value_to_plain(value: Any, solidity: str) -> Any:
    if solidity == "uint256":
        return str(int(value))
    if isinstance(value, tuple):
        return [_to_plain(item) if isinstance(item, Message) else item for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def encode(message: Message) -> bytes:
    """Return *message*'s canonical msgpack: a map of its fields in declared order."""
    return cast(bytes, msgpack.packb(_to_plain(message), use_bin_type=True))


_DECIMAL = re.compile(r"0|[1-9][0-9]{0,77}")
_NESTED = {model.__name__: model for model in MESSAGES.values()}


class Reader:
    """Takes msgpack apart item by item; raises CodecError for what is not asked for.

    Only scalars are ever unpacked whole: a list or map has to be asked for by its header, so
    no input makes it allocate more than a few times its own size.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._size = len(data)
        self._what = what
        self._unpacker = msgpack.Unpacker(
            raw=False,
            max_buffer_size=max(len(data), 1),
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=_MAX_TEXT,
            max_bin_len=len(data),
        )
        self._unpacker.feed(data)

    def fail(self, problem: str) -> CodecError:
        """Return the error to raise for a problem of this input."""
        return CodecError(f"{self._what}: {problem}")

    def _take(self, unpack: Callable[[], Any], expected: str) -> Any:
        try:
            return unpack()
        except (ValueError, msgpack.UnpackException) as error:
            raise self.fail(f"no {expected} where one goes ({type(error).__name__})") from error

    def map(self) -> int:
        """Take a map's header and return how many pairs follow."""
        return cast(int, self._take(self._unpacker.read_map_header, "map"))

    def array(self, max_items: int) -> int:
        """Take an array's header and return how many items follow."""
        count = cast(int, self._take(self._unpacker.read_array_header, "list"))
        if count > max_items:
            raise self.fail(f"list of {count} items exceeds the limit of {max_items}")
        return count

    def scalar(self, expected: type[T]) -> T:
        """Take a value that is no list, map or extension, of exactly the type *expected*."""
        value = self._take(self._unpacker.unpack, expected.__name__)
        if type(value) is not expected:
            raise self.fail(f"{type(value).__name__} where {expected.__name__} goes")
        return value

    def end(self) -> None:
        """Refuse bytes that are left over."""
        if self._unpacker.tell() != self._size:
            raise self.fail("bytes follow its end")


def _read_message(reader: Reader, model: type[Message]) -> Message:
    shape = _shape(model)
    count = reader.map()
    values: dict[str, Any] = {}
    for place, item in enumerate(shape.fields):
        if place == count:
            raise reader.fail(f"field {item.wire!r} is missing")
        _expect_key(reader, shape, item.wire)
        values[item.name] = _read_field(reader, item)
    if count > len(shape.fields):
        _expect_key(reader, shape, None)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise reader.fail(f"{where}: {first['msg']}") from error


def _expect_key(reader: Reader, shape: _Shape, wire: str | None) -> None:
    key = reader.scalar(str)
    if key not in shape.wires:
        raise reader.fail(f"unknown field {key[:64]!r}")
    if key != wire:
        raise reader.fail(f"field {key!r} where {wire!r} goes: missing, repeated or out of order")


def _read_field(reader: Reader, item: _Field) -> Any:
    if not item.solidity.endswith("[]"):
        return _read_value(reader, item.solidity)
    count = reader.array(item.max_items)
    return tuple(_read_value(reader, item.solidity[:-2]) for _ in range(count))


def _read_value(reader: Reader, solidity: str) -> Any:
    if solidity in _NESTED:
        return _read_message(reader, _NESTED[solidity])
    match solidity:
        case "uint256":
            text = reader.scalar(str)
            if not _DECIMAL.fullmatch(text):
                raise reader.fail(f"{text[:80]!r} is no decimal amount")
            return int(text)
        case "bytes" | "bytes32" | "address":
            return reader.scalar(bytes)
        case "string":
            return reader.scalar(str)
        case "bool":
            return reader.scalar(bool)
        case _:
            return reader.scalar(int)


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
    reader = Reader(data, kind)
    message = _read_message(reader, model)
    reader.end()
    if encode(message) != data:
        raise CodecError(f"{kind}: encoding is not canonical")
    return message


# ---- EIP-712 ----------------------------------------------------------------------------


def struct_hash(message: Message) -> bytes:
    """Return the EIP-712 `hashStruct` of *message* (https://eips.ethereum.org/EIPS/eip-712)."""
    shape = _shape(type(message))
    parts = [shape.type_hash]
    parts += [_word(getattr(message, item.name), item.solidity) for item in shape.fields]
    return bytes(keccak(b"".join(parts)))


def _word(value: Any, solidity: str) -> bytes:
    if solidity.endswith("[]"):
        return bytes(keccak(b"".join(_word(item, solidity[:-2]) for item in value)))
    match solidity:
        case "bytes32":
            return bytes(value)
        case "address":
            return bytes(12) + bytes(value)
        case "string":
            return bytes(keccak(value.encode()))
        case "bytes":
            return bytes(keccak(value))
        case _:  # uintN, bool
            return int(value).to_bytes(32, "big")
