"""One training job during which everybody dies in turn, and what is true of it afterwards."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from meshd.node.compute.toy import affine_dataset
from meshd.node.compute.toy_training import training_program
from meshd.node.control.api import ControlError, JobDetail, LogLine
from meshd.node.workloads.datasetfile import write_dataset
from tests.e2e.local_swarm import (
    PATIENCE_S,
    LocalSwarm,
    assert_money_is_exact,
    clean_environment,
    meshd,
    paid_attempts,
    wait_for,
)

ROUNDS, SHARDS = 40, 4
LONG = 60
"""Rounds of a job during which somebody is killed ten times."""
WORKERS = ("worker-1", "worker-2")


@dataclass
class Story:
    """The jobs, and what their log said of closed rounds when somebody was killed."""

    swarm: LocalSwarm
    id: str
    before: dict[str, int]
    other: str = ""
    reached: int = 0
    """Rounds that were closed when it was looked last."""
    closed: dict[str, str] = field(default_factory=dict)
    """Entries of closed rounds: what each said, by digest."""

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Have one more round close, at least, by those who are there when this ends.

        Between two of these the workers are paused: the job lasts, however fast this machine is.
        """
        for name in WORKERS:
            self.swarm[name].client.resume()
        yield
        before = max(self.reached, self.done())  # a daemon that just began knows of fewer
        detail = self.swarm.wait_job(
            f"more than {before} rounds are closed", self.id, lambda detail: _done(detail) > before
        )
        assert detail["rounds"] is not None
        self.reached = detail["rounds"]["done"]
        assert (detail["state"], self.reached < detail["rounds"]["total"]) == ("running", True)
        for name in WORKERS:
            self.swarm[name].client.pause()

    def done(self) -> int:
        """Return how many rounds are closed for good."""
        return _done(self.swarm.researcher.job(self.id))

    def remember(self) -> None:
        """Remember what the log says of the rounds that are closed for good."""
        done = self.done()
        for line in log_of(self.swarm, self.id):
            ours = line["kind"] in ("assignment", "round-close")
            if ours and int(line["text"].split()[1].rstrip(":")) < done:
                self.closed[line["digest"]] = line["text"]


def _done(detail: JobDetail) -> int:
    return detail["rounds"]["done"] if detail["rounds"] else 0


def log_of(swarm: LocalSwarm, job: str) -> list[LogLine]:
    """Return every certified entry of a job's log."""
    lines: list[LogLine] = []
    place: int | None = 0
    while place is not None:
        page = swarm.researcher.log(job, place)
        lines += page["lines"]
        place = page["next"]
    return lines


def contributions_of(swarm: LocalSwarm, job: str, name: str) -> list[tuple[int, int]]:
    """Return round and attempt of every shard that was given to a worker."""
    found = []
    for line in log_of(swarm, job):
        words = line["text"].split()
        if line["kind"] == "assignment" and words[words.index("to") + 1] == swarm[name].address:
            found.append((int(words[1]), int(words[5])))
    return found


def write_inputs(swarm: LocalSwarm) -> dict[str, Any]:
    """Write program and data; return what a job.toml says of a training job on them."""
    (swarm.folder / "model.meshd").write_bytes(training_program())
    write_dataset(affine_dataset(64, width=16), swarm.folder / "train.meshd-data")
    return {
        "workload": "train",
        "program": "model.meshd",
        "data": "train.meshd-data",
        "rows_per_shard": None,
        "time__window": "1s",
        "train__rounds": ROUNDS,
        "train__shards": SHARDS,
        "train__steps": 20,
        "train__batch": 4,
        "train__min_share": 1,
    }


@pytest.fixture(scope="module")
def story(swarm: LocalSwarm) -> Iterator[Story]:
    """A job during which everybody dies, and another one beside it on the same workers."""
    before = swarm.balances()
    inputs = write_inputs(swarm)
    jobs = [swarm.submit(**inputs), swarm.submit(**inputs, seed=7)]
    yield Story(swarm, jobs[0], before, jobs[1])
    for name in WORKERS:
        swarm[name].client.resume()


def test_a_worker_killed_with_a_lease_leaves_its_shard_to_others(story: Story) -> None:
    worker = story.swarm["worker-1"]
    wait_for("the worker computes", lambda: worker.client.status()["shards"])
    with story.going_on():
        story.swarm.kill("worker-1")
        story.swarm.restart("worker-1")


def test_one_of_two_jobs_on_all_workers_is_cancelled_in_mid_round(story: Story) -> None:
    story.swarm.wait_job("it has a round", story.other, lambda detail: _done(detail) > 0)
    with story.going_on():
        story.swarm.meshd("job", "cancel", story.other)


def test_a_worker_whose_disk_is_full_hands_its_shard_back_and_the_rounds_go_on(
    story: Story,
) -> None:
    worker = story.swarm["worker-2"]
    process = psutil.Process(worker.child.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    with story.going_on():
        process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))  # every write fails from now on
        try:
            (warning,) = wait_for("it takes no shards", lambda: worker.client.status()["warnings"])
        finally:
            process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
        assert "nothing can be kept here" in warning
        assert worker.client.status()["shards"] == 0


def test_an_orchestrator_killed_in_mid_round_goes_on_from_its_log(story: Story) -> None:
    with story.going_on():
        story.remember()
        story.swarm.kill("orchestrator")
        story.swarm.restart("orchestrator", same_port=True)


def test_a_validator_and_the_researcher_killed_in_the_middle_are_not_waited_for(
    story: Story,
) -> None:
    with story.going_on():
        story.swarm.kill("validator-1")
        events = story.swarm.researcher.watch(story.id)
        next(events)
        story.swarm.kill("researcher")
        with pytest.raises(ControlError, match="broke off"):
            list(events)
        story.swarm.restart("researcher")
    story.swarm.restart("validator-1")


def test_a_chain_killed_in_the_middle_goes_on_where_it_stopped(story: Story) -> None:
    with story.going_on():
        story.remember()
        story.swarm.kill("chain")
        story.swarm.restart_chain()


def test_the_jobs_end_paid_exactly_and_no_closed_round_was_computed_again(story: Story) -> None:
    swarm = story.swarm
    for name in WORKERS:
        swarm[name].client.resume()
    detail = swarm.wait_ended(story.id)
    assert (detail["state"], detail["shards"]["accepted"]) == ("settled", ROUNDS * SHARDS)
    paid = paid_attempts(swarm.meshd("job", "receipts", story.id))
    assert set(paid) == set(range(ROUNDS * SHARDS))
    final = {line["digest"]: line["text"] for line in log_of(swarm, story.id)}
    assert story.closed
    assert {name: final.get(name) for name in story.closed} == story.closed
    assert sum("contributions" in text for text in final.values()) == ROUNDS
    other = swarm.wait_ended(story.other)
    assert other["state"] == "cancelled"
    assert 0 < _done(other) < ROUNDS
    assert_money_is_exact(swarm, [story.id, story.other], story.before, swarm.balances())


def test_a_worker_that_was_killed_came_back_to_the_job(story: Story) -> None:
    given = contributions_of(story.swarm, story.id, "worker-1")
    assert min(given)[0] < story.done() // 2 < max(given)[0]


def test_a_worker_whose_disk_has_room_again_takes_shards_again(story: Story) -> None:
    worker = story.swarm["worker-2"].client
    wait_for("it has no warning", lambda: not worker.status()["warnings"])


def replay(story: Story, *arguments: str, node: str = "researcher") -> tuple[int, str, str]:
    """Run `meshd replay` at a daemon; return its exit code and what it said."""
    data_dir = str(story.swarm.folder / node)
    done = meshd("replay", *arguments, "--data-dir", data_dir, cwd=story.swarm.folder)
    return done.returncode, done.stdout, done.stderr


def test_a_replay_of_the_whole_job_is_equal(story: Story) -> None:
    code, out, err = replay(story, story.id)
    assert (code, err) == (0, "")
    *rounds, last = out.splitlines()
    assert len(rounds) == ROUNDS
    detail = story.swarm.researcher.job(story.id)
    assert detail["rounds"] is not None
    assert last == (
        f"equal: {ROUNDS} rounds with {ROUNDS * SHARDS} shards give state "
        f"{detail['rounds']['state']} and the job's output, bit for bit"
    )


@pytest.mark.parametrize("node", ["orchestrator", "validator-1", "researcher"])
def test_one_round_is_replayed_on_whatever_daemon_followed_the_job(story: Story, node: str) -> None:
    code, out, _ = replay(story, story.id, "--round", str(ROUNDS // 2), "--json", node=node)
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [event["event"] for event in events] == [*["shard"] * SHARDS, "round", "end"]
    assert {event["result"] for event in events} == {"equal"}


def test_a_replay_is_interrupted_quietly_and_another_one_goes_through(story: Story) -> None:
    data_dir = str(story.swarm.folder / "researcher")
    command = [sys.executable, "-m", "meshd.node.cli", "replay", story.id, "--json"]
    running = subprocess.Popen(
        [*command, "--data-dir", data_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["event"] == "shard"
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, said.split()) == (130, [b"meshd:", b"interrupted"])
    assert wait_for("it is free again", lambda: replay(story, story.id, "--round", "0")[0] == 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--round", str(ROUNDS)), f"it has rounds 0 to {ROUNDS - 1}"),
        (("--round", "-1"), "--round"),
        (("0x" + "12" * 32,), "is not known to this daemon"),
    ],
)
def test_what_cannot_be_replayed_is_told_in_one_line(
    story: Story, arguments: tuple[str, ...], told: str
) -> None:
    job = () if arguments[0].startswith("0x") else (story.id,)
    code, out, err = replay(story, *job, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert told in err


# ---- ten of ten ------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["worker-1", "validator-1", "orchestrator", "researcher", "chain"])
def test_a_role_is_killed_ten_times_at_any_moment_and_the_job_settles_exactly(
    swarm: LocalSwarm, name: str
) -> None:
    """One job for each role: ten kills, each at a random moment of another round."""
    luck = random.Random(name)
    before = swarm.balances()
    job = Story(swarm, swarm.submit(**write_inputs(swarm) | {"train__rounds": LONG}), before)
    for _ in range(10):
        with job.going_on():
            time.sleep(luck.uniform(0, 3))  # the moment of the fault; nothing waits for it
            swarm.kill(name)
            if name == "chain":
                swarm.restart_chain()
            else:
                swarm.restart(name, same_port=name == "orchestrator")
    for worker in WORKERS:
        swarm[worker].client.resume()
    detail = swarm.wait_ended(job.id)
    assert (detail["state"], _done(detail)) == ("settled", LONG)
    paid = paid_attempts(swarm.meshd("job", "receipts", job.id))
    assert set(paid) == set(range(LONG * SHARDS))
    assert_money_is_exact(swarm, [job.id], before, swarm.balances())
    last = list(swarm.researcher.replay(job.id))[-1]
    assert last["result"] == "equal", last["text"]
