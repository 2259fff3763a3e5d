"""The corpus in three stages: balanced, grouped by cue, without label words, the same for the same key."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mechlab.data.worlds import tales
from mechlab.data.worlds.emotion_corpus import STAGES, cue_lexicon, emotion_corpus


@pytest.fixture(scope="module")
def corpora():
    return {split: emotion_corpus(jax.random.key(0), 42, split=split) for split in ("train", "test")}


def test_classes_and_stages_are_balanced(corpora):
    corpus = corpora["test"]
    assert len(corpus.texts) == 42
    for stage in range(len(STAGES)):
        assert np.bincount(corpus.labels[corpus.stages == stage]).tolist() == [2] * 7


def test_labels_are_those_of_the_cues_and_no_cue_is_in_two_splits(corpora):
    half = len(tales.CUES) // 2
    for corpus in corpora.values():
        np.testing.assert_array_equal(corpus.cues % half // (half // 7), corpus.labels)
    assert not set(corpora["train"].cues) & set(corpora["test"].cues)
    assert not set(cue_lexicon("train")) & set(cue_lexicon("test"))


def test_no_text_holds_a_label_word_and_each_holds_its_person_and_cue(corpora):
    for corpus in corpora.values():
        for text, cue, name in zip(corpus.texts, corpus.cues, corpus.names, strict=True):
            words = [tales.VOCABULARY[token] for token in tales.tokenizer.encode(text)]
            assert not set(words) & set(tales.LABELS)
            assert name in words and text.endswith(".")
            cue_words = {word for word in tales.CUES[cue].split() if word.isalpha()}
            assert len(cue_words - set(words)) == 0, (text, tales.CUES[cue])


def test_the_same_key_gives_the_same_corpus(corpora):
    again = emotion_corpus(jax.random.key(0), 42, split="test")
    assert again.texts == corpora["test"].texts
    assert emotion_corpus(jax.random.key(1), 42, split="test").texts != again.texts


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="multiple of 21, got 20"):
        emotion_corpus(jax.random.key(0), 20)
    with pytest.raises(KeyError, match="unknown split"):
        emotion_corpus(jax.random.key(0), 21, split="valid")
