"""One job during which everybody dies in turn, as in a power cut, and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from meshd.node.control.api import ControlError, JobDetail
from tests.e2e.local_swarm import (
    LocalSwarm,
    assert_money_is_exact,
    assert_output_is_right,
    meshd,
    paid_attempts,
    wait_for,
)

SHARDS = 24


@dataclass
class Job:
    """The job, and what was accepted when the orchestrator was killed, by shard and attempt."""

    id: str
    before: dict[str, int]
    accepted: dict[int, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def job(swarm: LocalSwarm) -> Job:
    """A job that lasts: a worker has few unpaid shards at a time, so there are many cuts."""
    before = swarm.balances()
    submitted = swarm.submit(
        rows_per_shard=2, audit__retention=2, pay__max_unsettled=6, time__window="1s"
    )
    return Job(submitted, before)


def accepted_attempts(detail: JobDetail) -> dict[int, int]:
    """Return shard and attempt of every result that passed its audit."""
    passed = [audit for audit in detail["audits"] if audit["result"] == "accepted"]
    return {audit["shard"]: audit["attempt"] for audit in passed}


def wait_progress(swarm: LocalSwarm, job: Job, *, beyond: int) -> JobDetail:
    """Return the job when more than *beyond* shards are accepted, and not yet all."""
    detail = swarm.wait_job(
        f"more than {beyond} shards are accepted",
        job.id,
        lambda detail: detail["shards"]["accepted"] > beyond,
    )
    assert detail["state"] == "running"
    return detail


def test_a_worker_killed_with_a_lease_comes_back_to_the_job(swarm: LocalSwarm, job: Job) -> None:
    worker = swarm["worker-1"]
    wait_for("the worker computes", lambda: worker.client.status()["shards"])
    swarm.kill("worker-1")
    swarm.restart("worker-1")
    swarm.wait_job(
        "a shard of its is accepted",
        job.id,
        lambda detail: any(
            share["accepted"] for share in detail["workers"] if share["account"] == worker.address
        ),
    )


def test_an_orchestrator_killed_in_the_middle_goes_on_from_its_log(
    swarm: LocalSwarm, job: Job
) -> None:
    detail = wait_progress(swarm, job, beyond=0)
    job.accepted = accepted_attempts(detail)
    swarm.kill("orchestrator")
    swarm.restart("orchestrator", same_port=True)
    wait_progress(swarm, job, beyond=detail["shards"]["accepted"])


def test_a_validator_killed_in_the_middle_leaves_a_quorum_and_comes_back_to_it(
    swarm: LocalSwarm, job: Job
) -> None:
    detail = swarm.researcher.job(job.id)
    assert detail["quorum"] == 2
    swarm.kill("validator-1")
    swarm.restart("validator-1")
    wait_progress(swarm, job, beyond=detail["shards"]["accepted"])


def test_a_researchers_daemon_that_was_killed_goes_on_following_its_job(
    swarm: LocalSwarm, job: Job
) -> None:
    events = swarm.researcher.watch(job.id)
    accepted = next(events)["shards"]["accepted"]
    swarm.kill("researcher")
    with pytest.raises(ControlError, match="broke off"):
        list(events)
    swarm.restart("researcher")
    assert wait_progress(swarm, job, beyond=accepted)["id"] == job.id


def test_a_chain_killed_in_the_middle_goes_on_where_it_stopped(swarm: LocalSwarm, job: Job) -> None:
    detail = swarm.researcher.job(job.id)
    swarm.kill("chain")
    swarm.restart_chain()
    wait_progress(swarm, job, beyond=detail["shards"]["accepted"])


def test_the_job_ends_settled_exactly_and_nothing_accepted_was_computed_again(
    swarm: LocalSwarm, job: Job
) -> None:
    data_dir = str(swarm.folder / "researcher")
    watch = meshd("job", "watch", job.id, "--json", "--data-dir", data_dir, cwd=swarm.folder)
    assert watch.returncode == 0, watch.stderr
    detail = swarm.meshd("job", "show", job.id)
    assert (detail["state"], detail["shards"]["accepted"]) == ("settled", SHARDS)
    paid = paid_attempts(swarm.meshd("job", "receipts", job.id))
    assert set(paid) == set(range(SHARDS))
    assert job.accepted
    assert {shard: paid[shard] for shard in job.accepted} == job.accepted
    leases = sum(share["leases"] for share in detail["workers"])
    assert leases == sum(attempt + 1 for attempt in paid.values())
    assert_output_is_right(swarm, job.id)
    assert_money_is_exact(swarm, [job.id], job.before, swarm.balances())
