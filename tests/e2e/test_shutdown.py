"""How daemons end: told to, in the middle of a job, or because a role of theirs failed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.local_swarm import PATIENCE_S, LocalSwarm, clean_environment, wait_for

END_S = 10.0
"""Seconds that a daemon has to end after it was told to."""

BROKEN_ROLE = """
import os
import sys

import trio

from meshd.node.cli import main
from meshd.node.roles.worker import Worker


async def run(self, *, task_status):
    task_status.started()
    while not os.path.exists(sys.argv[1]):
        await trio.sleep(0.05)
    raise KeyError("a shard that is nowhere")


Worker.run = run
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def job(swarm: LocalSwarm) -> Iterator[str]:
    """A job in its first seconds: the executors of workers and validators are running."""
    job_id = swarm.submit(seed=3)
    swarm.wait_job("it has results", job_id, lambda detail: detail["shards"]["accepted"] > 0)
    yield job_id
    if swarm.researcher.job(job_id)["state"] in ("announced", "running"):
        swarm.meshd("job", "cancel", job_id)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("worker-2", signal.SIGTERM),
        ("worker-2", signal.SIGINT),
        ("validator-2", signal.SIGTERM),
        ("orchestrator", signal.SIGTERM),
        ("researcher", signal.SIGINT),
    ],
)
def test_a_daemon_told_to_end_in_the_middle_of_a_job_does_so_quietly_and_leaves_nothing(
    swarm: LocalSwarm, job: str, name: str, number: signal.Signals
) -> None:
    swarm.processes.check()
    child = swarm[name].child
    children = swarm.descendants(name)
    logged = len(child.log.read_text())
    began = time.monotonic()
    swarm.signal(name, number)
    code = child.process.wait(PATIENCE_S)
    seconds = time.monotonic() - began
    said = child.log.read_text()[logged:]
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    left = sorted(path.name for path in (swarm.folder / name).glob("*.sock"))
    swarm.restart(name, same_port=True)
    assert (code, alive, left) == (0, [], [])
    assert "Traceback" not in said
    assert "internal error" not in said
    assert seconds < END_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_chain_told_to_end_does_so_quietly(
    swarm: LocalSwarm, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ["meshd.node.cli", "chain", "dev", "--port", "0", "--data-dir", str(tmp_path)]
    child = swarm.processes.start(f"chain-{number.name}", arguments)
    wait_for("the chain answers", lambda: "at http://" in child.log.read_text())
    swarm.processes.killed.add(child.pid)
    began = time.monotonic()
    child.process.send_signal(number)
    assert child.process.wait(PATIENCE_S) == 0
    assert time.monotonic() - began < END_S
    assert "Traceback" not in child.log.read_text()


def test_a_role_that_fails_ends_the_daemon_with_its_traceback_logged_and_exit_code_1(
    chain: LocalSwarm, tmp_path: Path
) -> None:
    script, now = tmp_path / "broken.py", tmp_path / "now"
    script.write_text(BROKEN_ROLE)
    options = ["--data-dir", str(tmp_path / "data"), "--rpc", chain.swarm.rpc, "--roles", "worker"]
    options += ["--deployment", str(chain.swarm.deployment), "--set", "log.format=human"]
    log = tmp_path / "log"
    with log.open("w") as output:
        daemon = subprocess.Popen(
            [sys.executable, str(script), str(now), "up", *options],
            stderr=output,
            env=clean_environment(),
        )
    wait_for("it is ready", lambda: "ready" in log.read_text() or daemon.poll() is not None)
    now.touch()
    assert daemon.wait(PATIENCE_S) == 1
    said = log.read_text()
    assert "KeyError: 'a shard that is nowhere'" in said
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("meshd: the daemon failed: KeyError")
    assert not (tmp_path / "data" / "meshd.sock").exists()
