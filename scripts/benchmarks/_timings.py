"""What a timed orchestrator noted, as figures (pure; times are seconds of one clock)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshd.p2p.messages import AuditKind, AuditResult


@dataclass
class Course:
    """When what happened to one assignment; None: it did not."""

    shard: int
    worker: str
    sent: float
    """It was on disk, hence on its way to the worker."""
    committed: float | None = None
    units: int = 0
    rows: int = 0
    """Rows that its first audit drew."""
    challenged: float | None = None
    judged: float | None = None
    """Its first auditor had computed the drawn rows again."""
    attested: float | None = None
    """Its first audit's attestation came."""
    audit_units: int = 0
    """Compute units of all its audits."""
    accepted: bool = False
    paid: float | None = None


@dataclass
class Timings:
    """A job as its orchestrator saw it."""

    courses: list[Course] = field(default_factory=list)
    audits: int = 0
    """Attestations of any kind."""
    receipts: int = 0
    """Receipts of any kind."""

    def dispatch_s(self) -> list[float]:
        """Return the time from each assignment sent to its commitment received."""
        return [c.committed - c.sent for c in self.courses if c.committed is not None]

    def receipt_s(self) -> list[float]:
        """Return the time from each assignment sent to its receipt."""
        return [c.paid - c.sent for c in self.courses if c.paid is not None]

    def attested_s(self) -> list[float]:
        """Return the time from each commitment to its first attestation."""
        return [
            c.attested - c.committed
            for c in self.courses
            if c.attested is not None and c.committed is not None
        ]

    def audit_s(self) -> list[float]:
        """Return the time from each first challenge to its attestation."""
        return [
            c.attested - c.challenged
            for c in self.courses
            if c.attested is not None and c.challenged is not None
        ]

    def recompute_s(self) -> list[float]:
        """Return the part of `audit_s` in which the auditor computed its own rows."""
        return [
            c.judged - c.challenged
            for c in self.courses
            if c.judged is not None and c.challenged is not None
        ]

    def open_s(self) -> list[float]:
        """Return the part of `audit_s` in which the worker opened and the output was checked."""
        return [
            c.attested - c.judged
            for c in self.courses
            if c.attested is not None and c.judged is not None
        ]

    def overhead(self, *, probation: bool) -> float:
        """Return audited units over the units of the accepted shards, under probation or after.

        A shard counts as under probation if its first audit drew as many rows as any did. NaN if
        there is none of the kind.
        """
        most = max((c.rows for c in self.courses), default=0)
        chosen = [c for c in self.courses if c.accepted and (c.rows == most) == probation]
        units = sum(c.units for c in chosen)
        return sum(c.audit_units for c in chosen) / units if units else float("nan")

    def paid_at(self) -> list[float]:
        """Return when the receipts of work came, in order."""
        return sorted(c.paid for c in self.courses if c.paid is not None)

    def committed_at(self) -> list[float]:
        """Return when the commitments of accepted shards came, in order."""
        return sorted(c.committed for c in self.courses if c.accepted and c.committed is not None)

    def span_s(self) -> float:
        """Return the time from the first assignment to the last attestation."""
        ends = [c.attested for c in self.courses if c.attested is not None]
        return max(ends) - min(c.sent for c in self.courses)


def read_timings(lines: Iterable[str]) -> Timings:
    """Return the courses in the lines that `_timed` wrote; one that is cut off ends them."""
    timings = Timings()
    assigned: dict[str, Course] = {}
    committed: dict[str, Course] = {}
    challenged: dict[str, Course] = {}
    paid: set[tuple[str, str]] = set()
    for line in lines:
        if not line.endswith("\n"):
            break
        event = json.loads(line)
        match event["kind"]:
            case "assignment":
                sent, units = event["logged"], event["units"]
                course = Course(event["shard"], event["worker"], sent, units=units)
                assigned[event["name"]] = course
                timings.courses.append(course)
            case "commitment":
                committed[event["name"]] = assigned[event["of"]]
                assigned[event["of"]].committed = event["came"]
            case "challenge" if event["audit"] == AuditKind.FIRST:
                course = challenged[event["name"]] = committed[event["of"]]
                course.challenged, course.rows = event["came"], event["rows"]
            case "verdict-commit" if event["of"] in challenged:
                challenged[event["of"]].judged = event["came"]
            case "attestation":
                timings.audits += 1
                _note_attestation(committed[event["of"]], event)
            case "receipts":
                for kind, name in event["paid"]:
                    timings.receipts += 1
                    if kind == "work" and (kind, name) not in paid:
                        paid.add((kind, name))
                        committed[name].paid = event["came"]
            case _:
                pass
    return timings


def _note_attestation(course: Course, event: Mapping[str, Any]) -> None:
    course.audit_units += event["units"]
    if event["audit"] == AuditKind.FIRST and course.attested is None:
        course.attested = event["came"]
        course.accepted = event["result"] == AuditResult.ACCEPTED


def steady_rate(times: Sequence[float], *, warm_up: float = 0.5, tail: float = 0.1) -> float:
    """Return events a second between the first *warm_up* and the last *tail* (shares) of *times*.

    Events that came in one lump count from the lump before it. 0 if too few are left.
    """
    first, last = int(len(times) * warm_up), len(times) - 1 - int(len(times) * tail)
    if last <= first or times[last] <= times[first]:
        return 0.0
    return sum(times[first] < at <= times[last] for at in times) / (times[last] - times[first])


def median(values: Sequence[float]) -> float:
    """Return the median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* of *values* lie, NaN of nothing."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)] if ranked else float("nan")
