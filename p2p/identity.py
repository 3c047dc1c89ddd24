"""One secp256k1 key: the libp2p PeerId, the chain address and the signer of everything."""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NewType

import base58
import coincurve
from eth_hash.auto import keccak

Address = NewType("Address", bytes)
"""20 bytes: the last 20 of keccak-256 of the uncompressed public key."""

NOBODY = Address(bytes(20))
"""The zero address: "no particular party"."""

# A secp256k1 key is short enough to be the PeerId itself (identity multihash):
# 0x00 0x25, then protobuf PublicKey {Type = 2 (secp256k1), Data = 33 bytes}.
# https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
_PEER_ID_PREFIX = bytes.fromhex("002508021221")
_PEER_ID_LENGTH = 53
_HEX_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_MAX_KEY_FILE = 1024
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


class IdentityError(Exception):
    """A key, key file, PeerId or signature cannot be used; the text says which and the cure."""


@dataclass(frozen=True)
class Identity:
    """A node's key and everything that follows from it.

    Raises IdentityError if *secret* is not 32 bytes between 1 and the order of secp256k1.
    """

    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != 32:
            raise IdentityError(f"a secret key has 32 bytes, not {len(self.secret)}")
        try:
            key = coincurve.PrivateKey(self.secret)
        except ValueError as error:
            raise IdentityError("a secret key is above 0 and below secp256k1's order") from error
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "address", address_from_public_key(self.public_key))

    _key: coincurve.PrivateKey = field(init=False, repr=False, compare=False)
    address: Address = field(init=False, compare=False)

    @property
    def public_key(self) -> bytes:
        """The compressed public key, 33 bytes."""
        return self._key.public_key.format(compressed=True)

    @property
    def peer_id(self) -> str:
        """The libp2p PeerId in base58 (``16Uiu2...``)."""
        return peer_id_from_public_key(self.public_key)

    def sign(self, digest: bytes) -> bytes:
        """Return the recoverable low-s signature of a 32-byte *digest*: r, s, v (27 or 28).

        Deterministic (RFC 6979): the same digest always gives the same 65 bytes.
        """
        signature = self._key.sign_recoverable(digest, hasher=None)
        return signature[:64] + bytes([signature[64] + 27])

    def __repr__(self) -> str:
        return f"Identity({hex_address(self.address)})"

    @classmethod
    def generate(cls) -> Identity:
        """Return a fresh identity from the operating system's randomness."""
        return cls(coincurve.PrivateKey().secret)


def recover(digest: bytes, signature: bytes) -> Address:
    """Return who signed the 32-byte *digest*.

    Raises IdentityError for a malformed signature and for one with a high s (EIP-2).
    """
    if len(signature) != 65 or signature[64] not in (27, 28):
        raise IdentityError(f"signature of {len(signature)} bytes is not r, s, v with v 27 or 28")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise IdentityError("signature has a high s: only the low form is accepted")
    try:
        key = coincurve.PublicKey.from_signature_and_message(
            signature[:64] + bytes([signature[64] - 27]), digest, hasher=None
        )
    except Exception as error:  # coincurve raises bare Exception for unrecoverable signatures
        raise IdentityError("signature recovers to no key") from error
    return address_from_public_key(key.format(compressed=True))


def address_from_public_key(public_key: bytes) -> Address:
    """Return the chain address of a compressed or uncompressed secp256k1 *public_key*.

    Raises IdentityError if it is no point of the curve.
    """
    try:
        raw = coincurve.PublicKey(public_key).format(compressed=False)[1:]
    except ValueError as error:
        raise IdentityError(f"{public_key[:65].hex()} is no secp256k1 public key") from error
    return Address(keccak(raw)[12:])


def peer_id_from_public_key(public_key: bytes) -> str:
    """Return the PeerId of a compressed secp256k1 *public_key*."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


def address_from_peer_id(peer_id: str) -> Address:
    """Return the chain address of *peer_id*; raises IdentityError if it inlines no such key."""
    try:
        if len(peer_id) > _PEER_ID_LENGTH:  # base58 takes time quadratic in the length
            raise ValueError("too long")
        raw = base58.b58decode(peer_id)
        if len(raw) != 39 or not raw.startswith(_PEER_ID_PREFIX):
            raise ValueError("no inline secp256k1 key")
        if base58.b58encode(raw).decode() != peer_id:
            raise ValueError("not the canonical form")
        return address_from_public_key(raw[6:])
    except (ValueError, IdentityError) as error:
        raise IdentityError(
            f"peer id {peer_id[:64]!r} is not that of a secp256k1 key (16Uiu2...): {error}"
        ) from error


def hex_address(address: bytes) -> str:
    """Return *address* in the checksummed form of EIP-55."""
    lower = address.hex()
    digest = keccak(lower.encode()).hex()
    return "0x" + "".join(
        char.upper() if int(mark, 16) > 7 else char
        for char, mark in zip(lower, digest, strict=False)
    )


def address_from_hex(text: str) -> Address:
    """Parse ``0x`` and 40 hex digits; a mixed-case one must carry the right EIP-55 checksum."""
    if not _HEX_ADDRESS.fullmatch(text):
        raise IdentityError(f"address {text[:64]!r} is not 0x and 40 hex digits")
    raw = bytes.fromhex(text[2:])
    if text[2:] not in (text[2:].lower(), text[2:].upper()) and hex_address(raw) != text:
        raise IdentityError(f"address {text} has a wrong checksum: a digit was mistyped")
    return Address(raw)


def load_or_create(path: Path) -> Identity:
    """Read the key file at *path*, or make one (0600) if there is none.

    Raises IdentityError if others may read the file, if it is not owned by this user, if it
    does not hold a key or if it cannot be made.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    try:
        return _create(path)
    except OSError as error:
        raise IdentityError(f"key file {path} cannot be made: {error.strerror}") from error


def _load(path: Path) -> Identity:
    try:
        # Checked and read through one descriptor: nobody can swap the file in between.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise IdentityError(f"key file {path} cannot be opened: {error.strerror}") from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise IdentityError(f"key file {path} is not a regular file: name another one")
        if info.st_uid != os.geteuid():
            raise IdentityError(f"key file {path} belongs to uid {info.st_uid}, not to this user")
        mode = stat.S_IMODE(info.st_mode)
        if mode & 0o077:
            raise IdentityError(
                f"key file {path} has mode {mode:04o}: others may read it; run: chmod 600 {path}"
            )
        text = os.read(descriptor, _MAX_KEY_FILE).decode("ascii", errors="replace").strip()
    finally:
        os.close(descriptor)
    try:
        return Identity(bytes.fromhex(text))
    except (ValueError, IdentityError) as error:
        raise IdentityError(
            f"key file {path} does not hold a key of 64 hex digits: "
            "restore it from a backup, or move it away to start with a new identity"
        ) from error


def _create(path: Path) -> Identity:
    identity = Identity.generate()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(identity.secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # never overwrites a key that appeared meanwhile
    except FileExistsError:
        return _load(path)
    finally:
        os.unlink(temporary)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return identity
