"""The database: what is kept, and how one of another version is met."""

from __future__ import annotations

import resource
import sqlite3
from pathlib import Path

import pytest

from meshd.node import store as store_module
from meshd.node.store import STEPS, VERSION, Store, StoreError


def make(path: Path, version: int) -> None:
    """Write a database as the meshd of that version made it."""
    database = sqlite3.connect(path)
    database.executescript("".join(STEPS[:version]))
    database.execute(f"pragma user_version={version}")
    database.commit()
    database.close()


def schema(path: Path) -> list[tuple[str, str]]:
    database = sqlite3.connect(path)
    rows = database.execute("select name, sql from sqlite_master order by name").fetchall()
    database.close()
    return [(name, " ".join((sql or "").split())) for name, sql in rows]


@pytest.mark.parametrize("version", range(1, VERSION))
def test_a_database_of_every_older_version_is_upgraded_and_keeps_what_it_holds(
    tmp_path: Path, version: int
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make(old, version)
    with sqlite3.connect(old) as database:
        database.execute("insert into setting values('paused', '1')")
    database.close()
    Store(new).close()
    store = Store(old)
    assert store.upgraded_from == version
    assert store.connection.execute("select * from setting").fetchall() == [("paused", "1")]
    store.close()
    assert schema(old) == schema(new)
    again = Store(old)
    assert again.upgraded_from is None
    again.close()


def test_a_database_of_a_newer_version_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "db"
    make(path, VERSION)
    database = sqlite3.connect(path)
    database.execute(f"pragma user_version={VERSION + 1}")
    database.close()
    with pytest.raises(StoreError) as caught:
        Store(path)
    assert f"has version {VERSION + 1}, this meshd knows {VERSION}" in str(caught.value)
    assert "upgrade this one" in str(caught.value)


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    make(path, 1)
    before = schema(path)
    broken = (*STEPS[:1], "create table extra(x) strict; create table extra(x int) strict;")
    monkeypatch.setattr(store_module, "STEPS", broken)
    with pytest.raises(StoreError):
        Store(path)
    assert schema(path) == before


def test_what_is_no_database_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "db"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 50)
    with pytest.raises(StoreError, match="restore it from a backup"):
        Store(path)


async def test_a_setting_is_kept_over_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    assert await store.setting("paused") is None
    await store.set("paused", "1")
    await store.set("paused", "")
    await store.set("other", "x")
    store.close()
    store = Store(tmp_path / "db")
    assert (await store.setting("paused"), await store.setting("other")) == ("", "x")
    store.close()


async def test_a_step_that_cannot_be_written_leaves_nothing_and_the_next_one_can_be(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "db")
    await store.set("before", "1")
    (pages,) = store.connection.execute("pragma page_count").fetchone()
    store.connection.execute(f"pragma max_page_count={pages}")
    with pytest.raises(StoreError, match=r"database or disk is full.*is there room"):
        await store.set("large", "x" * 100_000)
    assert await store.setting("large") is None
    assert await store.setting("before") == "1"
    store.connection.execute("pragma max_page_count=1000000")
    await store.set("large", "x" * 100_000)
    store.close()


async def test_a_commit_that_cannot_be_written_is_rolled_back(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(tmp_path / "db")
    await store.set("before", "1")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        for _ in range(2):
            with pytest.raises(StoreError, match="cannot be written"):
                await store.set("after", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await store.setting("after") is None
    await store.set("after", "2")
    assert await store.setting("after") == "2"
    store.close()
