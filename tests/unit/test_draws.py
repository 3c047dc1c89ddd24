"""Draws: the same for everybody, chosen by nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshd.ledger import draws
from meshd.p2p.codec import digest
from meshd.p2p.identity import Address

MEMBERS = tuple(Address(bytes([i]) * 20) for i in range(1, 8))
BEACON, WORK, NONCE = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32


def test_every_member_but_the_worker_is_in_the_permutation_once() -> None:
    order = draws.permutation(MEMBERS, BEACON, WORK, without=[MEMBERS[2]])
    assert sorted(order) == sorted(set(MEMBERS) - {MEMBERS[2]})


def test_the_permutation_follows_from_beacon_and_commitment_only() -> None:
    order = draws.permutation(MEMBERS, BEACON, WORK, ())
    assert draws.permutation(MEMBERS[::-1], BEACON, WORK, ()) == order
    assert draws.permutation(MEMBERS, b"\x09" * 32, WORK, ()) != order
    assert draws.permutation(MEMBERS, BEACON, b"\x09" * 32, ()) != order


@given(st.integers(1, 500), st.integers(0, 40), st.binary(min_size=32, max_size=32))
def test_a_sample_has_distinct_ascending_rows_of_the_shard(
    rows: int, count: int, seed: bytes
) -> None:
    sample = draws.sample(rows, count, seed)
    assert len(sample) == min(rows, count)
    assert list(sample) == sorted(set(sample))
    assert all(0 <= row < rows for row in sample)


def test_every_row_is_drawn_about_equally_often() -> None:
    counts = [0] * 10
    for i in range(3000):
        for row in draws.sample(10, 2, digest(i.to_bytes(4, "big"))):
            counts[row] += 1
    assert all(500 < count < 700 for count in counts), counts


def test_drawn_rows_change_with_beacon_nonce_and_commitment() -> None:
    rows = draws.drawn_rows(WORK, BEACON, NONCE, 1000, 5)
    assert draws.drawn_rows(WORK, BEACON, NONCE, 1000, 5) == rows
    other = b"\x09" * 32
    assert draws.drawn_rows(other, BEACON, NONCE, 1000, 5) != rows
    assert draws.drawn_rows(WORK, other, NONCE, 1000, 5) != rows
    assert draws.drawn_rows(WORK, BEACON, other, 1000, 5) != rows


def test_second_audits_fall_due_as_often_as_the_terms_say() -> None:
    works = [digest(i.to_bytes(4, "big")) for i in range(5000)]
    due = sum(draws.second_audit_due(work, BEACON, 100_000) for work in works)
    assert 400 < due < 600
    assert not any(draws.second_audit_due(work, BEACON, 0) for work in works)
    assert all(draws.second_audit_due(work, BEACON, draws.PPM) for work in works)


def test_a_salted_verdict_is_bound_to_salt_digest_auditor_challenge_and_slot() -> None:
    def salted(
        salt: bytes = b"s" * 32,
        own: bytes = b"d" * 32,
        validator: Address = MEMBERS[0],
        challenge: bytes = b"c" * 32,
        draw_index: int = 0,
    ) -> bytes:
        return draws.salted_verdict(
            salt, own, validator=validator, challenge=challenge, draw_index=draw_index
        )

    values = {
        salted(),
        salted(salt=b"x" * 32),
        salted(own=b"x" * 32),
        salted(validator=MEMBERS[1]),
        salted(challenge=b"x" * 32),
        salted(draw_index=1),
    }
    assert len(values) == 6


def test_orchestrators_are_ranked_by_job_and_beacon() -> None:
    ranking = draws.orchestrator_ranking(MEMBERS, WORK, BEACON)
    assert sorted(ranking) == sorted(MEMBERS)
    assert draws.orchestrator_ranking(MEMBERS[::-1], WORK, BEACON) == ranking
    assert draws.orchestrator_ranking(MEMBERS, b"\x09" * 32, BEACON) != ranking
