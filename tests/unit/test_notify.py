"""What the service manager is told, over a real datagram socket."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshd.node.notify import READY, keep_telling, notify, watchdog_s


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def environ(sock: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": sock.getsockname(), **more}


def test_a_message_reaches_the_socket_that_the_environment_names(manager: socket.socket) -> None:
    assert notify(READY, "STATUS=2 peers", environ=environ(manager))
    assert manager.recv(1000) == b"READY=1\nSTATUS=2 peers"


def test_an_abstract_socket_is_reached_too() -> None:
    name = f"meshd-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.setblocking(False)
        assert notify(READY, environ={"NOTIFY_SOCKET": f"@{name}"})
        assert sock.recv(1000) == b"READY=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@nobody-listens-here"])
def test_without_a_manager_nothing_is_told_and_nothing_breaks(address: str) -> None:
    assert not notify(READY, environ={"NOTIFY_SOCKET": address})
    assert not notify(READY, environ={})


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdogs_wish_is_read_if_it_is_for_this_process(
    variables: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_s(variables) == seconds


async def test_the_watchdog_is_fed_in_time_and_only_while_the_check_returns(
    manager: socket.socket, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hangs = trio.Event()

    async def check() -> str:
        if trio.current_time() - began > 7:
            hangs.set()
            await trio.sleep_forever()
        return "3 peers, 1 shards"

    began = trio.current_time()
    nursery.start_soon(keep_telling, check, environ(manager, WATCHDOG_USEC="9000000"))
    await hangs.wait()
    await trio.sleep(60)
    for _ in range(3):  # at 0, 3 and 6 s; the check hangs at 9 s
        assert manager.recv(1000) == b"STATUS=3 peers, 1 shards\nWATCHDOG=1"
    with pytest.raises(BlockingIOError):
        manager.recv(1000)
    nursery.cancel_scope.cancel()


async def test_without_a_watchdog_only_the_status_is_told(
    manager: socket.socket, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def check() -> str:
        return "idle"

    nursery.start_soon(keep_telling, check, environ(manager))
    await trio.sleep(1)
    assert manager.recv(1000) == b"STATUS=idle"
    nursery.cancel_scope.cancel()


async def test_without_a_manager_nothing_is_checked() -> None:
    async def check() -> str:
        raise AssertionError("nobody asked")

    await keep_telling(check, {})
