"""What the daemon and its executor processes say to each other, as bytes.

The control socket (SOCK_SEQPACKET) carries small msgpack lists between daemon and server. The
data socket (stream) between daemon and one child carries frames: one byte of kind, u64le length,
payload.
"""

import struct
from enum import Enum
from typing import Any, Final

import msgpack

MAX_CONTROL: Final = 4096
FRAME: Final = struct.Struct("<cQ")
MAX_TEXT: Final = 2048


class Kind(bytes, Enum):
    """Kinds of frames: two requests, three replies."""

    PROGRAM = b"P"
    ROWS = b"R"
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
