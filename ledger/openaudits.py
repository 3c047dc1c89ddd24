"""What of a job has an audit open or still to come, and whose turn it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from meshd.ledger.audits import Status, Subject
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    Attestation,
    Challenge,
    JobTerms,
    Message,
    Reveal,
    VerdictCommit,
)


class OpenAudits:
    """The audits that a job's log still waits for."""

    def __init__(self, terms: JobTerms, auditors: Callable[[Subject], tuple[Address, ...]]) -> None:
        self._terms = terms
        self._auditors = auditors
        """Returns the committee members that are able to audit a subject."""
        self.all: dict[bytes, Subject] = {}
        """Every subject of an audit, by its digest."""
        self.open: dict[bytes, Subject] = {}
        """Those that the log still waits for."""
        self._challenged: dict[bytes, Subject] = {}
        self._judged: dict[bytes, Subject] = {}
        """Subjects by the digest of a challenge, and of a verdict commitment, of theirs."""

    def add(self, subject: Subject) -> None:
        """Audit *subject* as soon as its beacon is there."""
        self.all[subject.hash] = self.open[subject.hash] = subject

    def take(
        self, entry: Signed[Message], *, height: int, beacons: Mapping[int, bytes], ended: bool
    ) -> str | None:
        """Take an auditor's entry; return why it has no effect, None if it has."""
        message = entry.message
        match message:
            case Challenge():
                subject = self.all.get(message.commitments)
                if subject is None:
                    return "challenge of an unknown commitment"
                challenge = cast(Signed[Challenge], entry)
                why = subject.on_challenge(challenge, height, self._terms, beacons)
                if why is None:
                    self._challenged[entry.digest] = subject
                return why
            case VerdictCommit():
                subject = self._challenged.get(message.challenge)
                if subject is None:
                    return "verdict on an unknown challenge"
                why = subject.on_verdict(cast(Signed[VerdictCommit], entry), height, self._terms)
                if why is None:
                    self._judged[entry.digest] = subject
                return why
            case Reveal():
                subject = self._judged.get(message.verdict_commit)
                if subject is None:
                    return "no such verdict"
                return subject.on_reveal(cast(Signed[Reveal], entry), ended=ended)
            case _:
                return self._attestation(cast(Signed[Attestation], entry), height)

    def _attestation(self, entry: Signed[Attestation], height: int) -> str | None:
        subject = self.all.get(entry.message.commitment_hash)
        if subject is None:
            return "attestation of an unknown commitment"
        most = subject.units_of(subject.drawn_now())
        if entry.message.units_reexecuted > most:
            return f"attestation claims more than the {most} units of its draw"
        return subject.on_attestation(entry, height, self._terms)

    def needed_beacons(self, height: int) -> set[int]:
        """Return the heights up to *height* whose block hashes open audits."""
        needed = set()
        for subject in self.open.values():
            waiting = subject.waiting_beacon(self._terms.lag)
            if waiting is not None and waiting <= height:
                needed |= {waiting, *subject.lost_beacons}
        return needed

    def reach(self, height: int, beacons: Mapping[int, bytes]) -> None:
        """Open the audits whose beacons exist at *height*; forget what is through."""
        for subject in list(self.open.values()):
            subject.open_track(height, beacons, self._auditors(subject), self._terms)
            if subject.settled:
                del self.open[subject.hash]

    def copies_at(
        self, height: int, log_height: int, beacons: Mapping[int, bytes]
    ) -> Iterable[Subject]:
        """Yield copies of the subjects that have an audit open at chain *height*, with the auditor
        whose turn it is at *log_height*, the highest certified head's.
        """
        for original in self.open.values():
            subject = copy.copy(original)
            subject.track = copy.copy(original.track)
            subject.open_track(height, beacons, self._auditors(subject), self._terms)
            if subject.track is not None:
                subject.track.advance(log_height, self._terms)
                yield subject

    def overdue(self, log_height: int, height: int) -> bool:
        """Return whether an auditor's time, running at *log_height*, is over at *height*."""
        for subject in self.open.values():
            track = copy.copy(subject.track)
            if track is not None:
                track.advance(log_height, self._terms)
                if track.due(self._terms) < height:
                    return True
        return False

    def undecided(self, log_height: int, height: int) -> bool:
        """Return whether *height* decides on a second audit and the log, at *log_height*, has
        not come so far.
        """
        waiting = (
            subject.waiting_beacon(self._terms.lag)
            for subject in self.open.values()
            if subject.status is Status.ACCEPTED
        )
        return any(beacon is not None and log_height < beacon <= height for beacon in waiting)
