"""The works of a job with an audit open or still to come, and whose turn it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from meshd.ledger.audits import Status, Work
from meshd.p2p.identity import Address
from meshd.p2p.messages import JobTerms


class OpenAudits:
    """The audits that a job's log still waits for."""

    def __init__(self, terms: JobTerms, committee: tuple[Address, ...]) -> None:
        self._terms = terms
        self._committee = committee
        self.works: dict[bytes, Work] = {}

    def needed_beacons(self, height: int) -> set[int]:
        """Return the heights up to *height* whose block hashes open audits."""
        needed = set()
        for work in self.works.values():
            waiting = work.waiting_beacon(self._terms.lag)
            if waiting is not None and waiting <= height:
                needed |= {waiting, *work.lost_beacons}
        return needed

    def reach(self, height: int, beacons: Mapping[int, bytes]) -> None:
        """Open the audits whose beacons exist at *height*; forget works that are through."""
        for work in list(self.works.values()):
            work.open_track(height, beacons, self._committee, self._terms)
            if work.settled:
                del self.works[work.hash]

    def copies_at(
        self, height: int, log_height: int, beacons: Mapping[int, bytes]
    ) -> Iterable[Work]:
        """Yield copies of the works that have an audit open at chain *height*, with the auditor
        whose turn it is at *log_height*, the highest certified head's.
        """
        for original in self.works.values():
            work = copy.copy(original)
            work.track = copy.copy(original.track)
            work.open_track(height, beacons, self._committee, self._terms)
            if work.track is not None:
                work.track.advance(log_height, self._terms)
                yield work

    def overdue(self, log_height: int, height: int) -> bool:
        """Return whether an auditor's time, running at *log_height*, is over at *height*."""
        for work in self.works.values():
            track = copy.copy(work.track)
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
            work.waiting_beacon(self._terms.lag)
            for work in self.works.values()
            if work.status is Status.ACCEPTED
        )
        return any(beacon is not None and log_height < beacon <= height for beacon in waiting)
