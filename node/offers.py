"""Which workers ask for shards of a job, and which of them gets the next one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import trio

from meshd.ledger.jobstate import JobState
from meshd.ledger.leases import WorkerRecord
from meshd.p2p.identity import Address
from meshd.p2p.messages import JobTerms, LeaseEndReason, Offer

OFFER_LIFE_S = 15.0
"""Seconds for which an offer is good."""
STALLED = (LeaseEndReason.LAPSED, LeaseEndReason.NO_PROGRESS)
"""Ends of leases that others had to wait for."""


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
        if not offer.slots:  # it is withdrawn
            self.drop(worker)
            return None
        self._taken[worker] = _Taken(offer, trio.current_time())
        return None

    def workers(self) -> list[Address]:
        """Return whose offers are known."""
        return list(self._taken)

    def drop(self, worker: Address) -> None:
        """Forget a worker's offer."""
        self._taken.pop(worker, None)

    def next_worker(
        self, state: JobState, chosen: Counter[Address], without: Collection[Address] = ()
    ) -> tuple[Address, bytes] | None:
        """Return who is to have the next shard, with its numeric class; None if nobody may.

        It is whoever let the fewest leases lapse, of those who has the fewest shards to compute,
        and of those who never had one: a worker that joins is not passed over. Those *without*
        come last, and who hoards leases gets none while others are there. *chosen* counts what
        each was given that *state* does not know yet.
        """
        able = self._able(state)
        steady = [address for address, worker in able.items() if not _hoards(worker)]
        most = 1 if state.rounds.training else 2  # a second lease bridges the wait for the next
        best: tuple[tuple[bool, int, int, bool], Address] | None = None
        for address in steady or able:
            worker, more = able[address], chosen[address]
            computing = more + sum(lease.open for lease in worker.leases)
            if (
                worker.in_flight + more < worker.allowance
                and worker.unsettled + more < self._terms.max_unsettled
                and computing < most * self._taken[address].offer.slots
            ):
                rank = (address in without, worker.halvings, computing, bool(worker.leases))
                if best is None or rank < best[0]:
                    best = (rank, address)
        return (best[1], self._taken[best[1]].offer.numeric_class) if best else None

    def _able(self, state: JobState) -> dict[Address, WorkerRecord]:
        """Return who offers to compute and may, busy or not."""
        now = trio.current_time()
        able = {}
        for address, taken in list(self._taken.items()):
            worker = state.workers.get(address) or WorkerRecord()
            if now - taken.at > OFFER_LIFE_S:
                del self._taken[address]
            elif (
                not worker.rejected
                and state.genesis.committee != (address,)  # somebody else has to audit it
                and state.rounds.class_problem(address, taken.offer.numeric_class) is None
            ):
                able[address] = worker
        return able


def _hoards(worker: WorkerRecord) -> bool:
    """Return whether a worker let others wait for more shards than it delivered."""
    return sum(lease.ended in STALLED for lease in worker.leases) > len(worker.works)
