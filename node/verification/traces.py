"""What a training worker keeps back until it is audited: its uncompressed end state's digest."""

from __future__ import annotations

from meshd.p2p.codec import digest


def trace_root(salt: bytes, end_digest: bytes, assignment: bytes) -> bytes:
    """Return the commitment to an end state, bound to the lease by its *assignment*'s digest.

    The assignment names job, round, shard and worker, so nobody else can use the root.
    """
    return digest(b"meshd.trace.v1\0" + salt + assignment + end_digest)
