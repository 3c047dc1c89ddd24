"""One key: its PeerId and address against other libraries, its signatures, its file."""

import hashlib
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import base58
import pytest
from eth_account import Account
from eth_keys.datatypes import PrivateKey, PublicKey
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.secp256k1 import Secp256k1PublicKey
from libp2p.peer.id import ID

from meshd.p2p.identity import (
    NOBODY,
    Address,
    Identity,
    IdentityError,
    address_from_hex,
    address_from_peer_id,
    address_from_public_key,
    hex_address,
    load_or_create,
    peer_id_from_public_key,
    recover,
)

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
# https://eips.ethereum.org/EIPS/eip-55
EIP_55 = [
    "0x52908400098527886E0F7030069857D2E4169EE7",
    "0x8617E340B3D01FA5F11F306F4090FD50E238070D",
    "0xde709f2102306220921060314715629080e2fb77",
    "0x27b1fdb04752bbc536007a920d24acb045561c26",
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
    "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
]
secrets = st.integers(1, ORDER - 1).map(lambda number: number.to_bytes(32, "big"))


def some_identity(number: int) -> Identity:
    return Identity(hashlib.sha256(f"key {number}".encode()).digest())


# ---- names ------------------------------------------------------------------------------


def test_two_hundred_keys_have_libp2ps_peer_id_and_ethereums_address() -> None:
    for number in range(200):
        identity = some_identity(number)
        theirs = ID.from_pubkey(Secp256k1PublicKey.from_bytes(identity.public_key))
        assert identity.peer_id == theirs.to_base58()
        assert identity.peer_id.startswith("16Uiu2")
        assert len(identity.peer_id) == 53
        account = Account.from_key(identity.secret)
        assert hex_address(identity.address) == account.address
        assert address_from_peer_id(identity.peer_id) == identity.address


def test_the_key_one_has_its_well_known_address() -> None:
    identity = Identity((1).to_bytes(32, "big"))
    assert hex_address(identity.address) == "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"


def test_compressed_and_uncompressed_keys_have_one_address() -> None:
    identity = some_identity(1)
    full = PublicKey.from_compressed_bytes(identity.public_key).to_bytes()
    assert address_from_public_key(b"\x04" + full) == identity.address


@pytest.mark.parametrize("key", [b"", b"abc", b"\x02" + b"\xff" * 32, b"\x05" + b"\x01" * 32])
def test_what_is_no_public_key_has_no_address(key: bytes) -> None:
    with pytest.raises(IdentityError, match="no secp256k1 public key"):
        address_from_public_key(key)


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        "16Uiu2",
        "0OIl",
        "ü" * 53,
        some_identity(1).peer_id[:-1],
        some_identity(1).peer_id + " ",
        some_identity(1).peer_id + "1",
        "1" + some_identity(1).peer_id,
        "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "1" * 5_000_000,
        base58.b58encode(bytes.fromhex("002508021221") + b"\x02" + b"\xff" * 32).decode(),
        base58.b58encode(bytes.fromhex("002508011221") + some_identity(1).public_key).decode(),
    ],
)
def test_what_is_no_peer_id_of_a_secp256k1_key_is_refused(peer_id: str) -> None:
    with pytest.raises(IdentityError, match=r"is not that of a secp256k1 key \(16Uiu2"):
        address_from_peer_id(peer_id)


@given(st.text(max_size=60))
def test_arbitrary_text_is_no_peer_id(text: str) -> None:
    with pytest.raises(IdentityError):
        address_from_peer_id(text)


@pytest.mark.parametrize("text", EIP_55)
def test_addresses_are_written_and_read_as_eip_55_says(text: str) -> None:
    raw = bytes.fromhex(text[2:])
    assert hex_address(raw) == text or text[2:] == text[2:].lower()
    assert address_from_hex(text) == raw
    assert address_from_hex(hex_address(raw)) == raw
    assert address_from_hex("0x" + text[2:].lower()) == raw
    assert address_from_hex("0x" + text[2:].upper()) == raw


@pytest.mark.parametrize("text", EIP_55[4:])
def test_a_mistyped_digit_is_seen(text: str) -> None:
    assert hex_address(bytes.fromhex(text[2:])) == text
    letter = next(place for place in range(2, 42) if text[place].isalpha())
    with pytest.raises(IdentityError, match="wrong checksum"):
        address_from_hex(text[:letter] + text[letter].swapcase() + text[letter + 1 :])
    digit = next(place for place in range(2, 42) if text[place].isdigit())
    other = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    with pytest.raises(IdentityError, match="wrong checksum"):
        address_from_hex(other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0x",
        "52908400098527886E0F7030069857D2E4169EE7",
        "0X52908400098527886E0F7030069857D2E4169EE7",
        "0x52908400098527886E0F7030069857D2E4169EE",
        "0x52908400098527886E0F7030069857D2E4169EE700",
        "0x52908400098527886E0F7030069857D2E4169EG7",
        "0x5290840009 8527886e0f7030069857d2e4169ee7",
        "0x52908400098527886e0f7030069857d2e4169ee7\n",
        "0x" + "٣" * 40,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(IdentityError, match="is not 0x and 40 hex digits"):
        address_from_hex(text)


# ---- signatures -------------------------------------------------------------------------


@given(secrets, st.binary(min_size=32, max_size=32))
def test_a_signature_is_low_deterministic_and_says_its_signer(secret: bytes, digest: bytes) -> None:
    identity = Identity(secret)
    signature = identity.sign(digest)
    assert signature == Identity(secret).sign(digest)
    assert len(signature) == 65
    assert signature[64] in (27, 28)
    assert int.from_bytes(signature[32:64], "big") <= ORDER // 2
    assert recover(digest, signature) == identity.address


def test_signatures_are_those_of_another_library() -> None:
    for number in range(20):
        identity, digest = some_identity(number), hashlib.sha256(bytes([number])).digest()
        theirs = PrivateKey(identity.secret).sign_msg_hash(digest).to_bytes()
        assert identity.sign(digest) == theirs[:64] + bytes([theirs[64] + 27])


def test_a_high_s_is_refused() -> None:
    digest = bytes(32)
    signature = some_identity(1).sign(digest)
    s = int.from_bytes(signature[32:64], "big")
    high = signature[:32] + (ORDER - s).to_bytes(32, "big") + bytes([signature[64] ^ 7])
    with pytest.raises(IdentityError, match="high s"):
        recover(digest, high)


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        bytes(64),
        bytes(66),
        bytes(65),
        bytes(64) + b"\x1b",
        b"\x01" * 64 + b"\x1d",
        b"\xff" * 32 + b"\x01" * 32 + b"\x1b",
        b"\x01" * 32 + bytes(32) + b"\x1b",
    ],
)
def test_what_is_no_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(IdentityError, match="signature"):
        recover(bytes(32), signature)


def test_only_digests_of_32_bytes_are_recovered() -> None:
    with pytest.raises(IdentityError):
        recover(bytes(31), some_identity(1).sign(bytes(32)))


@pytest.mark.parametrize(
    "secret",
    [b"", b"\x01", b"\x01" * 31, b"\x01" * 33, bytes(32), ORDER.to_bytes(32, "big"), b"\xff" * 32],
)
def test_what_is_no_secret_key_is_refused(secret: bytes) -> None:
    with pytest.raises(IdentityError, match="a secret key"):
        Identity(secret)


def test_a_secret_is_not_shown() -> None:
    identity = some_identity(1)
    assert repr(identity) == f"Identity({hex_address(identity.address)})"
    assert identity.secret.hex() not in f"{identity} {identity!r}"


def test_identities_are_values() -> None:
    assert some_identity(1) == some_identity(1) != some_identity(2)
    assert len({some_identity(1), some_identity(1), some_identity(2)}) == 2
    assert Identity.generate() != Identity.generate()
    assert Address(bytes(20)) == NOBODY
    assert peer_id_from_public_key(some_identity(1).public_key) == some_identity(1).peer_id


# ---- the key file -----------------------------------------------------------------------


def write_key(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_new_key_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "data" / "deeper" / "identity.key"
    made = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["identity.key"]
    assert load_or_create(path) == made


def test_a_new_key_is_kept_for_its_owner_only_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_or_create(tmp_path / "identity.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o644, 0o601, 0o610, 0o602])
def test_a_key_that_others_may_use_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = write_key(tmp_path / "identity.key", "11" * 32, mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        load_or_create(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_of_the_owner_alone_is_read(tmp_path: Path, mode: int) -> None:
    path = write_key(tmp_path / "identity.key", "11" * 32 + "\n", mode)
    assert load_or_create(path).secret == b"\x11" * 32


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_key(tmp_path / "identity.key", "11" * 32)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(IdentityError, match=f"belongs to uid {owner}"):
        load_or_create(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "11" * 31,
        "11" * 16 + "1",
        "11" * 33,
        "zz" * 32,
        "00" * 32,
        "ff" * 32,
        "{}",
        "ключ",
        "11" * 32 + "\x00",
        "11" * 5000,
    ],
)
def test_a_damaged_key_file_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = write_key(tmp_path / "identity.key", text)
    with pytest.raises(IdentityError, match="restore it from a backup"):
        load_or_create(path)
    assert path.read_text() == text


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path in (folder, pipe):
        with pytest.raises(IdentityError, match="key file"):
            load_or_create(path)


def test_a_key_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file" / "identity.key", tmp_path / "dangling"):
        with pytest.raises(IdentityError, match=f"key file {path} cannot be"):
            load_or_create(path)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_starters_that_race_agree_on_one_key(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / f"{number}" / "identity.key"
        barrier = threading.Barrier(8)

        def start(path: Path = path, barrier: threading.Barrier = barrier) -> Identity:
            barrier.wait(10)
            return load_or_create(path)

        with ThreadPoolExecutor(8) as pool:
            made = {future.result() for future in [pool.submit(start) for _ in range(8)]}
        assert len(made) == 1
        assert os.listdir(path.parent) == ["identity.key"]


def test_a_key_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "identity.key"
    link = os.link

    def appear_first(source: Path, target: Path) -> None:
        write_key(path, "11" * 32)
        link(source, target)

    monkeypatch.setattr(os, "link", appear_first)
    assert load_or_create(path).secret == b"\x11" * 32
    assert os.listdir(tmp_path) == ["identity.key"]
