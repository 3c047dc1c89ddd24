"""Every message against its bytes: what is on the wire and what is signed never changes unseen."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from eth_account.messages import encode_typed_data
from eth_hash.auto import keccak

from meshd.p2p import codec
from meshd.p2p.codec import Domain, decode, encode, struct_hash, type_string
from meshd.p2p.identity import Address, Identity, recover
from meshd.p2p.messages import MESSAGES, PROTOCOL, Encoded, Message, Settlement

FILE: dict[str, Any] = json.loads(Path(__file__).with_name("messages.json").read_text())
DOMAIN = Domain(FILE["network"], FILE["chainId"], Address(bytes.fromhex(FILE["escrow"])))
KEY = Identity(bytes.fromhex(FILE["secret"]))
CURE = (
    "a message's bytes have changed: bump PROTOCOL in p2p/messages.py, "
    "then run tests/vectors/generate.py"
)


@pytest.fixture(autouse=True)
def no_frame_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_VERIFIED", codec._Cache(0, 0))


every_vector = pytest.mark.parametrize(
    ("kind", "vector"),
    [
        pytest.param(kind, vector, id=f"{kind}-{variant}")
        for kind, variants in FILE["messages"].items()
        for variant, vector in variants.items()
    ],
)


def solidity_type(model: type[Message], name: str) -> str:
    metadata = model.model_fields[name].metadata
    return next(item.solidity for item in metadata if isinstance(item, Encoded))


def from_readable(model: type[Message], fields: dict[str, Any]) -> Message:
    attributes = {name.replace("_", "").lower(): name for name in model.model_fields}
    values = {}
    for wire, value in fields.items():
        name = attributes[wire.lower()]
        values[name] = value_from_readable(value, solidity_type(model, name))
    return model(**values)


def value_from_readable(value: Any, solidity: str) -> Any:
    if isinstance(value, list):
        return tuple(value_from_readable(item, solidity[:-2]) for item in value)
    if isinstance(value, dict):
        return from_readable(next(m for m in MESSAGES.values() if m.__name__ == solidity), value)
    if solidity in ("bytes", "bytes32", "address"):
        return bytes.fromhex(value)
    return int(value) if solidity == "uint256" else value


def message_of(kind: str, vector: dict[str, Any]) -> Message:
    assert kind in MESSAGES, f"message {kind} is gone: {CURE}"
    try:
        return from_readable(MESSAGES[kind], vector["fields"])
    except (KeyError, ValueError) as error:
        pytest.fail(f"{kind} has other fields: {error}; {CURE}")


def test_every_message_has_its_vectors() -> None:
    assert set(FILE["messages"]) == set(MESSAGES), CURE
    assert FILE["protocol"] == PROTOCOL, "run tests/vectors/generate.py"


@every_vector
def test_a_message_has_the_bytes_of_its_vector(kind: str, vector: dict[str, Any]) -> None:
    message = message_of(kind, vector)
    assert encode(message).hex() == vector["encoded"], CURE
    assert decode(kind, bytes.fromhex(vector["encoded"])) == message, CURE


@every_vector
def test_a_signature_is_that_of_its_vector(kind: str, vector: dict[str, Any]) -> None:
    message = message_of(kind, vector)
    attached = tuple(bytes.fromhex(item) for item in vector["attached"])
    signed = DOMAIN.sign(KEY, message, expires=vector.get("expires", 0), attached=attached)
    assert signed.digest.hex() == vector["digest"], CURE
    assert signed.signature.hex() == vector["signature"], CURE
    assert signed.raw.hex() == vector["frame"], CURE
    assert recover(signed.digest, signed.signature).hex() == FILE["signer"]


@every_vector
def test_a_frame_opens_to_the_message_of_its_vector(kind: str, vector: dict[str, Any]) -> None:
    signed = DOMAIN.open(bytes.fromhex(vector["frame"]))
    assert signed.message == message_of(kind, vector)
    assert signed.signer == KEY.address
    assert signed.expires == vector.get("expires", 0)
    assert [item.hex() for item in signed.attached] == vector["attached"]


@every_vector
def test_a_typed_message_hashes_as_another_eip712_library_says(
    kind: str, vector: dict[str, Any]
) -> None:
    model = MESSAGES[kind]
    assert ("structHash" in vector) is model.typed, CURE
    if not model.typed:
        return
    message = message_of(kind, vector)
    assert struct_hash(message).hex() == vector["structHash"], CURE
    assert type_string(model) == vector["type"], CURE
    theirs = encode_typed_data(full_message=typed_data(vector["type"], message, vector))
    assert theirs.body.hex() == vector["structHash"]
    assert keccak(b"\x19\x01" + theirs.header + theirs.body).hex() == vector["digest"]


def test_the_escrow_hashes_the_settlement_that_members_sign() -> None:
    source = (Path(__file__).parents[2] / "contracts" / "src" / "JobEscrow.sol").read_text()
    constant = re.search(r"SETTLEMENT_TYPEHASH = keccak256\(([^)]+)\)[^)]*\);", source, re.S)
    assert constant is not None
    pieces = re.findall(r'"([^"]*)"', source[constant.start() : constant.end()])
    assert "".join(pieces) == type_string(Settlement), CURE
    types = (Path(__file__).parents[2] / "contracts" / "src" / "IJobEscrow.sol").read_text()
    struct = re.search(r"struct Settlement \{(.*?)\}", types, re.S)
    assert struct is not None
    members = [line.strip().rstrip(";") for line in struct[1].splitlines() if line.strip()]
    assert f"Settlement({','.join(members)})" == type_string(Settlement), CURE


def typed_data(type_text: str, message: Message, vector: dict[str, Any]) -> dict[str, Any]:
    parsed = re.fullmatch(r"(\w+)\((.*)\)", type_text)
    assert parsed is not None
    members = [member.split(" ") for member in parsed[2].split(",")]
    values = {
        wire: getattr(message, name)
        for (_, wire), name in zip(members, type(message).model_fields, strict=True)
    }
    return {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            parsed[1]: [{"name": wire, "type": solidity} for solidity, wire in members],
        },
        "primaryType": parsed[1],
        "domain": {
            "name": "meshd",
            "version": "1",
            "chainId": FILE["chainId"],
            "verifyingContract": "0x" + FILE["escrow"],
        },
        "message": {
            wire: list(value) if isinstance(value, tuple) else value
            for wire, value in values.items()
        },
    }
