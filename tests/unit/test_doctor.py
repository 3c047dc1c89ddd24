"""`meshd doctor`: each thing that can be wrong is found, and has its cure."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio

from meshd.config.schema import Config, resolve
from meshd.node.cli import chaincheck, checkup, main
from meshd.node.cli.chaincheck import check_chain
from meshd.node.cli.checkup import Finding
from meshd.node.control.api import ControlError
from meshd.node.store import VERSION
from meshd.p2p.identity import Identity

ALICE = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
CHAIN_ID = 7
HEAVY = ("torch", "libp2p", "web3")


class FakeRpc:
    """A chain's JSON-RPC whose answers a test sets."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "eth_chainId": hex(CHAIN_ID),
            "eth_getCode": "0x6000",
            "eth_getBlockByNumber": {"number": "0xc", "timestamp": hex(int(time.time()))},
            "eth_getBalance": hex(10**18),
        }
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                answer = fake.answers[asked["method"]]
                body = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answer}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def rpc() -> Iterator[FakeRpc]:
    """A chain with the contracts on it."""
    fake = FakeRpc()
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.server.shutdown()
    thread.join()
    fake.server.server_close()


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    """The file of that chain's contracts."""
    path = tmp_path / "deployment.json"
    path.write_text(
        json.dumps({"chain_id": CHAIN_ID, "mcc": ALICE, "registry": ALICE, "escrow": ALICE})
    )
    return path


def config_of(deployment: Path, **flags: Any) -> Config:
    return resolve(None, {}, {"chain.deployment": deployment, **flags})


def deployed(deployment: Path) -> Any:
    from meshd.config.deployment import read_deployment

    return read_deployment(deployment)


def state_of(findings: list[Finding], check: str) -> tuple[str, str]:
    """Return state and text of the first finding of that name that is not ok, else of any."""
    found = [f for f in findings if f.check == check]
    first = next((f for f in found if f.state != "ok"), found[0])
    return first.state, first.text


# ---- the data directory ----------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The directory of a daemon that was started once."""
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    (path / "identity.key").write_text(Identity.generate().secret.hex())
    (path / "identity.key").chmod(0o600)
    database = sqlite3.connect(path / "meshd.sqlite3")
    database.execute(f"pragma user_version={VERSION}")
    database.close()
    return path


def test_a_sound_data_directory_is_found_sound(data_dir: Path) -> None:
    findings = list(checkup.check_data_dir(data_dir))
    assert {f.state for f in findings if f.check != "disk"} == {"ok"}
    assert [f.check for f in findings] == ["data directory", "key", "database", "disk"]


def test_a_data_directory_that_is_not_there_will_be_made(tmp_path: Path) -> None:
    assert state_of(list(checkup.check_data_dir(tmp_path / "none")), "data directory")[0] == "ok"


def test_a_key_that_others_may_read_fails_with_the_command_that_cures_it(data_dir: Path) -> None:
    (data_dir / "identity.key").chmod(0o644)
    state, text = state_of(list(checkup.check_data_dir(data_dir)), "key")
    assert state == "fail"
    assert f"chmod 600 {data_dir}/identity.key" in text


def test_a_directory_that_others_may_enter_is_warned_of(data_dir: Path) -> None:
    data_dir.chmod(0o755)
    assert state_of(list(checkup.check_data_dir(data_dir)), "data directory")[0] == "warn"


@pytest.mark.parametrize(
    ("version", "state"), [(VERSION - 1, "ok"), (VERSION, "ok"), (VERSION + 1, "fail")]
)
def test_a_database_of_a_newer_version_fails(data_dir: Path, version: int, state: str) -> None:
    database = sqlite3.connect(data_dir / "meshd.sqlite3")
    database.execute(f"pragma user_version={version}")
    database.close()
    assert state_of(list(checkup.check_data_dir(data_dir)), "database")[0] == state


def test_a_database_that_is_none_fails(data_dir: Path) -> None:
    (data_dir / "meshd.sqlite3").write_bytes(b"x" * 5000)
    assert state_of(list(checkup.check_data_dir(data_dir)), "database")[0] == "fail"


@pytest.mark.parametrize(("free", "state"), [(1 << 20, "fail"), (2 << 30, "warn"), (9 << 30, "ok")])
def test_a_disk_with_little_room_is_told(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    usage = shutil.disk_usage(data_dir)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert state_of(list(checkup.check_data_dir(data_dir)), "disk")[0] == state


# ---- the chain -------------------------------------------------------------------------------


def test_a_chain_in_order_is_found_in_order(rpc: FakeRpc, deployment: Path) -> None:
    findings = list(check_chain(rpc.url, deployed(deployment), ALICE))
    assert [(f.check, f.state) for f in findings] == [
        ("chain", "ok"),
        ("contracts", "ok"),
        ("clock", "ok"),
        ("gas", "ok"),
    ]


@pytest.mark.parametrize(
    ("method", "answer", "check", "state", "told"),
    [
        ("eth_chainId", "0x8", "chain", "fail", "has the id 8, the deployment is on 7"),
        ("eth_chainId", None, "chain", "fail", "eth_chainId"),
        ("eth_chainId", "chain", "chain", "fail", "invalid literal"),
        ("eth_getCode", "0x", "contracts", "fail", "the chain has no MCC"),
        ("eth_getBalance", "0x0", "gas", "warn", "no coin for gas"),
        ("eth_getBlockByNumber", {"number": "0x1"}, "chain", "fail", "timestamp"),
    ],
)
def test_what_is_wrong_with_a_chain_is_told(
    rpc: FakeRpc, deployment: Path, method: str, answer: Any, check: str, state: str, told: str
) -> None:
    rpc.answers[method] = answer
    found = state_of(list(check_chain(rpc.url, deployed(deployment), ALICE)), check)
    assert found[0] == state
    assert told in found[1]


@pytest.mark.parametrize(("ahead", "state"), [(3600, "fail"), (-3600, "warn"), (30, "ok")])
def test_a_clock_that_is_off_by_the_newest_block_is_told(
    rpc: FakeRpc, deployment: Path, ahead: int, state: str
) -> None:
    at = hex(int(time.time()) + ahead)
    rpc.answers["eth_getBlockByNumber"] = {"number": "0xc", "timestamp": at}
    assert state_of(list(check_chain(rpc.url, deployed(deployment), None)), "clock")[0] == state


def test_a_chain_that_does_not_answer_fails_with_the_cure(
    deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaincheck, "ASK_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for backlog in (None, 1):
            if backlog is not None:
                silent.listen(backlog)
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            (finding,) = check_chain(url, deployed(deployment), None)
            assert (finding.state, "meshd chain dev" in finding.cure) == ("fail", True)


# ---- listening and the swarm -----------------------------------------------------------------


def test_an_address_in_use_fails_unless_the_daemon_itself_has_it(deployment: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        config = config_of(deployment, listen=address)
        (finding,) = checkup.check_listening(config, runs=False)
        assert finding.state == "fail"
        assert not list(checkup.check_listening(config, runs=True))
    (finding,) = checkup.check_listening(config, runs=False)
    assert finding.state == "ok"


def test_bootstrap_peers_are_dialled_and_one_that_answers_is_enough(deployment: Path) -> None:
    peer = Identity.generate().peer_id
    with socket.socket() as up, socket.socket() as down:
        up.bind(("127.0.0.1", 0))
        up.listen()
        down.bind(("127.0.0.1", 0))
        answers, silent = (
            f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}/p2p/{peer}" for sock in (up, down)
        )
        both = checkup.check_bootstrap(config_of(deployment, bootstrap=f"{answers},{silent}"))
        assert [finding.state for finding in both] == ["ok", "warn"]
        lost = checkup.check_bootstrap(config_of(deployment, bootstrap=silent))
        assert [finding.state for finding in lost] == ["fail"]
    (none,) = checkup.check_bootstrap(config_of(deployment))
    assert none.state == "warn"


async def test_a_running_daemon_is_asked_for_its_peers_and_its_pause(
    fake_node: Any, deployment: Path
) -> None:
    fake_node.paused = True
    status = await fake_node.status()
    findings = list(checkup.check_daemon({**status, "peers": 0}))
    assert state_of(findings, "paused")[0] == "warn"
    assert state_of(findings, "peers")[0] == "warn"
    away = ControlError("unavailable", "no daemon runs on /x", "start one")
    assert [f.state for f in checkup.check_daemon(away)] == ["ok"]
    foreign = ControlError("unavailable", "the daemon on /x belongs to another user", "be it")
    assert [f.state for f in checkup.check_daemon(foreign)] == ["fail"]


# ---- torch and the user ----------------------------------------------------------------------


def test_torch_is_imported_by_the_user_who_computes_and_only_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command[0], options["user"]))
        return subprocess.CompletedProcess(command, 1, "", "ModuleNotFoundError: no torch\n")

    monkeypatch.setattr(subprocess, "run", run)
    (finding,) = checkup.check_torch(("orchestrator",))
    assert (finding.state, asked) == ("ok", [])
    (finding,) = checkup.check_torch(("worker",))
    user = checkup.EXECUTOR_USER if os.geteuid() == 0 else None
    assert asked == [(sys.executable, user)]
    assert finding.state == "fail"
    assert "ModuleNotFoundError: no torch" in finding.text


@pytest.mark.parametrize(("uid", "state"), [(0, "warn"), (1000, "ok")])
def test_root_is_warned_of(monkeypatch: pytest.MonkeyPatch, uid: int, state: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    (finding,) = checkup.check_user()
    assert finding.state == state


# ---- the command -----------------------------------------------------------------------------


async def test_the_command_reports_all_of_it_loads_nothing_heavy_and_exits_by_what_it_found(
    rpc: FakeRpc, deployment: Path, data_dir: Path
) -> None:
    code = (
        "import sys; from meshd.node.cli import main; code = main(); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    options = ["--data-dir", data_dir, "--rpc", rpc.url, "--deployment", deployment, "--json"]
    command = [sys.executable, "-c", code, "doctor", *map(str, options)]
    run = trio.run_process
    done = await run(command, capture_stdout=True, capture_stderr=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"[]\n"), done.stdout
    report = json.loads(done.stdout)
    assert report["ok"]
    assert {line["check"] for line in report["checks"]} == {
        *("user", "configuration", "data directory", "key", "database", "disk", "daemon"),
        *("torch", "chain", "contracts", "clock", "gas", "listen", "bootstrap"),
    }
    rpc.answers["eth_getCode"] = "0x"
    done = await run(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["fail"] == 1


def test_a_wrong_configuration_is_one_finding_and_the_rest_is_still_checked(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "node.toml").write_text("rolse = []\n")
    code = main(["doctor", "--config", str(tmp_path / "node.toml"), "--data-dir", str(tmp_path)])
    said = capfd.readouterr().out
    assert code == 1
    assert "unknown key 'rolse': did you mean 'roles'?" in said
    assert "disk: " in said
    assert said.splitlines()[-1].endswith("1 failed"), said
