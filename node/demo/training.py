"""The demo's training job: a small language model, held against one worker that trains alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from meshd.node.control.api import ControlError, JobDetail
from meshd.node.demo.errors import DemoError
from meshd.node.demo.heldout import weights_file
from meshd.node.demo.language import (
    BATCH,
    DATA_FILE,
    LEARNING_RATE,
    OUTER_WARMUP,
    PROGRAM_FILE,
    ROUNDS,
    SHARDS,
    STEPS,
    WARMUP,
)
from meshd.node.demo.processes import Processes
from meshd.node.demo.report import Losses, Output
from meshd.node.demo.stage import SECOND_AUDITS, JobOutcome, Stage, is_settling
from meshd.node.demo.swarm import call, last_json, number_of

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

KILLED_IN: Final = ROUNDS // 4
"""The round, counted from 0, from which on the worker is killed: so it has trained before."""
SPAN: Final = 32
OVERHEAD_STEADY: Final = 1 / SPAN * (1 + SECOND_AUDITS)
OUTPUT_FILE: Final = "language.safetensors"

JOB: Final = f"""\
workload = "train"
program = "{PROGRAM_FILE}"
data = "{DATA_FILE}"

[train]
rounds = {ROUNDS}
shards = {SHARDS}
steps = {STEPS}
batch = {BATCH}
lr = {LEARNING_RATE}
warmup = {WARMUP}
outer_warmup = {OUTER_WARMUP}
min_share = 1

[audit]
span_shards = {SPAN}
silence = 10

[time]
window = "5s"
"""


class TrainingJob:
    """Trains a language model of bytes, round by round."""

    inputs = "language model and source text"

    def __init__(self) -> None:
        self._units = 0
        self._fetched = 0
        """Rounds whose weights are here."""
        self._told = 0
        """Lines of losses that were shown."""

    async def make_inputs(self, processes: Processes, folder: Path, seed: int) -> None:
        """Export the model and cut the text into rows."""
        arguments = ["--out", str(folder), "--seed", str(seed)]
        text = await processes.run("language", ["meshd.node.demo.language", *arguments])
        self._units = ROUNDS * SHARDS * number_of(last_json(text), "units_per_shard")

    async def run(
        self, stage: Stage, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> JobOutcome:
        """See the job through; it counts as started when all its work is done."""
        stage.progress.phase("job: training the language model")
        killed: list[bool] = []
        losses: list[Losses] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_judge, stage, losses)
            job_id = await stage.submit(JOB, self._units)
            async with trio.open_nursery() as watching:
                watching.start_soon(_kill, stage, job_id, killed)
                on_change = partial(self._show_round, stage)
                await stage.wait_until(job_id, is_settling, on_change)
                watching.cancel_scope.cancel()
            task_status.started()
            detail = await stage.wait_until(job_id, lambda _: False)
            if self._fetched < ROUNDS:
                nursery.cancel_scope.cancel()  # its losses will not come
        outcome = JobOutcome(detail, STEPS * BATCH, OVERHEAD_STEADY, any(killed))
        client = stage.researcher.client
        outcome.receipts = await call(lambda: client.receipts(job_id))
        outcome.check = losses[0] if losses else None
        if detail["output"]:
            outcome.outputs = [await self._fetch_result(stage, job_id)]
        return outcome

    async def _show_round(self, stage: Stage, detail: JobDetail) -> None:
        """Bring the weights after each closed round here, as any user could; show their losses."""
        client = stage.researcher.client
        done = detail["rounds"]["done"] if detail["rounds"] is not None else 0
        while self._fetched < done:
            path = stage.folder / weights_file(self._fetched + 1)
            try:
                await call(partial(client.part, detail["id"], self._fetched, path))
            except ControlError as error:
                if error.code != "again":
                    raise
                return
            self._fetched += 1
        lines = stage.swarm.processes.log_of("heldout").read_text().splitlines()
        for line in lines[self._told :]:
            if (said := _loss_text(line)) is not None:
                stage.progress.note(said)
        self._told = len(lines)

    async def _fetch_result(self, stage: Stage, job_id: str) -> Output:
        """Fetch the result, which is to be the weights after the last round."""
        output = stage.out / OUTPUT_FILE
        await call(lambda: stage.researcher.client.result(job_id, output))
        last = stage.folder / weights_file(ROUNDS)
        if last.exists() and last.read_bytes() != output.read_bytes():
            raise DemoError(
                f"the result of job {job_id} is not what its last round came to: run again with "
                "--keep for the logs"
            )
        return Output.of(output, "the trained weights, for load_state_dict")


def _loss_text(line: str) -> str | None:
    """Return a line of the judge's for people; None for its last one."""
    if not line.startswith("{"):
        return None
    said = json.loads(line)
    if "alone" in said:
        return f"one worker alone: held-out loss {said['alone']:.3f}"
    return f"round {said['round']}: held-out loss {said['loss']:.3f}" if "round" in said else None


async def _kill(stage: Stage, job_id: str, killed: list[bool]) -> None:
    """Kill the victim in a round in the middle."""
    client = stage.researcher.client
    while True:
        rounds = (await call(lambda: client.job(job_id)))["rounds"]
        if rounds is not None and rounds["done"] >= KILLED_IN:
            break
        await trio.sleep(0.5)
    killed.append(await stage.kill_while_computing())


async def _judge(stage: Stage, losses: list[Losses]) -> None:
    """Have the held-out losses computed, while the job runs, and those of one worker alone."""
    options = ["--rounds", str(ROUNDS), "--seed", str(stage.options.seed)]
    arguments = ["meshd.node.demo.heldout", "--dir", str(stage.folder), *options]
    found = last_json(await stage.swarm.processes.run("heldout", arguments))
    rounds, alone = found["loss"], found["loss_alone"]
    assert isinstance(rounds, list)
    assert isinstance(alone, float)
    losses.append(Losses(tuple(rounds), alone))
