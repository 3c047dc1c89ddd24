"""Content-addressed bytes: a blob's name is its BLAKE3 digest, checked when it comes in."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from meshd.p2p.codec import digest
from meshd.p2p.identity import Address


class BlobError(Exception):
    """A blob is missing, too large, or not what its digest says."""


class BlobStore:
    """The blobs of one node: files in a folder, or in memory when there is none.

    Everything is public unless it was put with `readers`: then only they are served it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[bytes, bytes] = {}
        self._readers: dict[bytes, frozenset[Address]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for leftover in folder.glob(".incoming-*"):
                leftover.unlink()
            for listed in folder.glob("*.readers"):
                readers = (Address(bytes.fromhex(line)) for line in listed.read_text().split())
                self._readers[bytes.fromhex(listed.stem)] = frozenset(readers)

    def put(self, data: bytes, *, readers: Collection[Address] | None = None) -> bytes:
        """Store *data* durably and return its digest.

        *readers* None makes it public; otherwise only those addresses are served it, in
        addition to the readers it already has.
        """
        name = digest(data)
        self._allow(name, readers)
        if name in self:
            return name
        if self._folder is None:
            self._memory[name] = data
        else:
            with self.incoming(name, len(data)) as file:
                file.write(data)
        return name

    def _allow(self, name: bytes, readers: Collection[Address] | None) -> None:
        if readers is None:
            self._readers.pop(name, None)
        elif name not in self or name in self._readers:
            self._readers[name] = self._readers.get(name, frozenset()) | frozenset(readers)
        if self._folder is not None:
            listed = self._path(name).with_suffix(".readers")
            if name in self._readers:
                listed.write_text("\n".join(sorted(r.hex() for r in self._readers[name])))
            else:
                listed.unlink(missing_ok=True)

    def may_read(self, name: bytes, asker: Address) -> bool:
        """Return whether *asker* may be served the blob."""
        return name not in self._readers or asker in self._readers[name]

    @contextmanager
    def incoming(self, name: bytes, max_bytes: int) -> Iterator[BinaryIO]:
        """Open a file that becomes blob *name* when closed.

        Raises BlobError, and keeps nothing, if it is then over *max_bytes* or its digest is
        another.
        """
        if self._folder is None:
            raise BlobError("a store in memory takes blobs whole: use put")
        path = self._folder / f".incoming-{secrets.token_hex(8)}"
        try:
            with path.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.stat().st_size > max_bytes:
                raise BlobError(f"blob {name.hex()} is over its limit of {max_bytes} bytes")
            if blake3().update_mmap(path).digest() != name:
                raise BlobError(f"blob {name.hex()}: the bytes have another digest")
            os.replace(path, self._path(name))
        finally:
            path.unlink(missing_ok=True)

    def _path(self, name: bytes) -> Path:
        assert self._folder is not None
        return self._folder / name.hex()

    @property
    def on_disk(self) -> bool:
        """Whether blobs are files."""
        return self._folder is not None

    def __contains__(self, name: bytes) -> bool:
        return name in self._memory if self._folder is None else self._path(name).exists()

    def size(self, name: bytes) -> int:
        """Return the blob's size in bytes; raises BlobError if it is not here."""
        if self._folder is None:
            return len(self.read(name))
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError as error:
            raise BlobError(f"blob {name.hex()} is not here") from error

    def read(self, name: bytes) -> bytes:
        """Return the blob's bytes; raises BlobError if it is not here."""
        try:
            return self._memory[name] if self._folder is None else self._path(name).read_bytes()
        except (KeyError, FileNotFoundError) as error:
            raise BlobError(f"blob {name.hex()} is not here") from error

    def path(self, name: bytes) -> Path:
        """Return the blob's file; raises BlobError if it is not here or not on disk."""
        if self._folder is None or name not in self:
            raise BlobError(f"blob {name.hex()} is no file here")
        return self._path(name)

    def remove(self, name: bytes) -> None:
        """Forget the blob, if it is here."""
        self._readers.pop(name, None)
        if self._folder is None:
            self._memory.pop(name, None)
        else:
            self._path(name).unlink(missing_ok=True)
            self._path(name).with_suffix(".readers").unlink(missing_ok=True)
