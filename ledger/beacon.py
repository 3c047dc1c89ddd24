"""The Beacon port: public randomness that nobody knew before a given height."""

from __future__ import annotations

from typing import Protocol

from meshd.ledger.chain import Chain
from meshd.p2p.codec import digest


class Beacon(Protocol):
    """Gives each height its value once the height is reached."""

    async def at(self, height: int) -> bytes:
        """Return the value of *height*, 32 bytes; wait until it exists."""
        ...


class BlockHashBeacon:
    """The chain's block hashes (`beaconSource = "blockhash"`).

    On a development chain or behind a sequencer the draw of auditors is as honest as its
    operator; the rows drawn also depend on the auditor's own nonce.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._known: dict[int, bytes] = {}

    async def at(self, height: int) -> bytes:
        """Return the hash of block *height*; wait until it exists."""
        if height not in self._known:
            self._known[height] = (await self._chain.wait_height(height)).hash
        return self._known[height]


class SeededBeacon:
    """Values that follow from a seed: for tests of what rests on a beacon."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed

    async def at(self, height: int) -> bytes:
        """Return the value of *height* at once."""
        return digest(b"meshd.beacon.v1\0" + self._seed + height.to_bytes(8, "big"))
