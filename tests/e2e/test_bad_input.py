"""Everything wrong that a user can hand in: one clear line each, and nothing half-done."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshd.config.amounts import format_mcc, parse_mcc
from tests.e2e.local_swarm import LocalSwarm, job_toml, meshd

USAGE, UNAVAILABLE, AGAIN, CONFIG = 2, 69, 75, 78

NOBODY = "0x" + "ab" * 20


def refused(*arguments: str, cwd: Path, code: int, **options: Any) -> str:
    """Run a command that must fail with *code* and one line; return that line."""
    done = meshd(*arguments, cwd=cwd, **options)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("meshd: ")
    return line


# ---- jobs -----------------------------------------------------------------------------------


@pytest.fixture
def submit(swarm: LocalSwarm, tmp_path: Path) -> Callable[..., str]:
    """Submit a job.toml that must be refused, and see to it that nothing came of it."""
    swarm.write_inputs(tmp_path)

    def run(text: str) -> str:
        path = tmp_path / "job.toml"
        path.write_text(text)
        before = _traces(swarm)
        data_dir = str(swarm.folder / "researcher")
        line = refused("job", "submit", str(path), "--data-dir", data_dir, cwd=tmp_path, code=USAGE)
        assert _traces(swarm) == before
        return line

    return run


def _traces(swarm: LocalSwarm) -> tuple[object, ...]:
    """What a submission leaves: jobs, money and blobs of the researcher."""
    blobs = sorted((swarm.folder / "researcher" / "blobs").rglob("*"))
    wallet = swarm.researcher.wallet()
    return [job["id"] for job in swarm.researcher.jobs()], wallet["mcc"], wallet["coin"], blobs


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (job_toml(pryce="1"), ("unknown key 'pryce'", "did you mean 'price'?")),
        (job_toml(audit__silense=1), ("unknown key 'audit.silense'", "'audit.silence'")),
        (job_toml() + "price = = 1\n", ("job.toml", "not TOML", "line")),
        (job_toml(cap=None), ("cap is missing", "MCC")),
        (job_toml(price="cheap"), ("price", "'cheap'", "digits like")),
        (job_toml(price=0.5), ("price = 0.5", "in quotes")),
        (job_toml(rows_per_shard=0), ("rows_per_shard = 0", "such as 128")),
        (job_toml(deadline="2020-01-31T12:00:00Z"), ("deadline", "2020-01-31", "in the past")),
        (job_toml(deadline="30s"), ("deadline", "30 s from now", "120 s at least", '"2h"')),
        (job_toml(time__lease_blocks=200_000), ("lease_blocks 200000", "100000 is the most")),
    ],
)
def test_a_wrong_job_description_is_told_with_key_value_and_cure(submit, text, told) -> None:
    line = submit(text)
    assert all(part in line for part in told), line


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("key", "name", "spoil", "told"),
    [
        ("program", "gone.program", None, ("gone.program", "does not exist")),
        ("program", "affine.program", _cut, ("affine.program", "program")),
        ("program", "model.pt2", None, ("model.pt2", "meshd program export")),
        ("program", "model.pkl", None, ("model.pkl", "pickle", "meshd program export")),
        (
            "program",
            "renamed.program",
            lambda path: path.write_bytes(pickle.dumps({"weights": [1, 2, 3]})),
            ("renamed.program", "pickle", "meshd program export"),
        ),
        (
            "program",
            "text.program",
            lambda path: path.write_text("def forward(x): ..."),
            ("text.program", "MESHPRG1", "meshd program export"),
        ),
        ("data", "gone.data", None, ("gone.data", "does not exist")),
        ("data", "numbers.data", _cut, ("numbers.data",)),
        ("data", "numbers.pkl", None, ("numbers.pkl", "pickle")),
        (
            "data",
            "rows.data",
            lambda path: path.write_text("1,2,3\n"),
            ("rows.data", "meshd data add"),
        ),
    ],
)
def test_a_missing_cut_or_foreign_file_is_told_by_name(
    submit, tmp_path: Path, key: str, name: str, spoil: Callable[[Path], None] | None, told
) -> None:
    if spoil is not None:
        spoil(tmp_path / name)
    line = submit(job_toml(**{key: name}))
    assert all(part in line for part in told), line


def test_a_program_with_an_operator_outside_the_table_is_refused_by_its_name(
    submit, tmp_path: Path
) -> None:
    path = tmp_path / "affine.program"
    path.write_bytes(path.read_bytes().replace(b"\xa3mul", b"\xa3fft"))
    line = submit(job_toml())
    assert "affine.program" in line
    assert "fft" in line


def test_an_export_of_an_operator_outside_the_table_names_it_and_writes_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "class Spectrum(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.fft.fft(x).real\n"
    )
    line = refused(
        *("program", "export", "model.py:Spectrum", "--input", "x=f32[8]", "--out", "s.program"),
        cwd=tmp_path,
        code=USAGE,
    )
    assert "fft" in line
    assert not list(tmp_path.glob("*.program*"))


def test_a_cap_below_the_price_of_one_shard_is_told_with_that_price(submit) -> None:
    line = submit(job_toml(cap="0.00000001"))
    assert "cap" in line
    assert "0.00000001" in line
    assert "price of one shard" in line
    assert "raise cap" in line


def test_too_small_a_balance_is_told_with_what_is_missing(swarm: LocalSwarm, submit) -> None:
    held = swarm.researcher.wallet()["mcc"]
    missing = format_mcc(parse_mcc("5000") - parse_mcc(held))
    line = submit(job_toml(cap="5000"))
    assert f"{missing} MCC" in line
    assert held in line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"need__memory": "900GiB"}, ("need.memory", "921600 MiB", "are missing")),
        ({"workers": [NOBODY]}, ("no worker matches", "workers names")),
    ],
)
def test_a_job_that_no_worker_matches_is_refused_with_the_reason(submit, changes, told) -> None:
    line = submit(job_toml(**changes))
    assert all(part in line for part in told), line


# ---- daemons --------------------------------------------------------------------------------


def up(chain: LocalSwarm, data_dir: Path, *arguments: str, code: int) -> str:
    """Start a daemon that must not come up; return what it says."""
    options = ["--rpc", chain.swarm.rpc, "--deployment", str(chain.swarm.deployment)]
    options += ["--data-dir", str(data_dir), *arguments]
    return refused("up", *options, cwd=chain.folder, code=code)


def test_a_key_file_that_others_can_read_is_refused(chain: LocalSwarm, tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    key.write_text("11" * 32)
    key.chmod(0o644)
    line = up(chain, tmp_path, code=CONFIG)
    assert str(key) in line
    assert "chmod 600" in line
    assert [path.name for path in tmp_path.iterdir()] == ["identity.key"]


def test_a_port_in_use_is_named(chain: LocalSwarm, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        line = up(chain, tmp_path, "--listen", listen, code=CONFIG)
    assert listen in line
    assert "choose another port" in line


def test_an_rpc_that_cannot_be_reached_is_named(chain: LocalSwarm, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        rpc = f"http://127.0.0.1:{free.getsockname()[1]}"
    line = up(chain, tmp_path, "--rpc", rpc, code=UNAVAILABLE)
    assert rpc in line
    assert "chain.rpc" in line


def test_another_chain_than_the_deployments_is_told_with_both_ids(
    chain: LocalSwarm, tmp_path: Path
) -> None:
    deployment = json.loads(chain.swarm.deployment.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(deployment | {"chain_id": 7}))
    line = up(chain, tmp_path / "data", "--deployment", str(other), code=CONFIG)
    assert str(deployment["chain_id"]) in line
    assert "not 7" in line


def test_a_chain_without_the_contracts_is_told_with_their_address(
    chain: LocalSwarm, tmp_path: Path
) -> None:
    deployment = json.loads(chain.swarm.deployment.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(deployment | {"escrow": NOBODY}))
    line = up(chain, tmp_path / "data", "--deployment", str(other), code=CONFIG)
    assert NOBODY in line.lower()
    assert "chain.deployment" in line


def test_a_second_daemon_on_a_data_directory_is_told_of_the_first(swarm: LocalSwarm) -> None:
    line = up(swarm, swarm.folder / "researcher", code=AGAIN)
    assert str(swarm["researcher"].child.pid) in line
    assert "--data-dir" in line
    assert swarm.researcher.status()["pid"] == swarm["researcher"].child.pid


def test_a_second_chain_on_a_port_is_refused(chain: LocalSwarm, tmp_path: Path) -> None:
    port = chain.swarm.rpc.rsplit(":", 1)[1]
    arguments = ["chain", "dev", "--port", port, "--data-dir", str(tmp_path)]
    line = refused(*arguments, cwd=tmp_path, code=CONFIG)
    assert port in line
    assert "choose another port" in line


def test_an_unknown_key_of_the_configuration_is_told_with_the_nearest(
    chain: LocalSwarm, tmp_path: Path
) -> None:
    config = tmp_path / "node.toml"
    config.write_text('rolls = ["worker"]\n')
    line = up(chain, tmp_path / "data", "--config", str(config), code=CONFIG)
    assert "'rolls'" in line
    assert "did you mean 'roles'?" in line
    assert not (tmp_path / "data").exists()
