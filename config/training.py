"""The [train] table of a job description: rounds, shards, and every setting of the training.

Names, bounds and defaults of the settings are those of meshd.node.workloads.training.settings;
a test compares them. What is left out gets its default there, which may depend on the optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ROUNDS: Final = 1_000_000
MAX_SHARDS: Final = 1024
"""As many commitments as one entry of a job's log names."""
OF_THE_JOB: Final = ("rounds", "shards", "start")
"""Keys of the table that are no settings."""
REQUIRED: Final = ("rounds", "shards", "batch")
MAX_STEPS: Final = 10_000_000


def _from(low: float, high: float, text: str) -> Any:
    return Field(default=None, ge=low, le=high, allow_inf_nan=False, description=text)


def _above(low: float, high: float, text: str) -> Any:
    return Field(default=None, gt=low, le=high, allow_inf_nan=False, description=text)


def _whole(low: int, high: int, text: str) -> Any:
    return Field(default=None, ge=low, le=high, description=text)


class TrainTerms(BaseModel):
    """How a program is trained: rounds of `shards` shards, each `steps` steps of `batch` rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int | None = _whole(1, MAX_ROUNDS, "how many rounds, such as 8")
    shards: int | None = _whole(
        1, MAX_SHARDS, "shards of one round, at least as many as workers, such as 4"
    )
    steps: int = Field(default=7, ge=1, le=10_000, description="inner steps of one shard")
    batch: int | None = _whole(1, 1 << 20, "rows of one inner step, such as 16")
    start: Path | None = Field(
        default=None, description="a safetensors file of weights: an earlier job's result"
    )
    optimizer: Literal["scion", "adamw", "sgd"] = Field(
        default="scion", description='the inner optimizer: "scion", "adamw" or "sgd"'
    )
    lr: float | None = _above(0, 100, "learning rate after the warm-up, about twice a lone one's")
    beta: float | None = _from(0, 0.9999, "decay of the momentum; in Scion of matrices")
    beta_rest: float | None = _from(0, 0.9999, "Scion: the same of everything else")
    beta_second: float | None = _from(0, 0.9999, "AdamW: decay of the mean square gradient")
    epsilon: float | None = _above(0, 1, "AdamW: what is added to the root of that mean")
    weight_decay: float | None = _from(0, 10, "weight decay, in parts of the learning rate")
    clip: float | None = _from(0, 1_000_000, "longest gradient; 0 does not clip")
    matrix_scale: float | None = _above(0, 100, "Scion: length of a matrix's step")
    rest_scale: float | None = _above(0, 100, "Scion: length of every other element's step")
    newton_schulz: int | None = _whole(1, 20, "Scion: iterations of the orthogonalisation")
    warmup: int | None = _whole(0, MAX_STEPS, "inner steps in which the learning rate rises")
    floor: float | None = _from(0, 1, "share of the learning rate left at the cosine's end")
    outer_lr: float | None = _above(0, 10, "how much of a round's mean change is applied")
    outer_momentum: float | None = _from(0, 0.99, "Nesterov momentum of the outer step")
    outer_warmup: int | None = _whole(0, MAX_STEPS, "first rounds without outer momentum")
    theta_bits: int | None = _whole(2, 8, "bits of an element of the weights' change")
    theta_block: int | None = Field(
        default=None,
        ge=8,
        le=1024,
        multiple_of=8,
        description="elements of that change that share a scale, a multiple of 8",
    )
    momentum_threshold: float | None = _from(0, 3, "what of the mean magnitude is sent as 0")
    momentum_block: int | None = _whole(8, 1 << 16, "elements of the momentum that share a scale")
    norm_low: float | None = _from(0, 1, "gate: shortest contribution, to the median")
    norm_high: float | None = _from(1, 1_000_000, "gate: longest contribution, to the median")
    min_cosine: float | None = _from(-1, 1, "gate: the median cosine must be above this")
    full_gate: int | None = _whole(2, 4096, "gate: contributions from which cosines count")
    norm_rounds: int | None = _whole(1, 100, "gate: closed rounds whose norms are kept")
    min_share: float | None = _above(0, 1, "share of its shards with which a late round closes")
    deadline_mads: float | None = _from(
        0, 1000, "a round's deadline: median + this x the median absolute deviation"
    )

    def missing(self) -> list[str]:
        """Return the keys that a training job needs and that are not given."""
        return [name for name in REQUIRED if getattr(self, name) is None]

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that are given, and the length of the schedule that follows."""
        given: dict[str, str | int | float] = {
            name: value
            for name in type(self).model_fields
            if name not in OF_THE_JOB and (value := getattr(self, name)) is not None
        }
        assert self.rounds is not None
        return {**given, "total_steps": self.rounds * self.steps}
