"""Every setting of a training job: its name, meaning, default and bounds, and its one spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from typing import Final

from meshd.node.workloads.training.errors import SettingsError

OPTIMIZERS: Final = ("scion", "adamw", "sgd")
Value = str | int | float

_DECIMAL: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?")
_MAX_TEXT: Final = 64
_MAX_STEPS: Final = 10_000_000
_OF_OPTIMIZER: Final[Mapping[str, Mapping[str, float]]] = {
    "scion": {},
    "adamw": {"lr": 0.004},
    "sgd": {"lr": 0.05, "weight_decay": 0.0},
}
"""Defaults that differ from those of Scion."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be: from `low` to `high`, without `low` itself if `above`."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        start = "above" if self.above else "from"
        return f"{kind} {start} {decimal(self.low)} to {decimal(self.high)}"

    def allow(self, value: object) -> bool:
        """Whether `value` is such a number."""
        right = type(value) is int if self.whole else type(value) in (int, float)
        if not right or not isinstance(value, (int, float)):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high


BOUNDS: Final[Mapping[str, Bounds]] = {
    "lr": Bounds(0, 100, above=True),
    "beta": Bounds(0, 0.9999),
    "beta_rest": Bounds(0, 0.9999),
    "beta_second": Bounds(0, 0.9999),
    "epsilon": Bounds(0, 1, above=True),
    "weight_decay": Bounds(0, 10),
    "clip": Bounds(0, 1_000_000),
    "matrix_scale": Bounds(0, 100, above=True),
    "rest_scale": Bounds(0, 100, above=True),
    "newton_schulz": Bounds(1, 20, whole=True),
    "warmup": Bounds(0, _MAX_STEPS, whole=True),
    "floor": Bounds(0, 1),
    "total_steps": Bounds(1, _MAX_STEPS, whole=True),
    "batch": Bounds(1, 1 << 20, whole=True),
    "steps": Bounds(1, 10_000, whole=True),
    "outer_lr": Bounds(0, 10, above=True),
    "outer_momentum": Bounds(0, 0.99),
    "outer_warmup": Bounds(0, _MAX_STEPS, whole=True),
    "theta_bits": Bounds(2, 8, whole=True),
    "theta_block": Bounds(8, 1024, whole=True),
    "momentum_threshold": Bounds(0, 3),
    "momentum_block": Bounds(8, 1 << 16, whole=True),
    "norm_low": Bounds(0, 1),
    "norm_high": Bounds(1, 1_000_000),
    "min_cosine": Bounds(-1, 1),
    "full_gate": Bounds(2, 4096, whole=True),
    "norm_rounds": Bounds(1, 100, whole=True),
    "min_share": Bounds(0, 1, above=True),
    "deadline_mads": Bounds(0, 1000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The settings of a training job, defaults filled in. Raises SettingsError out of bounds."""

    optimizer: str = "scion"
    """How a shard's inner steps change the weights: scion, adamw or sgd."""
    lr: float = 0.02
    """Learning rate after the warm-up; AdamW 0.004, SGD 0.05."""
    beta: float = 0.9
    """Decay of the momentum a step: of matrices in Scion, of everything in AdamW and SGD."""
    beta_rest: float = 0.95
    """Scion: decay of the momentum of everything that is no matrix."""
    beta_second: float = 0.95
    """AdamW: decay of the mean square gradient."""
    epsilon: float = 1e-8
    """AdamW: what is added to the root of the mean square gradient."""
    weight_decay: float = 0.1
    """Every step multiplies the weights by 1 - learning rate x this; SGD 0."""
    clip: float = 1.0
    """Longest gradient, over all weights together; 0 does not clip."""
    matrix_scale: float = 0.2
    """Scion: a step of a matrix (n, k) is learning rate x this x sqrt(max(n, k)) long."""
    rest_scale: float = 0.5
    """Scion: a step of anything else is learning rate x this in every element."""
    newton_schulz: int = 5
    """Scion: iterations that make the update of a matrix orthogonal."""
    warmup: int = 50
    """Inner steps over which the learning rate rises from 0."""
    floor: float = 0.1
    """Share of the learning rate that is left at the end of the cosine."""
    total_steps: int
    """Inner steps of the whole schedule: rounds x steps."""
    batch: int
    """B, rows of one inner step."""
    steps: int
    """H, inner steps of one shard."""
    outer_lr: float = 1.0
    """How much of the mean change of a round is applied."""
    outer_momentum: float = 0.3
    """Nesterov momentum of the outer step."""
    outer_warmup: int = 10
    """Rounds without outer momentum."""
    theta_bits: int = 3
    """Bits of an element of the weights' change: 3 has the levels -3 to 3."""
    theta_block: int = 128
    """Elements that share one fp16 scale there; a multiple of 8."""
    momentum_threshold: float = 0.7
    """A fresh momentum smaller than this x the mean magnitude of its block is sent as 0."""
    momentum_block: int = 1024
    """Elements that share one fp16 scale there."""
    norm_low: float = 0.5
    """Gate: shortest contribution, relative to the median."""
    norm_high: float = 2.0
    """Gate: longest contribution, relative to the median."""
    min_cosine: float = 0.0
    """Gate: the median cosine with the other contributions must be above this."""
    full_gate: int = 4
    """Gate: with fewer contributions there are no cosines, and norms are held against history."""
    norm_rounds: int = 5
    """Gate: how many closed rounds that history has."""
    min_share: float = 0.5
    """Share of a round's shards with which it may close when its deadline has passed."""
    deadline_mads: float = 6.0
    """A round's deadline: median + this x the median absolute deviation of its shards' times."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise SettingsError(
                f"optimizer is {self.optimizer!r}; known are {', '.join(OPTIMIZERS)}"
            )
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if not bounds.allow(value):
                raise SettingsError(f"{name} is {value!r}; {bounds} is allowed")
        if self.theta_block % 8:
            raise SettingsError(f"theta_block is {self.theta_block}; a multiple of 8 is allowed")

    @property
    def rows(self) -> int:
        """H x B, the rows that one shard reads."""
        return self.steps * self.batch

    def encode(self) -> tuple[str, ...]:
        """Return every setting as `name=value`, sorted by name: the one form that is signed."""
        return tuple(
            f"{name}={_spell(getattr(self, name))}" for name in sorted(f.name for f in fields(self))
        )

    @classmethod
    def parse(cls, lines: Sequence[str]) -> TrainSettings:
        """Return the settings that `encode` wrote.

        Raises SettingsError for one that is unknown, missing, twice there, malformed, out of
        bounds, or for lines out of order.
        """
        found: dict[str, Value] = {}
        for line in lines:
            name, equals, text = line.partition("=")
            if not equals:
                raise SettingsError(f"setting {line[:80]!r} has no value; write name=value")
            if name in found:
                raise SettingsError(f"setting {name!r} is there twice; give it once")
            found[name] = _value(name, text)
        missing = [f.name for f in fields(cls) if f.name not in found]
        if missing:
            raise SettingsError(f"setting {missing[0]!r} is missing; give every setting")
        settings = cls(**found)  # type: ignore[arg-type]
        if settings.encode() != tuple(lines):
            raise SettingsError("the settings are not sorted by name; sort them")
        return settings

    @classmethod
    def fill(cls, given: Mapping[str, Value]) -> TrainSettings:
        """Return settings with defaults (of the optimizer) for what is not given.

        `batch`, `steps` and `total_steps` have no default. Raises SettingsError.
        """
        for name in given:
            _known(name)
        for name in ("batch", "steps", "total_steps"):
            if name not in given:
                raise SettingsError(f"setting {name!r} is missing; it has no default")
        own = _OF_OPTIMIZER.get(str(given.get("optimizer", "scion")), {})
        return cls(**{**own, **given})  # type: ignore[arg-type]

    def of_canary(self) -> TrainSettings:
        """Return the settings of the job's first two steps, by which machines are compared."""
        return replace(self, steps=min(2, self.steps))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of an inner step, counted from 0 over the whole job.

        The same bits on every machine: additions, multiplications and divisions only.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        way = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + _cosine_of_pi(way)))

    def rate_of_shard(self, first: int) -> float:
        """Return the sum of the learning rates of a shard's steps, the first being `first`."""
        total = 0.0
        for step in range(first, first + self.steps):
            total += self.learning_rate(step)
        return total


def decimal(value: float) -> str:
    """Return a number without exponent, the one spelling that settings have."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def power(base: float, exponent: int) -> float:
    """Return base to a whole power by multiplication: the same bits everywhere."""
    result = 1.0
    for _ in range(exponent):
        result *= base
    return result


def _spell(value: Value) -> str:
    return value if isinstance(value, str) else decimal(value)


def _known(name: str) -> None:
    names = [f.name for f in fields(TrainSettings)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
        raise SettingsError(f"setting {name[:80]!r} is unknown; {cure}")


def _value(name: str, text: str) -> Value:
    _known(name)
    if name == "optimizer":
        return text
    if len(text) > _MAX_TEXT or not _DECIMAL.fullmatch(text) or text == "-0":
        raise SettingsError(
            f"{name} is {text[:80]!r}; write a decimal number without exponent, sign of plus or "
            "zeros that say nothing"
        )
    try:
        value: Value = int(text) if BOUNDS[name].whole else float(Decimal(text))
    except (ValueError, InvalidOperation) as error:
        raise SettingsError(f"{name} is {text[:80]!r}; {BOUNDS[name]} is allowed") from error
    if _spell(value) != text:
        raise SettingsError(f"{name} is {text!r}; write it as {_spell(value)}")
    return value


def _cosine_of_pi(x: float) -> float:
    """Return cos(pi x) for 0 <= x <= 1, by its series: no library rounds it otherwise."""
    square = (3.141592653589793 * x) * (3.141592653589793 * x)
    term = total = 1.0
    for k in range(1, 16):
        term *= -square / ((2 * k - 1) * (2 * k))
        total += term
    return total
