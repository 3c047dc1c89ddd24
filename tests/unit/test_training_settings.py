"""Settings of training: one spelling, every bound, and a schedule with the same bits everywhere."""

import math
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.node.workloads.training.errors import SettingsError
from meshd.node.workloads.training.settings import BOUNDS, TrainSettings, decimal, power

NEEDED: dict[str, str | int | float] = {"batch": 8, "steps": 7, "total_steps": 497}
SETTINGS = TrainSettings.fill(NEEDED)
LINES = SETTINGS.encode()
SCHEDULE = [
    "0x1.a36e2eb1c432dp-12",
    "0x1.34b1ddd09e009p-6",
    "0x1.07d04df05b223p-7",
    "0x1.062c528868547p-9",
]


def with_line(line: str) -> tuple[str, ...]:
    name = line.partition("=")[0]
    return tuple(line if old.partition("=")[0] == name else old for old in LINES)


def test_settings_come_back_as_they_were_written() -> None:
    assert TrainSettings.parse(LINES) == SETTINGS
    assert list(LINES) == sorted(LINES)
    assert len(LINES) == len(fields(TrainSettings)) == len(BOUNDS) + 1
    assert "epsilon=0.00000001" in LINES


@given(
    st.floats(0, 100, exclude_min=True),
    st.floats(0, 0.9999),
    st.integers(1, 10_000),
    st.sampled_from(["scion", "adamw", "sgd"]),
)
def test_any_settings_within_bounds_have_exactly_one_spelling(
    lr: float, beta: float, steps: int, optimizer: str
) -> None:
    settings = replace(SETTINGS, lr=lr, beta=beta, steps=steps, optimizer=optimizer)
    if all(len(line) <= 64 for line in settings.encode()):
        assert TrainSettings.parse(settings.encode()) == settings


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((), "'optimizer' is missing"),
        (LINES[1:], "'batch' is missing"),
        ((*LINES, "lr=1"), "'lr' is there twice"),
        ((*LINES, "momentum=1"), "'momentum' is unknown; did you mean"),
        ((*LINES, "zzzzzz=1"), "'zzzzzz' is unknown; known are"),
        ((*LINES, "lr"), "'lr' has no value; write name=value"),
        (LINES[::-1], "not sorted"),
        (with_line("optimizer=adam"), "optimizer is 'adam'; known are scion, adamw, sgd"),
        (with_line("lr="), "write a decimal number"),
        (with_line("lr=1e-3"), "lr is '1e-3'; write a decimal number"),
        (with_line("lr=0.10"), "write a decimal number"),
        (with_line("lr=.1"), "write a decimal number"),
        (with_line("lr=+1"), "write a decimal number"),
        (with_line("lr=nan"), "write a decimal number"),
        (with_line("lr=٣"), "write a decimal number"),
        (with_line("lr=-0"), "write a decimal number"),
        (with_line("lr=" + "1" * 65), "write a decimal number"),
        (with_line("lr=0.0200000000000000001"), "write it as 0.02"),
        (with_line("lr=0"), "lr is 0.0; a number above 0 to 100 is allowed"),
        (with_line("lr=101"), "lr is 101.0"),
        (with_line("beta=1"), "beta is 1.0; a number from 0 to 0.9999"),
        (with_line("steps=0"), "steps is 0; a whole number from 1 to 10000 is allowed"),
        (with_line("steps=7.5"), "steps is '7.5'; a whole number"),
        (with_line("steps=10001"), "steps is 10001"),
        (with_line("batch=0"), "batch is 0"),
        (with_line("total_steps=0"), "total_steps is 0"),
        (with_line("theta_bits=1"), "theta_bits is 1; a whole number from 2 to 8"),
        (with_line("theta_block=100"), "theta_block is 100; a multiple of 8"),
        (with_line("norm_low=1.5"), "norm_low is 1.5; a number from 0 to 1"),
        (with_line("norm_high=0.5"), "norm_high is 0.5; a number from 1"),
        (with_line("min_share=0"), "min_share is 0.0; a number above 0 to 1"),
    ],
)
def test_settings_that_are_not_right_are_named_with_value_and_cure(
    lines: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        TrainSettings.parse(lines)


def test_every_bound_is_kept_on_both_sides() -> None:
    for name, bounds in BOUNDS.items():
        beyond = bounds.high + (1 if bounds.whole else 0.001)
        below = bounds.low - (1 if bounds.whole else 0.001)
        for value in (beyond, below, math.nan, math.inf, True, "1"):
            with pytest.raises(SettingsError, match=f"{name} is"):
                replace(SETTINGS, **{name: value})  # type: ignore[arg-type]


def test_what_is_not_given_has_the_defaults_of_its_optimizer() -> None:
    assert (SETTINGS.optimizer, SETTINGS.lr, SETTINGS.weight_decay) == ("scion", 0.02, 0.1)
    adamw = TrainSettings.fill({**NEEDED, "optimizer": "adamw"})
    assert (adamw.lr, adamw.weight_decay) == (0.004, 0.1)
    sgd = TrainSettings.fill({**NEEDED, "optimizer": "sgd", "lr": 1})
    assert (sgd.lr, sgd.weight_decay) == (1, 0.0)
    assert TrainSettings.parse(sgd.encode()) == sgd


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        ({}, "'batch' is missing; it has no default"),
        ({**NEEDED, "lrr": 1}, "'lrr' is unknown; did you mean 'lr'"),
        ({**NEEDED, "lr": "fast"}, "lr is 'fast'"),
        ({**NEEDED, "steps": 7.0}, "steps is 7.0"),
    ],
)
def test_a_job_description_is_told_what_is_wrong(
    given_: dict[str, str | int | float], reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        TrainSettings.fill(given_)


def test_the_learning_rate_rises_and_falls_to_its_floor() -> None:
    rates = [SETTINGS.learning_rate(step) for step in range(SETTINGS.total_steps + 5)]
    assert rates[0] == 0.02 / 50
    assert rates[49] == rates[50] == 0.02
    assert rates[:50] == sorted(rates[:50])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(0.002)
    for step in (60, 200, 400):
        cosine = math.cos(math.pi * (step - 50) / (497 - 50))
        assert rates[step] == pytest.approx(0.02 * (0.1 + 0.9 * 0.5 * (1 + cosine)), rel=1e-12)
    assert SETTINGS.rate_of_shard(7) == pytest.approx(sum(rates[7:14]))


def test_the_schedule_has_the_same_bits_everywhere() -> None:
    exact = [SETTINGS.learning_rate(step).hex() for step in (0, 123, 321, 496)]
    assert exact == SCHEDULE


def test_a_schedule_without_a_warm_up_starts_at_its_peak() -> None:
    assert replace(SETTINGS, warmup=0).learning_rate(0) == 0.02


def test_powers_and_decimals_are_plain() -> None:
    assert power(0.5, 3) == 0.125
    assert power(0.9, 0) == 1.0
    assert [decimal(x) for x in (1, 1.0, 0.1, 1e-8, 123456.5, 1e20)] == [
        "1",
        "1",
        "0.1",
        "0.00000001",
        "123456.5",
        "100000000000000000000",
    ]


def test_the_canary_is_two_steps_of_the_same_settings() -> None:
    assert SETTINGS.of_canary() == replace(SETTINGS, steps=2)
    assert replace(SETTINGS, steps=1).of_canary().steps == 1


def test_the_docs_name_every_setting_with_its_default_and_bounds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+ \| [^|]+) \|", page, re.M))
    for field in fields(TrainSettings):
        default = "(none)" if field.default is MISSING else field.default
        text = default if isinstance(default, str) else decimal(default)
        allowed = BOUNDS.get(field.name, "scion, adamw, sgd")
        assert table.get(field.name) == f"{text} | {allowed}", field.name
