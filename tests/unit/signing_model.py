"""An explicit-state model of a committee that signs one job's log: who can sign what, and when.

Three honest members and a liar, quorum three. The network and the orchestrator are hostile: any
head of a bounded tree is offered to any member at any time, certificates and votes are delivered
or withheld, the liar signs whatever helps. The honest members are the product's code:
`SigningRecord` says what each may sign and vote for, `joblog.term_start` which head a term starts
from and which it declares lost.

What is left out or put more hostile than it is: a member "has verified" a certificate as soon as
one can exist, and learns others only when it votes (certificates do not go away, so a later
lesson covers an earlier one); two starts of one term on the same head count as one `start`.

Terms are explored in order (votes for a term, signatures in it, votes for the next), and what
was signed is forgotten as its term is closed, up to what is certified, known or to be listed by
a vote. That loses nothing as long as a record refuses all earlier terms and is indifferent, for
later ones, to what it has signed; both is asked of every record that comes up, and where a
record answers otherwise the whole exploration is done again in any order, forgetting nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from meshd.ledger.joblog import Genesis, VoteContent, term_start
from meshd.ledger.signing import HeadName, SigningRecord
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import LogHead, TermStart, TermVote

HONEST = 3
QUORUM = 3
LIAR = HONEST
COMMITTEE = tuple(Address(bytes([i + 1]) * 20) for i in range(HONEST + 1))
GENESIS = 0
"""The index of the genesis in a tree of heads: certified from the start."""
JOB = bytes(32)
NOTHING = bytes(32)


@dataclass(frozen=True)
class Bound:
    """How far is explored: the highest term, the highest seq, heads per place and parent."""

    term: int
    seq: int
    variants: int = 1


@dataclass(frozen=True)
class Head:
    """A head that may be offered; `ancestors` is a bit set of indices, its own among them."""

    index: int
    term: int
    seq: int
    parent: int
    start: bytes
    begins: bool
    ancestors: int

    @property
    def name(self) -> HeadName:
        """What a SigningRecord is told."""
        return HeadName(self.term, self.seq, word(self.index), word(self.parent), self.start)


def word(number: int) -> bytes:
    """Return *number* as 32 bytes, in place of a hash."""
    return number.to_bytes(32, "big")


def grow_tree(bound: Bound) -> list[Head]:
    """Return every head within *bound*, parents first, the genesis at index 0."""
    tree = [Head(GENESIS, -1, 0, GENESIS, b"term 0", False, 1)]
    for parent in tree:  # grows on the way
        if parent.seq == bound.seq:
            continue
        for term in range(max(parent.term, 0), bound.term + 1):
            begins = term > max(parent.term, 0)
            start = b"%d from %d" % (term, parent.index) if begins else parent.start
            for _ in range(bound.variants):
                i = len(tree)
                line = parent.ancestors | 1 << i
                tree.append(Head(i, term, parent.seq + 1, parent.index, start, begins, line))
    return tree


class Vote(NamedTuple):
    """A vote as it counts: its term, the highest head it carries, the heads it lists (bits)."""

    term: int
    high: int
    listed: int


class Member(NamedTuple):
    """One honest member: its record, the highest certified head it knows, its votes.

    `kept`: certified heads of closed terms that it signed and knows no certificate of.
    """

    record: int
    high: int
    kept: int
    votes: tuple[Vote, ...]


class State(NamedTuple):
    """A moment: phase 2t-1 votes for term t, 2t signs in it; -1 when terms come in any order."""

    phase: int
    certified: int
    members: tuple[Member, ...]


class Violation(NamedTuple):
    """What went wrong, and the moves that lead there."""

    what: str
    heads: tuple[int, int]
    moves: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What an exploration found."""

    states: int
    violation: Violation | None
    certified: frozenset[int]
    """Every set of certified heads that can come about (bits)."""


class OrderMatters(Exception):
    """A record signs for an earlier term, or remembers one: terms cannot be taken in order."""


class Rules:
    """The product's rules; a subclass leaves one out."""

    record: type[SigningRecord] = SigningRecord
    votes_needed = QUORUM

    def place(self, head: Head) -> tuple[int, int]:
        """Return what "higher" means between certified heads."""
        return head.term, head.seq

    def carried(self, high: Head, certified: Iterable[Head]) -> list[Head]:
        """Return the heads a vote may carry of a member whose highest certified is *high*."""
        return [
            head for head in certified if head == high or self.place(head) > self.place(high)
        ]

    def listed(self, signed: Iterable[Head], high: Head) -> list[Head]:
        """Return the heads a vote lists of those its voter *signed*."""
        return [head for head in signed if self.place(head) > self.place(high)]

    def starts_from(self, start: TermStart, votes: list[Head]) -> list[int]:
        """Return the heads a term may start from, *start* being the product's answer."""
        return [int.from_bytes(start.prev, "big")]

    def is_final(self, head: Head, next_: Head) -> bool:
        """Return whether *head* is final when *next_*, its successor, is certified as well."""
        return head.term == next_.term


def stand_in(message: LogHead | TermVote, signer: Address, name: bytes) -> Signed:  # type: ignore[type-arg]
    """Return *message* as if it had been signed and checked."""
    return Signed(message, signer, name, 0, b"", (), name)


class Model:
    """The committee under *rules*, within *bound*."""

    def __init__(self, rules: Rules, bound: Bound) -> None:
        self.rules = rules
        self.tree = grow_tree(bound)
        self.terms = range(1, bound.term + 1)
        self.by_term = [
            [head for head in self.tree[1:] if head.term == term] for term in range(bound.term + 1)
        ]
        self.genesis = Genesis(JOB, COMMITTEE, rules.votes_needed, NOTHING, COMMITTEE[0], 5)
        self.log_heads = [self._log_head(head) for head in self.tree]
        self.records: list[SigningRecord] = []
        self.record_ids: dict[object, int] = {}
        self.masks: list[int] = []
        """What each record has signed, as bits."""
        self._may: dict[tuple[int, int, bool, bool], bool] = {}
        self._after: dict[tuple[int, int], int] = {}
        self._after_vote: dict[tuple[int, int], int | None] = {}
        self._starts: dict[tuple[int, tuple[Vote, ...], int], dict[int, int]] = {}
        self._one_start: dict[tuple[Vote, ...], tuple[tuple[int, ...], int]] = {}
        self._contradictions: dict[int, tuple[int, int] | None] = {}
        self._closed: set[tuple[int, int]] = set()

    def _log_head(self, head: Head) -> Signed[LogHead]:
        message = LogHead(
            job_id=JOB,
            term=max(head.term, 0),
            seq=head.seq,
            prev=word(head.parent),
            start=NOTHING,
            entries_root=NOTHING,
            height=1,
            block_hash=NOTHING,
        )
        return stand_in(message, COMMITTEE[0], word(head.index))

    # ---- records: the product's code, each distinct one asked once -------------------------

    def intern(self, record: SigningRecord) -> int:
        key = (
            tuple(sorted(record.signed.items())),
            tuple(sorted(record.starts.items())),
            record.voted_term,
            tuple(sorted(vars(record).get("heads", ()))),
        )
        found = self.record_ids.get(key)
        if found is None:
            found = self.record_ids[key] = len(self.records)
            self.records.append(record)
        return found
