"""The unix socket and the lock of a data directory: who may talk, and who may run."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshd.config.paths import LOCK
from meshd.node.control.api import ControlError

if TYPE_CHECKING:
    import trio

_LONGEST: Final = 100
"""Bytes of a path that every system accepts as a socket's address (Linux: 107)."""


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Yield an address for the socket at *path* that fits, however long the path is.

    A long one is reached through its directory's descriptor (Linux). Raises ControlError
    where that is not possible.
    """
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    if not os.path.isdir("/proc/self/fd"):
        raise ControlError(
            "config",
            f"data directory {path.parent} has a path too long for a socket",
            f"choose one of at most {_LONGEST - len(path.name) - 1} bytes",
        )
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextmanager
def listening_socket(path: Path) -> Iterator[socket.socket]:
    """Yield a listening socket at *path*, mode 0600; it is removed at the end.

    A socket file that a dead daemon left is replaced: the caller holds the directory's lock.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with socket_address(path) as address:
            sock.bind(address)
        try:
            os.chmod(path, 0o600)  # before listen(): nobody can have connected yet
            sock.listen(64)
            sock.setblocking(False)
            yield sock
        finally:
            path.unlink(missing_ok=True)


def peer_uid(stream: trio.SocketStream) -> int | None:
    """Return the user id of the process that connected; None where the system does not say."""
    if sys.platform != "linux":
        return None
    size = struct.calcsize("3i")
    raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", raw)
    return int(uid)


def may_connect(uid: int | None, own: int) -> bool:
    """Whether a process of user *uid* may use the API of a daemon of user *own*.

    The same user and root may. Where the system names no user, the modes of the socket and
    its directory decide alone.
    """
    return uid is None or uid in (own, 0)


@contextmanager
def data_directory_lock(data_dir: Path) -> Iterator[None]:
    """Hold *data_dir*, made with mode 0700 if it is not there, for this daemon alone.

    Raises ControlError if another daemon holds it; the system frees it when the holder ends,
    however it ends.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ControlError(
            "config",
            f"data directory {data_dir} cannot be used: {error.strerror}",
            "make it writable for this user, or choose another with --data-dir",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ControlError(
                "again",
                f"data directory {data_dir} is in use by a second daemon, process {holder}",
                "stop that one, or choose another directory with --data-dir",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
