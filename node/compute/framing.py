"""What the daemon and its executor processes say to each other, as bytes.

The control socket (SOCK_SEQPACKET) carries small msgpack lists between daemon and server. The
data socket (stream) between daemon and one child carries frames: one byte of kind, u64le length,
payload.
"""

import struct
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

import msgpack

MAX_CONTROL: Final = 4096
FRAME: Final = struct.Struct("<cQ")
MAX_TEXT: Final = 2048


class Kind(bytes, Enum):
    """Kinds of frames: four requests, three replies."""

    PROGRAM = b"P"
    ROWS = b"R"
    TRAIN = b"T"
    CLOSE = b"C"
    DONE = b"d"
    FAILED = b"f"
    MEMORY = b"m"


class FramingError(Exception):
    """The other side sent what it never should."""


def frame(kind: Kind, payload_length: int) -> bytes:
    """Return the head of a frame."""
    return FRAME.pack(kind.value, payload_length)


def parse_frame(head: bytes) -> tuple[Kind, int]:
    """Return kind and payload length of a frame's head. Raises FramingError."""
    kind, length = FRAME.unpack(head)
    try:
        return Kind(kind), length
    except ValueError as error:
        raise FramingError(f"frame of unknown kind {kind!r}") from error


def pack_fields(fields: Sequence[bytes]) -> bytes:
    """Return byte strings, each with its length (u64le) before it, their number (u32le) first."""
    parts = [struct.pack("<I", len(fields))]
    for field in fields:
        parts += [struct.pack("<Q", len(field)), field]
    return b"".join(parts)


def parse_fields(data: memoryview) -> list[bytes]:
    """Return what `pack_fields` packed. Raises FramingError."""
    try:
        (count,), at = struct.unpack_from("<I", data), 4
        fields: list[bytes] = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            fields.append(bytes(data[at + 8 : at + 8 + length]))
            at += 8 + length
    except struct.error as error:
        raise FramingError("a payload ends too early") from error
    if at != len(data):
        raise FramingError("a payload does not end where its fields do")
    return fields


def pack_control(*parts: str | int) -> bytes:
    """Return a control message."""
    packed: bytes = msgpack.packb(parts)
    return packed


def parse_control(data: bytes) -> tuple[Any, ...]:
    """Return the parts of a control message, words and integers. Raises FramingError."""
    try:
        parts = msgpack.unpackb(data, use_list=False, max_map_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise FramingError("a control message is not msgpack") from error
    if not isinstance(parts, tuple) or not all(isinstance(part, (str, int)) for part in parts):
        raise FramingError("a control message is not a list of words and integers")
    return parts
