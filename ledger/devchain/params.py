"""The parameters of an RPC call, read with a clear word on what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence

from eth.vm.forks.prague.blocks import PragueBlockHeader

from meshd.ledger.devchain.chain import Devchain
from meshd.ledger.devchain.execution import Call
from meshd.ledger.devchain.store import GAS_LIMIT, LogFilter
from meshd.ledger.devchain.views import Json
from meshd.p2p.identity import NOBODY, Address

INVALID_PARAMS = -32602
SERVER_ERROR = -32000
LIMIT_EXCEEDED = -32005

MAX_LOG_BLOCKS = 10_000
"""Most blocks that one query for logs may span."""
MAX_FILTER_VALUES = 1_000
"""Most addresses and topics in one query for logs."""

_TAGS_OF_HEAD = ("latest", "pending", "safe", "finalized")
_CALL_FIELDS = {
    "from", "to", "data", "input", "value", "gas", "accessList", "nonce", "chainId", "type",
    "gasPrice", "maxFeePerGas", "maxPriorityFeePerGas",
}  # fmt: skip


class RpcError(Exception):
    """An answer that says why there is none; codes are those of JSON-RPC 2.0 and EIP-1474."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


class Params:
    """The positional parameters of one call."""

    def __init__(self, values: Sequence[Json]) -> None:
        self._values = values

    def at(self, index: int, default: Json = None) -> Json:
        """Return parameter *index*, *default* if it is left out or null."""
        value = self._values[index] if index < len(self._values) else None
        return default if value is None else value

    def data(self, index: int) -> bytes:
        """Return parameter *index*, bytes of any length."""
        return _bytes(self._required(index), f"argument {index}")

    def hash(self, index: int) -> bytes:
        """Return parameter *index*, 32 bytes."""
        return _bytes(self._required(index), f"argument {index}", 32)

    def address(self, index: int) -> Address:
        """Return parameter *index*, an address."""
        return Address(_bytes(self._required(index), f"argument {index}", 20))

    def quantity(self, index: int) -> int:
        """Return parameter *index*, a number."""
        return _quantity(self._required(index), f"argument {index}")

    def header(self, chain: Devchain, index: int) -> PragueBlockHeader:
        """Return the block that parameter *index* names (the newest if left out)."""
        header = find_header(chain, self.at(index, "latest"), f"argument {index}")
        if header is None:
            raise RpcError(SERVER_ERROR, f"header not found: {str(self.at(index))[:80]}")
        return header

    def call(self, index: int) -> Call:
        """Return parameter *index*, a transaction object, as a call."""
        fields = self._required(index)
        if not isinstance(fields, dict):
            raise _invalid(f"argument {index}", "is no transaction object")
        unknown = sorted(set(fields) - _CALL_FIELDS)
        if unknown:
            raise _invalid(f"argument {index}", f"has the unsupported field {unknown[0]!r}")
        sent = fields.get("input") or fields.get("data") or "0x"
        gas = _quantity(fields.get("gas") or hex(GAS_LIMIT), "gas")
        return Call(
            sender=Address(_bytes(fields["from"], "from", 20)) if fields.get("from") else NOBODY,
            to=_bytes(fields["to"], "to", 20) if fields.get("to") else b"",
            data=_bytes(sent, "input"),
            value=_quantity(fields.get("value") or "0x0", "value"),
            gas=min(gas, GAS_LIMIT),
            access_list=_access_list(fields.get("accessList") or []),
        )

    def log_filter(self, chain: Devchain, index: int) -> LogFilter:
        """Return parameter *index*, a filter of logs."""
        fields = self._required(index)
        if not isinstance(fields, dict):
            raise _invalid(f"argument {index}", "is no filter object")
        first, last = _log_range(chain, fields)
        addresses = fields.get("address") or []
        if isinstance(addresses, str):
            addresses = [addresses]
        places = fields.get("topics") or []
        if not isinstance(addresses, list) or not isinstance(places, list) or len(places) > 4:
            raise _invalid("filter", "needs a list of addresses and of at most four topics")
        topics = tuple(_topics(place) for place in places)
        wanted = frozenset(_bytes(address, "address", 20) for address in addresses)
        if len(wanted) + sum(map(len, topics)) > MAX_FILTER_VALUES:
            raise RpcError(
                LIMIT_EXCEEDED, f"more than {MAX_FILTER_VALUES} addresses and topics: ask for less"
            )
        return LogFilter(first, last, wanted, topics)

    def _required(self, index: int) -> Json:
        value = self.at(index)
        if value is None:
            raise RpcError(INVALID_PARAMS, f"missing value for required argument {index}")
        return value


def find_header(chain: Devchain, named: Json, what: str) -> PragueBlockHeader | None:
    """Return the block *named* by tag, number, or object (EIP-1898); None if there is none."""
    if isinstance(named, dict):
        if "blockHash" in named:
            number = chain.store.block_number(_bytes(named["blockHash"], "blockHash", 32))
            return None if number is None else chain.header(number)
        named = named.get("blockNumber", "latest")
    return chain.header(_block_number(chain, named, what))


def _block_number(chain: Devchain, named: Json, what: str) -> int:
    if named in _TAGS_OF_HEAD:
        return chain.head.block_number
    return 0 if named == "earliest" else _quantity(named, what)


def _log_range(chain: Devchain, fields: dict[str, Json]) -> tuple[int, int]:
    if fields.get("blockHash") is not None:
        if fields.get("fromBlock") is not None or fields.get("toBlock") is not None:
            raise _invalid("filter", "has a blockHash and a range: give one of them")
        number = chain.store.block_number(_bytes(fields["blockHash"], "blockHash", 32))
        if number is None:
            raise RpcError(SERVER_ERROR, "unknown block")
        return number, number
    first = _block_number(chain, fields.get("fromBlock") or "latest", "fromBlock")
    last = _block_number(chain, fields.get("toBlock") or "latest", "toBlock")
    if first > last:
        raise _invalid("filter", f"has the range {first} to {last}: its end is before its start")
    last = min(last, max(first, chain.head.block_number))
    if last - first >= MAX_LOG_BLOCKS:
        raise RpcError(
            LIMIT_EXCEEDED,
            f"blocks {first} to {last} are more than {MAX_LOG_BLOCKS}: ask for smaller ranges",
        )
    return first, last


def _topics(place: Json) -> frozenset[bytes]:
    if place is None:
        return frozenset()
    return frozenset(
        _bytes(topic, "topic", 32) for topic in (place if isinstance(place, list) else [place])
    )


def _access_list(entries: Json) -> tuple[tuple[bytes, tuple[int, ...]], ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _invalid("accessList", "is no list of objects")
    return tuple(
        (
            _bytes(entry.get("address"), "address", 20),
            tuple(
                int.from_bytes(_bytes(slot, "storage key", 32), "big")
                for slot in entry.get("storageKeys") or []
            ),
        )
        for entry in entries
    )


def _quantity(value: Json, what: str) -> int:
    if not isinstance(value, str) or not value.startswith("0x") or not 3 <= len(value) <= 66:
        raise _invalid(what, f"{str(value)[:80]!r} is no number such as 0x1f")
    try:
        return int(value[2:], 16)
    except ValueError:
        raise _invalid(what, f"{value!r} is no number such as 0x1f") from None


def _bytes(value: Json, what: str, length: int | None = None) -> bytes:
    try:
        if not isinstance(value, str) or not value.startswith("0x"):
            raise ValueError
        raw = bytes.fromhex(value[2:])
    except ValueError:
        raise _invalid(what, f"{str(value)[:80]!r} is no hexadecimal data with 0x") from None
    if length is not None and len(raw) != length:
        raise _invalid(what, f"{str(value)[:80]!r} has {len(raw)} bytes, not {length}")
    return raw


def _invalid(what: str, wrong: str) -> RpcError:
    return RpcError(INVALID_PARAMS, f"invalid {what}: {wrong}")
