"""The signed, expiring capability records that a node knows: the newest of each peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from meshd.p2p.codec import Signed
from meshd.p2p.identity import Address
from meshd.p2p.limits import MAX_RECORD
from meshd.p2p.messages import Capability, Message

MAX_LIFE_S = 24 * 3600
"""Seconds that a record may be valid at most."""
CLOCK_SLACK_S = 120
"""Seconds that a peer's clock may be ahead of ours."""
MAX_RECORDS = 4096
"""Peers whose records are kept; of more, the one that was refreshed longest ago goes."""


class CapabilityBook:
    """Records by signer. *wall* returns Unix seconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._records: dict[Address, Signed[Capability]] = {}

    def problem(self, signed: Signed[Message]) -> str | None:
        """Return why *signed* is no usable record now, or None if it is one."""
        now = self._wall()
        if not isinstance(signed.message, Capability):
            return f"a {signed.message.kind} is no capability"
        if not signed.expires:
            return "a capability must expire: sign it with expires"
        if signed.expired(now):
            return f"capability expired at {signed.expires}"
        if signed.expires > now + MAX_LIFE_S + CLOCK_SLACK_S:
            return f"capability expires at {signed.expires}: more than {MAX_LIFE_S} s from now"
        if signed.message.issued > now + CLOCK_SLACK_S:
            return f"capability was issued at {signed.message.issued}: in the future"
        if len(signed.raw) > MAX_RECORD:
            return f"capability of {len(signed.raw)} bytes: {MAX_RECORD} are allowed"
        return None

    def learn(self, signed: Signed[Message]) -> bool:
        """Keep *signed* if it is usable and news; return whether it was."""
        if self.problem(signed) is not None:
            return False
        record = cast(Signed[Capability], signed)
        former = self._records.get(record.signer)
        if former is not None and former.message.issued >= record.message.issued:
            return False
        self._records.pop(record.signer, None)
        self._records[record.signer] = record
        if len(self._records) > MAX_RECORDS:
            self._forget_expired()
        if len(self._records) > MAX_RECORDS:
            del self._records[next(iter(self._records))]
        return True

    def of(self, address: Address) -> Signed[Capability] | None:
        """Return the unexpired record of *address*, if it is known."""
        record = self._records.get(address)
        return None if record is None or record.expired(self._wall()) else record

    def known(self) -> tuple[Signed[Capability], ...]:
        """Return every unexpired record, those refreshed last at the end."""
        self._forget_expired()
        return tuple(self._records.values())

    def _forget_expired(self) -> None:
        now = self._wall()
        for address in [a for a, record in self._records.items() if record.expired(now)]:
            del self._records[address]
