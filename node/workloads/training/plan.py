"""Training: which rows each shard of each round reads, what it costs, and what it is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from meshd.node.workloads.datasets import Manifest, slice_rows
from meshd.node.workloads.planning import memory_bytes, units
from meshd.node.workloads.program import Program
from meshd.node.workloads.training.contribution import Layout, layout_of
from meshd.node.workloads.training.errors import TrainingError
from meshd.node.workloads.training.parameters import Trained, described, trained_weights
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shuffle import rows_of
from meshd.node.workloads.training.state import most_state_bytes
from meshd.p2p.codec import digest
from meshd.p2p.messages import JobTerms

MAX_ROUNDS = 1_000_000
MAX_SHARDS = 1024
_COPIES = 8
"""How many f32 copies of the trained weights a shard holds besides those of the program."""


class TrainPlan:
    """The shards of a training job: `rounds` rounds of `shards` shards of H x B rows.

    Raises WorkloadError if the terms contradict settings, program or dataset.
    """

    def __init__(self, terms: JobTerms, program: Program, manifest: Manifest) -> None:
        self.terms = terms
        self.program = program
        self.manifest = manifest
        self.settings = TrainSettings.parse(terms.hyperparameters)
        self.weights = trained_weights(program)
        self._check()

    def _check(self) -> None:
        terms, settings, manifest = self.terms, self.settings, self.manifest
        if manifest.schema != self.program.input_schema:
            raise TrainingError(
                f"the program reads {described(self.program.inputs)}, the dataset has "
                f"{described(manifest.columns)}: export the program for these columns, or import "
                "the data with the program's names, types and shapes"
            )
        if manifest.rows != terms.rows:
            raise TrainingError(f"the terms say {terms.rows} rows, the dataset has {manifest.rows}")
        if not 1 <= terms.shards <= MAX_SHARDS or not 1 <= terms.rounds <= MAX_ROUNDS:
            raise TrainingError(
                f"the terms have {terms.rounds} rounds of {terms.shards} shards; allowed are "
                f"1 to {MAX_ROUNDS} rounds of 1 to {MAX_SHARDS} shards"
            )
        if terms.rows_per_shard != settings.rows:
            raise TrainingError(
                f"the terms give a shard {terms.rows_per_shard} rows; {settings.steps} steps of "
                f"{settings.batch} rows read {settings.rows}"
            )
        if settings.total_steps != terms.rounds * settings.steps:
            raise TrainingError(
                f"total_steps is {settings.total_steps}; {terms.rounds} rounds of "
                f"{settings.steps} steps make {terms.rounds * settings.steps}"
            )

    def rows(self, round_: int, shard: int) -> list[int]:
        """Return the rows that a shard reads, in order; a small dataset's come more than once."""
        if not 0 <= round_ < self.terms.rounds or not 0 <= shard < self.terms.shards:
            raise TrainingError(f"there is no shard {shard} of round {round_} in this job")
        count = self.settings.rows
        first = (round_ * self.terms.shards + shard) * count
        return rows_of(self.terms.seed, rows=self.terms.rows, first=first, count=count)

    def canary_rows(self) -> list[int]:
        """Return the rows of the job's first two steps; their settings are `of_canary`."""
        return self.rows(0, 0)[: self.settings.of_canary().rows]

    def units(self, shard: int = 0) -> int:
        """Return the compute units of a shard, the same for all.

        H times three passes over B rows and the optimizer's operations (`optimizer_units`).
        """
        return self._units

    @cached_property
    def _units(self) -> int:
        each = units(self.program, self.settings.batch, training=True)
        return self.settings.steps * (each + optimizer_units(self.weights, self.settings))

    def input_hash(self, round_: int, shard: int, state: bytes) -> bytes:
        """Return the digest of everything that a shard is computed from.

        `state` is the digest of the round's state.
        """
        terms, settings = self.terms, self.settings
        place = b"".join(n.to_bytes(8, "big") for n in (terms.rows, terms.shards, round_, shard))
        lines = "\n".join(settings.encode()).encode()
        return digest(
            b"meshd.train.v1\0" + terms.program + terms.data + state + terms.seed + place + lines
        )

    def chunks(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """Return (digest, size) of the dataset's chunks that hold *rows*, each once."""
        chunks, each = self.manifest.chunks, self.manifest.rows_per_chunk
        return [
            (chunks[index].digest, chunks[index].size)
            for index in sorted({row // each for row in rows})
        ]

    def inputs(self, chunks: Mapping[bytes, bytes], rows: Sequence[int]) -> bytes:
        """Return the packed input rows at *rows*, in that order, from the chunks that hold them."""
        return slice_rows(self.manifest, chunks, rows)

    @cached_property
    def layout(self) -> Layout:
        """Where everything lies in a contribution to this job."""
        return layout_of(self.weights, self.settings)

    @property
    def contribution_bytes(self) -> int:
        """How long every contribution is, exactly."""
        return self.layout.size

    @cached_property
    def state_bytes_limit(self) -> int:
        """How long a state of this job can be at most."""
        return most_state_bytes(self.weights, self.settings)

    @cached_property
    def memory_bytes(self) -> int:
        """An upper bound of what a shard needs."""
        return train_memory(self.program, self.weights, self.settings)


def optimizer_units(weights: Iterable[Trained], settings: TrainSettings) -> int:
    """Return the compute units of one step of the optimizer.

    Twelve for every element; with Scion, for every matrix (n, k), a = min(n, k), b = max(n, k),
    `newton_schulz` times 4 a a b + 2 a a a more.
    """
    total = 0
    for weight in weights:
        total += 12 * weight.elements
        if settings.optimizer == "scion" and weight.matrices is not None:
            count, a, b = weight.matrices[0], *sorted(weight.matrices[1:])
            total += count * settings.newton_schulz * (4 * a * a * b + 2 * a * a * a)
    return total


def train_memory(program: Program, weights: Sequence[Trained], settings: TrainSettings) -> int:
    """Return an upper bound of the memory that a shard needs, its input and output included."""
    elements = sum(weight.elements for weight in weights)
    largest = max(weight.elements for weight in weights)
    copies = 4 * _COPIES * elements + 64 * largest
    rows = 3 * program.input_schema.packed_bytes(settings.rows)
    files = 3 * most_state_bytes(weights, settings) + layout_of(weights, settings).size
    return memory_bytes(program, settings.batch, training=True) + copies + rows + files


def close_memory(
    program: Program, weights: Sequence[Trained], settings: TrainSettings, contributions: int
) -> int:
    """Return an upper bound of the memory that closing a round needs."""
    largest = max(weight.elements for weight in weights)
    elements = sum(weight.elements for weight in weights)
    files = 4 * most_state_bytes(weights, settings)
    files += contributions * layout_of(weights, settings).size
    wide = (24 * contributions + 64) * (largest + 8 * settings.momentum_block)
    return program.size + files + 40 * elements + wide
