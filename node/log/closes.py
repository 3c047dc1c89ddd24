"""The closes of a training job's rounds, as soon as they are heard of.

A round goes on with its orchestrator's signed `RoundClose`; the head that certifies it follows.
"""

from __future__ import annotations

import trio

from meshd.ledger.joblog import Genesis
from meshd.ledger.rounds import accepted
from meshd.p2p.codec import Signed
from meshd.p2p.messages import Commitment, JobTerms, RoundClose

MAX_HEARD = 4096
"""Commitments that are kept in mind before the log has them."""


class Closes:
    """What the orchestrator has said of each round; the log may say otherwise later."""

    def __init__(self, genesis: Genesis, terms: JobTerms) -> None:
        self._genesis = genesis
        self._terms = terms
        self._heard: dict[int, Signed[RoundClose]] = {}
        self._commitments: dict[bytes, Signed[Commitment]] = {}
        self._changed = trio.Event()

    def hear(self, signed: Signed[RoundClose]) -> str | None:
        """Take a close; return why it is not one of this job, None if it is."""
        message = signed.message
        if signed.signer != self._genesis.orchestrator or message.job_id != self._genesis.job_id:
            return "the close is not from this job's orchestrator"
        if message.round >= self._terms.rounds:
            return f"the job has {self._terms.rounds} rounds, none is number {message.round}"
        known = self._heard.get(message.round)
        if known is None or known.digest != signed.digest:
            self._heard[message.round] = signed
            self._changed.set()
            self._changed = trio.Event()
        return None

    def note(self, commitment: Signed[Commitment]) -> None:
        """Keep a commitment in mind that the log may not have yet: a close names it."""
        self._commitments[commitment.digest] = commitment
        while len(self._commitments) > MAX_HEARD:
            del self._commitments[next(iter(self._commitments))]

    def commitment(self, name: bytes) -> Signed[Commitment] | None:
        """Return the commitment of digest *name*, if it was heard of."""
        return self._commitments.get(name)

    def state_of(self, round_: int) -> bytes | None:
        """Return the digest of the state that round *round_* starts from; None: not known yet."""
        if not round_:
            return self._terms.initial_state
        close = self._heard.get(round_ - 1)
        return close.message.state_after if close and accepted(close.message) else None

    def of(self, round_: int) -> Signed[RoundClose] | None:
        """Return the close of round *round_*, None if nothing was heard of it."""
        return self._heard.get(round_)

    def newest(self) -> list[Signed[RoundClose]]:
        """Return every close that was heard, in the order of rounds."""
        return [self._heard[round_] for round_ in sorted(self._heard)]

    async def changed(self) -> None:
        """Wait until another close is heard."""
        await self._changed.wait()
