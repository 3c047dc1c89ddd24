"""What timed daemons noted of a training job, as figures (pure; times are of one clock)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NONE = math.nan
PARTS = (
    *("assign", "begin", "state", "compute", "keep", "commit"),
    *("fetch", "log", "wait", "close", "enter"),
)
"""Where the time of a round goes, from the close before it to its own, in order.

The assignment is logged; it is brought and the worker begins; it fetches the state; it computes;
it puts the result on disk; it signs and sends its commitment; the contribution is fetched; the
commitment is logged; the orchestrator turns to the round; contributions are gated and combined;
the close is logged.
"""


@dataclass
class Attempt:
    """One assignment of a shard; NaN for what did not happen."""

    name: str
    round: int
    shard: int
    worker: str
    assigned: float
    computing: float = NONE
    state: float = NONE
    """The round's state was there."""
    computed: float = NONE
    seconds: float = NONE
    """Of the inner steps, rows and executor included."""
    handed_in: float = NONE
    fetched: float = NONE
    committed: float = NONE
    ended: float = NONE
    """Its lease was ended without a commitment."""

    @property
    def own_s(self) -> float:
        """Compute, and transfer of the state and of the contribution."""
        return (self.computed - self.computing) + (self.fetched - self.handed_in)


@dataclass
class Round:
    """One round as its orchestrator saw it."""

    number: int
    began: float
    """The round before it was closed."""
    closing: float
    combined: float
    closed: float
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def entered(self) -> list[Attempt]:
        """The attempts that were committed to."""
        return [attempt for attempt in self.attempts if not math.isnan(attempt.committed)]

    @property
    def slowest_s(self) -> float:
        """Compute and transfer of the worker that had most of it."""
        own: dict[str, float] = {}
        for attempt in self.entered:
            own[attempt.worker] = own.get(attempt.worker, 0.0) + attempt.own_s
        return max(own.values())

    @property
    def overhead_s(self) -> float:
        """What the round took beyond that."""
        return self.closed - self.began - self.slowest_s

    def parts(self) -> dict[str, float]:
        """Return the seconds of each of PARTS, along the shard that came in last."""
        last = max(self.entered, key=lambda attempt: attempt.committed)
        stations = (
            self.began,
            last.assigned,
            last.computing,
            last.state,
            last.state + last.seconds,
            last.computed,
            last.handed_in,
            last.fetched,
            last.committed,
            self.closing,
            self.combined,
            self.closed,
        )
        spans = (b - a for a, b in itertools.pairwise(stations))
        return dict(zip(PARTS, spans, strict=True))


@dataclass(frozen=True)
class Recovery:
    """What followed from the death of a worker with a lease, in seconds."""

    noticed_s: float
    """From the death to the end of the lease in the log."""
    reissued_s: float
    """From the death to the shard's next assignment."""
    completed_s: float
    """From the death to the close of its round."""
    recompute_s: float
    """Compute and transfer of the shard by its next worker."""
    busy_s: float
    """After the lease's end the next worker was busy for so long with a shard of its own."""

    @property
    def beyond_s(self) -> float:
        """What is left of `completed_s` without the shard's computation."""
        return self.completed_s - self.recompute_s


class Tail:
    """Whole lines of a file that grows, parsed as they come."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._kept = ""

    def feed(self, text: str) -> None:
        """Take what was written since the last time."""
        *lines, self._kept = (self._kept + text).split("\n")
        self.events += [json.loads(line) for line in lines if line]


def read_rounds(events: Iterable[Mapping[str, Any]]) -> list[Round]:
    """Return the closed rounds but the first, in order, from the events of all daemons."""
    attempts: dict[str, Attempt] = {}
    moments: dict[tuple[str, int], float] = {}
    for event in sorted(events, key=lambda event: event["at"]):
        kind, at = event["kind"], event["at"]
        if kind == "assigned":
            place = event["round"], event["shard"], event["worker"]
            attempts[event["name"]] = Attempt(event["name"], *place, assigned=at)
        elif kind in ("closing", "combined", "closed"):
            moments[kind, event["round"]] = at
        else:
            _note(attempts[event["name"]], kind, event)
    rounds = []
    for number in sorted(number for kind, number in moments if kind == "closed"):
        if ("closed", number - 1) in moments:
            closing, combined, closed = (
                moments[kind, number] for kind in ("closing", "combined", "closed")
            )
            own = [attempt for attempt in attempts.values() if attempt.round == number]
            began = moments["closed", number - 1]
            rounds.append(Round(number, began, closing, combined, closed, own))
    return rounds


def _note(attempt: Attempt, kind: str, event: Mapping[str, Any]) -> None:
    match kind:
        case "computing":
            attempt.computing = event["at"]
        case "state":
            attempt.state = event["at"]
        case "computed":
            attempt.computed, attempt.seconds = event["at"], event["seconds"]
        case "handed-in" if math.isnan(attempt.handed_in):
            attempt.handed_in = event["at"]
        case "fetched" if math.isnan(attempt.fetched):
            attempt.fetched = event["at"]
        case "committed":
            attempt.committed = event["at"]
        case "lease-ended":
            attempt.ended = event["at"]
        case _:
            pass


def recovery(rounds: Sequence[Round], worker: str, died: float) -> Recovery | None:
    """Return what followed when *worker* died at *died*; None if it held no lease then."""
    for each in rounds:
        for attempt in each.attempts:
            held = attempt.assigned < died < min(attempt.ended, each.closed)
            if attempt.worker != worker or not held or not math.isnan(attempt.committed):
                continue
            (again,) = (other for other in each.entered if other.shard == attempt.shard)
            before = [own for own in each.entered if own.worker == again.worker and own != again]
            free = max((own.committed for own in before), default=attempt.ended)
            return Recovery(
                noticed_s=attempt.ended - died,
                reissued_s=again.assigned - died,
                completed_s=each.closed - died,
                recompute_s=again.own_s,
                busy_s=max(0.0, free - attempt.ended),
            )
    return None
