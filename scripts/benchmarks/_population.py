"""A swarm with many workers, some of them cheating, on the real rules and without a network.

Every job is a real `JobState`: assignments, commitments, challenges, verdicts, attestations and
cuts go through it as they would come from a log, so that draws, probation, leases, voids and
receipts are the product's own. Simulated are only the parties: workers by a pace and a
strategy, auditors that are honest and prompt. Signatures are left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial

from _joblog import Entries, job_terms

from meshd.ledger.audits import Status, Subject
from meshd.ledger.works import Work, works_of
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import Assignment, JobEndReason, JobTerms

TICK_BLOCKS = 5
"""Blocks between two looks at everybody."""
CUT_TICKS = 10
PACE_TICKS = (2, 8)
"""The least and the most ticks that a worker takes for a shard."""
MOST_TICKS = 20_000


@dataclass(frozen=True)
class Strategy:
    """How a cheater cheats: in some of its shards, leaving out a part of their work."""

    name: str
    begins: Callable[[JobTerms, int], int]
    """Shards that it computes honestly first, from the terms and how many it can expect."""
    chance: float
    """Of a shard being touched after that."""
    rows: float
    """Share of a touched shard's rows that is invented (inference)."""
    steps: float
    """Share of a touched shard's inner steps that is left out (training)."""


def _after_probation(terms: JobTerms, _: int) -> int:
    return terms.span_shards if terms.workload == "train" else terms.probation_shards


def _at_once(_terms: JobTerms, _most: int) -> int:
    return 0


def _at_the_end(_: JobTerms, most: int) -> int:
    return most * 9 // 10


BOLD = Strategy("bold: half of every shard", _at_once, 1.0, 0.5, 0.5)
STRATEGIC = (
    Strategy("sleeper: some of every shard after probation", _after_probation, 1.0, 0.05, 0.25),
    Strategy("careful: as little as pays, after probation", _after_probation, 1.0, 0.01, 0.05),
    Strategy("rare: one shard of 20 after probation", _after_probation, 0.05, 1.0, 0.25),
    Strategy("late: its last tenth", _at_the_end, 1.0, 0.5, 0.25),
)
"""They know every constant of the policy and cheat where it looks least. A training shard with
more left out would meet the gate, which is not simulated.
"""


@dataclass
class Tally:
    """What a job came to; units are compute units, amounts MCC's smallest unit."""

    workers: int = 0
    cheaters: int = 0
    caught: int = 0
    false_rejects: int = 0
    shards: int = 0
    bad_shards: int = 0
    """Accepted with anything in them invented."""
    units: int = 0
    """Of accepted shards."""
    bad_units: float = 0.0
    probation_units: int = 0
    """Of accepted shards under probation."""
    audit_units: int = 0
    probation_audit_units: int = 0
    void_units: int = 0
    """Computed and thrown away: of rejected shards and of what fell with them."""
    paid: int = 0
    """To workers."""
    paid_to_cheaters: int = 0
    paid_for_bad: int = 0
    to_catch: list[int] = field(default_factory=list)
    """Touched shards that each caught cheater delivered."""

    def add(self, other: Tally) -> None:
        """Add another job's."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def figures(self) -> dict[str, float | int]:
        """Return shares and counts as they are reported."""
        steady = self.units - self.probation_units
        return {
            "workers": self.workers,
            "cheaters": self.cheaters,
            "caught": self.caught,
            "false_rejects": self.false_rejects,
            "shards": self.shards,
            "bad_work": self.bad_units / self.units,
            "bad_shards": self.bad_shards / self.shards,
            "overhead": self.audit_units / self.units,
            "overhead_probation": self.probation_audit_units / max(self.probation_units, 1),
            "overhead_steady": (self.audit_units - self.probation_audit_units) / max(steady, 1),
            "thrown_away": self.void_units / self.units,
            "paid_to_cheaters": self.paid_to_cheaters / self.paid,
            "paid_for_bad": self.paid_for_bad / self.paid,
            "cheaters_pay": self._cheaters_pay(),
            "shards_to_catch": sum(self.to_catch) / max(len(self.to_catch), 1),
        }

    def _cheaters_pay(self) -> float:
        """Return what a cheater is paid for each MCC that an honest worker is."""
        honest = self.workers - self.cheaters
        if not honest or not self.cheaters:
            return float("nan")
        ours = (self.paid - self.paid_to_cheaters) / honest
        return self.paid_to_cheaters / self.cheaters / ours


@dataclass
class Actor:
    """A worker: who it is now, how fast it is, how it cheats."""

    address: Address
    pace: int
    strategy: Strategy | None = None
    delivered: int = 0
    touched: int = 0
    lease: Signed[Assignment] | None = None
    ready: int = 0
    """The tick at which its shard is done."""


class SimulatedJob:
    """One job, from its first assignment to its last cut."""

    def __init__(
        self, terms: JobTerms, actors: list[Actor], chance: random.Random, *, reborn: bool = False
    ) -> None:
        self._entries = Entries(terms, chance)
        self._actors = actors
        self._chance = chance
        self._training = terms.workload == "train"
        self._reborn = reborn
        """Whether a caught cheater comes back as somebody new."""
        self._cheaters = {actor.address for actor in actors if actor.strategy}
        self._touched: dict[bytes, tuple[float, frozenset[int]]] = {}
        """Share and rows invented, by commitment."""
        self._free: list[int] = []
        self._looked = 0
        """The tick at which free shards were last looked for."""
        self._tally = Tally(workers=len(actors), cheaters=len(self._cheaters))
        expected = terms.shards * terms.rounds // max(len(actors), 1)
        self._begins = {s.name: s.begins(terms, expected) for s in (BOLD, *STRATEGIC)}

    def run(self) -> Tally:
        """Run it to its end; raises RuntimeError if it does not come to one."""
        entries, state = self._entries, self._entries.state
        for tick in range(1, MOST_TICKS):
            entries.reach(tick * TICK_BLOCKS)
            for subject in list(state.audits.open.values()):
                if subject.track is not None:  # none if its worker was caught a moment ago
                    entries.audit(subject, self._invented(subject))
            entries.reveal()
            for actor in self._actors:
                self._act(actor, tick)
            entries.close_round()
            if state.end is None and state.complete and state.audited:
                entries.end(JobEndReason.COMPLETE)
                entries.reveal()
            if state.end is not None or tick % CUT_TICKS == 0:
                entries.cut()
            if state.book.closed:
                return self._counted()
        raise RuntimeError(f"the job did not end within {MOST_TICKS} ticks")

    # ---- the workers ---------------------------------------------------------------------

    def _act(self, actor: Actor, tick: int) -> None:
        record = self._entries.state.workers.get(actor.address)
        if record is not None and record.rejected:
            self._caught(actor)
            return
        if actor.lease is not None and tick >= actor.ready:
            self._deliver(actor, actor.lease)
        if actor.lease is None:
            self._take(actor, tick)

    def _caught(self, actor: Actor) -> None:
        if not actor.address:
            return  # it was caught before, and stays away
        if actor.strategy is None:
            self._tally.false_rejects += 1
        self._tally.caught += actor.strategy is not None
        self._tally.to_catch.append(actor.touched)
        again = self._reborn and actor.strategy is not None
        actor.address = Address(self._chance.randbytes(20) if again else b"")
        actor.delivered, actor.touched, actor.lease = 0, 0, None
        if again:
            self._cheaters.add(actor.address)

    def _take(self, actor: Actor, tick: int) -> None:
        if not actor.address:
            return
        if not self._free and self._looked < tick:
            self._free, self._looked = self._entries.state.free_shards()[::-1], tick
        if self._free:
            actor.lease = self._entries.assign(self._free[-1], actor.address)
        if actor.lease is not None:
            self._free.pop()
            actor.ready = tick + actor.pace

    def _deliver(self, actor: Actor, lease: Signed[Assignment]) -> None:
        share = self._share(actor)
        commitment = self._entries.commit(lease)
        actor.lease = None
        if commitment is None:
            return  # the lease ended meanwhile: the worker was caught, or its round repeated
        actor.delivered += 1
        if share:
            actor.touched += 1
            n = commitment.message.n
            touched = frozenset(self._chance.sample(range(n), max(1, round(share * n))))
            self._touched[commitment.digest] = (share, touched)

    def _share(self, actor: Actor) -> float:
        strategy = actor.strategy
        if strategy is None or actor.delivered < self._begins[strategy.name]:
            return 0.0
        if self._chance.random() >= strategy.chance:
            return 0.0
        return strategy.steps if self._training else strategy.rows

    def _invented(self, subject: Subject) -> frozenset[int]:
        """Return what an auditor would find wrong: rows of a work, or works of a span."""
        if isinstance(subject, Work):
            return self._touched.get(subject.hash, (0.0, frozenset[int]()))[1]
        works = works_of(subject)
        return frozenset(at for at, work in enumerate(works) if work.hash in self._touched)

    # ---- the sum -------------------------------------------------------------------------

    def _counted(self) -> Tally:
        tally, state = self._tally, self._entries.state
        for subject in state.subjects.values():
            units = sum(f.attestation.message.units_reexecuted for f in subject.findings)
            tally.audit_units += units
            tally.probation_audit_units += units if subject.probation else 0
            for work in works_of(subject):
                self._count_work(work, subject)
        amounts: Counter[bool] = Counter()
        for receipt in state.book.receipts:
            if receipt.receipt_kind == "work":
                amounts[receipt.signer in self._cheaters] += receipt.amount
                bad = receipt.commitment_hash in self._touched
                tally.paid_for_bad += receipt.amount if bad else 0
        tally.paid, tally.paid_to_cheaters = amounts.total(), amounts[True]
        return tally

    def _count_work(self, work: Work, subject: Subject) -> None:
        tally, units = self._tally, work.assignment.message.units
        if work.outcome is not Status.ACCEPTED and not self._entries.entered(work):
            tally.void_units += units
            return
        share = self._touched.get(work.hash, (0.0, frozenset[int]()))[0]
        tally.shards += 1
        tally.units += units
        tally.probation_units += units if subject.probation else 0
        tally.bad_units += share * units
        tally.bad_shards += share > 0


@dataclass(frozen=True)
class Scenario:
    """Who is there, and what is computed."""

    name: str
    workload: str
    strategies: tuple[Strategy, ...] = STRATEGIC
    cheaters: float = 0.3
    reborn: bool = False
    workers: int = 1000
    jobs: int = 20
    """Each with its own committee and its share of the workers."""
    shards_each: int = 48
    """Shards a worker computes in a job, on average."""


SCENARIOS = (
    Scenario("inference", "infer"),
    Scenario("inference, free identities", "infer", reborn=True, workers=300, jobs=6),
    Scenario("training", "train", shards_each=128),
    Scenario(
        "training, free identities", "train", reborn=True, workers=300, jobs=6, shards_each=128
    ),
)


def simulate_job(scenario: Scenario, seed: int, number: int) -> Tally:
    """Run one of a scenario's jobs; the same *seed* gives the same figures."""
    chance = random.Random(f"{seed}.{scenario.name}.{number}")
    each = scenario.workers // scenario.jobs
    actors = []
    for at in range(each):
        strategy = chance.choice(scenario.strategies) if at < scenario.cheaters * each else None
        address = Address(chance.randbytes(20))
        actors.append(Actor(address, chance.randint(*PACE_TICKS), strategy))
    chance.shuffle(actors)
    terms = job_terms(scenario.workload, workers=each, shards_each=scenario.shards_each)
    return SimulatedJob(terms, actors, chance, reborn=scenario.reborn).run()


def simulate(
    scenario: Scenario, seed: int, *, run_all: Callable[..., Iterable[Tally]] = map
) -> Tally:
    """Run a scenario's jobs; *run_all* is `map`, or that of a pool of processes."""
    whole = Tally()
    numbers = range(scenario.jobs)
    for tally in run_all(partial(simulate_job, scenario, seed), numbers):
        whole.add(tally)
    return whole
