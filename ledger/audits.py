"""How a commitment, or a span of them, is audited, decided from log entries and their heights.

The subject of an audit passes through *tracks*. Each is one question put to the committee
members in the order that a beacon drew: a first audit, perhaps a second one of what was
accepted, and a confirmation of whatever an auditor objects to. An auditor that is silent in its
slot is replaced by the next; its word no longer counts then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from meshd.ledger import draws
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import (
    ZERO,
    Attestation,
    AuditKind,
    AuditResult,
    Challenge,
    JobTerms,
    Reveal,
    VerdictCommit,
)


class Status(Enum):
    """What has become of a commitment."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    VOID = "void"
    """Its worker was rejected elsewhere, or its auditors could not agree."""


@dataclass
class Finding:
    """A closed audit: an auditor's attestation and what it rests on."""

    kind: AuditKind
    auditor: Address
    challenge: Signed[Challenge]
    attestation: Signed[Attestation]
    verdict: Signed[VerdictCommit] | None
    height: int
    reveal: Signed[Reveal] | None = None
    in_majority: bool = True

    @property
    def result(self) -> AuditResult:
        """What the auditor found."""
        return AuditResult(self.attestation.message.result)


@dataclass
class Track:
    """One question to the committee: who is to answer it, and since when."""

    kind: AuditKind
    beacon_height: int
    order: tuple[Address, ...]
    index: int
    since: int
    drawn: tuple[int, ...] | None = None
    """What to check, where that is fixed already (a confirmation)."""
    challenge: Signed[Challenge] | None = None
    verdict: Signed[VerdictCommit] | None = None
    verdict_height: int = 0

    @property
    def auditor(self) -> Address:
        """Whose turn it is."""
        return self.order[self.index % len(self.order)]

    def due(self, terms: JobTerms) -> int:
        """Return the last height at which the present auditor is in time."""
        if self.challenge is None:
            return self.since + terms.challenge_blocks
        due = self.since + terms.audit_blocks
        if self.verdict is not None:
            due = max(due, self.verdict_height + terms.silence + terms.challenge_blocks)
        return due

    def advance(self, height: int, terms: JobTerms) -> None:
        """Replace auditors whose time was over before *height*."""
        while height > (due := self.due(terms)):
            self.index += 1
            self.since = due
            self.challenge = self.verdict = None


@dataclass(kw_only=True, eq=False)
class Subject(ABC):
    """What one audit decides on: a commitment in inference, a span of them in training.

    The auditor draws `sample` of its `population` (rows, or shards) and computes them again.
    """

    height: int
    position: int
    """Place in the whole log, from 0, of the entry that completed it."""
    beacon_height: int
    lost_beacons: tuple[int, ...]
    """Beacons of lost heads that may have held it: a second audit is certain."""
    sample: int
    probation: bool
    status: Status = Status.PENDING
    track: Track | None = None
    findings: list[Finding] = field(default_factory=list)
    contested: Finding | None = None
    accepted_height: int = 0
    second_decided: bool = False
    epoch: int = 0
    """The cut that entered it into a settlement; 0: none yet."""
    reason: str = ""

    @property
    @abstractmethod
    def hash(self) -> bytes:
        """The digest by which challenges and attestations name it."""

    @property
    @abstractmethod
    def worker(self) -> Address:
        """Who committed."""

    @property
    @abstractmethod
    def place(self) -> tuple[int, int]:
        """The shard and attempt that verdicts on it are bound to."""

    @property
    @abstractmethod
    def population(self) -> int:
        """How many rows, or shards, its audit draws from."""

    @abstractmethod
    def units_of(self, drawn: Sequence[int]) -> int:
        """Return the compute units that computing *drawn* again takes at most."""

    @property
    def settled(self) -> bool:
        """Whether no audit of it is open or can still come."""
        return self.status is not Status.PENDING and self.second_decided and self.track is None

    def drawn_now(self) -> tuple[int, ...]:
        """Return what the open challenge draws; nothing if none is open."""
        track = self.track
        return () if not track or not track.challenge else track.challenge.message.drawn

    def waiting_beacon(self, lag: int) -> int | None:
        """Return the height whose block hash opens this work's next track; None if none does."""
        if self.track is not None:
            return None
        if self.status is Status.PENDING:
            return self.beacon_height
        if self.status is Status.ACCEPTED and not self.second_decided:
            return self.accepted_height + lag
        return None

    def open_track(
        self,
        height: int,
        beacons: Mapping[int, bytes],
        committee: tuple[Address, ...],
        terms: JobTerms,
    ) -> None:
        """Begin the track that waits for a beacon, if that block is there at *height*."""
        beacon_height = self.waiting_beacon(terms.lag)
        if beacon_height is None or beacon_height > height:
            return
        without = [self.worker, *(finding.auditor for finding in self.findings)]
        kind = AuditKind.FIRST
        if self.status is Status.ACCEPTED:
            kind = AuditKind.SECOND
            self.second_decided = True
            share = draws.PPM if self.lost_beacons else terms.second_audit_share
            if not draws.second_audit_due(self.hash, beacons[beacon_height], share):
                return
            beacon_height = self.lost_beacons[0] if self.lost_beacons else beacon_height
        order = draws.permutation(committee, beacons[beacon_height], self.hash, without)
        if order:
            since = max(beacon_height, self.accepted_height + terms.lag)
            since = beacon_height if kind is AuditKind.FIRST else since
            self.track = Track(kind, beacon_height, order, 0, since)
        elif kind is AuditKind.FIRST:
            self._void("no committee member may audit it")

    # ---- what an audit's entries do ------------------------------------------------------

    def on_challenge(
        self, entry: Signed[Challenge], height: int, terms: JobTerms, beacons: Mapping[int, bytes]
    ) -> str | None:
        """Take a challenge; return why it has no effect, None if it has."""
        track = self.track
        if track is None:
            return "no audit of this commitment is open"
        track.advance(height, terms)
        message = entry.message
        if entry.signer != track.auditor or message.draw_index != track.index:
            return "challenger is not the auditor whose turn it is"
        if track.challenge is not None:
            return "challenged already"
        if message.audit_kind != track.kind or message.beacon_height != track.beacon_height:
            return "challenge names another audit"
        beacon = beacons[track.beacon_height]
        expected = track.drawn or draws.drawn_rows(
            self.hash, beacon, message.nonce, self.population, self.sample
        )
        if message.drawn != expected:
            return "rows drawn do not follow from beacon and nonce"
        track.challenge = entry
        return None

    def on_verdict(self, entry: Signed[VerdictCommit], height: int, terms: JobTerms) -> str | None:
        """Take an auditor's blind verdict; return why it has no effect, None if it has."""
        track = self.track
        if track is None or track.challenge is None:
            return "no challenge is open"
        track.advance(height, terms)
        if track.challenge is None or entry.message.challenge != track.challenge.digest:
            return "verdict is for another challenge"
        if entry.signer != track.auditor or track.verdict is not None:
            return "verdict is another auditor's, or a second one"
        message = entry.message
        if (message.shard, message.attempt, message.draw_index) != (*self.place, track.index):
            return "verdict is bound to another shard"
        track.verdict, track.verdict_height = entry, height
        return None

    def on_attestation(
        self, entry: Signed[Attestation], height: int, terms: JobTerms
    ) -> str | None:
        """Take an auditor's finding; return why it has no effect, None if it has.

        Afterwards the status says what follows: the caller acts on ACCEPTED and REJECTED.
        """
        track = self.track
        if track is None or track.challenge is None:
            return "no challenge is open"
        track.advance(height, terms)
        message = entry.message
        if track.challenge is None or track.verdict is None:
            return "attestation without a verdict of this slot"
        if entry.signer != track.auditor or message.validator != entry.signer:
            return "attestation is not the auditor's whose turn it is"
        named = (message.audit_kind, message.draw_index, message.verdict_commit)
        if named != (track.kind, track.index, track.verdict.digest):
            return "attestation names another audit"
        if message.result == AuditResult.SILENT and height < track.verdict_height + terms.silence:
            return "the worker still has time to open"
        if message.result == AuditResult.ACCEPTED and not message.holds_output:
            return "accepted without holding the output"
        try:
            kind, _ = AuditKind(message.audit_kind), AuditResult(message.result)
        except ValueError:
            return "unknown result"
        finding = Finding(kind, entry.signer, track.challenge, entry, track.verdict, height)
        self.findings.append(finding)
        self.track = None
        self._decide(finding, track, height)
        return None

    def on_reveal(self, entry: Signed[Reveal], *, ended: bool = False) -> str | None:
        """Take an auditor's opened verdict; return why it has no effect, None if it has.

        Once the job has *ended* nobody audits any more.
        """
        message = entry.message
        for finding in self.findings:
            if finding.verdict is None or finding.verdict.digest != message.verdict_commit:
                continue
            if finding.reveal is not None or entry.signer != finding.auditor:
                return "revealed already, or by another"
            if not self.may_reveal(finding, ended=ended):
                return "too early: a later auditor could copy it"
            expected = draws.salted_verdict(
                message.salt,
                message.digest,
                validator=finding.auditor,
                challenge=finding.challenge.digest,
                draw_index=finding.challenge.message.draw_index,
            )
            if expected != finding.verdict.message.salted:
                return "does not open the verdict"
            finding.reveal = entry
            return None
        return "no such verdict"

    def may_reveal(self, finding: Finding, *, ended: bool = False) -> bool:
        """Return whether no auditor is left whom *finding*'s own rows could help to be lazy."""
        if ended:
            return True
        if self.track is not None:
            return self.track.verdict is not None and finding in self.findings
        if self.status is Status.ACCEPTED and not self.second_decided:
            return False
        return self.status is not Status.PENDING

    # ---- what follows --------------------------------------------------------------------

    def _decide(self, finding: Finding, track: Track, height: int) -> None:
        if self.contested is None:
            if finding.result is AuditResult.ACCEPTED:
                if self.status is Status.PENDING:
                    self.status, self.accepted_height = Status.ACCEPTED, height
                return
            self.contested = finding
            if not self._confirm(track, height):
                # A committee of one: its word decides; else nobody is left to confirm it.
                alone = len(self.findings) == 1
                self._reject(finding) if alone else self._void("nobody is left to confirm it")
            return
        self._decide_contest(finding, track, height)

    def _decide_contest(self, finding: Finding, track: Track, height: int) -> None:
        if finding.result is AuditResult.ACCEPTED:
            for other in self.findings:
                other.in_majority = other.result is AuditResult.ACCEPTED
            self.contested = None
            if self.status is Status.PENDING:
                self.status, self.accepted_height = Status.ACCEPTED, height
            return
        objections = [f for f in self.findings if f.result is not AuditResult.ACCEPTED]
        agreeing = self._agreeing(finding, objections)
        if len(agreeing) < 2 and self._confirm(track, height):
            return
        if len(agreeing) < 2:
            self._void("its auditors found different results")
            return
        for other in objections:
            other.in_majority = other in agreeing
        self._reject(finding)

    @staticmethod
    def _agreeing(finding: Finding, objections: list[Finding]) -> list[Finding]:
        """Return *finding* and the objections that say the same: nothing opened, or own rows
        that equal those of *finding*'s auditor.
        """
        if finding.result is AuditResult.SILENT:
            return [f for f in objections if f.result is AuditResult.SILENT]
        same = finding.attestation.message.agrees_with
        return [f for f in objections if f is finding or f.attestation.digest == same]

    def _confirm(self, track: Track, height: int) -> bool:
        done = {finding.auditor for finding in self.findings}
        turn = track.index % len(track.order)
        rest = track.order[turn + 1 :] + track.order[:turn]
        order = tuple(member for member in rest if member not in done)
        if not order:
            return False
        drawn = self.findings[-1].challenge.message.drawn
        if self.contested is not None:
            drawn = self.contested.challenge.message.drawn
        self.track = Track(AuditKind.CONFIRM, track.beacon_height, order, 0, height, drawn)
        return True

    def _reject(self, finding: Finding) -> None:
        self.status, self.reason = Status.REJECTED, finding.result.name.lower()
        self.second_decided, self.track = True, None

    def _void(self, reason: str) -> None:
        self.status, self.reason = Status.VOID, reason
        self.second_decided, self.track = True, None
        for finding in self.findings:
            finding.in_majority = False

    def void(self) -> None:
        """Its worker was rejected elsewhere: it is not paid, and its shard goes to another."""
        if self.status in (Status.PENDING, Status.ACCEPTED):
            self.status, self.reason = Status.VOID, "its worker was rejected"
            self.second_decided, self.track = True, None


NO_AGREEMENT = ZERO
"""The `agreesWith` of an attestation that agrees with no earlier one."""
