"""HTTP/1.1 for JSON-RPC: POST requests of bounded size on connections that stay open."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable

import h11
import structlog
import trio

MAX_BODY_BYTES = 1024 * 1024
"""Longest body of a request."""
MAX_HEADER_BYTES = 16 * 1024
"""Longest head of a request."""
MAX_CONNECTIONS = 256
"""Most connections at a time; one more is told to come back later."""
IDLE_SECONDS = 120.0
"""How long a connection may be silent between two requests."""
TRANSFER_SECONDS = 30.0
"""How long the body of a request, or of an answer, may take."""

Answer = Callable[[bytes], Awaitable[bytes]]
"""Returns the body of the answer to the body of a request."""

_log = structlog.get_logger(__name__)


class _Refused(Exception):
    """A request that gets a status in place of an answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class HttpServer:
    """Serves connections, each of which only its own errors can end."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._places = trio.Semaphore(MAX_CONNECTIONS)

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        """Answer the requests on *stream* until the client or an error ends it."""
        connection = _Connection(stream)
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_after(1):
                await connection.refuse(_Refused(503, "too many connections: try later"))
            return
        try:
            await self._serve(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        except h11.ProtocolError as error:
            _log.debug("devchain.bad_http", error=str(error)[:200])
        except Exception:  # the outermost edge of the service
            _log.exception("devchain.connection_failed")
        finally:
            self._places.release()
            with trio.move_on_after(1) as closing:
                closing.shield = True
                await stream.aclose()

    async def _serve(self, connection: _Connection) -> None:
        while True:
            with trio.fail_after(IDLE_SECONDS):
                request = await connection.request()
            if request is None:
                return
            try:
                _check(request)
                with trio.fail_after(TRANSFER_SECONDS):
                    body = await connection.body()
            except _Refused as refusal:
                await connection.refuse(refusal)
                return
            answer = await self._answer(body)
            with trio.fail_after(TRANSFER_SECONDS):
                if not await connection.reply(200, answer, b"application/json"):
                    return


class _Connection:
    """One client: h11's state machine on a stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)

    async def request(self) -> h11.Request | None:
        """Return the head of the next request, None when the client is done."""
        try:
            event = await self._event()
        except h11.RemoteProtocolError as error:
            await self.refuse(_Refused(error.error_status_hint, str(error)))
            return None
        return event if isinstance(event, h11.Request) else None

    async def body(self) -> bytes:
        """Return the body of the request."""
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        parts: list[bytes] = []
        size = 0
        while isinstance(event := await self._event(), h11.Data):
            size += len(event.data)
            if size > MAX_BODY_BYTES:
                raise _Refused(413, f"body of over {MAX_BODY_BYTES} bytes: send less at a time")
            parts.append(bytes(event.data))
        return b"".join(parts)

    async def reply(self, status: int, body: bytes, content_type: bytes) -> bool:
        """Send an answer; return whether another request may follow."""
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._send(
            h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()
        )
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def refuse(self, refusal: _Refused) -> None:
        """Say why a request gets no answer; nothing can follow."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with trio.fail_after(TRANSFER_SECONDS):
                await self.reply(refusal.status, str(refusal).encode() + b"\n", b"text/plain")

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._stream.receive_some(65_536))
        return event

    async def _send(self, *events: h11.Event) -> None:
        await self._stream.send_all(b"".join(self._http.send(event) or b"" for event in events))


def _check(request: h11.Request) -> None:
    """Refuse what a web page could send here: RPC is for programs on this machine.

    A page may post plain text to any address, but JSON only where it is allowed to, and it comes
    with its own name as host if that was made to lead here.
    """
    headers = dict(request.headers)
    if request.method != b"POST":
        raise _Refused(405, "JSON-RPC is sent with POST")
    if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        raise _Refused(415, "JSON-RPC is sent as application/json")
    if not _is_local(headers.get(b"host", b"").decode("latin-1")):
        raise _Refused(403, "this chain is asked for by address or as localhost only")
    if int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
        raise _Refused(413, f"body of over {MAX_BODY_BYTES} bytes: send less at a time")


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
