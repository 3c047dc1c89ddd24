"""Every order of events in a committee with a liar, to a bound: no two final heads contradict.

An explicit-state model of a committee that signs one job's log. Three honest members and a liar,
quorum three. The network and the orchestrator are hostile: any head of a bounded tree is offered
to any member at any time, certificates and votes are delivered or withheld, the liar signs
whatever helps. The honest members are the product's code: `SigningRecord` says what each may
sign and vote for, `joblog.term_start` what a term starts from and which heads it declares lost.

Where the model differs it is the more hostile: a member has verified a certificate as soon as
one can exist; it learns others when it votes, or never (certificates do not go away, so a later
lesson covers an earlier one); starts of one term on one head count as the same `start`.

Terms are explored in order (votes for a term, signatures in it, votes for the next), and a closed
term is forgotten but for what is certified, known, or still to be listed by a vote. That loses
nothing if a record refuses all that is earlier and its past refuses nothing later. Both is asked
of every record that comes up; one that answers otherwise has everything explored again in any
order, forgetting nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import NamedTuple, TypeVar

import pytest

from meshd.ledger.joblog import Genesis, VoteContent, term_start
from meshd.ledger.signing import HeadName, SigningRecord
from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.messages import LogHead, Message, TermVote

M = TypeVar("M", bound=Message)

HONEST = 3
QUORUM = 3
COMMITTEE = tuple(Address(bytes([i + 1]) * 20) for i in range(HONEST + 1))
GENESIS = 0
"""The index of the genesis in a tree of heads: certified from the start."""
ANY_ORDER = -1


def word(number: int) -> bytes:
    """Return *number* as 32 bytes, in place of a hash."""
    return number.to_bytes(32, "big")


def bits(mask: int) -> list[int]:
    """Return the positions of the ones in *mask*, lowest first."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


class Bound(NamedTuple):
    """How far is explored: the highest term, the highest seq, heads per place and parent."""

    term: int
    seq: int
    variants: int


@dataclass(frozen=True)
class Head:
    """A head that may be offered; `line` holds it and its ancestors (bits)."""

    index: int
    term: int
    seq: int
    parent: int
    start: bytes
    begins: bool
    line: int
    text: str

    @property
    def name(self) -> HeadName:
        """What a SigningRecord is told of it."""
        return HeadName(self.term, self.seq, word(self.index), word(self.parent), self.start)


def grow_tree(bound: Bound) -> list[Head]:
    """Return every head within *bound*, parents first, the genesis (of term -1) at index 0."""
    tree = [Head(GENESIS, -1, 0, GENESIS, b"term 0", False, 1, "genesis")]
    for parent in tree:  # which grows on the way
        for term in range(max(parent.term, 0), bound.term + 1) if parent.seq < bound.seq else ():
            begins = term > max(parent.term, 0)
            start = b"%d after %d" % (term, parent.index) if begins else parent.start
            for variant in "abc"[: bound.variants]:
                i, seq = len(tree), parent.seq + 1
                text = f"{parent.text} < {term}.{seq}{variant}"
                line = parent.line | 1 << i
                tree.append(Head(i, term, seq, parent.index, start, begins, line, text))
    return tree


class Vote(NamedTuple):
    """A vote: its term, the highest certified head it carries, the heads it lists (bits)."""

    term: int
    high: int
    listed: int


class Member(NamedTuple):
    """One honest member: its record, the highest certified head it knows, its votes.

    `kept`: heads of closed terms that it signed, certified without its knowledge (bits).
    """

    record: int
    high: int
    kept: int
    votes: tuple[Vote, ...]


class State(NamedTuple):
    """A moment: phase 2t-1 votes for term t, 2t signs in it, ANY_ORDER both, whatever the term.

    `votes`: those for term t, once it is being signed in.
    """

    phase: int
    certified: int
    votes: tuple[Vote, ...]
    members: tuple[Member, ...]


class Rules:
    """The product's rules; a subclass leaves one out."""

    record: type[SigningRecord] = SigningRecord
    votes_needed = QUORUM

    def place(self, head: Head) -> tuple[int, int]:
        """Return what makes a certified head higher than another."""
        return head.term, head.seq

    def carries(self, known: Head, head: Head) -> bool:
        """Return whether a vote may carry the certified *head* if its voter knows *known*."""
        return head == known or self.place(head) > self.place(known)

    def lists(self, high: Head, head: Head) -> bool:
        """Return whether a vote that carries *high* lists *head*, which its voter signed."""
        return self.place(head) > self.place(high)

    def bases(self, product: int, carried: set[Head]) -> set[int]:
        """Return what a term may start from; *product*: what `term_start` makes of *carried*."""
        return {product}

    def final(self, head: Head, successors: list[Head]) -> bool:
        """Return whether *head* is final, it and *successors* being certified."""
        return any(successor.term == head.term for successor in successors)


class OrderMattersError(Exception):
    """A record signs for an earlier term, or its past bars a later one."""


class Records:
    """The honest members' records: the product's code, asked once for each distinct one."""

    def __init__(self, kind: type[SigningRecord], tree: list[Head], terms: range) -> None:
        self._tree, self._terms = tree, terms
        self._ids: dict[object, int] = {}
        self._all: list[SigningRecord] = []
        self.signed: list[int] = []
        """What each has signed (bits)."""
        self.fresh = self._intern(kind(), 0)
        self.may_sign = cache(self._may_sign)
        self.sign = cache(self._sign)
        self.vote = cache(self._vote)
        self.check_order = cache(self._check_order)
        self.check_past = cache(self._check_past)
        self.check_barring = cache(self._check_barring)

    def _intern(self, record: SigningRecord, signed: int) -> int:
        key = (signed, tuple(sorted(record.starts.items())), record.voted_term)
        if key not in self._ids:
            self._ids[key] = len(self._all)
            self._all.append(record)
            self.signed.append(signed)
        return self._ids[key]

    def _copy(self, i: int) -> SigningRecord:
        old = self._all[i]
        return type(old)(dict(old.signed), dict(old.starts), old.voted_term)

    def _may_sign(self, i: int, head: int, prev_certified: bool, start_valid: bool) -> bool:
        why = self._all[i].refusal(
            self._tree[head].name, prev_certified=prev_certified, start_valid=start_valid
        )
        return why is None

    def _sign(self, i: int, head: int) -> int:
        record = self._copy(i)
        record.note_signed(self._tree[head].name)
        return self._intern(record, self.signed[i] | 1 << head)

    def _vote(self, i: int, term: int) -> int | None:
        """Return the record after a vote for *term*, None if there is to be none."""
        record = self._copy(i)
        if record.vote_refusal(term) is not None:
            return None
        record.note_vote(term)
        return self._intern(record, self.signed[i])

    def _check_order(self, i: int, term: int, signed: bool) -> None:
        """Raise OrderMattersError if record *i*, in *term*, would do anything earlier."""
        votes = range(1, term + signed)
        heads = (h.index for h in self._tree[1:] if h.term < term)
        if any(self._may_sign(i, head, True, True) for head in heads) or any(
            self._all[i].vote_refusal(earlier) is None for earlier in votes
        ):
            raise OrderMattersError

    def _check_barring(self, before: int, after: int) -> None:
        """Raise OrderMattersError if record *after* would do what *before* it would not."""
        heads = (h.index for h in self._tree[1:])
        if any(
            self._may_sign(after, head, True, True) > self._may_sign(before, head, True, True)
            for head in heads
        ):
            raise OrderMattersError

    def _check_past(self, i: int, term: int) -> None:
        """Raise OrderMattersError if record *i* would not do everything after *term*."""
        heads = (h.index for h in self._tree if h.term > term)
        if not all(self._may_sign(i, head, True, True) for head in heads) or any(
            self._all[i].vote_refusal(later) for later in self._terms if later > term
        ):
            raise OrderMattersError


def stand_in(message: M, signer: Address, name: bytes) -> Signed[M]:
    """Return *message* as if it had been signed and checked."""
    return Signed(message, signer, name, 0, b"", (), name)


class Terms:
    """What a term can start from: `joblog.term_start` on every choice among the votes."""

    def __init__(self, rules: Rules, tree: list[Head]) -> None:
        self._rules, self._tree = rules, tree
        self._genesis = Genesis(word(1), COMMITTEE, rules.votes_needed, word(2), COMMITTEE[0], 5)
        self._heads = [
            stand_in(
                LogHead(
                    job_id=word(1),
                    term=max(head.term, 0),
                    seq=head.seq,
                    prev=word(head.parent),
                    start=word(0),
                    entries_root=word(0),
                    height=1,
                    block_hash=word(0),
                ),
                COMMITTEE[0],
                word(head.index),
            )
            for head in tree
        ]
        self._start = cache(self._product_start)
        self.bases = cache(self._all_bases)

    def _content(self, member: int, vote: Vote) -> VoteContent:
        listed = tuple(self._heads[i] for i in bits(vote.listed))
        high = None if vote.high == GENESIS else self._heads[vote.high]
        message = TermVote(
            job_id=word(1),
            term=vote.term,
            orchestrator=COMMITTEE[0],
            high=high.digest if high else self._genesis.hash,
            signed=tuple(head.digest for head in listed),
        )
        signed = stand_in(message, COMMITTEE[member], bytes([member, vote.high]))
        return VoteContent(signed, high, listed)

    def _product_start(self, votes: tuple[Vote, ...]) -> tuple[int, int]:
        """Return the head that the product starts a term from, and those it declares lost."""
        contents = [self._content(i, vote) for i, vote in enumerate(votes)]
        message, _, lost = term_start(self._genesis, votes[0].term, contents)
        base = GENESIS if message.prev == self._genesis.hash else int.from_bytes(message.prev)
        assert message.seq == self._tree[base].seq + 1
        return base, sum(1 << int.from_bytes(head.digest) for head in lost)

    def _all_bases(self, votes: tuple[Vote, ...], certified: int) -> dict[int, int]:
        """Return each head that a term may start from -> what is declared lost in any case.

        *votes*: the honest ones. The liar carries any certified head, and lists nothing.
        """
        bases: dict[int, int] = {}
        for size in range(self._rules.votes_needed - 1, len(votes) + 1):
            for chosen in combinations(votes, size):
                term = chosen[0].term
                for lie in (i for i in bits(certified) if self._tree[i].term < term):
                    every = (*chosen, Vote(term, lie, 0))
                    base, lost = self._start(every)
                    carried = {self._tree[vote.high] for vote in every}
                    for at in self._rules.bases(base, carried):
                        bases[at] = bases.get(at, lost) & lost
        return bases


class Committee:
    """The honest members' moves, and what must never come of them."""

    def __init__(self, rules: Rules, bound: Bound) -> None:
        self.rules = rules
        self.tree = tree = grow_tree(bound)
        self.terms = range(1, bound.term + 1)
        self.records = Records(rules.record, tree, self.terms)
        self.starts = Terms(rules, tree)
        self.in_term = {t: [h for h in tree[1:] if h.term == t] for t in range(bound.term + 1)}
        self.contradiction = cache(self._contradiction)

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield what may come next."""
        if state.phase == ANY_ORDER:
            yield from self._signatures(state)
            for term in self.terms:
                yield from self._votes(state, term)
            return
        if state.phase % 2:
            yield from self._votes(state, (state.phase + 1) // 2)
        else:
            yield from self._certificates(state)
        if state.phase < 2 * self.terms[-1]:
            yield from self._closed(state)

    def _offers(self, state: State, heads: list[Head]) -> Iterator[tuple[Head, list[int]]]:
        """Yield each of *heads* that some members may sign, with those."""
        for head in heads:
            prev_certified = bool(state.certified >> head.parent & 1)
            valid = not head.begins or head.parent in self._bases(state, head.term)
            willing = [
                i
                for i, member in enumerate(state.members)
                if self.records.may_sign(member.record, head.index, prev_certified, valid)
            ]
            if willing:
                yield head, willing

    def _signatures(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield each signature of one member."""
        for head, willing in self._offers(state, self.tree[1:]):
            held = [self.records.signed[m.record] >> head.index & 1 for m in state.members]
            certified = state.certified | (sum(held) + 2 >= QUORUM) << head.index  # one, the liar
            for i in willing:
                if not held[i]:
                    after = self._with(state, {i: self._signing(state, state.members[i], head)})
                    yield f"{i} signs {head.text}", after._replace(certified=certified)

    def _certificates(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield each certificate of the phase's term, by the liar and just enough others."""
        heads = self.in_term[state.phase // 2]
        new = [head for head in heads if not state.certified >> head.index & 1]
        for head, willing in self._offers(state, new):
            for signers in combinations(willing, QUORUM - 1):
                changed = {i: self._signing(state, state.members[i], head) for i in signers}
                certified = state.certified | 1 << head.index
                after = self._with(state, changed)._replace(certified=certified)
                yield f"{signers} sign {head.text}", after

    def _votes(self, state: State, term: int) -> Iterator[tuple[str, State]]:
        """Yield each vote of one member for *term*."""
        for i, member in enumerate(state.members):
            for after in self._voting(state, member, term):
                text = f"{i} votes for {term} on {self.tree[after.high].text}"
                yield text, self._with(state, {i: after})

    def _with(self, state: State, changed: dict[int, Member]) -> State:
        members = (changed.get(i, member) for i, member in enumerate(state.members))
        return state._replace(members=tuple(sorted(members)))

    def _bases(self, state: State, term: int) -> dict[int, int]:
        votes = state.votes
        if state.phase == ANY_ORDER:
            every = (vote for member in state.members for vote in member.votes)
            votes = tuple(sorted(vote for vote in every if vote.term == term))
        return self.starts.bases(votes, state.certified)

    def _signing(self, state: State, member: Member, head: Head) -> Member:
        record = self.records.sign(member.record, head.index)
        if state.phase != ANY_ORDER:
            self.records.check_order(record, head.term, True)
            self.records.check_barring(member.record, record)
        high = self.tree[member.high]
        prev = self.tree[head.parent]
        if state.certified >> prev.index & 1 and self.rules.place(prev) > self.rules.place(high):
            high = prev
        return Member(record, high.index, member.kept, member.votes)

    def _voting(self, state: State, member: Member, term: int) -> Iterator[Member]:
        """Yield the member after each vote for *term* it may cast: one only, as it is on disk."""
        record = self.records.vote(member.record, term)
        if record is None or any(vote.term == term for vote in member.votes):
            return
        if state.phase != ANY_ORDER:
            self.records.check_order(record, term, False)
        signed = self._heads(member.kept | self.records.signed[record])
        for high in self._heads(state.certified):
            if high.term < term and self.rules.carries(self.tree[member.high], high):
                listed = sum(1 << h.index for h in signed if self.rules.lists(high, h))
                votes = tuple(sorted((*member.votes, Vote(term, high.index, listed))))
                yield Member(record, high.index, member.kept, votes)

    def _heads(self, mask: int) -> list[Head]:
        return [self.tree[i] for i in bits(mask)]

    def _closed(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield *state* in the next phase, unless it is one with votes to no purpose."""
        members = []
        votes: tuple[Vote, ...] = ()
        if state.phase % 2:
            votes = tuple(sorted(vote for member in state.members for vote in member.votes))
            if 0 < len(votes) < self.rules.votes_needed - 1:
                return
        for member in state.members:
            self.records.check_past(member.record, state.phase // 2)
            kept = member.kept | self.records.signed[member.record] & state.certified
            high = self.tree[member.high]
            above = (h for h in self._heads(kept) if self.rules.place(h) > self.rules.place(high))
            kept = sum(1 << head.index for head in above)
            members.append(Member(self.records.fresh, high.index, kept, ()))
        yield "", State(state.phase + 1, state.certified, votes, tuple(sorted(members)))

    # ---- what must never be ----------------------------------------------------------------

    def _contradiction(self, certified: int) -> str | None:
        """Return two final heads of which neither is before the other, None if there are none."""
        heads = self._heads(certified)
        final = [
            head
            for head in heads[1:]
            if self.rules.final(head, [h for h in heads if h.parent == head.index])
        ]
        for a, b in combinations(final, 2):
            if not (a.line >> b.index & 1 or b.line >> a.index & 1):
                return f"final are both {a.text} and {b.text}"
        return None

    def redraw(self, state: State) -> str | None:
        """Return two certified heads that can hold one entry, neither declared lost for the other.

        A commitment in both would have two draws to choose from.
        """
        for head in self.tree[1:]:
            if not any(self.records.signed[m.record] >> head.index & 1 for m in state.members):
                continue
            rivals = state.certified & ~head.line if state.certified >> head.index & 1 else 0
            for rival in self._heads(rivals):
                if rival.term == head.term and not rival.line >> head.index & 1:
                    return f"certified are both {head.text} and {rival.text}"
            if head.begins:
                prev = self.tree[head.parent]
                lost = self._bases(state, head.term).get(prev.index, 0) | prev.line
                for dropped in self._heads(state.certified & ~lost):
                    if prev.term <= dropped.term < head.term:
                        return f"{head.text} drops {dropped.text} in silence"
        return None


class Outcome(NamedTuple):
    """What an exploration found: states, a wrong (empty: none), the sets that can be certified."""

    states: int
    wrong: str
    certified: set[int]


def explore(rules: Rules, bound: Bound, *, draws: bool = True, in_order: bool = True) -> Outcome:
    """Visit every state within *bound*, until two final heads contradict each other.

    *draws*: or until an entry can have a second draw unnoticed.
    """
    committee = Committee(rules, bound)
    member = Member(committee.records.fresh, GENESIS, 0, ())
    first = State(0 if in_order else ANY_ORDER, 1 << GENESIS, (), (member,) * HONEST)
    came: dict[State, tuple[State, str] | None] = {first: None}
    queue = deque([first])
    certified = set()
    try:
        while queue:
            state = queue.popleft()
            certified.add(state.certified)
            wrong = committee.contradiction(state.certified)
            if wrong is None and draws:
                wrong = committee.redraw(state)
            if wrong is not None:
                return Outcome(len(came), f"{wrong}: {story(came, state)}", certified)
            for text, after in committee.moves(state):
                if after not in came:
                    came[after] = state, text
                    queue.append(after)
    except OrderMattersError:
        return explore(rules, bound, draws=draws, in_order=False)
    return Outcome(len(came), "", certified)


def story(came: dict[State, tuple[State, str] | None], state: State) -> str:
    """Return the moves that lead to *state*."""
    texts: list[str] = []
    step = came[state]
    while step is not None:
        state, text = step
        texts.append(text)
        step = came[state]
    return "; ".join(text for text in reversed(texts) if text)


# ---- the rules, each left out ------------------------------------------------------------------


class SignsOnAnyPrev(SigningRecord):
    """Signs a head whatever is known of the one before."""

    def refusal(self, head: HeadName, *, prev_certified: bool, start_valid: bool) -> str | None:
        """Leave out whether `prev` is certified."""
        return super().refusal(head, prev_certified=True, start_valid=start_valid)


class SignsAnyStart(SigningRecord):
    """Signs a head whether its term was voted for or not."""

    def refusal(self, head: HeadName, *, prev_certified: bool, start_valid: bool) -> str | None:
        """Leave out whether the start is valid."""
        return super().refusal(head, prev_certified=prev_certified, start_valid=True)


class SignsTwoHeads(SigningRecord):
    """Signs several heads of one (term, seq)."""

    def refusal(self, head: HeadName, *, prev_certified: bool, start_valid: bool) -> str | None:
        """Leave out what was signed there."""
        lax = SigningRecord({}, self.starts, self.voted_term)
        return lax.refusal(head, prev_certified=prev_certified, start_valid=start_valid)


class SignsTwoStarts(SigningRecord):
    """Signs under several starts of one term."""

    def refusal(self, head: HeadName, *, prev_certified: bool, start_valid: bool) -> str | None:
        """Leave out under what start was signed."""
        lax = SigningRecord(self.signed, {**self.starts, head.term: head.start}, self.voted_term)
        return lax.refusal(head, prev_certified=prev_certified, start_valid=start_valid)


class SignsInAnyTerm(SigningRecord):
    """Signs in a term after a vote or a signature in a higher one."""

    def refusal(self, head: HeadName, *, prev_certified: bool, start_valid: bool) -> str | None:
        """Leave out higher terms."""
        starts = {term: start for term, start in self.starts.items() if term <= head.term}
        lax = SigningRecord(self.signed, starts)
        return lax.refusal(head, prev_certified=prev_certified, start_valid=start_valid)


class OnAnyPrev(Rules):
    """Left out: the head before must be certified."""

    record = SignsOnAnyPrev


class AnyStart(Rules):
    """Left out: a term needs a start that follows from votes."""

    record = SignsAnyStart


class TwoHeads(Rules):
    """Left out: one head per (term, seq)."""

    record = SignsTwoHeads


class TwoStarts(Rules):
    """Left out: one start per term."""

    record = SignsTwoStarts


class AnyTerm(Rules):
    """Left out: no lower term after a vote."""

    record = SignsInAnyTerm


class FewVotes(Rules):
    """Left out: a start takes a quorum of votes. One honest vote and the liar's will do."""

    votes_needed = QUORUM - 1


class AnyBase(Rules):
    """Left out: a term starts from the highest head among its votes. Any of them will do."""

    def bases(self, product: int, carried: set[Head]) -> set[int]:
        """Return them all."""
        return {head.index for head in carried}


class StaleVotes(Rules):
    """Left out: a vote carries the highest certified head that its voter knows."""

    def carries(self, known: Head, head: Head) -> bool:
        """Take any."""
        return True


class SilentVotes(Rules):
    """Left out: a vote lists the heads signed above the one it carries."""

    def lists(self, high: Head, head: Head) -> bool:
        """List none."""
        return False


class AnySuccessor(Rules):
    """Left out: a final head's successor is of the same term."""

    def final(self, head: Head, successors: list[Head]) -> bool:
        """Take any successor."""
        return bool(successors)


class NoSuccessor(Rules):
    """Left out: a final head has a certified successor."""

    def final(self, head: Head, successors: list[Head]) -> bool:
        """Ask for none."""
        return True


FEW_TERMS, LONG, VARIED = Bound(1, 4, 1), Bound(2, 3, 1), Bound(2, 2, 2)
MANY_TERMS = Bound(3, 2, 1)
SMALL, SMALL_VARIED = Bound(1, 2, 1), Bound(1, 2, 2)


@pytest.mark.parametrize("bound", [FEW_TERMS, LONG, VARIED, MANY_TERMS], ids=str)
def test_no_two_final_heads_contradict_and_no_entry_is_redrawn_in_silence(
    bound: Bound, record_property: Callable[[str, object], None]
) -> None:
    outcome = explore(Rules(), bound)
    record_property("states", outcome.states)
    assert outcome.wrong == ""
    assert outcome.states > 1000


@pytest.mark.parametrize(
    ("rules", "bound"),
    [
        (OnAnyPrev, SMALL),
        (AnyStart, SMALL),
        (TwoHeads, SMALL_VARIED),
        (AnyTerm, SMALL),
        (FewVotes, SMALL),
        (AnyBase, SMALL),
        (StaleVotes, SMALL),
        (NoSuccessor, SMALL),
        (AnySuccessor, MANY_TERMS),
    ],
)
def test_final_heads_contradict_each_other_without(rules: type[Rules], bound: Bound) -> None:
    outcome = explore(rules(), bound, draws=False)
    assert outcome.wrong.startswith("final are both")


@pytest.mark.parametrize(
    ("rules", "wrong"), [(TwoStarts, "certified are both"), (SilentVotes, "in silence")]
)
def test_an_entry_can_have_a_second_draw_without(rules: type[Rules], wrong: str) -> None:
    outcome = explore(rules(), Bound(1, 3, 1))
    assert wrong in outcome.wrong


def test_taking_the_terms_in_order_leaves_out_no_set_of_certified_heads() -> None:
    bound = Bound(1, 3, 1)
    in_order = explore(Rules(), bound)
    in_any_order = explore(Rules(), bound, in_order=False)
    assert in_order.certified == in_any_order.certified
    assert in_order.wrong == in_any_order.wrong == ""


def test_a_record_that_takes_terms_in_any_order_is_explored_in_any_order() -> None:
    records = Records(SignsInAnyTerm, grow_tree(SMALL), range(1, 2))
    voted = records.vote(records.fresh, 1)
    assert voted is not None
    with pytest.raises(OrderMattersError):
        records.check_order(voted, 1, False)
