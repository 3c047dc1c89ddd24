"""A result as it is committed to and opened: salted rows under a Merkle root.

Leaf i binds job, shard, worker, i, a salt and the row's bytes, so that neither a row nor a root
can be used again by anybody else, and nothing can be guessed from a path. The salts follow
from one seed, which the worker keeps until it opens its result to an auditor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.rows import Rows, RowSchema, check_finite, rows_agree, unpack
from meshd.p2p import merkle
from meshd.p2p.codec import digest
from meshd.p2p.identity import Address
from meshd.p2p.messages import Commitment, OpenedRow

TAG = b"meshd.output.v1\0"
RTOL = 1e-5
"""Rows agree when they differ by no more, relative to their largest magnitude."""


class OutputError(Exception):
    """A result is not what was committed to, or not a result at all."""


@dataclass(frozen=True)
class ResultPlace:
    """What the leaves of one result are bound to."""

    job_id: bytes
    shard: int
    worker: Address

    def _leaf(self, index: int, salt: bytes, row: bytes) -> bytes:
        place = self.shard.to_bytes(4, "big") + self.worker + index.to_bytes(4, "big")
        return self.job_id + place + salt + row

    def root(self, seed: bytes, rows: Sequence[bytes]) -> bytes:
        """Return the root over all *rows* with the salts of *seed*."""
        return merkle.root([self._leaf(i, salt_at(seed, i), row) for i, row in enumerate(rows)])

    def open_rows(
        self, seed: bytes, rows: Sequence[bytes], indices: Sequence[int]
    ) -> tuple[OpenedRow, ...]:
        """Return the rows at *indices* with their salts and paths."""
        leaves = [self._leaf(i, salt_at(seed, i), row) for i, row in enumerate(rows)]
        paths = merkle.paths(leaves, indices)
        return tuple(
            OpenedRow(index=index, row=rows[index], salt=salt_at(seed, index), path=path)
            for index, path in zip(indices, paths, strict=True)
        )

    def holds(self, commitment: Commitment, opened: OpenedRow) -> bool:
        """Return whether *opened* is the row that *commitment* binds at its index."""
        leaf = self._leaf(opened.index, opened.salt, opened.row)
        return merkle.verify(commitment.output_root, commitment.n, opened.index, leaf, opened.path)


def salt_at(seed: bytes, index: int) -> bytes:
    """Return the salt of row *index*."""
    return digest(b"meshd.salt.v1\0" + seed + index.to_bytes(4, "big"))


def output_blob(seed: bytes, packed: bytes) -> bytes:
    """Return what is served of a result: its salts' seed and its packed rows."""
    return TAG + seed + packed


def open_output(place: ResultPlace, commitment: Commitment, blob: bytes, schema: RowSchema) -> Rows:
    """Return the rows in *blob*; raises OutputError unless they are exactly those committed to."""
    if not blob.startswith(TAG) or len(blob) < len(TAG) + 32:
        raise OutputError("the blob is no result")
    seed, packed = blob[len(TAG) : len(TAG) + 32], blob[len(TAG) + 32 :]
    try:
        rows = unpack(packed)
    except WorkloadError as error:
        raise OutputError(f"the result is malformed: {error}") from error
    if (
        rows.schema != schema
        or rows.count != commitment.n
        or len(packed) != (commitment.output_bytes)
    ):
        raise OutputError("the result has other columns, rows or bytes than were committed to")
    try:
        check_finite(rows)
    except WorkloadError as error:
        raise OutputError(f"the result is invalid: {error}") from error
    if place.root(seed, rows.rows()) != commitment.output_root:
        raise OutputError("the result is not the one that was committed to")
    return rows


def packed_rows(blob: bytes) -> bytes:
    """Return the packed rows of a result's blob."""
    return blob[len(TAG) + 32 :]


def disagreeing(own: Sequence[bytes], theirs: Sequence[bytes], schema: RowSchema) -> list[int]:
    """Return the places at which two lists of rows differ by more than `RTOL`."""
    return [
        place
        for place, (a, b) in enumerate(zip(own, theirs, strict=True))
        if not rows_agree(a, b, schema, RTOL)
    ]
