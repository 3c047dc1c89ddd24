"""A dataset as one file, the form in which it lies on its author's disk.

Layout: `MESHDAT1`, u32le length of the manifest, the manifest, then its chunks in order. Nothing
else: the file of a dataset is the same wherever it was written.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd.node.workloads.datasets import (
    MAX_MANIFEST,
    Dataset,
    Manifest,
    parse_chunk,
    parse_manifest,
)
from meshd.node.workloads.errors import DatasetError

MAGIC: Final = b"MESHDAT1"
_CURE: Final = "make a dataset with `meshd data add`"


@dataclass(frozen=True, slots=True)
class DatasetFile:
    """A dataset on disk whose manifest was checked; chunks are read and checked one by one."""

    path: Path
    manifest_bytes: bytes
    manifest: Manifest

    def read_chunk(self, index: int) -> bytes:
        """Return a chunk's bytes after checking its digest, form, shapes and values.

        Raises DatasetError.
        """
        chunk = self.manifest.chunks[index]
        start = len(MAGIC) + 4 + len(self.manifest_bytes)
        start += sum(before.size for before in self.manifest.chunks[:index])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(chunk.size)
        parse_chunk(self.manifest, index, data)
        return data


def write_dataset(dataset: Dataset, path: Path) -> None:
    """Write `dataset` to `path`, replacing what is there only when all of it is on disk."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + struct.pack("<I", len(dataset.manifest_bytes)))
            file.write(dataset.manifest_bytes)
            for chunk in dataset.chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_dataset(path: Path) -> DatasetFile:
    """Return the dataset in the file at `path`; its manifest and length are checked.

    Raises DatasetError for a file that is missing, foreign or cut off.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(len(MAGIC) + 4)
            if len(head) < len(MAGIC) + 4 or not head.startswith(MAGIC):
                raise DatasetError(f"{path} is not a dataset: it starts otherwise; {_CURE}")
            (length,) = struct.unpack_from("<I", head, len(MAGIC))
            if length > MAX_MANIFEST:
                raise DatasetError(f"{path} claims a manifest of {length} bytes; {_CURE}")
            manifest_bytes = file.read(length)
    except OSError as error:
        raise DatasetError(f"dataset {path} cannot be read: {error.strerror}") from error
    if len(manifest_bytes) < length:
        raise DatasetError(f"{path} ends inside its manifest; {_CURE} again")
    manifest = parse_manifest(manifest_bytes)
    expected = len(head) + length + sum(chunk.size for chunk in manifest.chunks)
    if size != expected:
        raise DatasetError(f"{path} has {size} bytes, its chunks need {expected}; {_CURE} again")
    return DatasetFile(path, manifest_bytes, manifest)
