"""What the daemon tells the service manager that started it: ready, alive, stopping.

The protocol is sd_notify(3): datagrams of ``NAME=value`` lines to the socket that NOTIFY_SOCKET
names. Without one nothing is told.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Mapping

import structlog
import trio

log = structlog.get_logger()

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"
STATUS_S = 10.0
"""Seconds between two statuses where no watchdog asks for more."""

Check = Callable[[], Awaitable[str]]
"""Returns the status line; that it returns at all shows that event loop and database live."""


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send *lines* to the service manager; return whether there is one that took them."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.connect(address)
            sock.sendall("\n".join(lines).encode())
    except OSError as error:
        log.warning("the service manager was not told", what=lines[0], why=str(error))
        return False
    return True


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return within how many seconds the watchdog wants each sign of life; None: no watchdog."""
    asked = environ.get("WATCHDOG_USEC", "")
    ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(asked) / 1e6 if asked.isdigit() and int(asked) and ours else None


async def keep_telling(check: Check, environ: Mapping[str, str] = os.environ) -> None:
    """Send the status that *check* returns, and feed the watchdog, until cancelled."""
    if not environ.get("NOTIFY_SOCKET"):
        return
    asked = watchdog_s(environ)
    while True:
        status = await check()
        lines = [f"STATUS={status}"] + ([ALIVE] if asked is not None else [])
        notify(*lines, environ=environ)
        await trio.sleep(min(asked / 3, STATUS_S) if asked is not None else STATUS_S)
