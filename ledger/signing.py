"""What a committee member may sign in a job's log: the rules, and the memory they need.

Each rule is needed: tests/unit/test_signing_model.py explores every order of events with a
liar among the members and a hostile orchestrator, and as soon as one of them is left out finds
two contradicting final heads, or (one start per term) an entry with two draws to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HeadName:
    """What the rules need to know of a head."""

    term: int
    seq: int
    hash: bytes
    prev: bytes
    start: bytes


@dataclass
class SigningRecord:
    """What one member has signed and knows of one job; on disk before a signature leaves."""

    signed: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """(term, seq) -> the one head signed there."""
    starts: dict[int, bytes] = field(default_factory=dict)
    """term -> the one `start` signed under."""
    voted_term: int = 0

    def refusal(self, head: HeadName, *, prev_certified: bool, start_valid: bool) -> str | None:
        """Return why *head* must not be signed, None if it may be.

        *prev_certified*: this member has verified the certificate of `prev` (the genesis needs
        none). *start_valid*: the head continues the term of `prev`, or its first entry is a
        TermStart that follows from a quorum of votes.
        """
        if not prev_certified:
            return "the head before it is not known to be certified"
        if not start_valid:
            return "its term has no valid start"
        if self.signed.get((head.term, head.seq), head.hash) != head.hash:
            return f"another head was signed at {head.term}.{head.seq}"
        if self.starts.get(head.term, head.start) != head.start:
            return f"another start of term {head.term} was signed"
        if head.term < self.highest_term:
            return f"this member has gone on to term {self.highest_term}"
        return None

    @property
    def highest_term(self) -> int:
        """The highest term voted for or signed in."""
        return max([self.voted_term, *self.starts])

    def note_signed(self, head: HeadName) -> None:
        """Remember a signature."""
        self.signed[head.term, head.seq] = head.hash
        self.starts[head.term] = head.start

    def vote_refusal(self, term: int) -> str | None:
        """Return why this member must not vote for *term* any more, None if it may."""
        if term < self.voted_term or term <= max(self.starts, default=0):
            return f"this member has gone on to term {self.highest_term}"
        return None

    def note_vote(self, term: int) -> None:
        """Remember a vote."""
        self.voted_term = max(self.voted_term, term)


def too_late(own_height: int, head_height: int, lag: int) -> bool:
    """Return whether a head may give a draw away: its beacon would be `head_height + lag`."""
    return own_height > head_height + lag - 2
