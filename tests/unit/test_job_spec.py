"""Job descriptions: what a researcher may write, and how mistakes are told."""

import dataclasses
from pathlib import Path

import pytest

from meshd.config.errors import JobSpecError
from meshd.config.job import JobSpec, check_cap, parse_job
from meshd.config.reading import keys_of
from meshd.config.training import OF_THE_JOB, TrainTerms
from meshd.node.workloads.training.settings import BOUNDS, TrainSettings

NOW = 1_900_000_000.5
JOB = {
    "program": '"minilm.program"',
    "data": '"sentences.data"',
    "price": '"0.002"',
    "cap": '"50"',
    "deadline": '"2h"',
}
ALICE = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"


def toml(more: str = "", **changes: str | None) -> str:
    lines = [f"{key} = {value}" for key, value in (JOB | changes).items() if value is not None]
    return "\n".join(lines) + "\n" + more


def job(more: str = "", **changes: str | None) -> JobSpec:
    return parse_job(toml(more, **changes), now=NOW, directory=Path("/home/alice"))


def problem(more: str = "", **changes: str | None) -> str:
    with pytest.raises(JobSpecError) as caught:
        job(more, **changes)
    return str(caught.value)


def test_a_short_description_is_enough() -> None:
    spec = job()
    assert spec.program == Path("/home/alice/minilm.program")
    assert spec.price == 2 * 10**15
    assert spec.cap == 50 * 10**18
    assert spec.deadline == int(NOW) + 7200
    assert spec.settle_deadline == spec.deadline + 3600
    assert spec.workload == "infer"
    assert spec.epoch_limit == spec.cap
    assert spec.orchestrator == bytes(20)
    assert spec.workers == ()


def test_an_absolute_path_stays_what_it_is() -> None:
    assert job(data='"/srv/x.data"').data == Path("/srv/x.data")


def test_one_row_in_a_hundred_is_audited_unless_said_otherwise() -> None:
    assert job().audit_rows == 2
    assert job(rows_per_shard="10000").audit_rows == 100
    assert job(rows_per_shard="1").audit_rows == 1
    assert job("[audit]\nrows = 5").audit_rows == 5


def test_probation_audits_eight_rows_or_all_of_a_smaller_shard() -> None:
    assert job().probation_rows == 8
    assert job(rows_per_shard="3").probation_rows == 3
    assert job(rows_per_shard="10000").probation_rows == 100
    assert job("[audit]\nprobation_rows = 20").probation_rows == 20


@pytest.mark.parametrize(
    "deadline",
    ['"2030-03-17T19:46:40Z"', '"2030-03-17T20:46:40+01:00"', "2030-03-17T19:46:40Z"],
)
def test_a_deadline_may_be_a_date_with_its_zone(deadline: str) -> None:
    assert job(deadline=deadline).deadline == 1_900_007_200


@pytest.mark.parametrize("deadline", ['"2020-01-01T00:00:00Z"', "2020-01-01T00:00:00Z", '"0s"'])
def test_a_deadline_in_the_past_is_refused(deadline: str) -> None:
    told = problem(deadline=deadline)
    assert "is in the past (it is 2030-03-17T17:46:40+00:00): choose a later one" in told


def test_a_deadline_without_zone_or_of_another_kind_is_refused_with_the_cure() -> None:
    assert "add Z for UTC" in problem(deadline='"2035-01-01T00:00:00"')
    assert "neither a duration" in problem(deadline="7200")
    assert "write one like 45s" in problem(deadline='"soon"')
    assert "write one like 2030" in problem(deadline='"2030-13-01T00:00:00Z"')


def test_the_nearest_key_is_suggested_for_an_unknown_one() -> None:
    assert problem('deadlin = "2h"', deadline=None).splitlines() == [
        "job.toml: unknown key 'deadlin': did you mean 'deadline'?"
    ]
    assert problem("probation_rows = 4") == (
        "job.toml: unknown key 'probation_rows': did you mean 'audit.probation_rows'?"
    )
    assert problem("[audit]\nretnetion = 5").endswith("did you mean 'audit.retention'?")


def test_what_is_missing_is_named_with_an_example() -> None:
    told = problem(price=None, cap=None).splitlines()
    assert told[0].startswith("job.toml: price is missing; price is MCC paid per 10^9")
    assert told[1].startswith("job.toml: cap is missing")


@pytest.mark.parametrize(
    ("key", "value"), [("price", "0.002"), ("cap", "50"), ("price", "1e-3"), ("cap", "true")]
)
def test_an_amount_without_quotes_is_refused(key: str, value: str) -> None:
    told = problem(**{key: value})
    assert told.startswith(f"job.toml: {key} = ")
    assert "write it as text, in quotes" in told


@pytest.mark.parametrize(
    ("more", "changes", "cure"),
    [
        ("", {"price": '"0"'}, "for example"),
        ("", {"cap": '"-1"'}, "write digits like"),
        ("", {"rows_per_shard": "0"}, "such as 128"),
        ("", {"workload": '"bake"'}, '"infer" or "train"'),
        ("", {"workload": '"train"'}, "[train] needs rounds, shards, batch: train.rounds is how"),
        ("", {"workload": '"train"', "kind": '"infer"'}, "two names of one key"),
        ("[train]\nrounds = 8", {}, "this job infers"),
        ("[audit]\nspan_shards = 8", {}, 'workload = "train"'),
        ("", {"seed": "-1"}, "whole number"),
        ("", {"program": "5"}, "meshd program export"),
        (f'workers = ["{ALICE[:-1]}"]', {}, "40 hex digits"),
        ("[audit]\nsecond_share = 0.1", {}, "in quotes"),
        ("[audit]\nbudget = '2'", {}, "share"),
        ("[audit]\nrows = 500", {}, "at most rows_per_shard = 128"),
        ("[audit]\nretention = 32", {}, "below pay.max_unsettled = 32"),
        ("[time]\nlag = 2", {}, "at least 3"),
        ("[time]\nwindow = '1h'\nsettle_after = '2h'", {}, "leave it out or raise it"),
        ("[need]\nmemory = '2 gigs'", {}, "like 512MiB"),
        ("[need]\ndevice = 'cuda'", {}, "the only device"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_the_cure(more, changes, cure) -> None:
    told = problem(more, **changes)
    assert told.startswith("job.toml: ")
    assert "\n" not in told
    assert cure in told


TRAIN = "[train]\nrounds = 8\nshards = 4\nbatch = 16\n"


def training(more: str = "", **changes: str | None) -> JobSpec:
    return job(TRAIN + more, workload='"train"', **changes)


def test_a_training_job_is_rounds_of_shards_of_steps_of_rows() -> None:
    spec = training()
    assert spec.train_rows == 7 * 16
    assert spec.train.settings == {
        "optimizer": "scion",
        "steps": 7,
        "batch": 16,
        "total_steps": 56,
    }
    assert (spec.max_unsettled, spec.audit.span_shards) == (96, 32)
    assert (spec.audit.audit_shards, spec.audit.probation_span_shards) == (1, 8)
    assert job().max_unsettled == 32


def test_kind_is_another_name_of_workload() -> None:
    assert job(TRAIN, kind='"train"').workload == "train"


def test_every_setting_of_training_can_be_given() -> None:
    given = "optimizer = 'adamw'\nlr = 0.004\ntheta_bits = 4\n"
    settings = TrainSettings.fill(training(given + "start = 'before.safetensors'").train.settings)
    assert (settings.optimizer, settings.lr, settings.theta_bits) == ("adamw", 0.004, 4)
    assert settings.total_steps == 8 * 7
    assert TrainSettings.parse(settings.encode()) == settings


def test_the_weights_to_start_from_lie_beside_the_description() -> None:
    spec = training("start = 'before.safetensors'")
    assert spec.train.start == Path("/home/alice/before.safetensors")


def test_settings_have_the_names_bounds_and_defaults_that_they_have_in_the_terms() -> None:
    fields = {n: f for n, f in TrainTerms.model_fields.items() if n not in OF_THE_JOB}
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    assert set(fields) == names - {"total_steps"}  # which follows from rounds and steps
    for name, bounds in BOUNDS.items():
        if name == "total_steps":
            continue
        limits = {type(limit).__name__: limit for limit in fields[name].metadata}
        low = limits["Gt"].gt if bounds.above else limits["Ge"].ge
        assert (name, low, limits["Le"].le) == (name, bounds.low, bounds.high)
    assert TrainTerms.model_fields["optimizer"].default == "scion"


@pytest.mark.parametrize(
    ("more", "changes", "cure"),
    [
        ("lr = 0", {}, "greater than 0; train.lr is learning rate"),
        ("lr = inf", {}, "finite"),
        ("lr = 'fast'", {}, "train.lr is"),
        ("steps = 0", {}, "inner steps of one shard"),
        ("steps = 10001", {}, "less than or equal to 10000"),
        ("theta_block = 100", {}, "a multiple of 8"),
        ("optimizer = 'lion'", {}, '"scion", "adamw" or "sgd"'),
        ("momentun_block = 64", {}, "did you mean 'train.momentum_block'?"),
        ("", {"rows_per_shard": "128"}, "train.steps x train.batch = 112: leave it out"),
        ("[audit]\nrows = 4", {}, "audit.span_shards and audit.audit_shards"),
        ("[audit]\nprobation_shards = 4", {}, "audits whole shards"),
        ("[audit]\naudit_shards = 40", {}, "at most audit.span_shards = 32"),
        ("[audit]\nspan_shards = 96", {}, "below pay.max_unsettled = 96"),
        ("[audit]\nspan_shards = 0", {}, "shards of a worker audited together"),
    ],
)
def test_a_wrong_training_job_is_refused_in_one_line_with_the_cure(more, changes, cure) -> None:
    with pytest.raises(JobSpecError) as caught:
        training(more, **changes)
    told = str(caught.value)
    assert told.startswith("job.toml: ")
    assert "\n" not in told
    assert cure in told


def test_a_schedule_of_too_many_steps_is_refused() -> None:
    with pytest.raises(JobSpecError, match=r"are 20000000 inner steps: 10000000 is the most"):
        job(TRAIN.replace("8", "20000") + "steps = 1000", workload='"train"')


def test_a_shard_of_too_many_rows_is_refused() -> None:
    with pytest.raises(JobSpecError, match=r"20000000 rows in a shard: 16777216 is the most"):
        job(TRAIN.replace("16", "2000") + "steps = 10000", workload='"train"')


def test_malformed_toml_is_refused_with_its_line() -> None:
    with pytest.raises(JobSpecError, match=r"job.toml: not TOML: .*line 1"):
        parse_job("program = \n", now=NOW)


def test_a_long_window_moves_the_settle_deadline() -> None:
    spec = job('[time]\nwindow = "1h"')
    assert spec.settle_deadline == spec.deadline + 4 * 3600


def test_workers_and_orchestrator_are_accounts() -> None:
    spec = job(f'workers = ["{ALICE}"]\norchestrator = "{ALICE.lower()}"')
    assert spec.workers == (bytes.fromhex(ALICE[2:]),)
    assert spec.orchestrator == spec.workers[0]


def test_a_cap_below_the_price_of_one_shard_is_refused_with_both() -> None:
    spec = job(cap='"0.001"')
    check_cap(spec, 10**8)
    with pytest.raises(JobSpecError, match=r'cap = "0.001" is below .* one shard, 0.004 MCC'):
        check_cap(spec, 2 * 10**9)


def test_the_seed_is_32_bytes() -> None:
    assert job(seed=str(2**255)).seed_bytes == b"\x80" + bytes(31)


def test_every_key_has_a_description() -> None:
    assert all(field.description for field in keys_of(JobSpec).values())
