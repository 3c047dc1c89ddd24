"""A node's checked copy of one job's log, folded as far as it is final."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import trio

from meshd.ledger.audits import Subject
from meshd.ledger.beacon import Beacon
from meshd.ledger.joblog import Batch, Genesis, JobLog, LogError, open_as
from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import ShardPlan
from meshd.node.log.closes import Closes
from meshd.p2p.codec import CodecError, Domain, Signed, decode, encode
from meshd.p2p.messages import (
    Certificate,
    Challenge,
    JobTerms,
    LogBatch,
    LogHead,
    Message,
    RoundClose,
    VerdictCommit,
)


@dataclass(frozen=True)
class Job:
    """Everything about a job that is settled before its log begins."""

    domain: Domain
    genesis: Genesis
    terms: JobTerms
    plan: ShardPlan | None

    @property
    def id(self) -> bytes:
        """The job's id on chain."""
        return self.genesis.job_id


async def apply_batch(state: JobState, batch: Batch, beacon: Beacon) -> dict[bytes, str]:
    """Fetch the beacons that *batch* needs and apply it; return the refused entries."""
    heights = state.needed_beacons(batch.height)
    beacons = {height: await beacon.at(height) for height in sorted(heights)}
    return state.apply_batch(batch, beacons)


class LogView:
    """The certified log (`log`) and what its final part means (`state`)."""

    def __init__(self, job: Job, beacon: Beacon) -> None:
        self.job = job
        self.beacon = beacon
        self.log = JobLog(job.domain, job.genesis)
        self.state = self.fresh_state()
        self.closes = Closes(job.genesis, job.terms)
        self._folded = 0
        self._changed = trio.Event()
        self._lock = trio.Lock()

    def fresh_state(self) -> JobState:
        """Return the state before the first entry."""
        return JobState(self.job.domain, self.job.genesis, self.job.terms, self.job.plan)

    @property
    def height(self) -> int:
        """The height of the highest certified head: the log's clock."""
        return self.log.tip.message.height if self.log.tip else 0

    @property
    def seq(self) -> int:
        """The number of the highest certified head."""
        return self.log.tip.message.seq if self.log.tip else 0

    def holds(self, head: Signed[LogHead]) -> bool:
        """Return whether *head* is known here to be certified, on whatever branch."""
        return self.log.known(head.digest) is not None

    async def add(self, batch: Batch) -> None:
        """Append a certified batch and fold what has become final; raises LogError."""
        if self.holds(batch.head):
            return
        async with self._lock:
            self.log.add(batch)
            for final in self.log.final[self._folded :]:
                await apply_batch(self.state, final, self.beacon)
                self._folded += 1
                for entry in final.entries:
                    if isinstance(entry.message, RoundClose):
                        self.closes.hear(cast(Signed[RoundClose], entry))
            self._changed.set()
            self._changed = trio.Event()

    async def changed(self, deadline_s: float) -> bool:
        """Wait until the log has grown, *deadline_s* at most; return whether it has."""
        with trio.move_on_after(deadline_s) as scope:
            await self._changed.wait()
        return not scope.cancelled_caught

    async def audits(self, chain_height: int) -> list[Subject]:
        """Return copies of the subjects with an audit open at *chain_height*."""
        beacons: dict[int, bytes] = {}
        # The state may grow while a beacon is awaited: look again until nothing is missing.
        while missing := self.state.needed_beacons(chain_height) - beacons.keys():
            for height in sorted(missing):
                beacons[height] = await self.beacon.at(height)
        return list(self.state.audits_at(chain_height, self.height, beacons))

    async def audit_refusal(
        self,
        commitment: bytes,
        challenge: Signed[Challenge],
        verdict: Signed[VerdictCommit],
        chain_height: int,
    ) -> str | None:
        """Return why *challenge* and *verdict* are not those of the audit that is due now, as
        far as this log knows; None if they are.
        """
        for work in await self.audits(chain_height):
            track = work.track
            if work.hash != commitment or track is None:
                continue
            terms, beacons = self.job.terms, self.state.beacons
            beacons = {**beacons, track.beacon_height: await self.beacon.at(track.beacon_height)}
            if track.challenge is None or track.challenge.digest != challenge.digest:
                why = work.on_challenge(challenge, self.height, terms, beacons)
                if why is not None:
                    return why
            if track.verdict is not None and track.verdict.digest == verdict.digest:
                return None
            return work.on_verdict(verdict, self.height, terms)
        return "no audit of this commitment is due yet"

    def certified_entries(self) -> Iterable[Signed[Message]]:
        """Yield every certified entry, final or not."""
        for batch in self.log.batches:
            yield from batch.entries

    def height_of(self, name: bytes) -> int | None:
        """Return the height at which the certified entry of digest *name* counts."""
        for batch in reversed(self.log.batches):
            if any(entry.digest == name for entry in batch.entries):
                return batch.height
        return None

    def batch_message(self, after_seq: int) -> LogBatch:
        """Return the answer to a LogRequest: the batch after *after_seq*, if there is one."""
        if not 0 <= after_seq < len(self.log.batches):
            return LogBatch(
                job_id=self.job.id, highest_seq=self.seq, head=b"", certificate=b"", entries=()
            )
        batch = self.log.batches[after_seq]
        assert batch.certificate is not None
        return LogBatch(
            job_id=self.job.id,
            highest_seq=self.seq,
            head=batch.head.raw,
            certificate=encode(batch.certificate),
            entries=tuple(entry.raw for entry in batch.entries),
        )


def open_batch(domain: Domain, message: LogBatch) -> Batch:
    """Return the batch in *message*; raises LogError if its frames are not well signed.

    The certificate is taken as the head's own.
    """
    head = open_as(domain, message.head, LogHead)
    entries = tuple(open_as(domain, raw, Message) for raw in message.entries)
    return Batch(head, entries, open_certificate(message.certificate))


def open_certificate(raw: bytes) -> Certificate | None:
    """Decode a certificate (empty: None); raises LogError."""
    if not raw:
        return None
    try:
        return cast(Certificate, decode(Certificate.kind, raw))
    except CodecError as error:
        raise LogError(str(error)) from error
