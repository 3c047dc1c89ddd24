"""Inference: how a job over a dataset's rows splits into shards, and how their rows combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshd.node.workloads.datasets import Manifest, chunks_of, slice_rows
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import Program
from meshd.node.workloads.rows import RowSchema, pack, unpack
from meshd.p2p.codec import digest
from meshd.p2p.messages import JobTerms


class InferPlan:
    """The shards of an inference job: consecutive ranges of rows.

    Raises WorkloadError if the terms contradict program or dataset.
    """

    def __init__(self, terms: JobTerms, program: Program, manifest: Manifest) -> None:
        if manifest.schema != program.input_schema:
            given = ", ".join(f"{c.name} {c.dtype}{list(c.shape)}" for c in manifest.columns)
            wanted = ", ".join(f"{c.name} {c.dtype}{list(c.shape)}" for c in program.inputs)
            raise WorkloadError(
                f"the program reads {wanted}, the dataset has {given}: export the program for "
                "these columns, or import the data with the program's names, types and shapes"
            )
        if manifest.rows != terms.rows or terms.shards != shard_count(
            terms.rows, terms.rows_per_shard
        ):
            raise WorkloadError(
                f"the terms say {terms.rows} rows in {terms.shards} shards of "
                f"{terms.rows_per_shard}; the dataset has {manifest.rows} rows"
            )
        self.terms = terms
        self.program = program
        self.manifest = manifest
        self._units: dict[int, int] = {}

    def rows(self, shard: int) -> range:
        """Return the rows of the dataset that a shard computes."""
        start = shard * self.terms.rows_per_shard
        return range(start, min(start + self.terms.rows_per_shard, self.terms.rows))

    def units_of(self, rows: int) -> int:
        """Return the compute units of *rows* rows."""
        if rows not in self._units:
            self._units[rows] = units(self.program, rows)
        return self._units[rows]

    def units(self, shard: int) -> int:
        """Return the compute units of a shard."""
        return self.units_of(len(self.rows(shard)))

    def input_hash(self, round_: int, shard: int, state: bytes) -> bytes:
        """Return the digest of everything that a shard is computed from; there is no *state*."""
        rows = self.rows(shard)
        span = b"".join(n.to_bytes(8, "big") for n in (round_, rows.start, rows.stop))
        return digest(b"meshd.infer.v1\0" + self.terms.program + self.terms.data + span)

    def chunks(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """Return (digest, size) of the dataset's chunks that hold *rows* (ascending)."""
        needed = {}
        for row in rows:
            for chunk in chunks_of(self.manifest, row, row + 1):
                needed[chunk.digest] = chunk.size
        return list(needed.items())

    def inputs(self, chunks: Mapping[bytes, bytes], rows: Sequence[int]) -> bytes:
        """Return the packed input rows at *rows*, from the chunks that hold them."""
        return slice_rows(self.manifest, chunks, rows)

    @property
    def output_schema(self) -> RowSchema:
        """The columns of a result."""
        return self.program.output_schema

    def combine(self, results: Sequence[bytes]) -> bytes:
        """Return the job's output: the packed rows of all shards, in order."""
        rows = [row for result in results for row in unpack(result).rows()]
        return pack(self.output_schema, rows)


def shard_count(rows: int, rows_per_shard: int) -> int:
    """Return how many shards *rows* make."""
    return -(-rows // rows_per_shard)
