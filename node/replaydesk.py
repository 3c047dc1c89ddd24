"""What a daemon tells of a replay: each step as an event of the control API, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

from meshd.node.compute.executor import ExecutorError, ExecutorUnavailable
from meshd.node.control.api import (
    ControlError,
    ReplayEvent,
    ReplayResult,
    ReplayShard,
    SendReplay,
)
from meshd.node.kinds.kind import JobContext
from meshd.node.node import Node
from meshd.node.recall import NotBegun, PlanMissing, RecallError, UnknownJob, recall
from meshd.node.replay import (
    BlobMissing,
    NoSuchRound,
    Replay,
    ReplayedOutput,
    ReplayedRound,
    ReplayedShard,
    ReplayError,
    Step,
)
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.identity import hex_address

SHOWN = 4
"""Shards that a line of text names."""


async def tell_replay(node: Node, job_id: bytes, only: int | None, send: SendReplay) -> None:
    """Replay a job, or round *only* of it, on this node; send every event as it comes.

    Raises ControlError, and WorkloadError for a program or data that are not the job's.
    """
    try:
        context = await recall(node.ports, node.jobs, node.researcher, job_id)
        replay = _replay(context, only)
        told = ReplayTold(replay)
        async with aclosing(replay.steps()) as steps:
            async for step in steps:
                event = told.event_of(step)
                if event is not None:
                    await send(event)
        await send(told.end())
    except (RecallError, ReplayError, ExecutorError) as error:
        raise _told(error) from error


def _replay(context: JobContext, only: int | None) -> Replay:
    plan, job = context.plan, f"job 0x{context.record.id.hex()}"
    if not isinstance(plan, TrainPlan):
        raise ControlError(
            "usage",
            f"{job} is inference: only training is replayed",
            "its shards were audited one by one: see `meshd job show --json`",
        )
    try:
        return Replay(context, plan, only)
    except NoSuchRound as error:
        if context.view.state.end is None and (only or 0) < plan.terms.rounds:
            raise ControlError("again", f"{job}: {error}", "wait until it is closed") from error
        raise ControlError("usage", f"{job}: {error}", "see `meshd job show`") from error


def _told(error: Exception) -> ControlError:
    """Return what the user is told of what keeps a replay from its end."""
    match error:
        case UnknownJob():
            return ControlError("not-found", str(error), "ask a daemon that took part in it")
        case NotBegun():
            return ControlError("again", str(error), "wait for its start, or ask another daemon")
        case PlanMissing() | BlobMissing():
            cure = "start a daemon that has it (the job's researcher, orchestrator or a validator)"
            return ControlError("unavailable", str(error), cure)
        case ExecutorUnavailable():
            return ControlError("unavailable", str(error), "see `meshd doctor`")
        case _:
            return ControlError("failed", str(error))


class ReplayTold:
    """Turns the steps of one replay into events, and at last into its result."""

    def __init__(self, replay: Replay) -> None:
        self._rounds = replay.rounds
        self._total = replay.shards
        self._shards: list[ReplayedShard] = []
        self._closed: list[ReplayedRound] = []
        self._output: ReplayedOutput | None = None

    def event_of(self, step: Step) -> ReplayEvent | None:
        """Return what is told of a step at once; None: it is told at the end."""
        match step:
            case ReplayedShard():
                self._shards.append(step)
                text = f"{self._name(step.round)}, shard {step.shard}: {_result((step,))}"
                return self._event("shard", step.round, _result((step,)), text, shards=[step])
            case ReplayedRound():
                self._closed.append(step)
                result = _result(step.shards) if step.equal else "different"
                text = f"{self._name(step.round)}: {_round_text(step)}"
                return self._event("round", step.round, result, text, step, unequal(step.shards))
            case ReplayedOutput():
                self._output = step
                return None

    def end(self) -> ReplayEvent:
        """Return the result of all steps."""
        last = self._closed[-1]
        result, text = self._verdict()
        return self._event("end", last.round, result, text, last, unequal(self._shards))

    def _verdict(self) -> tuple[ReplayResult, str]:
        wrong = [each.round for each in self._closed if not each.equal]
        differing = [each for each in self._shards if each.equal is False]
        missed = [each for each in differing if not each.found]
        others = [each for each in self._shards if each.equal is None]
        rounds, shards = _many(len(self._closed), "round"), _many(len(self._shards), "shard")
        if wrong:
            which = ", ".join(map(str, wrong))
            text = f"another state, gate or loss than the log's follows from round {which}"
            return "different", f"different: {text}"
        if self._output is not None and self._output.output != self._output.logged:
            return "different", "different: another output follows from the last state"
        if missed:
            text = f"{len(missed)} of {shards} come to something else here"
            return "different", f"different: {text}: {_listed(missed)}"
        if others:
            text = f"{len(others)} of {shards} were computed on machines with other bits than this"
            states = f"the states follow from the contributions of {rounds}"
            return (
                "other-class",
                f"other numeric class: {text}: they cannot be equal here; {states}",
            )
        text = f"equal: {rounds} with {shards} give state 0x{self._closed[-1].state.hex()}"
        text += (
            " and the job's output, bit for bit" if self._output is not None else ", bit for bit"
        )
        if differing:
            found = f"{_many(len(differing), 'contribution')} that audits had found wrong"
            text += f"; among them {found}: {_listed(differing)}"
        return "equal", text

    def _name(self, round_: int) -> str:
        return f"round {round_} of {self._rounds}"

    def _event(
        self,
        event: Literal["shard", "round", "end"],
        round_: int,
        result: ReplayResult,
        text: str,
        closed: ReplayedRound | None = None,
        shards: Sequence[ReplayedShard] = (),
    ) -> ReplayEvent:
        return ReplayEvent(
            event=event,
            result=result,
            text=text,
            round=round_,
            rounds=self._rounds,
            done=len(self._shards),
            total=self._total,
            state="0x" + closed.state.hex() if closed is not None else "",
            logged="0x" + closed.logged.hex() if closed is not None else "",
            shards=[
                ReplayShard(
                    round=each.round,
                    shard=each.shard,
                    worker=hex_address(each.worker),
                    result=_result((each,)),
                    audit=each.outcome.value,
                )
                for each in shards
            ],
        )


def unequal(shards: Sequence[ReplayedShard]) -> list[ReplayedShard]:
    """Return those that are not shown to be equal."""
    return [shard for shard in shards if not shard.equal]


def _result(shards: Sequence[ReplayedShard]) -> ReplayResult:
    if any(shard.equal is False for shard in shards):
        return "different"
    return "other-class" if any(shard.equal is None for shard in shards) else "equal"


def _round_text(closed: ReplayedRound) -> str:
    state = "its state follows" if closed.equal else "another state, gate or loss follows"
    differing = [shard for shard in closed.shards if shard.equal is False]
    others = sum(shard.equal is None for shard in closed.shards)
    parts = [state, f"{len(closed.shards) - len(differing) - others} shards equal"]
    parts += [f"{others} of another numeric class"] if others else []
    parts += [f"different: {_listed(differing)}"] if differing else []
    return ", ".join(parts)


def _listed(shards: Sequence[ReplayedShard]) -> str:
    """Name some shards, their workers, and what their audits came to."""
    names = [
        f"round {each.round} shard {each.shard} by {hex_address(each.worker)} "
        f"(audit: {each.outcome.value})"
        for each in shards[:SHOWN]
    ]
    more = len(shards) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
