"""Which workers ask for shards of a job, and which of them gets the next one."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import WorkerRecord
from meshd.p2p.identity import Address
from meshd.p2p.messages import JobTerms, Offer

OFFER_LIFE_S = 15.0
"""Seconds for which an offer is good."""


@dataclass(frozen=True)
class _Taken:
    offer: Offer
    at: float


class Offers:
    """The offers for one job that are good now."""

    def __init__(self, terms: JobTerms) -> None:
        self._terms = terms
        self._taken: dict[Address, _Taken] = {}

    def take(self, worker: Address, offer: Offer) -> str | None:
        """Take an offer; return why it is not wanted, None if it is."""
        if offer.ask > self._terms.price:
            return f"the job pays {self._terms.price}, the offer asks {offer.ask}"
        if self._terms.workers and worker not in self._terms.workers:
            return "only the workers named in the terms are allowed"
        self._taken[worker] = _Taken(offer, trio.current_time())
        return None

    def drop(self, worker: Address) -> None:
        """Forget a worker's offer."""
        self._taken.pop(worker, None)

    def next_worker(self, state: JobState) -> Address | None:
        """Return who is to have the next shard, None if nobody may: whoever let the fewest leases
        lapse, and of those who has the fewest shards to compute.
        """
        now = trio.current_time()
        best: tuple[tuple[int, int], Address] | None = None
        for address, taken in list(self._taken.items()):
            if now - taken.at > OFFER_LIFE_S:
                del self._taken[address]
                continue
            if state.genesis.committee == (address,):
                continue  # nobody could audit it
            worker = state.workers.get(address) or WorkerRecord()
            computing = sum(lease.open for lease in worker.leases)
            if (
                not worker.rejected
                and worker.in_flight < worker.allowance
                and worker.unsettled < self._terms.max_unsettled
                and computing < 2 * taken.offer.slots
                and (best is None or (worker.halvings, computing) < best[0])
            ):
                best = ((worker.halvings, computing), address)
        return best[1] if best else None
