"""Amounts of MCC: exact decimal text for people, integers of the smallest unit inside."""

from __future__ import annotations

import re
from typing import Final

from meshd.config.errors import QuantityError

DECIMALS: Final = 18
"""One MCC is 10^18 of its smallest unit."""

ONE_MCC: Final = 10**DECIMALS
GIGA: Final = 10**9
"""Prices are MCC (smallest unit) per this many compute units."""

_AMOUNT = re.compile(r"([0-9]{1,60})(?:\.([0-9]{1,60}))?")
_LIMIT = 2**256


def parse_mcc(text: str) -> int:
    """Return the amount written as decimal *text* ("1.5") in MCC's smallest unit.

    Plain digits with at most 18 decimals: no sign, exponent, space or thousands separator.
    Raises QuantityError.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise QuantityError(f"{text[:80]!r} is not an amount of MCC: write digits like 12 or 0.5")
    whole, fraction = match.group(1), match.group(2) or ""
    if len(fraction.rstrip("0")) > DECIMALS:
        raise QuantityError(f"{text[:80]} MCC has more than {DECIMALS} decimals: round it")
    amount = int(whole) * ONE_MCC + int(fraction[:DECIMALS].ljust(DECIMALS, "0"))
    if amount >= _LIMIT:
        raise QuantityError(
            f"{text[:80]} MCC is more than fits into 256 bits: use a smaller amount"
        )
    return amount


def format_mcc(amount: int) -> str:
    """Return *amount* (smallest unit; negative for a difference) as exact decimal text."""
    whole, fraction = divmod(abs(amount), ONE_MCC)
    digits = f"{fraction:0{DECIMALS}d}".rstrip("0")
    sign = "-" if amount < 0 else ""
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def cost(units: int, price: int) -> int:
    """Return what *units* cost at *price* (smallest unit per 10^9 units), rounded up once."""
    return -(-units * price // GIGA)
