"""Content-addressed bytes: a blob's name is its BLAKE3 digest, checked when it comes in."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from blake3 import blake3

from meshd.p2p.codec import digest
from meshd.p2p.identity import Address

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class BlobError(Exception):
    """A blob is missing, too large, or not what its digest says."""


class _Bounded(io.BufferedWriter):
    """A new file that takes so many bytes at most."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self._max_bytes = max_bytes

    def write(self, data: ReadableBuffer, /) -> int:
        if self.tell() + memoryview(data).nbytes > self._max_bytes:
            raise BlobError(f"a blob is over its limit of {self._max_bytes} bytes")
        return super().write(data)


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
                self._load_readers(listed)

    def _load_readers(self, listed: Path) -> None:
        try:
            name = bytes.fromhex(listed.stem)
            readers = frozenset(
                Address(bytes.fromhex(line)) for line in listed.read_text("ascii").split()
            )
        except ValueError as error:
            raise BlobError(
                f"list of readers {listed} is damaged: remove it and the blob {listed.stem}"
            ) from error
        if name in self:
            self._readers[name] = readers
        else:
            listed.unlink()  # it was written first, and its blob never came

    def put(self, data: bytes, *, readers: Collection[Address] | None = None) -> bytes:
        """Store *data* durably and return its digest.

        *readers* None makes it public; otherwise only those addresses are served it, in
        addition to the readers it already has.
        """
        name = digest(data)
        known = name in self
        self._allow(name, known, readers)
        if known:
            return name
        if self._folder is None:
            self._memory[name] = data
        else:
            try:
                with self.incoming(name, len(data)) as file:
                    file.write(data)
            except BaseException:
                self.remove(name)
                raise
        return name

    def _allow(self, name: bytes, known: bool, readers: Collection[Address] | None) -> None:
        if readers is None:
            if self._readers.pop(name, None) is not None and self._folder is not None:
                self._readers_path(name).unlink(missing_ok=True)
        elif not known or name in self._readers:
            allowed = self._readers.get(name, frozenset()) | frozenset(readers)
            if self._folder is not None:
                # On disk before the blob: after a crash it must not come back as public.
                text = "\n".join(sorted(reader.hex() for reader in allowed))
                self._write(self._readers_path(name), text.encode())
            self._readers[name] = allowed

    def restrict(self, name: bytes, readers: Collection[Address]) -> None:
        """Serve the blob *name* to *readers* only, whoever was served it before."""
        self._readers[name] = frozenset()
        self._allow(name, True, readers)

    def may_read(self, name: bytes, asker: Address) -> bool:
        """Return whether *asker* may be served the blob."""
        return name not in self._readers or asker in self._readers[name]

    @contextmanager
    def incoming(self, name: bytes, max_bytes: int) -> Iterator[BinaryIO]:
        """Open a file that becomes blob *name* when closed.

        Raises BlobError, and keeps nothing, as soon as it would exceed *max_bytes*, or if its
        digest is another in the end.
        """
        if self._folder is None:
            raise BlobError("a store in memory takes blobs whole: use put")
        path = self._folder / f".incoming-{secrets.token_hex(8)}"
        try:
            with _Bounded(path, max_bytes) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if blake3().update_mmap(path).digest() != name:
                raise BlobError(f"blob {name.hex()}: the bytes have another digest")
            self._rename(path, self._path(name))
        finally:
            path.unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        assert self._folder is not None
        temporary = self._folder / f".incoming-{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _rename(self, source: Path, target: Path) -> None:
        assert self._folder is not None
        os.replace(source, target)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _path(self, name: bytes) -> Path:
        assert self._folder is not None
        if len(name) != 32:
            raise BlobError(f"blob {name[:32].hex()!r}: a name has 32 bytes, not {len(name)}")
        return self._folder / name.hex()

    def _readers_path(self, name: bytes) -> Path:
        return self._path(name).with_suffix(".readers")

    @property
    def on_disk(self) -> bool:
        """Whether blobs are files."""
        return self._folder is not None

    def __contains__(self, name: bytes) -> bool:
        if self._folder is None:
            return name in self._memory
        return len(name) == 32 and self._path(name).exists()

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
            self._readers_path(name).unlink(missing_ok=True)
