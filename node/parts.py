"""The parts of a job's result that can be had before it is complete: accepted rows, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.ledger.jobstate import JobState
from meshd.ledger.works import Work
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.verification.outputs import OutputError, ResultPlace, open_output, packed_rows
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan
from meshd.node.workloads.training.state import result_file
from meshd.p2p.messages import AuditResult
from meshd.p2p.network import NetworkError

FETCH_S = 30.0
"""Seconds that a part may take to come from one that has it."""


class PartError(Exception):
    """A part is not to be had now; the text says why."""


@dataclass(frozen=True)
class Part:
    """An accepted shard's rows, or the weights after a closed round."""

    number: int
    start: int
    stop: int
    """Its rows [start, stop), or how many rounds were closed before and after it."""
    digest: bytes
    """The commitment's, or the round state's: another one if the part was computed again."""


def parts_of(state: JobState) -> list[Part]:
    """Return what is accepted, or closed, by now."""
    terms = state.terms
    if state.rounds.training:
        states = state.rounds.states()[1:]
        return [Part(at, at, at + 1, name) for at, name in enumerate(states)]
    parts = []
    for shard in range(terms.shards):
        work = state.shard_done(shard)
        if work is not None:
            start = shard * terms.rows_per_shard
            stop = min(start + terms.rows_per_shard, terms.rows)
            parts.append(Part(shard, start, stop, work.hash))
    return parts


async def read_part(
    ports: Ports, jobs: Jobs, record: JobRecord, view: LogView, number: int
) -> bytes:
    """Return a part as a file: packed rows, or safetensors; it is fetched and checked if need be.

    Raises PartError.
    """
    part = next((part for part in parts_of(view.state) if part.number == number), None)
    if part is None:
        raise PartError(f"part {number} is not accepted yet")
    plan = await jobs.load_plan(record)
    try:
        if isinstance(plan, InferPlan):
            work = view.state.works[part.digest]
            return await _rows(ports, plan, record, work)
        genesis = view.job.genesis
        if part.digest not in ports.blobs:
            await ports.network.fetch(
                part.digest,
                max_bytes=plan.state_bytes_limit,
                holders=[genesis.orchestrator, *genesis.committee],
                deadline_s=FETCH_S,
            )
        return result_file(ports.blobs.read(part.digest), plan.program)
    except (NetworkError, WorkloadError) as error:
        raise PartError(f"part {number} cannot be had now: {error}") from error


async def _rows(ports: Ports, plan: InferPlan, record: JobRecord, work: Work) -> bytes:
    """Return an accepted shard's packed rows, from its auditors or its worker."""
    commitment = work.commitment.message
    place = ResultPlace(record.id, work.assignment.message.shard, work.worker)
    why = "nobody has said that it holds them"
    for finding in work.findings:
        if finding.result is not AuditResult.ACCEPTED:
            continue
        name = finding.attestation.message.output
        try:
            if name not in ports.blobs:
                await ports.network.fetch(
                    name,
                    max_bytes=commitment.output_bytes + 1024,
                    holders=[finding.auditor, work.worker, record.orchestrator],
                    deadline_s=FETCH_S,
                )
            blob = ports.blobs.read(name)
            open_output(place, commitment, blob, plan.output_schema)
            return packed_rows(blob)
        except (NetworkError, OutputError) as error:
            why = str(error)
    raise PartError(f"the rows of shard {work.assignment.message.shard} are not here: {why}")
