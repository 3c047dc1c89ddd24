"""meshd's contracts as bytes: calls in, events and errors out, after their committed ABIs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError, EncodingError
from eth_hash.auto import keccak
from eth_utils.abi import abi_to_signature, get_abi_input_types, get_abi_output_types

from meshd.contracts import Artifact
from meshd.ledger.chain import CallFailed

_ERROR_STRING = keccak(b"Error(string)")[:4]
_PANIC = keccak(b"Panic(uint256)")[:4]


@dataclass(frozen=True)
class Event:
    """A decoded log: the event's name and its arguments by name; addresses are text."""

    name: str
    arguments: dict[str, Any]


class ContractAbi:
    """Encodes calls of one contract and decodes what it returns and logs."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        entries = artifact.abi
        self._functions: dict[str, Any] = {e["name"]: e for e in entries if e["type"] == "function"}
        self._events: dict[bytes, Any] = {_topic(e): e for e in entries if e["type"] == "event"}
        self._constructor = next((e for e in entries if e["type"] == "constructor"), None)
        self.errors = {_topic(e)[:4]: str(e["name"]) for e in entries if e["type"] == "error"}
        """Names of the contract's errors by selector."""

    def call(self, name: str, *arguments: Any) -> bytes:
        """Return the data of a call; addresses are bytes, structs tuples.

        Raises CallFailed if an argument does not fit its type.
        """
        function = self._functions[name]
        return _topic(function)[:4] + self._encoded(name, function, arguments)

    def creation(self, *arguments: Any) -> bytes:
        """Return the data of a deployment; raises CallFailed as `call` does."""
        if self._constructor is None:
            return self.artifact.bytecode
        return self.artifact.bytecode + self._encoded("constructor", self._constructor, arguments)

    def result(self, name: str, data: bytes) -> Any:
        """Return what function *name* returned: one value, or a dict of a struct's fields.

        Addresses are text.
        Raises ValueError if *data* is not that, as when there is no contract.
        """
        function = self._functions[name]
        try:
            (value,) = decode(get_abi_output_types(function), data)
        except DecodingError as error:
            raise ValueError(f"{self.artifact.name}.{name} returned no such value") from error
        output = function["outputs"][0]
        if output["type"] == "tuple":
            return dict(zip((c["name"] for c in output["components"]), value, strict=True))
        return value

    def topic(self, name: str) -> bytes:
        """Return the first topic of event *name*'s logs."""
        return next(topic for topic, event in self._events.items() if event["name"] == name)

    def event(self, topics: Sequence[bytes], data: bytes) -> Event | None:
        """Return the event that a log tells of; None for one that the contract does not know."""
        entry = self._events.get(topics[0]) if topics else None
        if entry is None:
            return None
        indexed = [i for i in entry["inputs"] if i["indexed"]]
        others = [i for i in entry["inputs"] if not i["indexed"]]
        values = decode([i["type"] for i in others], data)
        arguments = {i["name"]: value for i, value in zip(others, values, strict=True)}
        for i, topic in zip(indexed, topics[1:], strict=True):
            (arguments[i["name"]],) = decode([i["type"]], topic)
        return Event(entry["name"], arguments)

    def _encoded(self, name: str, entry: Any, arguments: Sequence[Any]) -> bytes:
        try:
            return encode(get_abi_input_types(entry), arguments)
        except EncodingError as error:
            raise CallFailed(f"{self.artifact.name}.{name}: {error}") from error


def error_name(contracts: Iterable[ContractAbi], data: bytes) -> str:
    """Return what a revert with *data* says: a contract's error by name, or a reason as text."""
    selector = data[:4]
    for contract in contracts:
        if selector in contract.errors:
            return contract.errors[selector]
    try:
        if selector == _ERROR_STRING:
            return str(decode(["string"], data[4:])[0])
        if selector == _PANIC:
            return f"Panic({decode(['uint256'], data[4:])[0]:#x})"
    except (DecodingError, UnicodeDecodeError):
        pass
    return f"reverted with {data[:36].hex()}" if data else "reverted without a reason"


def _topic(entry: Any) -> bytes:
    return bytes(keccak(abi_to_signature(entry).encode()))
