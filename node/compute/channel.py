"""The daemon's end of the socket to one child: a request, then its reply, bounded."""

import socket
from collections.abc import Sequence

import trio

from meshd.node.compute.executor import LimitExceeded, ShardFailed
from meshd.node.compute.framing import FRAME, MAX_TEXT, FramingError, Kind, frame, parse_frame

_CHUNK = 1 << 20


class ChannelClosed(Exception):
    """The child has gone, or says what it never should: either way it is of no use any more."""


class Channel:
    """Asks one child for one thing at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._stream = trio.SocketStream(self._socket)

    async def request(
        self, kind: Kind, payload: Sequence[bytes], expected: int, memory_bytes: int = 0
    ) -> bytes:
        """Send a request and return its reply of exactly `expected` bytes.

        Raises ShardFailed and LimitExceeded as the child says, ChannelClosed when it has gone.
        """
        try:
            await self._stream.send_all(frame(kind, sum(map(len, payload))))
            for part in payload:
                await self._stream.send_all(part)
            reply, length = parse_frame(await self._read(FRAME.size))
            if reply is Kind.DONE and length == expected:
                return await self._read(length)
            if reply is Kind.FAILED and length <= MAX_TEXT:
                text = (await self._read(length)).decode("utf-8", "replace")
                raise ShardFailed("".join(c if c.isprintable() else " " for c in text))
            if reply is Kind.MEMORY and length == 0:
                raise LimitExceeded("memory_bytes", memory_bytes)
            raise ChannelClosed(f"a reply {reply.name} of {length} bytes, {expected} expected")
        except (trio.BrokenResourceError, trio.ClosedResourceError, FramingError) as error:
            raise ChannelClosed(str(error)) from error

    async def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            received = await self._stream.receive_some(min(_CHUNK, length - len(data)))
            if not received:
                raise ChannelClosed("the child closed its end")
            data += received
        return bytes(data)

    def close(self) -> None:
        """Close at once; whoever waits gets ChannelClosed."""
        self._socket.close()
