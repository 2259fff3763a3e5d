"""Tokenizers: round trips, refusals by name, nothing cut silently; real texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.core.errors import UnknownName
from mechlab.data.text import ByteTokenizer, WordTokenizer, load_emotions, load_text, rows_of, train_bpe

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


def test_bytes_spell_any_text() -> None:
    tokenizer = ByteTokenizer()
    text = "Größe: 3 €, 日本\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 256 and len(ids) == 1 + len(text.encode()) and ids.max() < len(tokenizer)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[:-2]).endswith("�")


def test_learned_pieces_spell_any_text_and_shorten_what_they_were_learned_from() -> None:
    pytest.importorskip("tokenizers")
    text = "the cat sat on the mat, the cat sat.\n" * 20
    tokenizer = train_bpe(text, 280)
    assert len(tokenizer) <= 280
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text
    unseen = "Größe ☃"
    assert tokenizer.decode(tokenizer.encode(unseen, bos=False)) == unseen
    again = train_bpe(text, 280)
    np.testing.assert_array_equal(again.encode(text), ids)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(text, 100)


@pytest.mark.parametrize(("name", "sizes"), [("shakespeare", (1_000_000, 110_000)), ("gsm8k", (3_500_000, 600_000))])
def test_real_texts_have_two_parts(name: str, sizes: tuple[int, int], data_dir: Path) -> None:
    train, test = load_text(name, download=False)
    assert (len(train) > sizes[0], len(test) > sizes[1]) == (True, True)
    assert train[-200:] not in test


def test_wikitext_is_read_as_published(data_dir: Path) -> None:
    train, test = load_text("wikitext", download=False)
    assert "<unk>" in train and "<unk>" in test and train[:500] != test[:500]


def test_emotions_are_scenarios_of_six_classes_each_once(data_dir: Path) -> None:
    texts, labels, names = load_emotions(download=False)
    assert names == ("anger", "disgust", "fear", "happiness", "sadness", "surprise")
    assert len(texts) == len(set(texts)) == len(labels) and len(texts) > 1200
    assert np.bincount(labels).min() > 195
    assert texts[0] == "Someone takes credit for your hard work at the office." and labels[0] == 0


def test_an_unknown_text_is_refused() -> None:
    with pytest.raises(ValueError, match='Did you mean "wikitext"'):
        load_text("wikitex")


def test_rows_of_cuts_a_text_and_leaves_out_the_rest() -> None:
    np.testing.assert_array_equal(rows_of(np.arange(7), 3), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match=r"length must be in 1\.\.7"):
        rows_of(np.arange(7), 8)
