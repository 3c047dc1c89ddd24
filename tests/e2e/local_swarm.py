"""A swarm of real processes that a test starts, kills and asks, mostly through `meshd` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import trio

from meshd.config.amounts import parse_mcc
from meshd.node.client import Client, connect
from meshd.node.compute.toy import affine_dataset, affine_program, run_program
from meshd.node.control.api import ENDED, ControlError, JobDetail, ReceiptInfo
from meshd.node.demo.accounts import mcc_balances
from meshd.node.demo.processes import Child, Processes
from meshd.node.demo.swarm import Participant, Swarm
from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.datasets import parse_manifest, slice_rows
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.rows import unpack
from meshd.p2p.codec import digest

T = TypeVar("T")

PATIENCE_S = 300.0
"""How long anything may take on a busy machine before a test fails."""
POLL_S = 0.1
EPOCH_BLOCKS = 6
"""Blocks after which a stake counts, and one."""
ROWS = 48

JOB = {
    "program": "affine.program",
    "data": "numbers.data",
    "rows_per_shard": 6,
    "price": "1000",
    "cap": "100",
    "deadline": "20m",
    "time.window": "5s",
    "audit.silence": 10,
    "orchestrator": "0x" + "ab" * 20,
}
"""A job that would be taken; `LocalSwarm.submit` names the swarm's own orchestrator."""


def wait_for(what: str, found: Callable[[], T | None], *, patience_s: float = PATIENCE_S) -> T:
    """Return what *found* finds, as soon as it is anything; fail if that takes too long."""
    until = time.monotonic() + patience_s
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < until, f"{what}: not within {patience_s:g} s"
        time.sleep(POLL_S)


def meshd(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a `meshd` command to its end, as a user's shell would."""
    return subprocess.run(
        [sys.executable, "-m", "meshd.node.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=clean_environment() | (env or {}),
        timeout=PATIENCE_S,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """The environment without anything that would configure meshd."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MESHD_")}


def job_toml(**changes: Any) -> str:
    """A job.toml: JOB with *changes*, `table__key` for a key in a table; None leaves one out."""
    keys = JOB | {name.replace("__", "."): value for name, value in changes.items()}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
    return "\n".join(lines) + "\n"


@dataclass
class LocalSwarm:
    """The chain and the daemons of a test session, and what its user does with them."""

    folder: Path
    processes: Processes = field(init=False)
    swarm: Swarm = field(init=False)

    def __post_init__(self) -> None:
        self.processes = Processes(self.folder)
        self.swarm = Swarm(self.folder, self.processes)

    # ---- starting and stopping -----------------------------------------------------------

    async def populate(self) -> None:
        """Start, fund and stake an orchestrator, three validators, two workers, a researcher."""
        await self.swarm.add("orchestrator", "orchestrator", ("orchestrator", "aggregator"))
        async with trio.open_nursery() as nursery:
            for number in (1, 2, 3):
                name = f"validator-{number}"
                nursery.start_soon(self.swarm.add, name, "validator", ("validator",))
            for number in (1, 2):
                nursery.start_soon(self.swarm.add, f"worker-{number}", "worker", ("worker",))
            nursery.start_soon(self.swarm.add, "researcher", "researcher", ())
        await self.swarm.fund()
        await self.swarm.stake()
        staked = self.height()
        await self.swarm.wait_discovered()
        self.write_inputs(self.folder)
        wait_for("the stakes count", lambda: self.height() > staked + EPOCH_BLOCKS)

    def height(self) -> int:
        """Return the chain's height as the researcher's daemon has seen it."""
        return self.researcher.status()["chain"]["height"] or 0

    def write_inputs(self, folder: Path) -> None:
        """Write the program and the dataset that JOB names."""
        (folder / JOB["program"]).write_bytes(affine_program(steps=3))
        write_dataset(affine_dataset(ROWS), folder / JOB["data"])

    def end(self) -> None:
        """End every process."""
        trio.run(self.processes.end_all)

    def __getitem__(self, name: str) -> Participant:
        return self.swarm.participants[name]

    def kill(self, name: str) -> None:
        """End a daemon (or "chain") as a power cut would."""
        child = self._child(name)
        self.processes.kill(child)
        child.process.wait()

    def signal(self, name: str, number: int) -> None:
        """Send a daemon (or "chain") a signal that ends it."""
        child = self._child(name)
        self.processes.killed.add(child.pid)
        child.process.send_signal(number)

    def restart(self, name: str, *, same_port: bool = False) -> None:
        """Start a daemon again on its data directory and wait until it answers."""
        old = self[name]
        arguments = ["meshd.node.cli", "up", "--config", str(self.folder / f"{name}.toml")]
        if same_port:
            arguments += ["--listen", f"/ip4/127.0.0.1/tcp/{old.port}"]
        self.processes.children.remove(old.child)
        old.child = self.processes.start(name, arguments)
        old.status = wait_for(f"{name} answers", lambda: self._status(name))

    def restart_chain(self) -> None:
        """Start the chain again on its port and directory and wait until it answers."""
        assert self.swarm.chain is not None
        data_dir, port = str(self.folder / "chain"), self.swarm.rpc.rsplit(":", 1)[1]
        arguments = ["meshd.node.cli", "chain", "dev", "--port", port, "--data-dir", data_dir]
        self.processes.children.remove(self.swarm.chain)
        before = self.swarm.chain.log.read_text()
        self.swarm.chain = self.processes.start("chain", arguments)
        log = self.swarm.chain.log
        wait_for("the chain answers", lambda: self.swarm.rpc in log.read_text()[len(before) :])

    def _child(self, name: str) -> Child:
        if name == "chain":
            assert self.swarm.chain is not None
            return self.swarm.chain
        return self[name].child

    def _status(self, name: str) -> Any:
        self.processes.check()
        try:
            return connect(self.folder / name).status()
        except ControlError:
            return None

    def descendants(self, name: str) -> list[psutil.Process]:
        """Return the processes that a daemon (or "chain") started."""
        return psutil.Process(self._child(name).pid).children(recursive=True)

    # ---- asking --------------------------------------------------------------------------

    @property
    def researcher(self) -> Client:
        """The researcher's daemon."""
        return self["researcher"].client

    def meshd(self, *arguments: str, node: str = "researcher") -> Any:
        """Run a command with --json at a daemon; return what it prints, fail if it fails."""
        done = meshd(*arguments, "--json", "--data-dir", str(self.folder / node), cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def submit(self, **changes: Any) -> str:
        """Write a job.toml and submit it with `meshd job submit`; return the job's id."""
        path = self.folder / "job.toml"
        orchestrator = {"orchestrator": self["orchestrator"].address}
        path.write_text(job_toml(**orchestrator | changes))
        job_id = self.meshd("job", "submit", str(path))["id"]
        assert isinstance(job_id, str)
        return job_id

    def wait_job(self, what: str, job_id: str, holds: Callable[[JobDetail], bool]) -> JobDetail:
        """Return the job as soon as *holds* holds; fail if it ends without."""

        def look() -> JobDetail | None:
            self.processes.check()
            detail = self.researcher.job(job_id)
            if holds(detail):
                return detail
            assert detail["state"] not in ENDED, f"{what}: it ended {detail['state']} before"
            return None

        return wait_for(what, look)

    def wait_ended(self, job_id: str) -> JobDetail:
        """Return the job when it has ended."""
        return self.wait_job(f"job {job_id[:8]} ends", job_id, lambda d: d["state"] in ENDED)

    def balances(self) -> dict[str, int]:
        """Return every participant's MCC by address, as the chain has it when no job is open."""
        for job in self.researcher.jobs():
            self.wait_ended(job["id"])
        addresses = [participant.address for participant in self.swarm.participants.values()]
        return trio.run(mcc_balances, self.swarm.rpc, self.swarm.deployment, addresses)


# ---- what has to be true of a job that is over ----------------------------------------------


def assert_money_is_exact(
    swarm: LocalSwarm, jobs: Sequence[str], before: dict[str, int], after: dict[str, int]
) -> None:
    """Each escrow adds up, and balances moved by exactly what the receipts of *jobs* say."""
    moved: Counter[str] = Counter()
    researcher = swarm["researcher"].address
    for job_id in jobs:
        escrow = {k: parse_mcc(v) for k, v in swarm.meshd("job", "show", job_id)["escrow"].items()}
        assert escrow["deposited"] == escrow["burnt"] + escrow["paid"] + escrow["refunded"]
        receipts: list[ReceiptInfo] = swarm.meshd("job", "receipts", job_id)
        assert sum(parse_mcc(receipt["amount"]) for receipt in receipts) == escrow["paid"]
        for receipt in receipts:
            moved[receipt["account"]] += parse_mcc(receipt["amount"])
        moved[researcher] -= escrow["deposited"] - escrow["refunded"]
    assert {who: after[who] - before[who] for who in before} == {who: moved[who] for who in before}
    assert set(moved) <= set(before)


def assert_output_is_right(swarm: LocalSwarm, job_id: str) -> None:
    """The job's result, row by row and bit by bit, is what the program makes of the data."""
    out = swarm.folder / f"{job_id[:10]}.rows"
    written = swarm.meshd("job", "result", job_id, "--out", str(out))
    result = unpack(out.read_bytes())
    assert (result.count, written["rows"]) == (ROWS, ROWS)
    program = (swarm.folder / JOB["program"]).read_bytes()
    dataset = affine_dataset(ROWS)
    manifest = parse_manifest(dataset.manifest_bytes)
    chunks = {digest(chunk): chunk for chunk in dataset.chunks}
    inputs = unpack(slice_rows(manifest, chunks, range(ROWS)))
    assert result.rows() == unpack(run_program(parse_program(program), program, inputs)).rows()


def paid_attempts(receipts: Iterable[ReceiptInfo]) -> dict[int, int]:
    """Return the attempt that was paid of each shard; no shard is paid twice."""
    work = [receipt for receipt in receipts if receipt["kind"] == "work"]
    attempts = {receipt["shard"]: receipt["attempt"] for receipt in work}
    assert len(attempts) == len(work)
    return attempts
