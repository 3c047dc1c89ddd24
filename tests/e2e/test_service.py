"""A daemon as a service manager and its operator meet it: told, paused, examined, upgraded."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.node.store import STEPS, VERSION
from tests.e2e.local_swarm import PATIENCE_S, LocalSwarm, clean_environment, meshd


class Service:
    """One daemon under a service manager that is this test."""

    def __init__(self, chain: LocalSwarm, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        rpc, deployment = chain.swarm.rpc, str(chain.swarm.deployment)
        self.options = ["--data-dir", str(self.data), "--rpc", rpc, "--deployment", deployment]
        self.options += ["--roles", "worker"]
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(folder / "notify"))
        self.manager.settimeout(PATIENCE_S)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it says that it is ready."""
        environment = clean_environment() | {
            "NOTIFY_SOCKET": str(self.folder / "notify"),
            "WATCHDOG_USEC": "3000000",
        }
        command = [sys.executable, "-m", "meshd.node.cli", "up", *self.options]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment)
        self.wait("READY=1")

    def wait(self, line: str) -> str:
        """Return the first message with a line that begins like this."""
        while True:
            message = self.manager.recv(4096).decode()
            if any(part.startswith(line) for part in message.splitlines()):
                return message

    def stop(self) -> int:
        """Stop the daemon as systemd does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.wait("STOPPING=1")
        return self.process.wait(PATIENCE_S)

    def meshd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return meshd(*arguments, "--data-dir", str(self.data), cwd=self.folder)


@pytest.fixture
def service(chain: LocalSwarm, tmp_path: Path) -> Iterator[Service]:
    """A service that is not started yet."""
    made = Service(chain, tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()
    made.manager.close()


def test_a_daemon_tells_its_manager_what_it_does_and_stays_paused_over_restarts(
    service: Service,
) -> None:
    service.start()
    assert service.wait("WATCHDOG=1").startswith("STATUS=0 peers, 0 shards\n")
    assert service.meshd("pause").returncode == 0
    assert "paused" in service.wait("STATUS=0 peers, 0 shards, paused")
    examined = meshd("doctor", *service.options, "--json", cwd=service.folder)
    checks = {line["check"]: line for line in json.loads(examined.stdout)["checks"]}
    assert checks["paused"]["state"] == "warn"
    assert checks["contracts"]["state"] == checks["clock"]["state"] == "ok", examined.stdout
    assert service.stop() == 0
    service.start()
    assert json.loads(service.meshd("status", "--json").stdout)["paused"] is True
    assert service.meshd("resume").returncode == 0
    assert service.stop() == 0
    service.start()
    assert json.loads(service.meshd("status", "--json").stdout)["paused"] is False
    assert json.loads(service.meshd("earnings", "--json").stdout)["paid"] == "0"
    assert service.stop() == 0


def test_a_data_directory_of_an_older_version_is_upgraded_and_a_newer_one_refused(
    service: Service,
) -> None:
    service.data.mkdir(mode=0o700)
    database = sqlite3.connect(service.data / "meshd.sqlite3")
    database.executescript(STEPS[0])
    database.execute("insert into setting values('paused', '1')")
    database.execute("pragma user_version=1")
    database.commit()
    database.close()
    service.start()
    assert json.loads(service.meshd("status", "--json").stdout)["paused"] is True
    assert "database upgraded" in (service.folder / "log").read_text()
    assert service.stop() == 0
    database = sqlite3.connect(service.data / "meshd.sqlite3")
    assert database.execute("pragma user_version").fetchone() == (VERSION,)
    database.execute(f"pragma user_version={VERSION + 1}")
    database.close()
    refused = meshd("up", *service.options, cwd=service.folder)
    assert refused.returncode == 78
    assert refused.stderr.splitlines()[-1].startswith("meshd: database ")
    assert "upgrade this one, or use another data directory" in refused.stderr
