"""Sentences from docstrings: real prose, the same ones every time, and enough or none."""

from pathlib import Path

import pytest

from meshd.node.demo.errors import SentencesError
from meshd.node.demo.sentences import collect_sentences, split_sentences

MODULE = '''
"""Answer letters of many kinds. Never
answers twice!  Short one.

    >>> answer("not a sentence that anybody would read")

- a list of things that are no sentences at all.
"""

raise SystemExit("this module is parsed and never run")


class Letter:
    """A letter has a sender, and it can be (but need not be) signed by them."""

    async def send(self):
        """Send the letter to whoever is its recipient, e.g. Alice or Bob."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "post").mkdir()
    (tmp_path / "post" / "letters.py").write_text(MODULE)
    (tmp_path / "same.py").write_text(MODULE)
    (tmp_path / "old.py").write_text("print 'This is not the Python of this version at all.'")
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.py").write_text('"""This belongs to somebody else entirely."""')
    return tmp_path


def test_sentences_are_the_prose_of_docstrings(library: Path) -> None:
    assert collect_sentences(3, 0, library) == [
        "Answer letters of many kinds.",
        "A letter has a sender, and it can be (but need not be) signed by them.",
        "Send the letter to whoever is its recipient, e.g. Alice or Bob.",
    ]


def test_too_few_sentences_are_an_error_that_says_how_many(library: Path) -> None:
    with pytest.raises(SentencesError, match=r"3 sentences .* 3 files .* 4 are needed"):
        collect_sentences(4, 0, library)


def test_a_missing_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SentencesError, match="0 sentences found in the docstrings of 0 files"):
        collect_sentences(1, 0, tmp_path / "nowhere")


def test_the_same_seed_gives_the_same_sentences_and_another_one_others() -> None:
    first = collect_sentences(300, seed=5)
    assert first == collect_sentences(300, seed=5)
    assert len({sentence.casefold() for sentence in first}) == 300
    assert all(5 <= len(sentence.split()) <= 60 for sentence in first)
    assert all(sentence.isascii() and sentence.isprintable() for sentence in first)
    assert set(collect_sentences(300, seed=6)) != set(first)


def test_the_standard_library_has_enough_for_the_demo() -> None:
    assert len(collect_sentences(2048)) == 2048


@pytest.mark.parametrize(
    "docstring",
    [
        "Too few words.",
        "this sentence begins somewhere in the middle of another.",
        "This sentence never comes to its end",
        "Usage: x = f(a, b)[0] + g(c)**2 != None or {1: 2}.",
        " ".join(["Word", *["word"] * 60]) + ".",
        "Größe und Umlaute gibt es hier nicht.",
        "    This text is indented as examples are in docstrings.",
    ],
)
def test_what_is_no_plain_sentence_is_left_out(docstring: str) -> None:
    assert split_sentences(docstring) == []
