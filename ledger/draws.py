"""Who audits, and what: draws from a beacon that nobody knew when the work was committed."""

from __future__ import annotations

from collections.abc import Sequence

from meshd.p2p.codec import digest
from meshd.p2p.identity import Address

PPM = 1_000_000


def permutation(
    committee: Sequence[Address], beacon: bytes, commitment: bytes, without: Sequence[Address]
) -> tuple[Address, ...]:
    """Return the auditors of *commitment* in order: the committee, ranked by a hash of each
    member with the beacon's block hash; the parties *without* are left out.
    """
    ranked = sorted(
        (digest(b"meshd.auditor.v1\0" + beacon + commitment + member), member)
        for member in committee
        if member not in without
    )
    return tuple(member for _, member in ranked)


def sample(population: int, size: int, seed: bytes) -> tuple[int, ...]:
    """Return min(*size*, *population*) distinct numbers below *population*, ascending.

    Each follows from *seed* by rejection over BLAKE3 counters, without modulo bias.
    """
    if size >= population:
        return tuple(range(population))
    limit = 2**64 - 2**64 % population
    drawn: set[int] = set()
    counter = 0
    while len(drawn) < size:
        value = int.from_bytes(digest(seed + counter.to_bytes(8, "big"))[:8], "big")
        counter += 1
        if value < limit:
            drawn.add(value % population)
    return tuple(sorted(drawn))


def drawn_rows(
    commitment: bytes, beacon: bytes, nonce: bytes, rows: int, count: int
) -> tuple[int, ...]:
    """Return the rows of a shard that an auditor checks: they follow from commitment, beacon
    and the auditor's own nonce, so that neither worker nor auditor chooses them.
    """
    return sample(rows, count, digest(b"meshd.rows.v1\0" + commitment + beacon + nonce))


def second_audit_due(commitment: bytes, beacon: bytes, share_ppm: int) -> bool:
    """Return whether an accepted *commitment* is audited a second time (*share_ppm* of all)."""
    value = int.from_bytes(digest(b"meshd.second.v1\0" + beacon + commitment)[:8], "big")
    return value * PPM < share_ppm * 2**64


def orchestrator_ranking(
    candidates: Sequence[Address], job_id: bytes, beacon: bytes
) -> tuple[Address, ...]:
    """Return the staked orchestrators in the order in which they may take the job."""
    ranked = sorted((digest(b"meshd.rank.v1\0" + job_id + beacon + c), c) for c in candidates)
    return tuple(candidate for _, candidate in ranked)


def salted_verdict(
    salt: bytes, own_digest: bytes, *, validator: Address, challenge: bytes, draw_index: int
) -> bytes:
    """Return the commitment to an auditor's own result, bound to its audit by the challenge."""
    index = draw_index.to_bytes(4, "big")
    return digest(b"meshd.verdict.v1\0" + salt + own_digest + validator + challenge + index)
