"""HTTP in front of the embedded chain: bounded, for programs on this machine only, unbreakable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshd.ledger.devchain import http as http_module
from meshd.ledger.devchain.http import IDLE_SECONDS, MAX_BODY_BYTES, TRANSFER_SECONDS, HttpServer

Stream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


async def echo(body: bytes) -> bytes:
    return b"<" + body + b">"


@asynccontextmanager
async def connection(
    answer: Callable[[bytes], Awaitable[bytes]] = echo, server: HttpServer | None = None
) -> AsyncIterator[Stream]:
    """A client's end of a connection that a server serves."""
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon((server or HttpServer(answer)).serve_connection, served)
        yield client
        nursery.cancel_scope.cancel()


def post(body: bytes = b"{}", **headers: str) -> bytes:
    fields = {
        "Host": "127.0.0.1:8545",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return b"POST / HTTP/1.1\r\n" + head.encode() + b"\r\n" + body


async def read_answer(client: Stream) -> tuple[int, bytes]:
    """The status and body of the next answer."""
    buffer = b""
    while b"\r\n\r\n" not in buffer:
        part = await client.receive_some(65_536)
        assert part, f"connection ended after {buffer!r}"
        buffer += part
    head, _, body = buffer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    while len(body) < length:
        body += await client.receive_some(65_536)
    return int(head.split()[1]), body


async def is_closed(client: Stream) -> bool:
    with trio.fail_after(5):
        try:
            return await client.receive_some(1) == b""
        except trio.BrokenResourceError:
            return True


async def test_a_connection_serves_one_request_after_another() -> None:
    async with connection() as client:
        for body in (b"1", b"22", b""):
            await client.send_all(post(body))
            assert await read_answer(client) == (200, b"<" + body + b">")


async def test_requests_sent_at_once_are_answered_in_order() -> None:
    async with connection() as client:
        await client.send_all(post(b"1") + post(b"2"))
        assert (await read_answer(client))[1].startswith(b"<1>")


async def test_a_request_may_come_byte_by_byte_and_in_chunks() -> None:
    async with connection() as client:
        for byte in post(b"slow"):
            await client.send_all(bytes([byte]))
        assert await read_answer(client) == (200, b"<slow>")
        chunked = post(b"", Transfer_Encoding="chunked", Content_Length="")
        await client.send_all(chunked + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
        assert await read_answer(client) == (200, b"<abc>")


async def test_connection_close_is_obeyed() -> None:
    async with connection() as client:
        await client.send_all(post(Connection="close"))
        assert await read_answer(client) == (200, b"<{}>")
        assert await is_closed(client)


async def test_a_client_that_waits_for_100_continue_gets_it() -> None:
    async with connection() as client:
        request = post(b"late", Expect="100-continue")
        await client.send_all(request[:-4])
        assert (await client.receive_some(65_536)).startswith(b"HTTP/1.1 100")
        await client.send_all(b"late")
        assert await read_answer(client) == (200, b"<late>")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (post(Content_Type="text/plain"), 415),
        (post(Content_Type=""), 415),
        (post(Host="evil.example"), 403),
        (post(Host="evil.example:8545"), 403),
        (post(Host="127.0.0.1.evil.example"), 403),
        (post(Content_Length=str(MAX_BODY_BYTES + 1)), 413),
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n\r\n", 400),
        (post(Content_Length="-1"), 400),
        (post(Padding="x" * 100_000), 431),
    ],
)
async def test_what_is_not_for_the_chain_is_refused_and_the_connection_closed(
    request_: bytes, status: int
) -> None:
    async with connection() as client:
        await client.send_all(request_)
        assert (await read_answer(client))[0] == status
        assert await is_closed(client)


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "[::1]:8545", "[::1]"])
async def test_this_machine_may_be_named_in_several_ways(host: str) -> None:
    async with connection() as client:
        await client.send_all(post(Host=host))
        assert (await read_answer(client))[0] == 200


async def test_a_body_without_announced_length_is_bounded_too() -> None:
    async with connection() as client, trio.open_nursery() as nursery:
        head = post(b"", Transfer_Encoding="chunked", Content_Length="")
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        nursery.start_soon(client.send_all, head + chunk * 17)
        assert (await read_answer(client))[0] == 413


async def test_the_largest_body_is_taken() -> None:
    async with connection() as client:
        await client.send_all(post(bytes(MAX_BODY_BYTES)))
        assert len((await read_answer(client))[1]) == MAX_BODY_BYTES + 2


async def test_an_error_while_answering_ends_that_connection_only() -> None:
    async def fragile(body: bytes) -> bytes:
        if body == b"break":
            raise ZeroDivisionError
        return body

    server = HttpServer(fragile)
    async with connection(server=server) as broken, connection(server=server) as other:
        await broken.send_all(post(b"break"))
        assert await is_closed(broken)
        await other.send_all(post(b"fine"))
        assert await read_answer(other) == (200, b"fine")


async def test_a_client_that_goes_away_in_the_middle_harms_nobody() -> None:
    server = HttpServer(echo)
    for part in (10, len(post()) - 1):
        async with connection(server=server) as client:
            await client.send_all(post()[:part])
            await client.aclose()
    async with connection(server=server) as client:
        await client.send_all(post())
        assert (await read_answer(client))[0] == 200


async def test_a_connection_too_many_is_told_to_come_back_and_places_are_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_module, "MAX_CONNECTIONS", 1)
    server = HttpServer(echo)
    async with connection(server=server) as first:
        await first.send_all(post())
        await read_answer(first)
        async with connection(server=server) as second:
            assert (await read_answer(second))[0] == 503
    async with connection(server=server) as third:
        await third.send_all(post())
        assert (await read_answer(third))[0] == 200


async def test_a_silent_connection_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    async with connection() as client:
        started = trio.current_time()
        assert await client.receive_some(1) == b""
        assert trio.current_time() - started == pytest.approx(IDLE_SECONDS)


async def test_a_body_that_does_not_come_is_not_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with connection() as client:
        await client.send_all(post()[:-1])
        started = trio.current_time()
        assert await client.receive_some(1) == b""
        assert trio.current_time() - started == pytest.approx(TRANSFER_SECONDS)
