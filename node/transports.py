"""How a client waits: it stops its thread, or lets trio's other tasks run.

What the client does is written once, as coroutines over a `Transport`. With `BlockingTransport`
none of them ever suspends, so `run_blocking` takes a coroutine to its end in one step: the same
code serves those who have no event loop.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from meshd.node.control.socket import socket_address

if TYPE_CHECKING:
    import trio

T = TypeVar("T")

_PIECE = 64 * 1024


class Stream(Protocol):
    """A connection to a daemon. Every wait ends in OSError when it takes too long."""

    async def send_all(self, data: bytes) -> None:
        """Send *data*."""
        ...

    async def receive(self) -> bytes:
        """Return what has come in, nothing at its end."""
        ...

    async def aclose(self) -> None:
        """Hang up."""
        ...


class Transport(Protocol):
    """Connections, and everything else that takes time."""

    async def open(self, path: Path, timeout_s: float) -> Stream:
        """Connect to the unix socket at *path*; raises OSError."""
        ...

    async def call(self, function: Callable[[], T]) -> T:
        """Return what a *function* that computes or reads files for a while returns."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


# ---- without an event loop -----------------------------------------------------------------


class BlockingTransport:
    """Stops the calling thread. Safe to share: it holds nothing."""

    async def open(self, path: Path, timeout_s: float) -> Stream:
        """Connect to the unix socket at *path*; raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            with socket_address(path) as address:
                sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return _BlockingStream(sock)

    async def call(self, function: Callable[[], T]) -> T:
        """Return what *function* returns, computed here."""
        return function()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251 - stops the thread, as all of this class does


class _BlockingStream:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send_all(self, data: bytes) -> None:
        self._sock.sendall(data)

    async def receive(self) -> bytes:
        return self._sock.recv(_PIECE)

    async def aclose(self) -> None:
        self._sock.close()


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a *coroutine* over a BlockingTransport returns."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} waited for an event loop; there is none")


def iterate_blocking(steps: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield what an asynchronous generator over a BlockingTransport yields."""
    try:
        while True:
            try:
                value = run_blocking(steps.__anext__())
            except StopAsyncIteration:
                return
            yield value
    finally:
        run_blocking(steps.aclose())


# ---- trio ----------------------------------------------------------------------------------


class TrioTransport:
    """Lets other tasks run; what computes goes to a thread."""

    async def open(self, path: Path, timeout_s: float) -> Stream:
        """Connect to the unix socket at *path*; raises OSError."""
        import trio

        with socket_address(path) as address:
            try:
                with trio.fail_after(timeout_s):
                    return _TrioStream(await trio.open_unix_socket(address), timeout_s)
            except trio.TooSlowError as error:
                raise TimeoutError("timed out") from error

    async def call(self, function: Callable[[], T]) -> T:
        """Return what *function* returns, computed in a thread."""
        import trio

        return await trio.to_thread.run_sync(function)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        import trio

        await trio.sleep(seconds)


class _TrioStream:
    def __init__(self, stream: trio.SocketStream, timeout_s: float) -> None:
        self._stream = stream
        self._timeout_s = timeout_s

    async def send_all(self, data: bytes) -> None:
        import trio

        try:
            with trio.fail_after(self._timeout_s):
                await self._stream.send_all(data)
        except trio.TooSlowError as error:
            raise TimeoutError("timed out") from error
        except trio.BrokenResourceError as error:
            raise ConnectionError("it hung up") from error

    async def receive(self) -> bytes:
        import trio

        try:
            with trio.fail_after(self._timeout_s):
                return bytes(await self._stream.receive_some(_PIECE))
        except trio.TooSlowError as error:
            raise TimeoutError("timed out") from error
        except trio.BrokenResourceError as error:
            raise ConnectionError("it hung up") from error

    async def aclose(self) -> None:
        import trio

        with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
            await self._stream.aclose()
