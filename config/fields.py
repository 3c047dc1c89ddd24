"""Field types of configuration models: how each is read from text and shown again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from meshd.config.amounts import format_mcc, parse_mcc
from meshd.config.errors import QuantityError
from meshd.config.quantities import (
    format_account,
    format_duration,
    format_share,
    format_size,
    parse_account,
    parse_duration,
    parse_multiaddr,
    parse_share,
    parse_size,
)


def _text(parse: Callable[[str], Any], what: str) -> BeforeValidator:
    """Read a field by *parse*; anything but text is refused, numbers with the reason.

    Bytes, which no file can hold, pass: code that has an address need not write it first.
    """

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return parse(value)
        if isinstance(value, bytes):
            return value
        if isinstance(value, int | float):
            raise QuantityError(f"a bare number is no {what}: write it as text, in quotes")
        raise QuantityError(f"a {type(value).__name__} is no {what}: write it as text, in quotes")

    return BeforeValidator(read)


def _words(value: Any) -> Any:
    """Split text at commas, as environment variables and flags write lists."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


Amount = Annotated[int, _text(parse_mcc, "amount of MCC"), PlainSerializer(format_mcc)]
"""MCC in its smallest unit, written as a decimal string."""
Share = Annotated[int, _text(parse_share, "share"), PlainSerializer(format_share)]
"""Parts per million, written as a decimal string from 0 to 1."""
Size = Annotated[int, _text(parse_size, "size"), PlainSerializer(format_size)]
"""Bytes, written like ``2GiB``."""
Duration = Annotated[int, _text(parse_duration, "duration"), PlainSerializer(format_duration)]
"""Seconds, written like ``2h``."""
Account = Annotated[
    bytes,
    Field(min_length=20, max_length=20),
    _text(parse_account, "address"),
    PlainSerializer(format_account),
]
"""A chain address, 20 bytes, written as 0x and 40 hex digits."""
Listen = Annotated[str, _text(lambda text: parse_multiaddr(text, needs_peer=False), "multiaddr")]
"""Where to listen: /ip4/HOST/tcp/PORT."""
PeerAddress = Annotated[
    str, _text(lambda text: parse_multiaddr(text, needs_peer=True), "multiaddr")
]
"""Where a peer is: /ip4/HOST/tcp/PORT/p2p/PEER."""
Words = BeforeValidator(_words)
"""Before a tuple type: a list, or text with commas."""
