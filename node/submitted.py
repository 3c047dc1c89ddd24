"""A researcher's own job, as far as it has come."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from meshd.node.counts import Counts, counts_of
from meshd.node.log.view import LogView
from meshd.p2p.codec import Signed
from meshd.p2p.messages import JobTerms


class JobState(Enum):
    """The states of a submitted job."""

    ANNOUNCED = "announced"
    RUNNING = "running"
    SETTLING = "settling"
    SETTLED = "settled"
    CANCELLED = "cancelled"
    FAILED = "failed"


OVER = (JobState.SETTLED, JobState.CANCELLED, JobState.FAILED)


@dataclass
class SubmittedJob:
    """A job of this researcher, as far as it has come."""

    id: bytes
    terms: Signed[JobTerms]
    salt: bytes
    state: JobState = JobState.ANNOUNCED
    detail: str = ""
    view: LogView | None = None
    output: bytes | None = None
    """Blob digest of the output, once it is here."""
    created: float = 0.0
    ended: float | None = None
    """Unix seconds of the submission and of the end."""
    kept: Counts | None = None
    """The counts when it ended, from disk."""

    @property
    def counts(self) -> Counts:
        """How many of its shards have come how far."""
        if self.view is None and self.kept is not None:
            return self.kept
        return counts_of(self.terms.message, self.view.state if self.view else None)
