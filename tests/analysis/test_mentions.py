"""CHAIR and POPE on captions made by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis.mentions import chair, label_mentions, mentioned, pope, pope_negatives

# Tokens 1 and 2 are synonyms of object 0; 3 is object 1, 4 is object 2; 0 and 5 name nothing.
CLASS_OF = np.array([-1, 0, 0, 1, 2, -1])
TOKENS = np.array([[5, 1, 5, 3, 2], [4, 0, 0, 0, 0]])
TRUTH = np.array([[True, False, True], [False, False, True]])


def test_first_mentions_and_all_mentions():
    mask, labels = label_mentions(TOKENS, TRUTH, CLASS_OF)
    assert mask[0].tolist() == [False, True, False, True, False] and mask[1].tolist() == [True] + [False] * 4
    assert labels[0].tolist() == [False, False, False, True, False] and not bool(labels[1].any())
    assert int(label_mentions(TOKENS, TRUTH, CLASS_OF, first_only=False)[0].sum()) == 4


def test_chair_by_hand():
    found = chair(TOKENS, TRUTH, CLASS_OF)
    assert found.mentions.tolist() == [3, 1] and found.hallucinated.tolist() == [1, 0]
    assert float(found.chair_i) == pytest.approx(1 / 4) and float(found.chair_s) == pytest.approx(1 / 2)
    assert float(found.recall) == pytest.approx(2 / 3)
    silent = chair(np.zeros((1, 3), int), TRUTH[:1], CLASS_OF)
    assert float(silent.chair_i) == 0 and float(silent.recall) == 0


def test_pope_by_hand():
    said = mentioned(TOKENS, CLASS_OF, 3)
    assert said.tolist() == [[True, True, False], [False, False, True]]
    negatives = np.array([[False, True, False], [True, False, False]])
    found = pope(said, TRUTH, negatives)
    # Asked for 5 objects; "yes" to objects 0 and 1 of the first caption and 2 of the second; two answers are wrong.
    assert float(found.accuracy) == pytest.approx(3 / 5) and float(found.yes_rate) == pytest.approx(3 / 5)
    assert float(found.f1) == pytest.approx(2 * 2 / (3 + 3))


@given(st.integers(0, 2**31 - 1))
def test_chair_counts_what_sets_count(seed):
    rng = np.random.default_rng(seed)
    tokens, truth = rng.integers(0, 6, (3, 7)), rng.random((3, 3)) < 0.5
    found = chair(tokens, truth, CLASS_OF)
    for row, there in enumerate(truth):
        named = [int(c) for c in CLASS_OF[tokens[row]] if c >= 0]
        assert int(found.mentions[row]) == len(named)
        assert int(found.hallucinated[row]) == sum(not there[c] for c in named)
        assert int(found.recalled[row]) == len(set(named) & set(np.flatnonzero(there).tolist()))
    assert 0 <= float(found.chair_i) <= 1 and 0 <= float(found.recall) <= 1


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_negatives_are_absent_and_as_many_as_are_there(kind):
    truth = np.asarray(jax.random.uniform(jax.random.key(0), (40, 10)) < 0.3)
    found = np.asarray(pope_negatives(jax.random.key(1), truth, kind))
    assert not (found & truth).any()
    np.testing.assert_array_equal(found.sum(1), np.minimum(truth.sum(1), 10 - truth.sum(1)))


def test_popular_and_adversarial_negatives_by_hand():
    truth = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]], bool)
    popular = pope_negatives(jax.random.key(0), truth, "popular")
    adversarial = pope_negatives(jax.random.key(0), truth, "adversarial")
    assert popular[0].tolist() == [False, True, False, False]
    assert adversarial[0].tolist() == [False, False, True, False]


def test_bad_captions_are_refused():
    for call, match in (
        (lambda: label_mentions(TOKENS, TRUTH[:1], CLASS_OF), r"\(N, T\) and \(N, C\)"),
        (lambda: label_mentions(TOKENS + 2, TRUTH, CLASS_OF), r"0\.\.5"),
        (lambda: label_mentions(TOKENS, TRUTH, np.full(6, -1)), "no word names"),
        (lambda: label_mentions(TOKENS, TRUTH, CLASS_OF + 1), r"-1\.\.2"),
        (lambda: pope_negatives(jax.random.key(0), jnp.asarray(TRUTH), "hard"), "hard"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
