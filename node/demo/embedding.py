"""The demo's inference job: sentences embedded by MiniLM, compared with plain torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from meshd.node.control.api import JobDetail
from meshd.node.demo.model import DATA_FILE, PROGRAM_FILE, ROWS_PER_SHARD, TEXT_FILE
from meshd.node.demo.processes import Processes
from meshd.node.demo.report import Check, Output
from meshd.node.demo.stage import SECOND_AUDITS, JobOutcome, Stage, is_settling
from meshd.node.demo.swarm import call, last_json, number_of

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

SENTENCES: Final = 2048
AUDIT_ROWS: Final = 2
OVERHEAD_STEADY: Final = AUDIT_ROWS / ROWS_PER_SHARD * (1 + SECOND_AUDITS)
OUTPUT_FILE: Final = "embeddings.rows"

JOB: Final = f"""\
program = "{PROGRAM_FILE}"
data = "{DATA_FILE}"
rows_per_shard = {ROWS_PER_SHARD}

[audit]
rows = {AUDIT_ROWS}
silence = 10

[time]
window = "5s"
"""


class EmbeddingJob:
    """Embeds 2,048 sentences in 16 shards."""

    inputs = "MiniLM and sentences"

    def __init__(self) -> None:
        self._units = 0

    async def make_inputs(self, processes: Processes, folder: Path, seed: int) -> None:
        """Export the model and tokenise the sentences."""
        arguments = ["--out", str(folder), "--sentences", str(SENTENCES), "--seed", str(seed)]
        made = last_json(await processes.run("model", ["meshd.node.demo.model", *arguments]))
        shards = -(-SENTENCES // ROWS_PER_SHARD)
        self._units = shards * number_of(made, "units_per_shard_of_128")

    async def run(
        self, stage: Stage, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> JobOutcome:
        """See the job through; it counts as started when all its work is done."""
        stage.progress.phase("job: embedding the sentences")
        killed: list[bool] = []
        job_id = await stage.submit(JOB, self._units)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_compute_reference, stage)
            async with trio.open_nursery() as watching:
                watching.start_soon(_kill, stage, killed)
                await stage.wait_until(job_id, is_settling)
                watching.cancel_scope.cancel()
            task_status.started()
            detail = await stage.wait_until(job_id, lambda _: False)
        outcome = JobOutcome(detail, ROWS_PER_SHARD, OVERHEAD_STEADY, any(killed))
        client = stage.researcher.client
        outcome.receipts = await call(lambda: client.receipts(job_id))
        if detail["output"]:
            await _compare(stage, outcome, detail)
        return outcome


async def _kill(stage: Stage, killed: list[bool]) -> None:
    killed.append(await stage.kill_while_computing())


async def _compute_reference(stage: Stage) -> None:
    arguments = ["--stage", "compute", "--dir", str(stage.folder)]
    await stage.swarm.processes.run("reference", ["meshd.node.demo.reference", *arguments])


async def _compare(stage: Stage, outcome: JobOutcome, detail: JobDetail) -> None:
    """Fetch the output and have it compared, row by row, with plain torch's."""
    stage.progress.note("comparing the embeddings with plain torch in one process")
    output, sentences = stage.out / OUTPUT_FILE, stage.out / TEXT_FILE
    client = stage.researcher.client
    await call(lambda: client.result(detail["id"], output))
    shutil.copy(stage.folder / TEXT_FILE, sentences)
    arguments = ["--stage", "compare", "--dir", str(stage.folder), "--output", str(output)]
    text = await stage.swarm.processes.run("compare", ["meshd.node.demo.reference", *arguments])
    compared = last_json(text)
    difference = compared["max_abs_diff"]
    assert isinstance(difference, float)
    outcome.check = Check(number_of(compared, "rows"), difference)
    outcome.outputs = [
        Output.of(output, "the embeddings, packed rows in the order of the sentences"),
        Output.of(sentences, "the sentences, one a line"),
    ]
