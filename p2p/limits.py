"""What one peer may cost this node: sizes, rates, slots an address, what may be dialled (pure)."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from meshd.p2p.identity import Address, IdentityError, address_from_peer_id
from meshd.p2p.messages import KIB

MAX_NEGOTIATION = 64 * KIB
"""Bytes of one protocol-negotiation line: all that a stranger may announce."""
MAX_GOSSIP = 512 * KIB
"""Bytes of a gossiped frame; libp2p drops an RPC over 1 MiB without a word."""
MAX_RECORD = 4 * KIB
"""Bytes of a capability record's frame."""


def check_gossip(raw: bytes) -> None:
    """Raise ValueError for a frame that is too large for gossip."""
    if len(raw) > MAX_GOSSIP:
        raise ValueError(
            f"{len(raw)} bytes are too much for gossip ({MAX_GOSSIP}): "
            "send a request, or a blob and its digest"
        )


class TokenBucket:
    """Admits *rate* events a second on average and *burst* at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._updated = 0.0

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Return whether *amount* events may happen at *now* (seconds, monotonic)."""
        elapsed = max(0.0, now - self._updated)
        self._tokens = min(self._burst, self._tokens + elapsed * self._rate)
        self._updated = max(self._updated, now)
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True


class Buckets:
    """A TokenBucket for each key; of more than *size* keys the longest unused is forgotten."""

    def __init__(self, rate: float, burst: float, *, size: int = 1024) -> None:
        self._rate = rate
        self._burst = burst
        self._size = size
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def take(self, key: Hashable, now: float, amount: float = 1.0) -> bool:
        """Return whether *key* may do *amount* more at *now* (seconds, monotonic)."""
        bucket = self._buckets.pop(key, None) or TokenBucket(self._rate, self._burst)
        self._buckets[key] = bucket
        if len(self._buckets) > self._size:
            self._buckets.popitem(last=False)
        return bucket.take(now, amount)


class Slots:
    """Handshakes in progress: bounded in total, an address, and a network around it.

    An address is an IPv4 /32 or an IPv6 /64; a network an IPv4 /24 or an IPv6 /48.
    """

    def __init__(self, *, total: int, per_address: int, per_network: int) -> None:
        self._limits = (total, per_address, per_network)
        self._taken: Counter[object] = Counter()

    def take(self, host: str) -> bool:
        """Take a slot for *host* (an IP address) if there is one; return whether there was."""
        keys = _slot_keys(host)
        if any(self._taken[key] >= limit for key, limit in zip(keys, self._limits, strict=True)):
            return False
        self._taken.update(keys)
        return True

    def release(self, host: str) -> None:
        """Give the slot of *host* back."""
        self._taken.subtract(_slot_keys(host))
        for key in _slot_keys(host):
            if self._taken[key] <= 0:
                del self._taken[key]


def _slot_keys(host: str) -> tuple[object, object, object]:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return ("all", ("address", host), ("network", host))
    address, network = (32, 24) if ip.version == 4 else (64, 48)
    return (
        "all",
        ("address", ipaddress.ip_network((ip, address), strict=False)),
        ("network", ipaddress.ip_network((ip, network), strict=False)),
    )


@dataclass(frozen=True)
class Endpoint:
    """Where a peer listens: the parts of ``/ip4/192.0.2.1/tcp/4001/p2p/16Uiu2...``."""

    kind: str
    host: str
    port: int
    peer_id: str

    @classmethod
    def parse(cls, multiaddr: str) -> Endpoint:
        """Parse a TCP multiaddr that ends in a peer id; raises ValueError for anything else."""
        parts = multiaddr.split("/")
        shown = repr(multiaddr[:96])
        if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p":
            raise ValueError(f"multiaddr {shown} is not of the form /ip4/HOST/tcp/PORT/p2p/PEER")
        kind, host, port, peer_id = parts[1], parts[2], parts[4], parts[6]
        if kind not in ("ip4", "ip6", "dns4", "dns6", "dns"):
            raise ValueError(f"multiaddr {shown} starts with {kind[:16]!r}: use ip4, ip6 or dns4")
        if kind in ("ip4", "ip6") and ipaddress.ip_address(host).version != int(kind[2]):
            raise ValueError(f"multiaddr {shown}: {host} is no {kind} address")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"multiaddr {shown}: {port[:16]!r} is no TCP port")
        try:
            address_from_peer_id(peer_id)
        except IdentityError as error:
            raise ValueError(f"multiaddr {shown}: {error}") from error
        return cls(kind, host, int(port), peer_id)

    @property
    def address(self) -> Address:
        """The chain address that belongs to the peer id."""
        return address_from_peer_id(self.peer_id)

    def dialable(self, *, lan: bool) -> bool:
        """Return whether this may be dialled on a peer's word.

        Only public IP addresses may, so that no peer can make this node knock at machines of
        its home network; with *lan* private and loopback addresses and names may, too.
        """
        return lan or (self.kind in ("ip4", "ip6") and is_public(self.host))


def is_public(host: str) -> bool:
    """Return whether the IP address *host* is one of the public internet."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return bool(ip.is_global and not ip.is_multicast and (mapped is None or mapped.is_global))
