"""Source text in windows: the same ones every time, whole files held out, enough or none."""

from pathlib import Path

import pytest

from meshd.node.demo.errors import SourceTextError
from meshd.node.demo.sourcetext import WINDOW, collect_source_text


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in "abcdef":
        (tmp_path / f"{name}.py").write_bytes(name.encode() * (3 * WINDOW + 7))
    (tmp_path / "short.py").write_bytes(b"x" * (WINDOW - 1))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "other.py").write_bytes(b"t" * 1000)
    return tmp_path


def rows(text: bytes) -> list[bytes]:
    return [text[at : at + WINDOW] for at in range(0, len(text), WINDOW)]


def test_a_row_is_of_one_file_and_no_file_is_both_trained_on_and_held_out(library: Path) -> None:
    text = collect_source_text(8, 4, seed=3, stdlib=library)
    assert [len(row) for row in rows(text.training)] == [WINDOW] * 8
    assert [len(row) for row in rows(text.held_out)] == [WINDOW] * 4
    trained, kept = set(text.training), set(text.held_out)
    assert all(len(set(row)) == 1 for row in rows(text.training) + rows(text.held_out))
    assert trained.isdisjoint(kept)
    assert (trained | kept) <= set(b"abcdef")


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    first = collect_source_text(256, 64, seed=5)
    assert first == collect_source_text(256, 64, seed=5)
    assert first != collect_source_text(256, 64, seed=6)


def test_one_file_gives_a_limited_number_of_rows(tmp_path: Path) -> None:
    (tmp_path / "table.py").write_bytes(b"1" * (1000 * WINDOW))
    (tmp_path / "other.py").write_bytes(b"2" * (1000 * WINDOW))
    text = collect_source_text(64, 16, seed=0, stdlib=tmp_path)
    assert (len(rows(text.training)), len(rows(text.held_out))) == (64, 16)
    with pytest.raises(SourceTextError, match="64 rows of 129 bytes found in 1 source files"):
        collect_source_text(65, 16, seed=0, stdlib=tmp_path)


def test_a_missing_library_is_an_error_that_says_how_much_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceTextError, match=r"0 rows .* 0 source files .* 4 are needed"):
        collect_source_text(8, 4, stdlib=tmp_path / "nowhere")
