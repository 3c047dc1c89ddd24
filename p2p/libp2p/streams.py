"""Streams that cannot hang or leak: deadlines, bounded reads, reset at the end."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID

OPEN_DEADLINE_S = 10.0
"""Seconds until a new stream must be negotiated."""
CLOSE_DEADLINE_S = 1.0
"""Seconds that closing or resetting a stream may take."""

LINGER_S = 5.0
"""Seconds that an asker has to read an answer's end."""

_LENGTH = struct.Struct("!I")


class StreamFailure(Exception):
    """The stream or its connection broke, or the peer closed it early."""


class OversizedFrame(Exception):
    """The peer announced a frame over its limit; nothing of it was read."""


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Turn what py-libp2p raises into StreamFailure.

    It raises what was at hand where something broke: StreamError, SwarmException, KeyError,
    OSError, ValueError, groups of them. This is the one place that knows.
    """
    try:
        yield
    except (StreamFailure, OversizedFrame):
        raise
    except trio.TooSlowError as error:
        raise StreamFailure(f"{doing}: its deadline passed") from error
    except Exception as error:
        raise StreamFailure(f"{doing}: {type(error).__name__} {str(error)[:200]}") from error


async def reset(stream: INetStream) -> None:
    """Reset *stream*, within a deadline and whatever else is going on."""
    deadline = trio.current_time() + CLOSE_DEADLINE_S
    with trio.CancelScope(deadline=deadline, shield=True):
        try:
            await stream.reset()
        except Exception:  # nothing is left to do for a stream that cannot be reset
            return


@asynccontextmanager
async def open_stream(host: IHost, peer: ID, protocol: TProtocol) -> AsyncIterator[INetStream]:
    """Open a stream on an existing connection to *peer*; it is reset at the end.

    A stream that is only cancelled keeps its slot: 256 of them block the connection.
    Raises StreamFailure.
    """
    with library_errors("open stream"), trio.fail_after(OPEN_DEADLINE_S):
        stream = await host.new_stream(peer, [protocol])
    try:
        yield stream
    finally:
        await reset(stream)


async def read_exactly(stream: INetStream, size: int) -> bytes:
    """Read *size* bytes; raises StreamFailure if the stream ends before."""
    data = bytearray()
    with library_errors("read"):
        while len(data) < size:
            part = await stream.read(size - len(data))
            if not part:
                raise StreamFailure(f"read: stream ended after {len(data)} of {size} bytes")
            data += part
    return bytes(data)


async def read_length(stream: INetStream, limit: int) -> int:
    """Read a frame's length; raises OversizedFrame if it is over *limit*, StreamFailure."""
    (size,) = _LENGTH.unpack(await read_exactly(stream, _LENGTH.size))
    if size > limit:
        raise OversizedFrame(f"frame of {size} bytes announced, {limit} are allowed")
    return int(size)


async def read_frame(stream: INetStream, limit: int) -> bytes:
    """Read a frame of at most *limit* bytes; raises OversizedFrame, StreamFailure."""
    return await read_exactly(stream, await read_length(stream, limit))


async def write(stream: INetStream, data: bytes) -> None:
    """Write *data*; raises StreamFailure."""
    with library_errors("write"):
        await stream.write(data)


async def write_frame(stream: INetStream, data: bytes, *, prefix: bytes = b"") -> None:
    """Write *prefix*, then *data* as a frame; raises StreamFailure."""
    await write(stream, prefix + _LENGTH.pack(len(data)) + data)


async def finish(stream: INetStream) -> None:
    """End a stream that was answered: close it, wait until the asker has read that, reset it.

    A reset that overtakes unread bytes discards them at the reader.
    """
    with library_errors("close"):
        await stream.close()
        with trio.move_on_after(LINGER_S), contextlib.suppress(StreamError):
            while await stream.read(4096):
                pass
    await reset(stream)
