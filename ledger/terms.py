"""Which terms a job can be run on: anybody may write any, and nobody may be held up by them."""

from __future__ import annotations

from meshd.ledger.draws import PPM
from meshd.p2p.messages import JobTerms

MIN_LAG = 3
"""Blocks: with fewer a head would have no time to be signed before its beacon is known."""
MAX_BLOCKS = 100_000
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
    if terms.work_deadline >= terms.settle_deadline:
        return "the terms' settle deadline does not come after their work deadline"
    return None
