"""The rounds of a training job: their states, their closes, and the numeric classes.

A round's state is public: parameters and momenta, named by one digest. `RoundClose` says which
commitments entered a round and which state follows; that the state does follow from them is
recomputed by every committee member before it signs a head that holds the close.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal

from meshd.ledger.works import Work
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import ZERO, Canary, JobTerms, RoundClose

TRAIN = "train"
"""The `workload` of a training job's terms."""
SMALL_COMMITTEE = 7
"""Members below which a committee is small: its quorum has to be trusted."""
TRIES = 2
"""A round of which the gate accepts nothing is repeated once."""
MIN_SHARE = "min_share"
"""The hyperparameter that says which share of a round's shards must be in for it to close."""


def is_training(terms: JobTerms) -> bool:
    """Return whether the terms are those of a training job."""
    return terms.workload == TRAIN


def fewest(terms: JobTerms) -> int:
    """Return how many commitments a round needs at least to close."""
    values = dict(item.split("=", 1) for item in terms.hyperparameters if "=" in item)
    try:
        least = Decimal(values.get(MIN_SHARE, "1")) * terms.shards
        if least >= terms.shards:
            return terms.shards
        return max(1, int(least.to_integral_value(ROUND_CEILING)))
    except (ArithmeticError, ValueError):
        return terms.shards


class Rounds:
    """Which round is open, what the closed ones made, and who computes in which class.

    An inference job is one round that never closes.
    """

    def __init__(self, terms: JobTerms, committee: tuple[Address, ...]) -> None:
        self.training = is_training(terms)
        self._terms = terms
        self._committee = committee
        self._fewest = fewest(terms)
        self.state = terms.initial_state if self.training else ZERO
        """The digest of the open round's state."""
        self.open = 0
        self.tries = 0
        """How often the gate accepted nothing of the open round."""
        self.closes: list[Signed[RoundClose]] = []
        """Every close in order, those of repeated rounds included."""
        self.canaries: dict[Address, bytes] = {}

    @property
    def done(self) -> bool:
        """Whether every round is closed."""
        return self.training and self.open >= self._terms.rounds

    @property
    def over(self) -> bool:
        """Whether no round is open any more."""
        return self.done or self.failed

    @property
    def failed(self) -> bool:
        """Whether the gate accepted nothing of a round, and nothing of its repetition."""
        return self.tries >= TRIES

    def states(self) -> list[bytes]:
        """Return the digests of every round's state, the initial one first."""
        after = [c.message.state_after for c in self.closes if accepted(c.message)]
        return [self._terms.initial_state, *after]

    def state_of(self, round_: int) -> bytes:
        """Return the digest of the state that round *round_* starts from."""
        return self.states()[round_]

    # ---- numeric classes -----------------------------------------------------------------

    def on_canary(self, entry: Signed[Canary]) -> str | None:
        """Note a party's numeric class; return why it has no effect, None if it has."""
        if not self.training:
            return "canary has no effect in this kind of job"
        if entry.message.party != entry.signer:
            return "canary of another party"
        if entry.signer in self.canaries:
            return "this party's class is known"
        if entry.message.digest == ZERO:
            return "canary without a digest"
        self.canaries[entry.signer] = entry.message.digest
        return None

    def members_of(self, numeric_class: bytes) -> tuple[Address, ...]:
        """Return the committee members that compute the same bits; all of them in inference."""
        if not self.training:
            return self._committee
        return tuple(m for m in self._committee if self.canaries.get(m) == numeric_class)

    def class_problem(self, worker: Address, numeric_class: bytes) -> str | None:
        """Return why *worker* may not have shards in *numeric_class*, None if it may."""
        if not self.training:
            return None if numeric_class == ZERO else "inference knows no numeric classes"
        if self.canaries.get(worker) != numeric_class:
            return "worker has not shown this numeric class"
        others = [m for m in self.members_of(numeric_class) if m != worker]
        needed = 1 if len(self._committee) < SMALL_COMMITTEE else 2
        if len(others) < needed:
            return f"{len(others)} members share the worker's numeric class, {needed} are needed"
        return None

    # ---- closes --------------------------------------------------------------------------

    def may_close(self, works: Sequence[Work]) -> bool:
        """Return whether *works* are enough for the open round to close."""
        return self.training and not self.over and len(works) >= self._fewest

    def on_close(self, entry: Signed[RoundClose], works: Sequence[Work]) -> str | None:
        """Close the open round on *works*, what was committed to it, in the order of shards.

        Return why that has no effect, None if it has.
        """
        message = entry.message
        why = self._close_problem(message, works)
        if why is not None:
            return why
        self.closes.append(entry)
        if accepted(message):
            self.open, self.tries, self.state = self.open + 1, 0, message.state_after
        else:
            self.tries += 1
        return None

    def _close_problem(self, message: RoundClose, works: Sequence[Work]) -> str | None:
        if not self.training or self.over:
            return "no round is open"
        if message.round != self.open or message.state_before != self.state:
            return f"close is not of round {self.open} and its state"
        if message.commitments != tuple(work.hash for work in works):
            return "close holds other commitments than the round"
        if len(works) < self._fewest:
            return f"the round has {len(works)} commitments, {self._fewest} are needed"
        if message.weights != tuple(work.population for work in works):
            return "weights are not the rows of the contributions"
        if list(message.gated) != sorted({at for at in message.gated if at < len(works)}):
            return "gated contributions are not ascending places in the close"
        if not accepted(message) and message.state_after != message.state_before:
            return "nothing was accepted, and the state changed"
        if accepted(message) and message.state_after == ZERO:
            return "close names no state"
        return None


def accepted(message: RoundClose) -> list[int]:
    """Return the places of the contributions that the gate let through."""
    gated = set(message.gated)
    return [at for at in range(len(message.commitments)) if at not in gated]
