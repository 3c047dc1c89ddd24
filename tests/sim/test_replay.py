"""Replays: a training job computed again by whoever knows of it, from log and blobs alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from sim import adversaries as bad
from sim.cast import CountingExecutor, finish, gather, log_of, wait_until
from sim.invariants import Cast
from sim.swarm import SimNode, Swarm, simulated

from meshd.ledger.rounds import accepted
from meshd.node.compute.executor import CloseRequest, CloseResult, TrainRequest, TrainResult
from meshd.node.compute.toy import ToyExecutor
from meshd.node.control.api import ControlError, ReplayEvent
from meshd.node.replaydesk import tell_replay
from meshd.node.submitted import SubmittedJob
from meshd.p2p.identity import hex_address

FAST = 1_000_000
OTHERS = ("oscar", "victor", "vera", "vince", "wanda", "will", "walt")


class Recording(ToyExecutor):
    """Notes which shards it trained and which rounds it closed."""

    def __init__(self) -> None:
        super().__init__(FAST)
        self.trained: list[tuple[int, int, int]] = []
        self.closed: list[int] = []

    async def train(self, job: TrainRequest) -> TrainResult:
        self.trained.append((job.slot, job.round, job.shard))
        return await super().train(job)

    async def close_round(self, job: CloseRequest) -> CloseResult:
        self.closed.append(job.round)
        return await super().close_round(job)

    def replayed(self) -> list[tuple[int, int]]:
        """Return round and shard of everything trained but the canary."""
        return [(r, s) for slot, r, s in self.trained if slot == -2]


async def replayed(
    node: SimNode, job: SubmittedJob, only: int | None = None
) -> Sequence[ReplayEvent]:
    """Return the events of a replay on *node*."""
    events: list[ReplayEvent] = []

    async def send(event: ReplayEvent) -> None:
        await trio.lowlevel.checkpoint()
        events.append(event)

    assert node.node is not None
    await tell_replay(node.node, job.id, only, send)
    return events


async def fault_of(node: SimNode, job: bytes, only: int | None = None) -> ControlError:
    """Return the error that a replay on *node* ends with."""

    async def send(_: ReplayEvent) -> None:
        await trio.lowlevel.checkpoint()

    assert node.node is not None
    with pytest.raises(ControlError) as caught:
        await tell_replay(node.node, job, only, send)
    return caught.value


def last_state(swarm: Swarm, job: SubmittedJob) -> str:
    return "0x" + log_of(swarm, job).rounds.state.hex()


def contributions(swarm: Swarm, job: SubmittedJob) -> list[bytes]:
    works = log_of(swarm, job).works.values()
    return [work.commitment.message.output_root for work in works]


def cheating(name: str) -> Cast:
    return Cast(dishonest=frozenset([name]))


@simulated
async def test_a_replay_gives_the_final_state_and_the_output_bit_for_bit(swarm: Swarm) -> None:
    own = Recording()
    rita = await gather(swarm, rita={"executor": own})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3))
    events = await replayed(rita, job)
    assert [e["event"] for e in events] == [*(["shard"] * 4 + ["round"]) * 3, "end"]
    assert {e["result"] for e in events} == {"equal"}
    end = events[-1]
    assert (end["done"], end["total"], end["rounds"], end["shards"]) == (12, 12, 3, [])
    assert end["state"] == end["logged"] == last_state(swarm, job)
    assert "3 rounds with 12 shards" in end["text"]
    assert "and the job's output, bit for bit" in end["text"]


@simulated
async def test_a_replay_needs_nothing_but_what_the_researcher_has_from_the_first(
    swarm: Swarm,
) -> None:
    """Nobody else is left, and the researcher's node was started again."""
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3))
    assert not any(name in rita.blobs for name in contributions(swarm, job))
    states = log_of(swarm, job).rounds.states()
    for name in OTHERS:
        swarm.kill(swarm.nodes[name])
    await swarm.restart(rita, after_s=5)
    end = (await replayed(rita, job))[-1]
    assert (end["result"], end["state"]) == ("equal", "0x" + states[-1].hex())
    kept = [name in rita.blobs for name in states]
    assert kept == [True, False, False, False]
    assert all(name in rita.blobs for name in contributions(swarm, job))


@simulated
async def test_one_round_is_replayed_from_the_newest_state_that_is_served(swarm: Swarm) -> None:
    own = Recording()
    rita = await gather(swarm, rita={"executor": own})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=4))
    states = log_of(swarm, job).rounds.states()
    for name in OTHERS:
        for state in states[2:]:
            swarm.nodes[name].blobs.remove(state)
    assert any(states[1] in swarm.nodes[name].blobs for name in OTHERS)
    events = await replayed(rita, job, 3)
    assert [e["event"] for e in events] == ["shard"] * 4 + ["round", "end"]
    assert (events[-1]["result"], events[-1]["total"]) == ("equal", 4)
    assert sorted(own.replayed()) == [(3, shard) for shard in range(4)]
    assert own.closed == [1, 2, 3]


@simulated
async def test_one_round_is_replayed_from_the_start_if_no_later_state_is_served(
    swarm: Swarm,
) -> None:
    own = Recording()
    rita = await gather(swarm, rita={"executor": own})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3))
    for state in log_of(swarm, job).rounds.states()[1:]:
        for name in OTHERS:
            swarm.nodes[name].blobs.remove(state)
    assert (await replayed(rita, job, 1))[-1]["result"] == "equal"
    assert own.closed == [0, 1]
    assert {r for r, _ in own.replayed()} == {1}


@simulated
async def test_a_round_that_was_repeated_is_replayed_as_it_closed(swarm: Swarm) -> None:
    names = ("wanda", "will", "walt", "wendy")
    once = {n: {"executor": bad.Poisoning(ToyExecutor(1000), bad.zeroed, last=0)} for n in names}
    rita = await gather(swarm, workers=4, **once)
    job = await swarm.submit_training(rita, rounds=2)
    job = await finish(swarm, job, cast=Cast(dishonest=frozenset(names)))
    assert len(log_of(swarm, job).rounds.closes) == 3
    end = (await replayed(rita, job))[-1]
    assert (end["result"], end["total"], end["state"]) == ("equal", 8, last_state(swarm, job))


@simulated
async def test_what_a_caught_cheater_left_in_closed_rounds_is_named_and_equal(
    swarm: Swarm,
) -> None:
    cheater = bad.Skipping(ToyExecutor(1000), 0.25)
    rita = await gather(swarm, workers=5, wanda={"executor": cheater})
    job = await finish(swarm, await swarm.submit_training(rita), cast=cheating("wanda"))
    closes = [close.message for close in log_of(swarm, job).rounds.closes]
    works, wanda = log_of(swarm, job).works, swarm.nodes["wanda"]
    entered = [
        (close.round, works[close.commitments[at]].place[0])
        for close in closes
        for at in accepted(close)
        if works[close.commitments[at]].worker == wanda.address
    ]
    assert entered
    events = await replayed(rita, job)
    end = events[-1]
    assert (end["result"], end["state"]) == ("equal", last_state(swarm, job))
    assert {(s["round"], s["shard"]) for s in end["shards"]} >= set(entered)
    assert {s["worker"] for s in end["shards"]} == {hex_address(wanda.address)}
    assert {s["audit"] for s in end["shards"]} <= {"rejected", "void"}
    assert "that audits had found wrong" in end["text"]
    assert any(e["event"] == "round" and e["result"] == "different" for e in events)


@simulated
async def test_a_contribution_that_differs_and_was_paid_is_named_with_its_worker(
    swarm: Swarm,
) -> None:
    """The liar is the machine that replays: everybody else is honest, and paid."""
    own = bad.Wrapped(ToyExecutor(FAST))

    class Lying(bad.Wrapped):
        async def train(self, job: TrainRequest) -> TrainResult:
            if (job.slot, job.round, job.shard) != (-2, 1, 2):
                return await super().train(job)
            return await bad.Poisoning(own, bad.flipped).cheat(job)

    rita = await gather(swarm, rita={"executor": Lying(own)})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    end = (await replayed(rita, job))[-1]
    assert (end["result"], end["state"]) == ("different", last_state(swarm, job))
    ((shard),) = end["shards"]
    assert (shard["round"], shard["shard"], shard["audit"]) == (1, 2, "accepted")
    assert shard["worker"] in end["text"]
    assert "round 1 shard 2" in end["text"]


@simulated
async def test_a_state_that_does_not_follow_is_told_by_its_round(swarm: Swarm) -> None:
    class Lying(bad.Wrapped):
        async def close_round(self, job: CloseRequest) -> CloseResult:
            done = await super().close_round(job)
            return CloseResult(b"x" + done.state[1:], done.gated) if job.round == 1 else done

    rita = await gather(swarm, rita={"executor": Lying(ToyExecutor(FAST))})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3))
    events = await replayed(rita, job)
    rounds = [(e["round"], e["result"]) for e in events if e["event"] == "round"]
    assert rounds == [(0, "equal"), (1, "different"), (2, "equal")]
    assert events[-1]["result"] == "different"
    assert "follows from round 1" in events[-1]["text"]


@simulated
async def test_a_machine_of_another_numeric_class_says_that_it_cannot_compare(
    swarm: Swarm,
) -> None:
    own = Recording()
    rita = await gather(swarm, rita={"executor": bad.Inexact(own)})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    events = await replayed(rita, job)
    end = events[-1]
    assert end["result"] == "other-class"
    assert end["state"] == end["logged"] == last_state(swarm, job)
    assert "8 of 8 shards were computed on machines with other bits" in end["text"]
    assert own.replayed() == []


@simulated
async def test_a_blob_that_nobody_serves_is_named_in_time(swarm: Swarm) -> None:
    rita = await gather(swarm, rita={"executor": bad.Inexact(ToyExecutor(FAST))})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    missing = contributions(swarm, job)[0]
    for name in OTHERS:
        swarm.nodes[name].blobs.remove(missing)
    began = swarm.seconds
    fault = await fault_of(rita, job.id)
    assert (fault.code, missing.hex() in fault.message) == ("unavailable", True)
    assert "the contribution of round 0, shard" in fault.message
    assert swarm.seconds - began < 60
    rita.blobs.remove(job.terms.message.program)
    for name in OTHERS:
        swarm.kill(swarm.nodes[name])
    fault = await fault_of(rita, job.id)
    assert (fault.code, job.terms.message.program.hex() in fault.message) == ("unavailable", True)


@simulated
async def test_members_of_the_committee_can_replay_after_a_restart_too(swarm: Swarm) -> None:
    rita = await gather(swarm)
    job = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    swarm.kill(rita)
    for name in ("vera", "oscar"):
        node = swarm.nodes[name]
        assert (await replayed(node, job))[-1]["result"] == "equal"
        await swarm.restart(node, after_s=2)
        await trio.sleep(5)
        assert (await replayed(node, job))[-1]["result"] == "equal"


@simulated
async def test_the_closed_rounds_of_a_job_that_runs_are_replayed_and_it_goes_on(
    swarm: Swarm,
) -> None:
    rita = await gather(swarm, rita={"executor": ToyExecutor(FAST)})
    job = await swarm.submit_training(rita, rounds=5)

    def closed() -> int:
        found = swarm.job(rita, job.id)
        return len(found.view.state.rounds.closes) if found and found.view else 0

    await wait_until(lambda: closed() >= 2)
    end = (await replayed(rita, job))[-1]
    assert end["result"] == "equal"
    assert 2 <= end["rounds"] < 5
    fault = await fault_of(rita, job.id, 4)
    assert (fault.code, "round 4 is not closed" in fault.message) == ("again", True)
    await finish(swarm, job)
    assert (await replayed(rita, job, 4))[-1]["result"] == "equal"


@simulated
async def test_a_replay_that_is_left_in_the_middle_leaves_nothing(swarm: Swarm) -> None:
    rita = await gather(swarm, rita={"executor": CountingExecutor()})
    job = await finish(swarm, await swarm.submit_training(rita, rounds=3))
    before = set(log_of(swarm, job).rounds.states()[1:])
    with trio.move_on_after(15) as scope:
        await replayed(rita, job)
    assert scope.cancelled_caught
    assert not any(name in rita.blobs for name in before)
    assert (await replayed(rita, job))[-1]["result"] == "equal"


@simulated
async def test_what_cannot_be_replayed_is_refused_with_the_reason(swarm: Swarm) -> None:
    rita = await gather(swarm)
    inference = await finish(swarm, await swarm.submit(rita, rows=8))
    fault = await fault_of(rita, inference.id)
    assert (fault.code, "only training is replayed" in fault.message) == ("usage", True)
    training = await finish(swarm, await swarm.submit_training(rita, rounds=2))
    fault = await fault_of(rita, training.id, 2)
    assert (fault.code, "it has rounds 0 to 1" in fault.message) == ("usage", True)
    assert (await fault_of(rita, b"\1" * 32)).code == "not-found"
    early = await swarm.submit_training(rita, rounds=2)
    assert (await fault_of(rita, early.id)).code == "again"
    await finish(swarm, early)
