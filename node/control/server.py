"""Serves the control API on a unix socket: one request per connection, bounded in size and time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import h11
import structlog
import trio

from meshd.config.errors import ConfigError
from meshd.ledger.chain import ChainError, ChainUnavailable
from meshd.node.control.api import MAX_BODY, Code, ControlError
from meshd.node.control.port import Node
from meshd.node.control.routes import Stream, find_route, parse_body
from meshd.node.control.socket import listening_socket, may_connect, peer_uid
from meshd.node.store import StoreError
from meshd.node.workloads.errors import WorkloadError
from meshd.p2p.identity import IdentityError
from meshd.p2p.network import NetworkError

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger("control")

REQUEST_DEADLINE_S: Final = 10.0
"""How long a client may take to send its request."""
SEND_DEADLINE_S: Final = 30.0
"""How long a client may take to read a piece of its answer."""
HEARTBEAT_S: Final = 15.0
"""A silent stream sends an empty line this often, so that both ends notice a broken one."""
MAX_CONNECTIONS: Final = 64

_HTTP: Final[dict[Code, int]] = {
    "usage": 400,
    "not-found": 404,
    "again": 409,
    "failed": 500,
    "config": 500,
    "unavailable": 503,
}
_PIECE: Final = 64 * 1024


async def serve(
    node: Node,
    path: Path,
    *,
    task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests to *node* on the socket at *path* until cancelled.

    The caller holds the data directory's lock. Whatever a client sends or does not read costs
    its own connection only.
    """
    with listening_socket(path) as sock:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        server = _Server(node)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, server.answer_connection, [listener])
            task_status.started()


def error_from(error: Exception) -> ControlError | None:
    """Return what a client is told of *error*; None if it is nobody's fault but ours."""
    match error:
        case ControlError():
            return error
        case ConfigError() | WorkloadError():
            return ControlError("usage", str(error))
        case IdentityError():
            return ControlError("config", str(error))
        case ChainUnavailable() | NetworkError():
            return ControlError("unavailable", str(error))
        case ChainError() | StoreError():
            return ControlError("failed", str(error))
        case trio.TooSlowError():
            return ControlError("unavailable", "the daemon took too long to answer", "try again")
        case _:
            return None


class _Server:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._open = 0

    async def answer_connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection; the outermost edge, so nothing but Cancelled leaves it."""
        self._open += 1
        client = _Client(stream)
        try:
            uid = peer_uid(stream)
            if not may_connect(uid, os.geteuid()):
                log.warning("control.refused", uid=uid)
            else:
                await self._answer(client)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            log.debug("control.client_left")
        except Exception:
            log.exception("control.connection_failed")
        finally:
            self._open -= 1
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await stream.aclose()

    async def _answer(self, client: _Client) -> None:
        try:
            method, target, raw = await client.read_request()
            if self._open > MAX_CONNECTIONS:
                raise ControlError("again", f"{MAX_CONNECTIONS} requests are open", "try later")
            route, names = find_route(method, target)
            body = parse_body(raw)
        except ControlError as error:
            await client.send_error(error)
            return
        try:
            with trio.fail_after(route.deadline_s):
                answer = await route.call(self._node, names, body)
        except Exception as error:
            await client.send_error(_told(error))
            return
        if isinstance(answer, Stream):
            await client.send_stream(answer)
        else:
            await client.send_json(200, answer)


def _told(error: Exception) -> ControlError:
    """Return what a client is told; what nobody expected is logged with its traceback."""
    known = error_from(error)
    if known is not None:
        return known
    log.error("control.request_failed", exc_info=error)
    return ControlError(
        "failed", f"internal error: {type(error).__name__}: {error}", "see the daemon's log"
    )


class _Client:
    """One connection's HTTP/1.1 conversation: a request, an answer, the end."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)

    async def read_request(self) -> tuple[str, str, bytes]:
        """Return method, path and body.

        Raises ControlError for a malformed or oversize one, TooSlowError and
        BrokenResourceError for a client that stops.
        """
        with trio.fail_after(REQUEST_DEADLINE_S):
            request = await self._next_event()
            body = bytearray()
            while isinstance(event := await self._next_event(), h11.Data):
                body += event.data
                if len(body) > MAX_BODY:
                    raise ControlError("usage", "the body is longer than 1 MiB", "send less")
        return request.method.decode(), request.target.decode("ascii", "replace"), bytes(body)

    async def _next_event(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(_PIECE))
        except h11.RemoteProtocolError as error:
            raise ControlError("usage", f"malformed request: {error}", "send HTTP/1.1") from error
        if isinstance(event, h11.ConnectionClosed):
            raise trio.BrokenResourceError("the client left")
        return event

    async def send_json(self, status: int, answer: Any) -> None:
        """Send a whole answer."""
        payload = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        await self._send(
            _head(status, "application/json", [("content-length", str(len(payload)))]),
            h11.Data(data=payload),
            h11.EndOfMessage(),
        )

    async def send_error(self, error: ControlError) -> None:
        """Send an error; does nothing if an answer has begun."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        await self.send_json(_HTTP[error.code], _fault(error))

    async def send_stream(self, answer: Stream) -> None:
        """Send events as lines of JSON as they come, until they end or the client leaves.

        The daemon's events are taken only as fast as the client reads them.
        """
        sending, lines = trio.open_memory_channel[bytes | ControlError](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_client_leaves, nursery.cancel_scope)
            nursery.start_soon(_pull, answer, sending)
            with suppress(trio.BrokenResourceError, trio.TooSlowError):
                await self._send_lines(lines)
            nursery.cancel_scope.cancel()

    async def _send_lines(self, lines: trio.MemoryReceiveChannel[bytes | ControlError]) -> None:
        """Send lines until there are no more; an error before the first one is a whole answer."""
        head = [_head(200, "application/x-ndjson", [])]
        while True:
            line: bytes | ControlError = b"\n"
            try:
                with trio.move_on_after(HEARTBEAT_S):
                    line = await lines.receive()
            except trio.EndOfChannel:
                await self._send(*head, h11.EndOfMessage())
                return
            if isinstance(line, ControlError):
                if head:
                    await self.send_error(line)
                    return
                line = json.dumps(_fault(line)).encode() + b"\n"
            await self._send(*head, h11.Data(data=line))
            head.clear()

    async def _until_client_leaves(self, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            while await self._stream.receive_some(_PIECE):
                pass
        scope.cancel()

    async def _send(self, *events: h11.Event) -> None:
        data = b"".join(self._http.send(event) or b"" for event in events)
        with trio.fail_after(SEND_DEADLINE_S):
            await self._stream.send_all(data)


async def _pull(answer: Stream, lines: trio.MemorySendChannel[bytes | ControlError]) -> None:
    """Turn events into lines; an error is the last of them."""

    async def send(event: Any) -> None:
        await lines.send(json.dumps(event, ensure_ascii=False).encode() + b"\n")

    async with lines:
        try:
            await answer.run(send)
        except Exception as error:
            await lines.send(_told(error))


def _fault(error: ControlError) -> dict[str, dict[str, str]]:
    return {"error": {"code": error.code, "message": error.message, "cure": error.cure}}


def _head(status: int, content: str, more: list[tuple[str, str]]) -> h11.Response:
    headers = [("content-type", content), ("connection", "close"), *more]
    return h11.Response(status_code=status, headers=headers)
