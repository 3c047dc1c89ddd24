"""The course of the demo: start the swarm, run the job, kill a worker, compare, add up."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import trio

from meshd.config.amounts import format_mcc, parse_mcc
from meshd.ledger.draws import PPM
from meshd.node.control.api import ENDED, ControlError, JobDetail, ReceiptInfo
from meshd.node.demo.accounts import mcc_balances
from meshd.node.demo.errors import DemoError
from meshd.node.demo.model import DATA_FILE, PROGRAM_FILE, TEXT_FILE
from meshd.node.demo.options import DemoOptions
from meshd.node.demo.page import Progress
from meshd.node.demo.processes import Processes
from meshd.node.demo.swarm import Participant, Swarm, call, last_json

SENTENCES = 2048
ROWS_PER_SHARD = 128
PRICE = "0.001"
"""MCC per 10^9 compute units."""
JOB_S = 600
"""Seconds that the job may take before the demo gives up."""
AUDIT_ROWS = 2
POLL_S = 0.5

JOB = """\
program = "{program}"
data = "{data}"
rows_per_shard = {rows_per_shard}
price = "{price}"
cap = "{cap}"
deadline = "15m"
orchestrator = "{orchestrator}"

[audit]
rows = {audit_rows}
silence = 10

[time]
window = "5s"
"""


@dataclass
class Outcome:
    """What happened, for the report."""

    swarm: Swarm
    cheater: Participant
    victim: Participant
    before: dict[str, int]
    after: dict[str, int] = field(default_factory=dict)
    detail: JobDetail | None = None
    receipts: list[ReceiptInfo] = field(default_factory=list)
    rows: int = 0
    max_abs_diff: float = float("inf")
    output: Path = Path()
    sentences: Path = Path()
    was_killed: bool = False


async def run_course(
    options: DemoOptions, folder: Path, processes: Processes, progress: Progress
) -> Outcome:
    """Run the whole demo in *folder*; raises DemoError if it cannot go on."""
    swarm = Swarm(folder, processes)
    made: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_make_inputs, options, folder, processes, made)
        progress.phase("chain: starting it and deploying the contracts")
        await swarm.start_chain()
        progress.phase("daemons: starting them")
        cheater, victim = await _start_daemons(options, swarm)
        progress.phase("accounts: funding, registering, staking")
        await swarm.fund()
        await swarm.stake()
        progress.phase("discovery: through the bootstrap peer and the DHT")
        await swarm.wait_discovered()
        progress.phase("model: exporting MiniLM, tokenising sentences")
    outcome = Outcome(swarm, cheater, victim, await _balances(swarm))
    await _run_job(options, outcome, made, progress)
    outcome.after = await _balances(swarm)
    return outcome


async def _make_inputs(
    options: DemoOptions, folder: Path, processes: Processes, made: dict[str, object]
) -> None:
    arguments = ["--out", str(folder), "--sentences", str(SENTENCES), "--seed", str(options.seed)]
    text = await processes.run("model", ["meshd.node.demo.model", *arguments])
    made.update(last_json(text))


async def _start_daemons(options: DemoOptions, swarm: Swarm) -> tuple[Participant, Participant]:
    """Start everybody; return the worker that cheats and the one that will be killed."""
    chosen = random.Random(options.seed).sample(range(1, options.workers + 1), 2)
    cheats, dies = (f"worker-{number}" for number in chosen)
    await swarm.add("orchestrator", "orchestrator", ("orchestrator", "aggregator"))
    async with trio.open_nursery() as nursery:
        for number in range(1, options.validators + 1):
            nursery.start_soon(swarm.add, f"validator-{number}", "validator", ("validator",))
        for number in range(1, options.workers + 1):
            name = f"worker-{number}"
            module = "meshd.node.demo.cheater" if name == cheats else "meshd.node.cli"
            nursery.start_soon(partial(swarm.add, name, "worker", ("worker",), module=module))
        nursery.start_soon(swarm.add, "researcher", "researcher", ())
    return swarm.participants[cheats], swarm.participants[dies]


async def _balances(swarm: Swarm) -> dict[str, int]:
    addresses = [participant.address for participant in swarm.participants.values()]
    return await mcc_balances(swarm.rpc, swarm.deployment, addresses)


# ---- the job -----------------------------------------------------------------------------


async def _run_job(
    options: DemoOptions, outcome: Outcome, made: dict[str, object], progress: Progress
) -> None:
    swarm, folder = outcome.swarm, outcome.swarm.folder
    researcher = swarm.of_role("researcher")[0]
    text = JOB.format(
        program=PROGRAM_FILE,
        data=DATA_FILE,
        rows_per_shard=ROWS_PER_SHARD,
        price=PRICE,
        cap=_cap(made),
        orchestrator=swarm.of_role("orchestrator")[0].address,
        audit_rows=AUDIT_ROWS,
    )
    progress.phase("job: embedding the sentences")
    began = time.monotonic()
    submitted = await call(lambda: researcher.client.submit_text(text, folder))
    job_id = submitted["id"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_compute_reference, outcome)
        nursery.start_soon(_kill_when_computing, outcome)
        with trio.move_on_after(JOB_S) as scope:
            outcome.detail = await _wait_ended(outcome, researcher, job_id, progress)
        if scope.cancelled_caught:
            raise DemoError(f"the job took over {JOB_S} s: run again with --keep for the logs")
        progress.phase("comparison: with plain torch in one process")
    outcome.receipts = await call(lambda: researcher.client.receipts(job_id))
    if outcome.detail is not None and outcome.detail["output"]:
        await _compare(options, outcome, researcher, job_id)
    progress.phase(f"done after {time.monotonic() - began:.0f} s of job")


def _cap(made: dict[str, object]) -> str:
    """Return a cap that pays for the job, its services and audits, and the burnt share."""
    units, rows = made["units_per_shard_of_128"], made["rows"]
    assert isinstance(units, int)
    assert isinstance(rows, int)
    shards = -(-rows // ROWS_PER_SHARD)
    work = Fraction(units * shards * parse_mcc(PRICE), 10**9)
    return format_mcc(int(work * Fraction(125 * PPM, 100 * PPM)) + PPM)


async def _wait_ended(
    outcome: Outcome, researcher: Participant, job_id: str, progress: Progress
) -> JobDetail:
    while True:
        outcome.swarm.processes.check()
        detail = await call(lambda: researcher.client.job(job_id))
        progress.job(detail)
        if detail["state"] in ENDED:
            return detail
        await trio.sleep(POLL_S)


async def _kill_when_computing(outcome: Outcome) -> None:
    """Kill the victim while it computes a shard, hence holds a lease."""
    victim = outcome.victim
    while True:
        try:
            status = await call(victim.client.status)
        except ControlError:
            return
        if status["shards"] > 0:
            outcome.swarm.processes.kill(victim.child)
            outcome.was_killed = True
            return
        await trio.sleep(POLL_S / 2)


async def _compute_reference(outcome: Outcome) -> None:
    arguments = ["--stage", "compute", "--dir", str(outcome.swarm.folder)]
    await outcome.swarm.processes.run("reference", ["meshd.node.demo.reference", *arguments])


async def _compare(
    options: DemoOptions, outcome: Outcome, researcher: Participant, job_id: str
) -> None:
    """Fetch the output and have it compared, row by row, with plain torch's."""
    options.out.mkdir(parents=True, exist_ok=True)
    outcome.output = options.out.absolute() / "embeddings.rows"
    await call(lambda: researcher.client.result(job_id, outcome.output))
    outcome.sentences = options.out.absolute() / TEXT_FILE
    shutil.copy(outcome.swarm.folder / TEXT_FILE, outcome.sentences)
    folder = str(outcome.swarm.folder)
    arguments = ["--stage", "compare", "--dir", folder, "--output", str(outcome.output)]
    text = await outcome.swarm.processes.run("compare", ["meshd.node.demo.reference", *arguments])
    compared = last_json(text)
    rows, difference = compared["rows"], compared["max_abs_diff"]
    assert isinstance(rows, int)
    assert isinstance(difference, float)
    outcome.rows, outcome.max_abs_diff = rows, difference
