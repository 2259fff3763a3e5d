"""Word tokenizer: round trips, refusals by name, nothing cut silently."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.core.errors import UnknownName
from mechlab.data.text import WordTokenizer

WORDS = ("<pad>", "<bos>", ".", ",", "?", ":", "“", "”", "tom", "mia", "i", "ran", "where", "is", "it", "asked")
small = WordTokenizer(words=WORDS, proper=frozenset({"tom", "mia"}))


@pytest.mark.parametrize(
    "text",
    [
        "Tom ran. Mia ran.",
        "“Where is it?” asked Tom.",
        "“It ran,” Mia asked. I ran, Tom.",
        "Where: It ran.\nMia asked: Where is Tom?",
    ],
)
def test_text_written_as_english_survives(text: str) -> None:
    assert small.decode(small.encode(text)) == text


@given(st.lists(st.integers(2, len(WORDS) - 1), min_size=1, max_size=30))
def test_every_row_of_words_decodes_and_encodes_to_itself(ids: list[int]) -> None:
    row = [1, *ids]
    assert small.encode(small.decode(row)).tolist() == row


def test_case_and_straight_quotes_carry_no_information() -> None:
    assert small.encode('"WHERE is it?" asked tom.').tolist() == small.encode("“Where is it?” asked Tom.").tolist()


def test_a_line_is_a_document() -> None:
    ids = small.encode("Tom ran.\nMia ran.")
    assert (ids == 1).sum() == 2
    assert ids.dtype == np.int32
    assert small.encode("ran.", bos=False).tolist() == [11, 2]


def test_padding_is_not_text() -> None:
    assert small.decode([1, 8, 11, 2, 0, 0]) == "Tom ran."
    tokens, lengths = small.pad([[1, 8], [1, 8, 11, 2]], 5)
    assert tokens.tolist() == [[1, 8, 0, 0, 0], [1, 8, 11, 2, 0]]
    assert lengths.tolist() == [2, 4]


def test_unknown_word_is_refused_by_name() -> None:
    with pytest.raises(UnknownName, match=r'unknown word "wher"\. Did you mean "where"\?'):
        small.encode("Tom wher is it")
    with pytest.raises(KeyError, match="7"):
        small.encode("Tom ran 7")
    with pytest.raises(KeyError, match="_"):
        small.encode("Tom_ran")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="empty"):
        small.encode("  \n ")
    with pytest.raises(ValueError, match=r"0\.\.15"):
        small.decode([16])
    for rows in ([[1, 8, 11, 2]], [[]], []):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            small.pad(rows, 3)
    with pytest.raises(ValueError, match="tom"):
        WordTokenizer(words=(*WORDS, "tom"))
    with pytest.raises(ValueError, match="<bos>"):
        WordTokenizer(words=("<pad>", "tom"))
