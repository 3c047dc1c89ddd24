"""Logs of training jobs written by hand: rounds, numeric classes and spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.logkit import DOMAIN, JOB, LAG, UNITS, Story, person

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.ledger.works import Span, Work
from meshd.p2p.codec import digest
from meshd.p2p.messages import Assignment, Canary, Commitment, RoundClose

CLASS, OTHER = b"\x0c" * 32, b"\x0d" * 32
"""Two numeric classes."""
WORKERS = ("wanda", "will", "wilma", "wolf")
TRAINING: Mapping[str, Any] = {
    "workload": "train",
    "rounds": 2,
    "initial_state": digest(b"state 0"),
    "hyperparameters": ("min_share=0.5",),
    "max_unsettled": 96,
    "cap": 10_000_000,
    "epoch_limit": 10_000_000,
}
"""Two rounds of four shards, eight rows each; two shards are enough for a late round to close."""


def input_hash(round_: int, shard: int, state: bytes) -> bytes:
    """Return a digest of everything that these jobs' shards are computed from."""
    return digest(b"trainlog" + bytes([round_ % 256, shard % 256]) + state)


class Plan:
    """Shards as program and data make them."""

    def units(self, shard: int) -> int:
        """Return a shard's units: all are equal."""
        return UNITS

    def input_hash(self, round_: int, shard: int, state: bytes) -> bytes:
        """Return the digest of a shard's input."""
        return input_hash(round_, shard, state)


class TrainStory(Story):
    """A training job's log. *classes* says who shows which class; all others show `CLASS`."""

    def __init__(
        self,
        *,
        members: int = 3,
        classes: Mapping[str, bytes | None] | None = None,
        **terms: Any,
    ) -> None:
        super().__init__(members=members, **{**TRAINING, **terms})
        self.state = JobState(DOMAIN, self.genesis, self.terms, Plan())
        self.at(1)
        for name in (*WORKERS, *(f"v{i}" for i in range(members))):
            shown = (classes or {}).get(name, CLASS)
            if shown is not None:
                assert self.show(name, shown) is None

    def show(self, name: str, digest_: bytes = CLASS) -> str | None:
        """Let somebody show its numeric class; return why it has no effect."""
        message = Canary(job_id=JOB, party=person(name).address, digest=digest_)
        return self.say(name, message)

    # ---- shards --------------------------------------------------------------------------

    def assignment(self, shard: int, worker: str, **over: Any) -> Assignment:
        """Return the assignment of the open round's shard, its next attempt."""
        rounds = self.state.rounds
        values: dict[str, Any] = {
            "round": rounds.open,
            "attempt": len(self.state.attempts(shard)),
            "input_hash": input_hash(rounds.open, shard, rounds.state),
            "numeric_class": CLASS,
        }
        return super().assignment(shard, worker, **(values | over))

    def commitment(self, assignment: bytes, **over: Any) -> Commitment:
        """Return a commitment for a lease."""
        return super().commitment(assignment, **({"numeric_class": CLASS} | over))

    def commit(self, lease: bytes, worker: str, **over: Any) -> Work:
        """Commit for a lease."""
        assert self.say(worker, self.commitment(lease, **over)) is None
        work = self.state.leases[lease].work
        assert work is not None
        return work

    def deliver(self, workers: Sequence[str], shards: Sequence[int] | None = None) -> list[Work]:
        """Let *workers* in turn deliver the open round's free shards, or *shards* of them."""
        places = self.state.free_shards() if shards is None else shards
        return [
            self.committed(shard, workers[at % len(workers)]) for at, shard in enumerate(places)
        ]

    # ---- rounds --------------------------------------------------------------------------

    def close(self, **over: Any) -> RoundClose:
        """Return the close of the open round on what was committed to it."""
        rounds, works = self.state.rounds, self.state.round_works()
        gated = over.get("gated", ())
        after = digest(b"state %d" % (rounds.open + 1))
        values: dict[str, Any] = {
            "job_id": JOB,
            "term": self.state.term,
            "round": rounds.open,
            "state_before": rounds.state,
            "commitments": tuple(work.hash for work in works),
            "weights": tuple(work.population for work in works),
            "gated": gated,
            "state_after": after if len(gated) < len(works) else rounds.state,
            "loss": "1.0",
        }
        return RoundClose(**(values | over))

    def close_round(self, *gated: int) -> None:
        """Close the open round."""
        assert self.say("oscar", self.close(gated=gated)) is None

    def gate_all(self) -> None:
        """Close the open round of which the gate lets nothing through."""
        self.close_round(*range(len(self.state.round_works())))

    def round(self, *workers: str) -> list[Work]:
        """Let *workers* in turn deliver a whole round, and close it."""
        works = self.deliver(workers or WORKERS)
        self.close_round()
        return works

    # ---- spans ---------------------------------------------------------------------------

    @property
    def spans(self) -> list[Span]:
        """Every span that is closed, in the log's order."""
        return [subject for subject in self.state.subjects.values() if isinstance(subject, Span)]

    def opened(self) -> list[Span]:
        """Go on to the newest beacon; return the spans that have an audit open there."""
        waiting = [span.waiting_beacon(LAG) for span in self.spans]
        self.at(max([self.state.height, *(height for height in waiting if height)]))
        return [span for span in self.spans if span.track is not None]

    def pass_all(self, *, reveal: bool = True) -> None:
        """Let every span that waits for its first audit pass it."""
        for span in self.opened():
            if span.status is Status.PENDING:
                self.audit(span)
        self.at(self.state.height + LAG)
        if reveal:
            self.reveal_all()

    def reveal_all(self) -> None:
        """Let every auditor reveal that may."""
        for span in self.spans:
            for finding in span.findings:
                if finding.verdict and finding.reveal is None and span.may_reveal(finding):
                    assert self.say(finding.auditor, self.reveal(finding.verdict)) is None


__all__ = ["CLASS", "OTHER", "TRAINING", "WORKERS", "Plan", "TrainStory", "input_hash"]
