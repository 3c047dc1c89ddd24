"""Requests and answers over libp2p streams: one stream each, a frame there and one back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

import structlog
import trio
from libp2p.abc import IHost, INetStream
from libp2p.peer.id import ID

from meshd.p2p.codec import MAX_FRAME, CodecError, Domain, Signed
from meshd.p2p.identity import Address, Identity, hex_address
from meshd.p2p.libp2p.host import NetworkSettings
from meshd.p2p.libp2p.protocols import requests_protocol
from meshd.p2p.libp2p.streams import (
    OversizedFrame,
    StreamFailure,
    finish,
    open_stream,
    read_exactly,
    read_frame,
    read_length,
    reset,
    write,
    write_frame,
)
from meshd.p2p.limits import Buckets
from meshd.p2p.messages import MAX_CONTROL, Message, Refused
from meshd.p2p.network import RequestRefused, RequestTimeout, Unreachable
from meshd.p2p.services import Services, open_fresh

READ_DEADLINE_S = 60.0
"""Seconds that a request's frame may take to arrive."""
REQUEST_RATE = 200.0
REQUEST_BURST = 1000.0
"""Requests a second that one peer may make, on average and at once."""
LARGE_AT_ONCE = 2
"""Frames over MAX_CONTROL bytes that one peer may be sending at once."""
REASON_SIZE = 512

ACKNOWLEDGED, ANSWERED, REFUSED = b"\0", b"\1", b"\2"

Reach = Callable[[Address], Awaitable[ID]]
"""Returns a connected peer, dialling if need be; raises Unreachable."""

_log = structlog.get_logger()


class Requests:
    """Asks other nodes, and answers them by *services*."""

    def __init__(
        self,
        host: IHost,
        identity: Identity,
        domain: Domain,
        services: Services,
        settings: NetworkSettings,
        stats: Counter[str],
        reach: Reach,
    ) -> None:
        self._host = host
        self._identity = identity
        self._domain = domain
        self._services = services
        self._settings = settings
        self._stats = stats
        self._reach = reach
        self._protocol = requests_protocol(domain.network)
        self._rate = Buckets(REQUEST_RATE, REQUEST_BURST)
        self._large: defaultdict[ID, trio.CapacityLimiter] = defaultdict(
            lambda: trio.CapacityLimiter(LARGE_AT_ONCE)
        )
        host.set_stream_handler(self._protocol, self._serve)

    # ---- asking ---------------------------------------------------------------------------

    async def request(
        self, to: Address, signed: Signed[Message], deadline_s: float
    ) -> Signed[Message] | None:
        """Send *signed* and return the answer; raises Unreachable, RequestTimeout, RequestRefused.

        A request to this node itself goes to its own handler.
        """
        with trio.move_on_after(deadline_s):
            if to == self._identity.address:
                return await self._ask_self(signed)
            peer = await self._reach(to)
            try:
                return await self._ask(peer, signed)
            except (StreamFailure, OversizedFrame, CodecError) as error:
                raise Unreachable(
                    f"{hex_address(to)} broke off a {signed.message.kind!r} request: {error}"
                ) from error
        raise RequestTimeout(
            f"{hex_address(to)} did not answer {signed.message.kind!r} within {deadline_s} s"
        )

    async def _ask(self, peer: ID, signed: Signed[Message]) -> Signed[Message] | None:
        async with open_stream(self._host, peer, self._protocol) as stream:
            await write_frame(stream, signed.raw)
            status = await read_exactly(stream, 1)
            if status == ACKNOWLEDGED:
                return None
            if status not in (ANSWERED, REFUSED):
                raise CodecError(f"answer has status {status[0]}")
            raw = await read_frame(stream, MAX_FRAME)
        answer = open_fresh(self._domain, raw, self._settings.wall())
        if status == REFUSED:
            if not isinstance(answer.message, Refused):
                raise CodecError(f"refusal is a {answer.message.kind!r}")
            raise RequestRefused(answer.message.reason)
        return answer

    async def _ask_self(self, signed: Signed[Message]) -> Signed[Message] | None:
        try:
            return await self._services.answer(signed.raw)
        except RequestRefused:
            raise
        except Exception as error:  # as if a peer had asked: its fault is not the asker's
            self._count_failure(signed.message.kind, error)
            raise Unreachable(f"the handler of {signed.message.kind!r} failed") from error

    # ---- answering ------------------------------------------------------------------------

    async def _serve(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        try:
            with trio.fail_after(READ_DEADLINE_S):
                raw = await self._read_request(peer, stream)
        except (OversizedFrame, StreamFailure, trio.TooSlowError):
            self._stats["bad frames"] += 1
            await reset(stream)
            return
        try:
            if not self._rate.take(peer, trio.current_time()):
                raise RequestRefused(f"more than {REQUEST_RATE:.0f} requests a second")
            with trio.fail_after(self._settings.handler_deadline_s):
                answer = await self._services.answer(raw)
        except RequestRefused as error:
            self._stats["refused"] += 1
            await self._refuse(stream, str(error))
        except CodecError:
            self._stats["bad frames"] += 1
            await reset(stream)
        except Exception as error:  # a peer's request must not take the node down
            self._count_failure("request", error)
            await reset(stream)
        else:
            await self._send(stream, answer)

    async def _read_request(self, peer: ID, stream: INetStream) -> bytes:
        size = await read_length(stream, MAX_FRAME)
        if size <= MAX_CONTROL:
            return await read_exactly(stream, size)
        async with self._large[peer]:
            return await read_exactly(stream, size)

    async def _send(self, stream: INetStream, answer: Signed[Message] | None) -> None:
        if answer is None:
            await write(stream, ACKNOWLEDGED)
        else:
            await write_frame(stream, answer.raw, prefix=ANSWERED)
        await finish(stream)

    async def _refuse(self, stream: INetStream, reason: str) -> None:
        refusal = self._domain.sign(self._identity, Refused(reason=reason[:REASON_SIZE]))
        await write_frame(stream, refusal.raw, prefix=REFUSED)
        await finish(stream)

    def _count_failure(self, kind: str, error: Exception) -> None:
        self._stats["handler errors"] += 1
        _log.warning("handler failed", kind=kind, error=repr(error), exc_info=error)

    def forget(self, peer: ID) -> None:
        """Drop what is kept for a peer that has gone."""
        self._large.pop(peer, None)
