"""A job as this node can know it at any time: followed now, on disk, or asked of the swarm."""

from __future__ import annotations

import trio

from meshd.node.archive import load_log
from meshd.node.jobs import JobRecord, Jobs
from meshd.node.kinds.kind import JobContext
from meshd.node.log.follower import Follower
from meshd.node.log.view import LogView
from meshd.node.ports import Ports
from meshd.node.researcher import Researcher
from meshd.node.submitted import OVER
from meshd.node.workloads.plans import Plan

PLAN_S = 60.0
"""Seconds that program and manifest may take to come."""
LOG_S = 60.0
"""Seconds that a log may take to come from those who keep it."""


class RecallError(Exception):
    """A job cannot be looked into.

    RecallError
    ├── UnknownJob   this node has never heard of it
    ├── NotBegun     it has no log yet, or never had one
    └── PlanMissing  nobody serves its program or data
    """


class UnknownJob(RecallError):
    """This node has never heard of the job."""


class NotBegun(RecallError):
    """The job has no log yet, or never had one."""


class PlanMissing(RecallError):
    """Nobody serves the job's program or its data's manifest."""


async def recall(ports: Ports, jobs: Jobs, researcher: Researcher, job_id: bytes) -> JobContext:
    """Return a job with as much of its certified log as can be had.

    Raises RecallError, and WorkloadError for a program or data that are not what the terms say.
    """
    name = f"job 0x{job_id.hex()}"
    record = await jobs.recall(job_id)
    if record is None:
        raise UnknownJob(f"{name} is not known to this daemon")
    if not record.ready:
        raise NotBegun(f"{name} has not started: its terms or its committee are not known here")
    plan = await _plan(jobs, record, ports)
    own = researcher.submitted.get(job_id)
    view = await researcher.view_of(own) if own is not None else jobs.known_view(job_id)
    if view is None and own is not None:
        raise NotBegun(f"{name} is {own.state.value} and has no log")
    followed = view is not None and (own is None or own.state not in OVER)
    if view is None:
        view = jobs.view(record, plan)
        await load_log(ports, view)
    if view.state.end is None and not followed:
        with trio.move_on_after(LOG_S):
            await _catch_up(ports, view)
    return JobContext(ports, jobs, record, plan, view)


async def _plan(jobs: Jobs, record: JobRecord, ports: Ports) -> Plan:
    with trio.move_on_after(PLAN_S):
        return await jobs.load_plan(record)
    assert record.terms is not None
    wanted = (record.terms.message.program, record.terms.message.data)
    missing = " and ".join(blob.hex() for blob in wanted if blob not in ports.blobs)
    raise PlanMissing(
        f"program or data of job 0x{record.id.hex()} did not come within {PLAN_S:g} s: nobody "
        f"serves blob {missing}"
    )


async def _catch_up(ports: Ports, view: LogView) -> None:
    """Ask those who keep the log for it until they have no more."""
    follower, before = Follower(ports, view), -1
    while view.seq > before:
        before = view.seq
        await follower.pull()
