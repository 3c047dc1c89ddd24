"""Every cheater: its name, what it does, how it is played, and what it must not get away with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from weakref import WeakKeyDictionary

from attacks import parties, workers
from attacks.stage import (
    CHEATER,
    SPAN,
    Part,
    Result,
    commitments_of_others,
    others_of,
    play,
)
from attacks.tiny import STEPS, TorchExecutor
from sim import adversaries as bad
from sim.swarm import SimNode, Swarm, identity_of

from meshd.ledger.audits import Status
from meshd.ledger.jobstate import JobState
from meshd.node.compute.executor import Executor
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import AuditResult
from meshd.p2p.network import Network

Ending = Callable[[list[Result]], str]


@dataclass(frozen=True)
class Cheater:
    """One row of the table."""

    name: str
    does: str
    part: Part
    ending: Ending
    """Checks some runs; returns in a few words how they ended."""


@dataclass(frozen=True)
class Row:
    """A cheater's figures over some seeds."""

    cheater: Cheater
    shards: str
    received: str
    found: str


NONE = "none"
LONG, LONG_SHARD_S = 12, 4.0
"""Rounds, and seconds of a shard, of the training jobs behind the table."""


def row_of(cheater: Cheater, seeds: range) -> Row:
    """Play a cheater with every seed; raises AssertionError where it gets away with something."""
    part, role = cheater.part, cheater.part.role
    if role == "worker" and part.workload == "train":
        part = replace(part, shard_s=LONG_SHARD_S, terms={"rounds": LONG, **part.terms})
    results = [play(part, seed) for seed in seeds]
    found = cheater.ending(results)
    if role == "validator":
        paid = median(result.paid_audits for result in results)
        return Row(cheater, NONE, f"{paid:g} audits" if paid else "0", found)
    share = median(100 * r.received / r.earned if r.earned else 0.0 for r in results)
    received = f"{share:.0f} %" if share else "0"
    if role == "orchestrator":
        return Row(cheater, NONE, received, found)
    return Row(cheater, f"{median(result.shards for result in results):g}", received, found)


# ---- how it has to end -------------------------------------------------------------------


def rejected(results: list[Result]) -> str:
    """It was caught by an audit, and is paid for nothing."""
    for result in results:
        assert result.caught, "it was not caught"
        assert result.received == result.paid_shards == 0, "it was paid"
    gated = sum(result.gated for result in results)
    shards = sum(result.shards for result in results)
    gate = f"; the gate kept out {100 * gated / shards:.0f} %" if gated else ""
    ways = sorted({result.caught for result in results})
    return f"audit: {', '.join(ways)}{gate}"


def turned_away(results: list[Result]) -> str:
    """Nothing that it handed in was ever logged."""
    for result in results:
        assert result.refused, "something of it was logged"
        assert result.received == 0
    return "refused: nothing of it is ever logged"


def without_harm(results: list[Result]) -> str:
    """The job ended as if it were honest, and it gained nothing by what it did."""
    for result in results:
        assert result.state == "settled"
        for leases in _log(result).shards.values():
            delivered = [lease for lease in leases if lease.work is not None]
            assert len(delivered) == 1, "a shard counts twice"
    return "second commitments have no effect: paid once, as if honest"


def starved(results: list[Result]) -> str:
    """It held leases and delivered nothing; the job went on."""
    for result in results:
        assert result.state == "settled"
        assert result.received == 0
        assert len(_log(result).workers[_address(CHEATER)].leases) == 1
    return "its lease lapses, and it gets no other while anybody else is there"


def outvoted(results: list[Result]) -> str:
    """Nobody was rejected on its word, and its objections were not paid."""
    for result in results:
        for subject in _log(result).subjects.values():
            assert not subject.reason, f"an honest worker was found {subject.reason}"
            own = [f for f in subject.findings if f.auditor == _address(CHEATER)]
            assert not any(finding.in_majority for finding in own)
        assert result.paid_audits == 0
    return "the confirming auditor agrees with the worker: outvoted, unpaid"


def two_in_a_row(results: list[Result]) -> str:
    """It has an honest worker rejected only where the beacon drew both, one after another."""
    liars = {_address(name) for name in (CHEATER, *PAIR)}
    accused = lost = 0
    for result in results:
        for subject in _log(result).subjects.values():
            against = [f for f in subject.findings if f.result is AuditResult.MISMATCH]
            accused += bool(against)
            if subject.status is Status.REJECTED:
                lost += 1
                assert {finding.auditor for finding in against} == liars
    return f"outvoted, but where the beacon draws both in turn ({lost} of {accused} accusations)"


def stamped(results: list[Result]) -> str:
    """What it stamps passes, unless others look too; then the worker is not paid."""
    passed = spans = 0
    for result in results:
        for subject in _log(result).subjects.values():
            if subject.worker == _address(ACCUSED):
                spans += 1
                passed += subject.status is Status.ACCEPTED
    return f"by other auditors only: of its accomplice's spans {passed} of {spans} were paid"


def uncertified(results: list[Result]) -> str:
    """No head with what it did was ever certified; it is paid nothing."""
    for result in results:
        assert result.state == "failed"
        assert not _log(result).book.receipts
        assert result.received == 0
    return "no quorum signs: the job fails, the deposit goes back"


def both_beacons(results: list[Result]) -> str:
    """What its lost heads held was audited under the lost beacons too."""
    for result in results:
        twice = [s for s in _log(result).subjects.values() if s.lost_beacons]
        assert twice, "nothing was lost"
        for subject in twice:
            beacons = {finding.challenge.message.beacon_height for finding in subject.findings}
            assert subject.lost_beacons[0] in beacons
    return "the next term lists the lost head: audited under both beacons"


def goes_on(results: list[Result]) -> str:
    """The job is done by the others."""
    for result in results:
        assert result.state == "settled"
        assert not _log(result).workers[_address(RIVAL)].works
    return "the others do the shards; it is paid its share, not more"


def anchored_by_members(results: list[Result]) -> str:
    """Everybody was paid without it."""
    for result in results:
        assert result.earned > 0
    return "members carry the settlement to the chain"


def _log(result: Result) -> JobState:
    assert result.log is not None
    return result.log


def _address(name: str) -> Address:
    return identity_of(name).address


# ---- the parts ---------------------------------------------------------------------------


def _computes(make: Callable[[TorchExecutor], Executor]) -> Part:
    return Part(executor=lambda _, honest: make(honest))


def _infers(make: Callable[[TorchExecutor], Executor]) -> Part:
    return replace(_computes(make), workload="infer")


def _opens(trick: parties.Trick, *, withheld: bool = False) -> Part:
    return Part(
        wrap=lambda _, node, net: parties.Opening(net, node.identity, trick, withheld=withheld),
        workload="infer",
    )


def _speaks(make: Callable[[Network, Identity], Network], **terms: object) -> Part:
    return Part(wrap=lambda _, node, net: make(net, node.identity), terms=terms)


def _orchestrates(make: Callable[[Network, Identity], Network], **terms: object) -> Part:
    return replace(_speaks(make, **terms), role="orchestrator")


def _audits(make: Callable[[Network, Identity], Network]) -> Part:
    return replace(_speaks(make), role="validator")


def _copies(make: Callable[[TorchExecutor, workers.Others], Executor]) -> Part:
    return Part(executor=lambda swarm, honest: make(honest, lambda job: others_of(swarm, job)))


def _copycat(swarm: Swarm, node: SimNode, network: Network) -> Network:
    return parties.Copycat(network, node.identity, lambda: commitments_of_others(swarm))


def _accomplice(swarm: Swarm, node: SimNode, network: Network) -> Network:
    return parties.Accomplice(network, node.identity, _CLAIMS.setdefault(swarm, {}))


PAIR = ("vera",)
RIVAL, ACCUSED = "wanda", "worse"
_CLAIMS: WeakKeyDictionary[Swarm, dict[bytes, bytes]] = WeakKeyDictionary()
_FIRST = identity_of("victor").address
_RIVAL = identity_of(RIVAL).address
SHORT = {"work_s": 50, "settle_s": 40}
_SKIPS = Part(executor=lambda _, honest: bad.Skipping(honest, 0.25))
_LAZY = Part(
    role="validator",
    executor=lambda _, honest: parties.Lazy(honest, STEPS),
    wrap=lambda _, node, net: bad.RubberStamp(net, node.identity),
    with_worker=_SKIPS,
)

CHEATERS = (
    # ---- training
    Cheater(
        "noise",
        "random numbers of about the right size, nothing computed",
        _computes(workers.Noise),
        rejected,
    ),
    Cheater("skipper", "leaves a quarter of the steps out, extrapolates", _SKIPS, rejected),
    Cheater(
        "first half",
        "computes half of the steps, extrapolates the rest",
        _computes(lambda honest: bad.Skipping(honest, 0.5)),
        rejected,
    ),
    Cheater(
        "sleeper",
        "honest in its first span, a skipper from then on",
        _computes(lambda honest: bad.Skipping(honest, 0.25, first=SPAN)),
        rejected,
    ),
    Cheater(
        "cached batch",
        "reads the first step's rows in every step",
        _computes(lambda honest: workers.Rearranging(honest, workers.first_batch)),
        rejected,
    ),
    Cheater(
        "half batch",
        "reads half of each step's rows, twice",
        _computes(lambda honest: workers.Rearranging(honest, workers.half_batch)),
        rejected,
    ),
    Cheater(
        "bf16",
        "rounds the weights to bf16 in every step",
        _computes(lambda honest: workers.Altering(honest, interpreter=workers.Halved)),
        rejected,
    ),
    Cheater(
        "gradient",
        "makes one step's gradient ten times too long",
        _computes(lambda honest: workers.Altering(honest, interpreter=workers.Louder)),
        rejected,
    ),
    Cheater("labels", "trains on one wrong label", _computes(workers.Mislabelling), rejected),
    Cheater(
        "learning rate",
        "takes one step 1 % too long",
        _computes(lambda honest: workers.Altering(honest, settings=workers.Hastier)),
        rejected,
    ),
    Cheater(
        "other state", "goes on from the first round's state", _computes(workers.Outdated), rejected
    ),
    Cheater(
        "flipped",
        "contributes the opposite of what it computed",
        _computes(lambda honest: bad.Poisoning(honest, bad.flipped)),
        rejected,
    ),
    Cheater(
        "poisoner",
        "contributes noise, commits to the honest end state",
        _computes(lambda honest: bad.Poisoning(honest, bad.noise)),
        rejected,
    ),
    Cheater(
        "end digest",
        "contributes honestly, commits to another end state",
        _computes(bad.Misremembering),
        rejected,
    ),
    Cheater(
        "copied contribution",
        "hands in what another contributed",
        _copies(workers.Copying),
        rejected,
    ),
    Cheater(
        "a little is enough",
        "the others' mean less one standard deviation",
        _copies(workers.LittleIsEnough),
        rejected,
    ),
    Cheater("copycat", "signs the roots another committed to", Part(wrap=_copycat), rejected),
    Cheater("silent", "opens nothing", _speaks(lambda net, _: bad.NeverOpening(net)), rejected),
    Cheater("grinder", "commits again under other salts", _speaks(parties.Grinding), without_harm),
    Cheater(
        "NaN bomb",
        "contributes NaN",
        _computes(lambda honest: workers.Bombing(honest, workers.nan)),
        turned_away,
    ),
    Cheater(
        "shape bomb",
        "contributes a megabyte too much",
        _computes(lambda honest: workers.Bombing(honest, workers.too_long)),
        turned_away,
    ),
    Cheater(
        "size bomb", "claims a contribution of a petabyte", _speaks(parties.Claiming), turned_away
    ),
    Cheater(
        "hoarder",
        "takes leases, shows progress, delivers nothing",
        replace(_computes(bad.Hoarding), terms={"lease_blocks": 12}),
        starved,
    ),
    Cheater(
        "invented class", "computes bits no member computes", _computes(bad.Inexact), turned_away
    ),
    # ---- inference
    Cheater(
        "changed layer",
        "infers with one layer changed by 0.01",
        _infers(lambda honest: workers.Substituting(honest, workers.shifted)),
        rejected,
    ),
    Cheater(
        "int8",
        "infers with one matrix stored in 8 bits",
        _infers(lambda honest: workers.Substituting(honest, workers.int8)),
        rejected,
    ),
    Cheater("truncated answer", "computes half of the rows", _infers(workers.Truncating), rejected),
    Cheater("cached answer", "answers every shard like the first", _infers(bad.Caching), rejected),
    Cheater("NaN rows", "answers NaN", _infers(workers.Infinite), rejected),
    Cheater(
        "withheld output",
        "opens what is drawn, serves no output",
        _opens(parties.as_it_is, withheld=True),
        rejected,
    ),
    Cheater(
        "duplicated leaf",
        "opens the last row in place of all others",
        _opens(parties.last_twice),
        rejected,
    ),
    Cheater("node as leaf", "opens an inner node as a row", _opens(parties.node_as_leaf), rejected),
    Cheater("swapped index", "opens rows under other indices", _opens(parties.swapped), rejected),
    Cheater(
        "wrong n",
        "commits to another number of rows",
        replace(_speaks(parties.Miscounting), workload="infer"),
        turned_away,
    ),
    # ---- auditors
    Cheater("false accuser", "finds everybody wrong", _audits(bad.FalseAccuser), outvoted),
    Cheater(
        "pair of accusers",
        "two of five members find everybody wrong and confirm each other",
        Part(role="validator", accomplices=PAIR, wrap=_accomplice),
        two_in_a_row,
    ),
    Cheater("lazy auditor", "computes nothing, finds everybody right", _LAZY, stamped),
    # ---- orchestrators
    Cheater(
        "waits for the beacon",
        "lets heads be lost once it knows their beacon",
        _orchestrates(lambda net, _: parties.WaitingForTheBeacon(net, _FIRST)),
        both_beacons,
    ),
    Cheater(
        "starts twice",
        "begins one term in two ways",
        _orchestrates(lambda net, own: parties.StartingTwice(net, own, _FIRST), **SHORT),
        uncertified,
    ),
    Cheater(
        "equivocates",
        "sends two heads for one place",
        _orchestrates(lambda net, own: bad.Equivocating(net, own, 1.0, 1), **SHORT),
        uncertified,
    ),
    Cheater(
        "another close",
        "closes rounds with another state",
        _orchestrates(bad.ClosingWrongly, **SHORT),
        uncertified,
    ),
    Cheater(
        "incomplete close",
        "leaves a rival's contribution out of the close",
        _orchestrates(bad.ClosingWithout, **SHORT),
        uncertified,
    ),
    Cheater(
        "pays itself",
        "logs a cut and an attempt that never were",
        _orchestrates(lambda net, own: bad.Overpaying(net, own, 1.0, 1), **SHORT),
        uncertified,
    ),
    Cheater(
        "drops commitments",
        "logs nothing that a rival commits to",
        _orchestrates(lambda net, _: parties.DroppingCommitments(net, _RIVAL)),
        goes_on,
    ),
    Cheater(
        "stalls leases out",
        "sits on a rival's commitments until its leases lapse",
        _orchestrates(lambda net, _: parties.StallingOut(net, _RIVAL, 15), lease_blocks=10),
        goes_on,
    ),
    Cheater(
        "never anchors",
        "carries no settlement to the chain",
        Part(role="orchestrator", factory=parties.never_anchoring),
        anchored_by_members,
    ),
)
