"""Blobs over libp2p streams: digest and offset there, size and bytes back, checked on arrival.

Files are read, written and hashed in threads, so that pings stay alive beside a transfer.
"""

from __future__ import annotations

import math
import random
import struct
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from typing import BinaryIO

import trio
from libp2p.abc import IHost, INetStream
from libp2p.peer.id import ID

from meshd.p2p.blobs import BlobError, BlobStore
from meshd.p2p.codec import digest
from meshd.p2p.identity import Address, IdentityError, address_from_peer_id, hex_address
from meshd.p2p.libp2p.links import Links
from meshd.p2p.libp2p.protocols import blobs_protocol
from meshd.p2p.libp2p.requests import Reach
from meshd.p2p.libp2p.streams import (
    StreamFailure,
    finish,
    library_errors,
    open_stream,
    read_exactly,
    reset,
    write,
)
from meshd.p2p.messages import MIB
from meshd.p2p.network import BlobUnavailable, Unreachable
from meshd.p2p.services import Turns

PART = MIB
"""Bytes written to a stream at once: 40 % faster than 64 KiB."""
STALL_S = 10.0
"""Seconds without a byte after which a holder is given up."""
QUEUE_S = 60.0
"""Seconds that a transfer may wait for its turn at the holder."""
UPLOADS_PER_PEER = 4
UPLOADS = 16
NOT_SERVED = 2**64 - 1

_REQUEST = struct.Struct("!32sQ")
_SIZE = struct.Struct("!Q")


_in_thread = trio.to_thread.run_sync


class HolderFailed(Exception):
    """One holder did not deliver; another may go on from there."""


class Blobs:
    """Serves this node's blobs and fetches others'."""

    def __init__(
        self,
        host: IHost,
        network_name: str,
        store: BlobStore,
        links: Links,
        stats: Counter[str],
        reach: Reach,
    ) -> None:
        self._host = host
        self._store = store
        self._links = links
        self._stats = stats
        self._reach = reach
        self._protocol = blobs_protocol(network_name)
        self._turns = Turns()
        self._uploads = trio.CapacityLimiter(UPLOADS)
        self._per_peer: defaultdict[ID, trio.CapacityLimiter] = defaultdict(
            lambda: trio.CapacityLimiter(UPLOADS_PER_PEER)
        )
        host.set_stream_handler(self._protocol, self._serve)

    def forget(self, peer: ID) -> None:
        """Drop what is kept for a peer that has gone."""
        self._per_peer.pop(peer, None)

    # ---- serving --------------------------------------------------------------------------

    async def _serve(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        try:
            with trio.fail_after(STALL_S):
                request = await read_exactly(stream, _REQUEST.size)
            name, offset = _REQUEST.unpack(request)
            asker = address_from_peer_id(str(peer))
            served = name in self._store and self._store.may_read(name, asker)
            size = self._store.size(name) if served else 0
            if not served or offset > size:
                self._stats["refused"] += 1
                await write(stream, _SIZE.pack(NOT_SERVED))
            else:
                with trio.move_on_after(QUEUE_S) as queue:
                    async with self._per_peer[peer], self._uploads:
                        queue.deadline = math.inf
                        await write(stream, _SIZE.pack(size))
                        await self._send(stream, name, offset)
            await finish(stream)
        except (StreamFailure, BlobError, IdentityError, OSError, trio.TooSlowError):
            self._stats["uploads broken"] += 1
            await reset(stream)

    async def _send(self, stream: INetStream, name: bytes, offset: int) -> None:
        with self._open(name) as file:
            file.seek(offset)
            while part := await _in_thread(file.read, PART):
                with trio.fail_after(6 * STALL_S):
                    await write(stream, part)
                self._stats["blob bytes sent"] += len(part)

    def _open(self, name: bytes) -> BinaryIO:
        if self._store.on_disk:
            return self._store.path(name).open("rb")
        return BytesIO(self._store.read(name))

    # ---- fetching -------------------------------------------------------------------------

    async def fetch(
        self, name: bytes, max_bytes: int, holders: Sequence[Address], deadline_s: float
    ) -> None:
        """Bring blob *name* into the store; raises BlobUnavailable."""
        problems: list[str] = []
        with trio.move_on_after(deadline_s) as scope:
            async with self._turns.of(name):
                if name in self._store:
                    return
                if await self._fetch_from(self._order(holders), name, max_bytes, problems):
                    return
        if scope.cancelled_caught:
            problems.append(f"not within {deadline_s} s")
        raise BlobUnavailable(
            f"blob {name.hex()}: {'; '.join(problems[:8]) or 'nobody is named as its holder'}"
        )

    def _order(self, holders: Sequence[Address]) -> list[Address]:
        own = address_from_peer_id(str(self._host.get_id()))
        others = [holder for holder in dict.fromkeys(holders) if holder != own]
        random.shuffle(others)
        return sorted(others, key=lambda holder: self._links.peer_of(holder) is None)

    async def _fetch_from(
        self, holders: list[Address], name: bytes, max_bytes: int, problems: list[str]
    ) -> bool:
        """Fetch from the group of *holders*; where bytes were wrong, find out whose."""
        groups = deque([holders])
        while groups:
            group = groups.popleft()
            contributors: list[Address] = []
            try:
                await self._assemble(name, max_bytes, group, contributors, problems)
                return True
            except HolderFailed:
                continue
            except BlobError:
                self._stats["corrupt blobs"] += 1
                names = ", ".join(hex_address(holder) for holder in contributors)
                problems.append(f"{names} sent bytes with another digest")
                if len(contributors) > 1:
                    groups.extend([holder] for holder in contributors)
                groups.append([holder for holder in group if holder not in contributors])
        return False

    async def _assemble(
        self,
        name: bytes,
        max_bytes: int,
        holders: list[Address],
        contributors: list[Address],
        problems: list[str],
    ) -> None:
        """Read from one holder after another, each going on where the last one broke off.

        Names those who sent something in *contributors*. Raises HolderFailed if none finished,
        BlobError if the bytes are not those of *name*.
        """
        async with self._incoming(name, max_bytes) as file:
            for holder in holders:
                before = file.tell()
                try:
                    await self._read_from(holder, name, max_bytes, file)
                    contributors.append(holder)
                    return
                except HolderFailed as error:
                    problems.append(f"{hex_address(holder)} {error}")
                    if file.tell() > before:
                        contributors.append(holder)
            raise HolderFailed("nobody is left")

    async def _read_from(
        self, holder: Address, name: bytes, max_bytes: int, file: BinaryIO
    ) -> None:
        """Append to *file* what is missing; raises HolderFailed."""
        try:
            peer = await self._reach(holder)
            async with open_stream(self._host, peer, self._protocol) as stream:
                await write(stream, _REQUEST.pack(name, file.tell()))
                with trio.fail_after(QUEUE_S):
                    (size,) = _SIZE.unpack(await read_exactly(stream, _SIZE.size))
                if size == NOT_SERVED:
                    raise HolderFailed("does not serve it")
                if size > max_bytes:
                    raise HolderFailed(f"has {size} bytes, over the limit of {max_bytes}")
                await self._copy(stream, file, size)
        except (StreamFailure, Unreachable) as error:
            raise HolderFailed(str(error)) from error
        except trio.TooSlowError as error:
            raise HolderFailed("is silent") from error

    async def _copy(self, stream: INetStream, file: BinaryIO, size: int) -> None:
        waiting = bytearray()
        left = size - file.tell()
        try:
            while left:
                with library_errors("read"), trio.fail_after(STALL_S):
                    part = await stream.read(min(left, PART))
                if not part:
                    raise StreamFailure(f"read: stream ended {left} bytes early")
                left -= len(part)
                waiting += part
                self._stats["blob bytes received"] += len(part)
                if len(waiting) >= PART:
                    full, waiting = waiting, bytearray()
                    await _in_thread(file.write, full)
        except StreamFailure:
            file.write(waiting)  # the next holder goes on from here
            raise
        await _in_thread(file.write, waiting)

    @asynccontextmanager
    async def _incoming(self, name: bytes, max_bytes: int) -> AsyncIterator[BinaryIO]:
        """Open what becomes blob *name* at the end; raises BlobError if it is another."""
        if not self._store.on_disk:
            memory = BytesIO()
            yield memory
            data = memory.getvalue()
            if await _in_thread(digest, data) != name:
                raise BlobError(f"blob {name.hex()}: the bytes have another digest")
            self._store.put(data)
            return
        manager = self._store.incoming(name, max_bytes)
        file = manager.__enter__()
        try:
            yield file
        except BaseException as error:
            manager.__exit__(type(error), error, error.__traceback__)
            raise
        await _in_thread(manager.__exit__, None, None, None)
