"""Answer margins: by hand, by brute force, and what an offset can and cannot change."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis import margins
from mechlab.analysis.metrics import auroc


def example(seed, items=30, answers=2):
    scores, pick = jax.random.split(jax.random.key(seed))
    right = jax.random.randint(pick, (items,), 0, answers)
    return jax.random.normal(scores, (items, answers)) + 0.7 * jax.nn.one_hot(right, answers), right


def test_candidates_are_read_item_by_item_or_from_one_list():
    logits = jnp.arange(24.0).reshape(2, 3, 4)
    own = margins.candidate_scores(logits, jnp.asarray([[0, 1], [3, 2], [1, 3]]))
    np.testing.assert_array_equal(own[1], [[12, 13], [19, 18], [21, 23]])
    np.testing.assert_array_equal(margins.candidate_scores(logits, jnp.asarray([2, 0]))[0], [[2, 0], [6, 4], [10, 8]])


def test_log_odds_are_those_of_the_softmax_over_the_list():
    scores, right = example(0, answers=5)
    p = jnp.take_along_axis(jax.nn.softmax(scores), right[:, None], -1)[:, 0]
    np.testing.assert_allclose(margins.log_odds(scores, right), jnp.log(p / (1 - p)), rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 100))
def test_two_candidates_get_the_best_of_all_offsets(seed):
    scores, right = example(seed)
    offsets = margins.tune_offsets(scores, right)
    tuned = int(margins.list_correct(scores, right, offsets).sum())
    edges = np.sort(np.asarray(scores[:, 1] - scores[:, 0]))
    tried = np.concatenate([[edges[0] - 1, edges[-1] + 1], (edges[1:] + edges[:-1]) / 2])
    assert tuned == max(int(margins.list_correct(scores, right, jnp.asarray([o, 0.0])).sum()) for o in tried)


def test_more_candidates_get_at_least_what_a_coarse_grid_finds():
    scores, right = example(3, answers=3)
    tuned = int(margins.list_correct(scores, right, margins.tune_offsets(scores, right)).sum())
    grid = itertools.product(np.linspace(-2, 2, 9), repeat=2)
    found = max(int(margins.list_correct(scores, right, jnp.asarray([0.0, *o])).sum()) for o in grid)
    assert tuned >= found - 1
    assert tuned > int(margins.list_correct(scores, right).sum())


def test_a_planted_bias_is_undone_and_auroc_never_saw_it():
    scores, right = example(4, items=200)
    biased = scores + jnp.asarray([4.0, 0.0])
    assert margins.list_correct(biased, right).mean() < 0.6
    clean, tuned = (margins.list_correct(s, right, margins.tune_offsets(s, right)).mean() for s in (scores, biased))
    np.testing.assert_allclose(tuned, clean, atol=0.011)
    first, second = (auroc(s[:, 1] - s[:, 0], right) for s in (scores, biased))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_leading_axes_are_seeds():
    pairs = [example(seed) for seed in (0, 1)]
    both = jnp.stack([scores for scores, _ in pairs])
    apart = [margins.tune_offsets(scores, pairs[0][1]) for scores in both]
    np.testing.assert_allclose(margins.tune_offsets(both, pairs[0][1]), jnp.stack(apart))
    assert margins.list_correct(both, pairs[0][1], jnp.stack(apart)).shape == (2, 30)


def test_a_constant_right_answer_is_checked_under_jit():
    scores, right = example(5)
    wanted = margins.log_odds(scores, right)
    np.testing.assert_allclose(jax.jit(lambda s: margins.log_odds(s, right))(scores), wanted, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="the same token twice"):
        margins.candidate_scores(jnp.zeros((2, 4)), jnp.asarray([[1, 1], [0, 2]]))
    with pytest.raises(ValueError, match=r"wanted \(N, A\) or \(A,\)"):
        margins.candidate_scores(jnp.zeros((2, 4)), jnp.asarray([[0, 1]] * 3))
    with pytest.raises(ValueError, match="wanted 0 to 1"):
        margins.log_odds(jnp.zeros((2, 2)), jnp.asarray([0, 2]))
    with pytest.raises(ValueError, match="A >= 2"):
        margins.tune_offsets(jnp.zeros((2, 1)), jnp.asarray([0, 0]))
