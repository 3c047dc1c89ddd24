"""Writes messages.json: for every message two values with their bytes, hashes and signatures.

    python tests/vectors/generate.py

A vector that has changed means that a new daemon does not understand an old one: bump `PROTOCOL`
in p2p/messages.py first. Before a protocol's first release `--unreleased` overrides that.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from meshd.p2p.codec import ATTACHING, Domain, encode, struct_hash, type_string
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import MESSAGES, PROTOCOL, Encoded, Message

FILE = Path(__file__).with_name("messages.json")
DOMAIN = Domain("vectors", 31337, Address(b"\xee" * 20))
KEY = Identity(hashlib.sha256(b"meshd vectors").digest())
EXPIRES = 2_000_000_000


def wire_name(name: str) -> str:
    """Return how a field is called in the file, and on the wire."""
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def solidity_type(model: type[Message], name: str) -> str:
    """Return a field's EIP-712 type."""
    (encoded,) = (item for item in model.model_fields[name].metadata if isinstance(item, Encoded))
    return encoded.solidity


def sample(model: type[Message], variant: str) -> Message:
    """Return a value that follows from the message's name: `typical`, or `extreme` in size."""
    values = {
        name: _sample(solidity_type(model, name), f"{model.kind}.{name}", variant)
        for name in model.model_fields
    }
    return model(**values)


def _sample(solidity: str, seed: str, variant: str) -> Any:
    noise = hashlib.sha256(seed.encode()).digest()
    typical = variant == "typical"
    if solidity.endswith("[]"):
        items = noise[0] % 3 + 1 if typical else 0
        return tuple(_sample(solidity[:-2], f"{seed}.{i}", variant) for i in range(items))
    match solidity:
        case "bytes32":
            return noise if typical else b"\xff" * 32
        case "address":
            return noise[:20] if typical else bytes(20)
        case "bool":
            return typical
        case "string":
            return f"{seed} é" if typical else ""
        case "bytes":
            return _signature_or_bytes(seed, noise, typical)
        case _ if solidity.startswith("uint"):
            bits = int(solidity.removeprefix("uint"))
            return int.from_bytes(noise, "big") % 2 ** (bits // 2) if typical else 2**bits - 1
        case _:
            nested = next(m for m in MESSAGES.values() if m.__name__ == solidity)
            return sample(nested, variant)


def _signature_or_bytes(seed: str, noise: bytes, typical: bool) -> bytes:
    if "signature" in seed:
        return noise + noise + b"\x1b"
    return noise * 2 if typical else b""


def readable(message: Message) -> dict[str, Any]:
    """Return *message* as the file shows it: hex for bytes, decimal strings for amounts."""
    return {
        wire_name(name): _readable(getattr(message, name), solidity_type(type(message), name))
        for name in type(message).model_fields
    }


def _readable(value: Any, solidity: str) -> Any:
    if isinstance(value, tuple):
        return [_readable(item, solidity[:-2]) for item in value]
    if isinstance(value, Message):
        return readable(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if solidity == "uint256" else value


def vector(message: Message, attached: tuple[bytes, ...]) -> dict[str, Any]:
    """Return everything that is derived from *message*."""
    signed = DOMAIN.sign(KEY, message, expires=EXPIRES, attached=attached)
    own: dict[str, Any] = {"expires": EXPIRES}
    if message.typed:
        own = {"type": type_string(type(message)), "structHash": struct_hash(message).hex()}
    return {
        "fields": readable(message),
        "encoded": encode(message).hex(),
        **own,
        "digest": signed.digest.hex(),
        "signature": signed.signature.hex(),
        "attached": [item.hex() for item in attached],
        "frame": signed.raw.hex(),
    }


def vectors() -> dict[str, Any]:
    """Return the whole file's content."""
    messages = {}
    for kind, model in sorted(MESSAGES.items()):
        attached = (b"first", b"") if kind in ATTACHING else ()
        messages[kind] = {
            "typical": vector(sample(model, "typical"), attached),
            "extreme": vector(sample(model, "extreme"), ()),
        }
    return {
        "protocol": PROTOCOL,
        "network": DOMAIN.network,
        "chainId": DOMAIN.chain_id,
        "escrow": DOMAIN.escrow.hex(),
        "secret": KEY.secret.hex(),
        "signer": KEY.address.hex(),
        "messages": messages,
    }


def main() -> int:
    """Write the file; refuse to change a vector without a new protocol version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unreleased", action="store_true", help="nobody speaks this version yet")
    unreleased = parser.parse_args().unreleased
    new = vectors()
    old = json.loads(FILE.read_text()) if FILE.exists() else {"protocol": None, "messages": {}}
    changed = sorted(k for k, v in old["messages"].items() if new["messages"].get(k) != v)
    if changed and old["protocol"] == PROTOCOL and not unreleased:
        sys.stderr.write(f"changed: {', '.join(changed)}: bump PROTOCOL in p2p/messages.py\n")
        return 1
    FILE.write_text(json.dumps(new, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
