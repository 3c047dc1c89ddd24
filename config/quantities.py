"""Sizes, durations, shares, accounts and addresses as people write them."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from meshd.config.errors import QuantityError

_SIZES: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SECONDS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_SIZE = re.compile(r"([0-9]{1,15}) ?(|KiB|MiB|GiB|TiB)")
_DURATION = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")
_SHARE = re.compile(r"([01])(?:\.([0-9]{1,6}))?")
_PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{20,80}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9-]{1,63})*")

MILLION: Final = 1_000_000
"""Shares travel as parts per million."""


def parse_size(text: str) -> int:
    """Return the bytes that *text* stands for: digits and KiB, MiB, GiB, TiB or nothing."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise QuantityError(f"{text[:80]!r} is not a size: write one like 512MiB or 4GiB")
    return int(match.group(1)) * _SIZES[match.group(2)]


def format_size(size: int) -> str:
    """Return *size* bytes in the largest unit that shows it exactly."""
    for unit, factor in reversed(_SIZES.items()):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return "0"


def parse_duration(text: str) -> int:
    """Return the seconds that *text* stands for: days, hours, minutes, seconds (``1h30m``)."""
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise QuantityError(
            f"{text[:80]!r} is not a duration: write one like 45s, 90m, 2h or 1d12h"
        )
    counts = (int(count or 0) for count in match.groups())
    return sum(count * unit for count, unit in zip(counts, _SECONDS.values(), strict=True))


def format_duration(seconds: int) -> str:
    """Return *seconds* as parse_duration reads it."""
    parts = []
    for name, unit in _SECONDS.items():
        count, seconds = divmod(seconds, unit)
        if count:
            parts.append(f"{count}{name}")
    return "".join(parts) or "0s"


def parse_share(text: str) -> int:
    """Return the parts per million that decimal *text* from 0 to 1 stands for."""
    match = _SHARE.fullmatch(text)
    if match is None:
        raise QuantityError(f"{text[:80]!r} is not a share: write a decimal from 0 to 1 like 0.125")
    share = int(match.group(1)) * MILLION + int((match.group(2) or "").ljust(6, "0"))
    if share > MILLION:
        raise QuantityError(f"{text[:80]} is more than the whole: a share is at most 1")
    return share


def format_share(share: int) -> str:
    """Return *share* (parts per million) as exact decimal text."""
    whole, rest = divmod(share, MILLION)
    digits = f"{rest:06d}".rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def parse_account(text: str) -> bytes:
    """Return the 20 bytes of a chain address; mixed case must carry the checksum of EIP-55."""
    digits = text[2:]
    if not text.startswith("0x") or not re.fullmatch(r"[0-9a-fA-F]{40}", digits):
        raise QuantityError(f"{text[:80]!r} is not an address: write 0x and 40 hex digits")
    account = bytes.fromhex(digits)
    if digits not in (digits.lower(), digits.upper()) and format_account(account) != text:
        raise QuantityError(f"address {text} has a wrong checksum: a digit was mistyped")
    return account


def format_account(account: bytes) -> str:
    """Return *account* in the checksummed form of EIP-55."""
    from eth_hash.auto import keccak  # only here: most uses of this module need no hash

    lower = account.hex()
    marks = keccak(lower.encode()).hex()
    return "0x" + "".join(
        char.upper() if mark > "7" else char for char, mark in zip(lower, marks, strict=False)
    )


def parse_multiaddr(text: str, *, needs_peer: bool) -> str:
    """Return *text* if it is a TCP multiaddr: /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEER].

    *needs_peer* says whether it must end with a PeerId or must not.
    Source: https://github.com/multiformats/multiaddr
    """
    parts = text.split("/")
    shape = "/ip4/HOST/tcp/PORT/p2p/PEER" if needs_peer else "/ip4/HOST/tcp/PORT"
    length = 7 if needs_peer else 5
    if len(parts) != length or parts[0] or parts[3] != "tcp" or (needs_peer and parts[5] != "p2p"):
        raise QuantityError(f"{text[:200]!r} is not a multiaddr of the form {shape}: write it so")
    if not _is_host(parts[1], parts[2]):
        raise QuantityError(
            f"{text[:200]!r} names no host by ip4, ip6 or dns: correct {parts[2]!r}"
        )
    if not parts[4].isdecimal() or len(parts[4]) > 5 or int(parts[4]) > 65_535:
        raise QuantityError(f"{text[:200]!r} has port {parts[4]!r}: use 0 (any free one) to 65535")
    if needs_peer and not _PEER.fullmatch(parts[6]):
        raise QuantityError(
            f"{text[:200]!r} ends with {parts[6]!r}, which is not a PeerId (16Uiu2...)"
        )
    return text


def is_loopback(multiaddr: str) -> bool:
    """Whether only this machine can reach the host of *multiaddr*."""
    _, protocol, host, *_ = multiaddr.split("/")
    return protocol in ("ip4", "ip6") and ipaddress.ip_address(host).is_loopback


def _is_host(protocol: str, host: str) -> bool:
    try:
        match protocol:
            case "ip4":
                return bool(ipaddress.IPv4Address(host))
            case "ip6":
                return bool(ipaddress.IPv6Address(host))
            case "dns" | "dns4" | "dns6":
                return len(host) < 254 and _HOST.fullmatch(host) is not None
            case _:
                return False
    except ValueError:
        return False
