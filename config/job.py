"""A job description (job.toml): what a researcher writes, checked before anything is done."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meshd.config.amounts import cost, format_mcc
from meshd.config.errors import ConfigError, JobSpecError
from meshd.config.fields import Account, Amount, Duration, Share, Size, Words
from meshd.config.quantities import parse_duration
from meshd.config.reading import build, check_keys, flatten, parse_toml, show
from meshd.config.training import MAX_STEPS, TrainTerms

_U32: Final = 2**32 - 1
_NO_ONE: Final = bytes(20)
_MIN_SETTLE: Final = 3600
_WINDOWS_TO_SETTLE: Final = 4
_MAX_UNSETTLED: Final = {"infer": 32, "train": 96}
_MAX_SHARD_ROWS: Final = 1 << 24
_OF_INFERENCE: Final = ("rows", "probation_rows", "probation_shards")
_OF_TRAINING: Final = ("span_shards", "audit_shards", "probation_span_shards")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AuditTerms(_Table):
    """How the job is checked. Counts of rows, shards and blocks; shares are parts per million."""

    rows: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="rows of every shard that are computed again; without it one in a hundred",
    )
    probation_rows: int | None = Field(
        default=None, ge=1, le=4096, description="the same in a worker's first shards; 8 or all"
    )
    probation_shards: int = Field(
        default=10, ge=0, le=_U32, description="how many first shards of a worker those are"
    )
    span_shards: int = Field(
        default=32, ge=1, le=1024, description="training: shards of a worker audited together"
    )
    audit_shards: int = Field(
        default=1, ge=1, le=1024, description="training: how many of a span are computed again"
    )
    probation_span_shards: int = Field(
        default=8, ge=1, le=1024, description="training: the same in a worker's first span"
    )
    second_share: Share = Field(
        default=100_000, description='the share of accepted shards audited twice, such as "0.1"'
    )
    budget: Share = Field(
        default=100_000, description='the largest share of the cap paid for audits, as "0.1"'
    )
    retention: int = Field(
        default=8, ge=0, le=_U32, description="later accepted shards before one is paid"
    )
    silence: int = Field(
        default=60, ge=1, le=_U32, description="blocks a worker has to open its rows"
    )
    challenge_blocks: int = Field(
        default=10, ge=1, le=_U32, description="blocks an auditor has to begin"
    )
    blocks: int = Field(default=60, ge=1, le=_U32, description="blocks an auditor has to finish")


class PayTerms(_Table):
    """How the money is divided. Shares are parts per million of the payment for work."""

    orchestrator_share: Share = Field(
        default=20_000, description='the orchestrator\'s share of the work, such as "0.02"'
    )
    aggregator_share: Share = Field(
        default=30_000, description='the aggregator\'s share, which covers its gas, as "0.03"'
    )
    max_unsettled: int | None = Field(
        default=None,
        ge=1,
        le=_U32,
        description="unpaid shards at which a worker stops; without it 32, in training 96",
    )
    epoch_limit: Amount | None = Field(
        default=None, description='the most MCC one settlement may add, as "5"; else the cap'
    )


class TimeTerms(_Table):
    """Windows and leases. Durations in seconds, counts in blocks."""

    window: Duration = Field(
        default=300, ge=1, le=_U32, description='how long a settlement can be disputed, as "5m"'
    )
    settle_after: Duration | None = Field(
        default=None, description='time after the deadline to settle, as "1h"; 4 windows at least'
    )
    lag: int = Field(
        default=5, ge=3, le=1000, description="blocks from a log head to its beacon, at least 3"
    )
    lease_blocks: int = Field(
        default=120, ge=5, le=_U32, description="blocks a worker has for a shard"
    )


class NeedTerms(_Table):
    """What a worker must offer."""

    memory: Size = Field(
        default=2 << 30, ge=1 << 20, lt=2**64, description="bytes a shard may take, like 2GiB"
    )
    device: Literal["cpu"] = Field(default="cpu", description='"cpu", the only device today')


class JobSpec(_Table):
    """A job as its researcher describes it; amounts in MCC's smallest unit, times in seconds."""

    program: Path = Field(description="the file that `meshd program export` wrote")
    data: Path = Field(description="the dataset that `meshd data add` wrote")
    workload: Literal["infer", "train"] = Field(
        default="infer", description='what is done with them: "infer" or "train"'
    )
    rows_per_shard: int = Field(
        default=128,
        ge=1,
        le=1 << 20,
        description="rows in one worker's unit of work, such as 128; training: train.steps x batch",
    )
    price: Amount = Field(
        gt=0, description='MCC paid per 10^9 compute units, in quotes, for example "0.002"'
    )
    cap: Amount = Field(
        gt=0, description='the most MCC the job may cost, in quotes, for example "50"'
    )
    deadline: int = Field(
        description='when work ends: a duration like "2h" or a date like "2030-01-31T12:00:00Z"'
    )
    seed: int = Field(
        default=0, ge=0, lt=2**256, description="a whole number; everything random follows from it"
    )
    workers: Annotated[tuple[Account, ...], Words] = Field(
        default=(), max_length=256, description="addresses that alone may work; none: anybody"
    )
    orchestrator: Account = Field(
        default=_NO_ONE, description="the address that runs the job; without it a ranked one"
    )
    audit: AuditTerms = AuditTerms()
    pay: PayTerms = PayTerms()
    time: TimeTerms = TimeTerms()
    need: NeedTerms = NeedTerms()
    train: TrainTerms = TrainTerms()

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.workload == "train":
            self._check_training()
        else:
            self._check_inference()
        if self.audit.retention >= self.max_unsettled:
            raise ValueError(
                f"audit.retention = {self.audit.retention} keeps every worker waiting for ever: "
                f"it must be below pay.max_unsettled = {self.max_unsettled}"
            )
        if self.settle_deadline - self.deadline < _WINDOWS_TO_SETTLE * self.time.window:
            raise ValueError(
                f"time.settle_after = {self.time.settle_after} s is too short for "
                f"{_WINDOWS_TO_SETTLE} windows of {self.time.window} s: leave it out or raise it"
            )
        return self

    def _check_inference(self) -> None:
        given = [f"audit.{key}" for key in _OF_TRAINING if key in self.audit.model_fields_set]
        if self.train.model_fields_set:
            given = ["[train]", *given]
        if given:
            raise ValueError(
                f"{given[0]} is for training, and this job infers: leave it out, or write "
                'workload = "train"'
            )
        for key, rows in (
            ("audit.rows", self.audit.rows),
            ("audit.probation_rows", self.audit.probation_rows),
        ):
            if rows is not None and rows > self.rows_per_shard:
                raise ValueError(
                    f"{key} = {rows} is more than a shard has: at most rows_per_shard = "
                    f"{self.rows_per_shard}"
                )

    def _check_training(self) -> None:
        if missing := self.train.missing():
            known = TrainTerms.model_fields
            cure = "; ".join(f"train.{key} is {known[key].description}" for key in missing)
            raise ValueError(f"[train] needs {', '.join(missing)}: {cure}")
        for key in _OF_INFERENCE:
            if key in self.audit.model_fields_set:
                raise ValueError(
                    f"audit.{key} is for inference: training audits whole shards, see "
                    "audit.span_shards and audit.audit_shards"
                )
        self._check_shard()
        span = self.audit.span_shards
        for key in ("audit_shards", "probation_span_shards"):
            if key in self.audit.model_fields_set and getattr(self.audit, key) > span:
                raise ValueError(
                    f"audit.{key} = {getattr(self.audit, key)} is more than a span has: at most "
                    f"audit.span_shards = {span}"
                )
        if span >= self.max_unsettled:
            raise ValueError(
                f"audit.span_shards = {span} keeps every worker waiting for ever: it must be "
                f"below pay.max_unsettled = {self.max_unsettled}"
            )

    def _check_shard(self) -> None:
        rows, total = self.train_rows, self.train.settings["total_steps"]
        if "rows_per_shard" in self.model_fields_set and self.rows_per_shard != rows:
            raise ValueError(
                f"rows_per_shard = {self.rows_per_shard} contradicts train.steps x train.batch = "
                f"{rows}: leave it out"
            )
        if rows > _MAX_SHARD_ROWS:
            raise ValueError(
                f"train.steps = {self.train.steps} x train.batch = {self.train.batch} are {rows} "
                f"rows in a shard: {_MAX_SHARD_ROWS} is the most"
            )
        if isinstance(total, int) and total > MAX_STEPS:
            raise ValueError(
                f"train.rounds = {self.train.rounds} x train.steps = {self.train.steps} are "
                f"{total} inner steps: {MAX_STEPS} is the most"
            )

    @property
    def train_rows(self) -> int:
        """Rows that a training shard reads: its steps times their batch."""
        assert self.train.batch is not None
        return self.train.steps * self.train.batch

    @property
    def max_unsettled(self) -> int:
        """Unpaid shards at which a worker stops: three whole spans in training."""
        return self.pay.max_unsettled or _MAX_UNSETTLED[self.workload]

    @property
    def audit_rows(self) -> int:
        """Rows of a shard audited after probation.

        Without a wish one in a hundred, at least one: a worker that invents a share f of its
        rows is missed with probability exp(-f k) after k audited rows, so 5 % of 10,000 rows
        are found with 99.3 %.
        """
        return self.audit.rows or -(-self.rows_per_shard // 100)

    @property
    def probation_rows(self) -> int:
        """Rows of a shard audited during probation: 8, or all of a smaller shard."""
        return self.audit.probation_rows or max(self.audit_rows, min(8, self.rows_per_shard))

    @property
    def epoch_limit(self) -> int:
        """The most that one settlement may add to what is owed."""
        return self.cap if self.pay.epoch_limit is None else self.pay.epoch_limit

    @property
    def settle_deadline(self) -> int:
        """Unix seconds after which the rest of the escrow goes back to the researcher."""
        wait = self.time.settle_after
        if wait is None:
            wait = max(_MIN_SETTLE, _WINDOWS_TO_SETTLE * self.time.window)
        return self.deadline + wait

    @property
    def seed_bytes(self) -> bytes:
        """The seed as 32 bytes, big-endian."""
        return self.seed.to_bytes(32, "big")


def parse_job(
    text: str, *, now: float, directory: Path = Path(), source: str = "job.toml"
) -> JobSpec:
    """Return the job that TOML *text* describes.

    Relative paths count from *directory*; a duration as deadline counts from *now* (Unix
    seconds). Raises JobSpecError with one line for each key that is unknown or wrong.
    """
    try:
        table = _with_workload(parse_toml(text, source), source)
        if problems := check_keys(JobSpec, table, source):
            raise JobSpecError("\n".join(problems))
        flat = dict(flatten(table))
        if "deadline" in flat:
            flat["deadline"] = _deadline(flat["deadline"], now, source)
        for key in ("program", "data", "train.start"):
            if isinstance(flat.get(key), str) and flat[key]:
                flat[key] = directory / flat[key]
        return build(JobSpec, flat, lambda key: source)
    except JobSpecError:
        raise
    except ConfigError as error:
        raise JobSpecError(str(error)) from error


def _with_workload(table: dict[str, Any], source: str) -> dict[str, Any]:
    """Return *table* with `kind`, as reports call it, under its name here, `workload`."""
    if "kind" not in table:
        return table
    kind = table.pop("kind")
    if table.setdefault("workload", kind) != kind:
        raise JobSpecError(
            f"{source}: kind = {show(kind)} contradicts workload = {show(table['workload'])}: "
            "they are two names of one key: leave one out"
        )
    return table


def check_cap(spec: JobSpec, shard_units: int) -> None:
    """Raise JobSpecError if the cap does not pay for one shard of *shard_units* compute units."""
    work = cost(shard_units, spec.price)
    if spec.workload == "train":
        smaller = f"train.steps = {spec.train.steps}"
    else:
        smaller = f"rows_per_shard = {spec.rows_per_shard}"
    if spec.cap < work:
        raise JobSpecError(
            f"cap = {show(format_mcc(spec.cap))} is below the price of one shard, "
            f"{format_mcc(work)} MCC ({shard_units} compute units): raise cap, or lower price or "
            f"{smaller}"
        )


def _deadline(value: Any, now: float, source: str) -> int:
    """Return the Unix seconds of a duration, an RFC 3339 text or TOML's own date and time."""
    moment = value
    if isinstance(value, str) and re.match(r"\d{4}-", value):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError as error:
            raise JobSpecError(
                f"{source}: deadline = {show(value)}: {error}: write one like 2030-01-31T12:00:00Z"
            ) from error
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise JobSpecError(
                f"{source}: deadline = {show(value)} has no time zone: add Z for UTC, or +01:00"
            )
        seconds = int(moment.timestamp())
    elif isinstance(moment, str):
        try:
            seconds = int(now) + parse_duration(moment)
        except ConfigError as error:
            raise JobSpecError(f"{source}: deadline = {show(value)}: {error}") from error
    else:
        raise JobSpecError(
            f'{source}: deadline = {show(value)} is neither a duration like "2h" nor a date like '
            '"2030-01-31T12:00:00Z": write it in quotes'
        )
    if seconds <= now:
        late = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        raise JobSpecError(
            f"{source}: deadline = {show(value)} is in the past (it is {late}): choose a later one"
        )
    return seconds
