"""How far a job has come, in numbers: a pure function of its log."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.ledger.rounds import accepted, is_training
from meshd.p2p.messages import JobTerms


@dataclass(frozen=True)
class Counts:
    """A job's shards, all rounds together, and what became of attempts at them."""

    total: int
    accepted: int = 0
    """Inference: passed their audit. Training: entered a closed round."""
    rejected: int = 0
    """Found wrong; in training after they had entered a round."""
    reissued: int = 0
    """Attempts after the first of their shard."""

    def encode(self) -> str:
        """Return it as text for the database."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return what `encode` made text of."""
        return cls(**json.loads(text))


def counts_of(terms: JobTerms, state: JobState | None) -> Counts:
    """Return the counts of a job; *state* is its log's, None if there is no log yet."""
    total = terms.rounds * terms.shards if is_training(terms) else terms.shards
    if state is None:
        return Counts(total)
    reissued = sum(len(leases) - 1 for leases in state.shards.values())
    works = [work.outcome for work in state.works.values()]
    if not is_training(terms):
        done = sum(state.shard_done(shard) is not None for shard in range(terms.shards))
        return Counts(total, done, works.count(Status.REJECTED), reissued)
    entered = [
        state.works[close.message.commitments[at]].outcome
        for close in state.rounds.closes
        for at in accepted(close.message)
    ]
    return Counts(total, len(entered), entered.count(Status.REJECTED), reissued)
