"""Which terms a job can be run on: anybody may write any, and nobody may be held up by them."""

from __future__ import annotations

from meshd.ledger.draws import PPM
from meshd.ledger.rounds import TRAIN
from meshd.p2p.messages import ZERO, JobTerms

MIN_LAG = 3
"""Blocks: with fewer a head would have no time to be signed before its beacon is known."""
MAX_BLOCKS = 100_000
MAX_SHARDS = 1024
"""Shards of a training round: as many commitments as one close names."""
_SHARES = ("orchestrator_share", "aggregator_share", "audit_budget", "second_audit_share")
_AT_LEAST_ONE = (
    "rows",
    "shards",
    "rows_per_shard",
    "rounds",
    "cap",
    "audit_rows",
    "probation_rows",
    "max_unsettled",
    "epoch_limit",
    "window",
)
_BLOCKS = ("silence", "challenge_blocks", "audit_blocks", "lease_blocks")


def terms_problem(terms: JobTerms) -> str | None:
    """Return what makes *terms* impossible to keep to, None if nothing does."""
    for name in (*_AT_LEAST_ONE, *_BLOCKS):
        if getattr(terms, name) < 1:
            return f"the terms have {name} 0: it is at least 1"
    for name in ("lag", *_BLOCKS):
        if getattr(terms, name) > MAX_BLOCKS:
            return f"the terms have {name} {getattr(terms, name)}: {MAX_BLOCKS} is the most"
    if terms.lag < MIN_LAG:
        return f"the terms have lag {terms.lag}: it is at least {MIN_LAG}"
    for name in _SHARES:
        if getattr(terms, name) > PPM:
            return f"the terms have {name} {getattr(terms, name)}: {PPM} parts are the whole"
    if terms.max_unsettled <= terms.retention:
        return (
            f"the terms have max_unsettled {terms.max_unsettled}: a worker would stop before "
            f"any shard is payable, which takes retention = {terms.retention} later ones"
        )
    if terms.workload == TRAIN and (problem := _training_problem(terms)) is not None:
        return problem
    if terms.work_deadline >= terms.settle_deadline:
        return "the terms' settle deadline does not come after their work deadline"
    return None


def _training_problem(terms: JobTerms) -> str | None:
    for name in ("span_shards", "audit_shards", "probation_span_shards"):
        if not 1 <= getattr(terms, name) <= terms.span_shards:
            return (
                f"the terms have {name} {getattr(terms, name)}: it is at least 1 and at most "
                f"span_shards, {terms.span_shards}"
            )
    if terms.max_unsettled <= terms.span_shards:
        return (
            f"the terms have max_unsettled {terms.max_unsettled}: a worker would stop before its "
            f"first span of {terms.span_shards} shards is full"
        )
    if terms.shards > MAX_SHARDS:
        return f"the terms have {terms.shards} shards a round: {MAX_SHARDS} are the most"
    if terms.rounds * terms.shards >= 2**32:
        return f"the terms have {terms.rounds} rounds of {terms.shards} shards: 2^32 are too many"
    if terms.initial_state == ZERO:
        return "the terms name no initial_state"
    return None
