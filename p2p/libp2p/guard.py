"""What py-libp2p leaves open to a hostile peer, closed: streams, handshakes, buffers, lengths.

- An exception in any stream handler ends the host: here it is counted and the stream reset.
- The length prefix of a protocol negotiation is unbounded: here it is 64 KiB.
- Handshakes have no limit an address, and a slot once taken by an inbound connection is kept
  after it closed: here slots are per address, per network and given back.
- The receive window of yamux is not enforced: here a peer that overruns it is cut off.
- Whoever is cancelled while it writes breaks the connection for all: here frames stay whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog
import trio
from libp2p.abc import INetStream
from libp2p.exceptions import ParseError
from libp2p.io.abc import Reader, ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer import multiselect_communicator
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.yamux.yamux import MAX_WINDOW_SIZE, Yamux, YamuxStream
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from meshd.p2p.libp2p.streams import reset
from meshd.p2p.limits import MAX_NEGOTIATION, Buckets, Slots

STREAMS_PER_PEER = 64
"""Streams that one peer may have open towards this node; gossip, pings and the DHT take few."""
STREAM_RATE = 200.0
STREAM_BURST = 1000.0
"""New streams a second that one peer may open, on average and at once."""
BUFFER_LIMIT = MAX_WINDOW_SIZE + 1024 * 1024
"""Unread bytes of one stream: the largest window that is ever granted, and one frame."""
CONNECTION_LIMIT = 4 * MAX_WINDOW_SIZE
"""Unread bytes of all streams of one connection."""

WRITE_S = 10.0
"""Seconds until a frame must be in the socket's buffer."""

CREDIT_BATCH = 16 * 1024
"""Bytes read before a stream's window is opened again; windows are 256 KiB at least."""

_log = structlog.get_logger()


def bound_negotiation() -> None:
    """Bound what a protocol negotiation may announce, for every host in this process."""
    vars(multiselect_communicator)["read_delim"] = _read_line


def bound_multiplexing() -> None:
    """Have BoundedYamux multiplex every connection in this process.

    py-libp2p negotiates by the muxers it was given, then makes a Yamux of its own whatever they
    were.
    """
    vars(muxer_multistream)[Yamux.__name__] = BoundedYamux


def batch_window_updates() -> None:
    """Let yamux return credit for many small reads at once, in this process.

    py-libp2p reads lengths byte by byte and would answer each byte with a frame.
    """
    setattr(YamuxStream, _return_credit_now.__name__, _return_credit)


_return_credit_now = YamuxStream._auto_tune_and_send_window_update


async def _return_credit(stream: YamuxStream, *, bytes_read: int = 0) -> None:
    owed = vars(stream).get("_owed", 0) + bytes_read
    if bytes_read > 0 and owed < CREDIT_BATCH:
        vars(stream)["_owed"] = owed
        return
    vars(stream)["_owed"] = 0
    await _return_credit_now(stream, bytes_read=owed)


async def _read_line(reader: Reader) -> bytes:
    line = await read_varint_prefixed_bytes_limited(reader, MAX_NEGOTIATION)
    if not line.endswith(b"\n"):
        raise ParseError("negotiation line does not end in a newline")
    return line[:-1]


class _WindowOverrun(trio.TooSlowError):
    """More unread bytes than any window allowed; yamux closes the connection on TooSlowError."""


class _Buffer(bytearray):
    """The unread bytes of one stream."""

    def __init__(self, siblings: dict[int, bytearray]) -> None:
        super().__init__()
        self._siblings = siblings

    def extend(self, data: bytes) -> None:  # type: ignore[override]
        if len(self) + len(data) > BUFFER_LIMIT:
            raise _WindowOverrun
        super().extend(data)
        if len(self) > MAX_WINDOW_SIZE // 4:
            total = sum(len(buffer) for buffer in self._siblings.values())
            if total > CONNECTION_LIMIT:
                raise _WindowOverrun


class _Buffers(dict[int, bytearray]):
    def __setitem__(self, stream_id: int, _: bytearray) -> None:
        super().__setitem__(stream_id, _Buffer(self))


class BoundedYamux(Yamux):
    """Yamux whose receive window is enforced, and whose frames are written whole or not at all."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.stream_buffers = _Buffers()

    async def _write_frame(self, data: bytes) -> None:
        """Write a frame, also if the writer is cancelled once it has begun.

        Noise numbers a message when it encrypts it: after one that never left, or left in part,
        the peer can decrypt nothing more and closes the connection. Raises TooSlowError, and
        closes it, if the peer takes nothing for WRITE_S.
        """
        async with self._write_lock:
            deadline = trio.current_time() + WRITE_S
            with trio.CancelScope(deadline=deadline, shield=True) as scope:
                await self.secured_conn.write(data)
            if scope.cancelled_caught:
                await self.secured_conn.close()
                raise trio.TooSlowError
        await trio.lowlevel.checkpoint()


class StreamGuard:
    """Stands before every inbound stream of a host."""

    def __init__(self, network: Swarm, stats: Counter[str]) -> None:
        self._inner = network.common_stream_handler
        self._stats = stats
        self._open: Counter[ID] = Counter()
        self._rate = Buckets(STREAM_RATE, STREAM_BURST)
        network.set_stream_handler(self)

    async def __call__(self, stream: INetStream) -> None:
        """Run the host's handler; nothing but cancellation comes out of it."""
        peer = stream.muxed_conn.peer_id
        admitted = self._open[peer] < STREAMS_PER_PEER
        if not admitted or not self._rate.take(peer, trio.current_time()):
            self._stats["streams refused"] += 1
            await reset(stream)
            return
        self._open[peer] += 1
        try:
            await self._inner(stream)
        except Exception as error:  # whatever a peer provokes must not end the host
            self._stats["stream errors"] += 1
            _log.debug("stream handler failed", peer=str(peer), error=repr(error)[:500])
            await reset(stream)
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


class InboundGate:
    """Stands before every inbound connection of a host.

    *established* bounds inbound connections, so that outbound ones always find room.
    """

    def __init__(
        self, network: Swarm, stats: Counter[str], slots: Slots, *, established: int
    ) -> None:
        self._network = network
        self._stats = stats
        self._slots = slots
        self._established = established
        self._count = 0
        vars(network)["_handle_inbound_connection"] = self.accept

    async def accept(self, stream: ReadWriteCloser, listener: Any) -> None:
        """Upgrade an accepted socket and hold it until it closes."""
        remote = stream.get_remote_address()
        host = remote[0] if remote else "unknown"
        if self._count >= self._established or not self._slots.take(host):
            self._stats["connections refused"] += 1
            return
        raw = RawConnection(stream, False)
        self._count += 1
        try:
            try:
                muxed = await self._network.upgrade_inbound_raw_conn(raw, listener)
            finally:
                self._slots.release(host)
            assert isinstance(muxed, Yamux)
            await muxed.event_closed.wait()
        except Exception as error:  # whatever a stranger sends before it is known
            self._stats["handshakes failed"] += 1
            _log.debug("inbound connection failed", host=host, error=repr(error)[:500])
        finally:
            self._count -= 1


class DialGate:
    """Decides which addresses the library may dial by itself, on a peer's word."""

    def __init__(self, allowed: Callable[[str], bool], stats: Counter[str]) -> None:
        self._allowed = allowed
        self._stats = stats

    async def is_allowed(self, address: object) -> bool:
        """Return whether *address* may be dialled; called by the library for each dial."""
        allowed = self._allowed(str(address))
        self._stats["dials refused"] += not allowed
        return allowed
