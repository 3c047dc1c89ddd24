"""Jobs through the command line only: one to its payment, two that are cancelled."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from meshd.node.control.api import JobDetail
from tests.e2e.local_swarm import (
    LocalSwarm,
    assert_money_is_exact,
    assert_output_is_right,
    meshd,
    paid_attempts,
)

SHARDS = 8


@dataclass
class Jobs:
    """Three jobs that are over, and everybody's MCC before and after them."""

    complete: str
    taken_back: str
    stopped: str
    watched: list[dict[str, object]]
    """What `meshd job watch` printed of the complete one."""
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="module")
def jobs(swarm: LocalSwarm) -> Jobs:
    before = swarm.balances()
    complete = swarm.submit()
    taken_back = swarm.submit(seed=1)
    swarm.meshd("job", "cancel", taken_back)
    stopped = swarm.submit(seed=2)
    swarm.wait_job("leases are out", stopped, _has_leases)
    swarm.meshd("job", "cancel", stopped)
    data_dir = str(swarm.folder / "researcher")
    watch = meshd("job", "watch", complete, "--json", "--data-dir", data_dir, cwd=swarm.folder)
    assert watch.returncode == 0, watch.stderr
    watched = [json.loads(line) for line in watch.stdout.splitlines()]
    return Jobs(complete, taken_back, stopped, watched, before, swarm.balances())


def _has_leases(detail: JobDetail) -> bool:
    return any(worker["leases"] for worker in detail["workers"])


def test_a_job_is_settled_with_every_shard_accepted_and_paid_once(swarm, jobs: Jobs) -> None:
    shown = swarm.meshd("job", "show", jobs.complete)
    assert shown["state"] == "settled"
    assert shown["shards"]["accepted"] == shown["shards"]["total"] == SHARDS
    assert shown["anchors"]
    receipts = swarm.meshd("job", "receipts", jobs.complete)
    assert set(paid_attempts(receipts)) == set(range(SHARDS))
    assert {"work", "audit", "orchestrate", "aggregate"} <= {r["kind"] for r in receipts}


def test_its_result_is_bit_by_bit_what_the_program_makes_of_the_data(swarm, jobs: Jobs) -> None:
    assert_output_is_right(swarm, jobs.complete)


def test_a_watch_tells_every_step_and_exits_when_the_job_has_ended(jobs: Jobs) -> None:
    states = list(dict.fromkeys(event["state"] for event in jobs.watched))
    assert states[-2:] == ["settling", "settled"]
    assert jobs.watched[-1]["shards"]["accepted"] == SHARDS


def test_a_job_cancelled_before_its_start_gets_back_all_but_the_burnt_hundredth(
    swarm, jobs: Jobs
) -> None:
    shown = swarm.meshd("job", "show", jobs.taken_back)
    assert shown["state"] == "cancelled"
    assert shown["escrow"] == {"deposited": "100", "burnt": "1", "paid": "0", "refunded": "99"}
    assert swarm.meshd("job", "receipts", jobs.taken_back) == []


def test_a_job_cancelled_after_its_start_pays_what_passed_and_nothing_else(
    swarm, jobs: Jobs
) -> None:
    shown = swarm.meshd("job", "show", jobs.stopped)
    assert shown["state"] == "cancelled"
    assert shown["shards"]["accepted"] < SHARDS
    receipts = swarm.meshd("job", "receipts", jobs.stopped)
    assert len(paid_attempts(receipts)) == shown["shards"]["accepted"]


def test_balances_moved_by_exactly_what_the_receipts_say(swarm, jobs: Jobs) -> None:
    every = [jobs.complete, jobs.taken_back, jobs.stopped]
    assert_money_is_exact(swarm, every, jobs.before, jobs.after)


def test_jobs_are_listed_with_the_newest_first(swarm, jobs: Jobs) -> None:
    listed = [job["id"] for job in swarm.meshd("job", "ls")]
    places = [listed.index(job) for job in (jobs.stopped, jobs.taken_back, jobs.complete)]
    assert places == sorted(places)
