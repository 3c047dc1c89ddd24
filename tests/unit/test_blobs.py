"""Blobs: named by what they hold, whole or not there at all, and private ones stay private."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.p2p.blobs import BlobError, BlobStore
from meshd.p2p.codec import digest
from meshd.p2p.identity import Address

ALICE = Address(b"\x0a" * 20)
BOB = Address(b"\x0b" * 20)
CAROL = Address(b"\x0c" * 20)
DATA = b"rows of a shard"
NAME = digest(DATA)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs" if request.param == "disk" else None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "blobs"
    BlobStore(folder)
    yield folder
    assert not list(folder.glob(".incoming-*"))


# ---- both kinds -------------------------------------------------------------------------


@pytest.mark.parametrize("data", [DATA, b"", bytes(3_000_000)])
def test_a_blob_is_found_under_its_digest(store: BlobStore, data: bytes) -> None:
    assert digest(data) not in store
    name = store.put(data)
    assert name == digest(data) == store.put(data)
    assert name in store
    assert store.read(name) == data
    assert store.size(name) == len(data)
    assert store.may_read(name, ALICE)


@pytest.mark.parametrize("name", [NAME, b"", b"\x01", bytes(33), bytes(5000)])
def test_what_is_not_there_is_said_to_be_missing(store: BlobStore, name: bytes) -> None:
    assert name not in store
    for ask in (store.read, store.size, store.path):
        with pytest.raises(BlobError, match="blob"):
            ask(name)


def test_a_removed_blob_is_gone_and_may_be_removed_again(store: BlobStore) -> None:
    store.put(DATA, readers=[ALICE])
    store.remove(NAME)
    store.remove(NAME)
    assert NAME not in store
    store.put(DATA)
    assert store.may_read(NAME, BOB)


def test_a_private_blob_is_for_its_readers_only(store: BlobStore) -> None:
    store.put(DATA, readers=[ALICE])
    assert store.may_read(NAME, ALICE)
    assert not store.may_read(NAME, BOB)
    store.put(DATA, readers=[BOB])
    assert [store.may_read(NAME, who) for who in (ALICE, BOB, CAROL)] == [True, True, False]


def test_a_blob_for_no_reader_is_served_to_nobody(store: BlobStore) -> None:
    store.put(DATA, readers=[])
    assert not store.may_read(NAME, ALICE)


def test_a_private_blob_put_again_without_readers_becomes_public(store: BlobStore) -> None:
    store.put(DATA, readers=[ALICE])
    store.put(DATA)
    assert store.may_read(NAME, BOB)


def test_a_public_blob_stays_public(store: BlobStore) -> None:
    store.put(DATA)
    store.put(DATA, readers=[ALICE])
    assert store.may_read(NAME, BOB)


# ---- on disk ----------------------------------------------------------------------------


def test_blobs_and_their_readers_survive_a_restart(folder: Path) -> None:
    before = BlobStore(folder)
    before.put(DATA, readers=[ALICE, BOB])
    public = before.put(b"for everybody")
    after = BlobStore(folder)
    assert after.on_disk
    assert after.read(NAME) == DATA
    assert [after.may_read(NAME, who) for who in (ALICE, BOB, CAROL)] == [True, True, False]
    assert after.may_read(public, CAROL)
    assert after.path(NAME).read_bytes() == DATA
    after.put(DATA)
    assert BlobStore(folder).may_read(NAME, CAROL)


def test_a_new_folder_is_its_owners_only(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_blob_comes_in_piece_by_piece(folder: Path) -> None:
    store = BlobStore(folder)
    with store.incoming(NAME, len(DATA)) as file:
        file.seek(4)
        file.write(DATA[4:])
        assert NAME not in store
        file.seek(0)
        file.write(DATA[:4])
    assert store.read(NAME) == DATA


def test_bytes_of_another_digest_leave_nothing(folder: Path) -> None:
    store = BlobStore(folder)
    with pytest.raises(BlobError, match="another digest"):
        receive(store, 100, DATA, b"!")
    assert NAME not in store
    assert os.listdir(folder) == []


def receive(store: BlobStore, max_bytes: int, *pieces: bytes, seek: int = 0) -> None:
    with store.incoming(NAME, max_bytes) as file:
        file.seek(seek)
        for piece in pieces:
            if not piece:
                raise ConnectionError("the peer went away")
            file.write(piece)


def test_too_many_bytes_are_refused_before_they_are_written(folder: Path) -> None:
    store = BlobStore(folder)
    with pytest.raises(BlobError, match="over its limit of 5 bytes"):
        receive(store, 5, b"12345", b"6")
    with pytest.raises(BlobError, match="over its limit"):
        receive(store, 5, b"x", seek=10**12)
    assert os.listdir(folder) == []


def test_a_broken_transfer_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ConnectionError):
        receive(BlobStore(folder), 100, DATA[:5], b"")
    assert os.listdir(folder) == []


def test_what_a_crash_left_is_removed_at_the_next_start(folder: Path) -> None:
    (folder / ".incoming-0123").write_bytes(b"half a bl")
    (folder / f"{NAME.hex()}.readers").write_text(ALICE.hex())
    store = BlobStore(folder)
    assert os.listdir(folder) == []
    store.put(DATA, readers=[BOB])
    assert not store.may_read(NAME, ALICE)


def test_a_private_blob_is_never_on_disk_without_its_readers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        replace(source, target)
        listed = (folder / f"{NAME.hex()}.readers").exists()
        seen.append(((folder / NAME.hex()).exists(), listed))

    monkeypatch.setattr(os, "replace", watch)
    BlobStore(folder).put(DATA, readers=[ALICE])
    assert seen == [(False, True), (True, True)]


def test_a_put_that_fails_leaves_neither_blob_nor_readers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(folder)
    sync = os.fsync
    calls: list[int] = []

    def full_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # readers, folder, then the blob itself
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.put(DATA, readers=[ALICE])
    assert os.listdir(folder) == []
    assert NAME not in store
    store.put(DATA)
    assert store.may_read(NAME, BOB)


@pytest.mark.parametrize(
    ("name", "text"),
    [(NAME.hex(), "0a0a0"), (NAME.hex(), "not hex"), ("notes", ""), (NAME.hex(), "ü")],
)
def test_a_damaged_list_of_readers_stops_the_store(folder: Path, name: str, text: str) -> None:
    BlobStore(folder).put(DATA)
    (folder / f"{name}.readers").write_text(text)
    with pytest.raises(BlobError, match=f"list of readers .*{name}.readers is damaged"):
        BlobStore(folder)


def test_a_store_in_memory_has_no_files(tmp_path: Path) -> None:
    store = BlobStore()
    store.put(DATA)
    assert not store.on_disk
    with pytest.raises(BlobError, match="no file here"):
        store.path(NAME)
    with pytest.raises(BlobError, match="use put"), store.incoming(NAME, 1):
        pass
