"""Directions against NumPy, and planted ones that must be found."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from mechlab.analysis.directions import class_means, mean_difference, pca_direction, token_mean

RNG = np.random.default_rng(0)


def test_class_means_and_their_difference_at_every_depth():
    x, labels = RNG.normal(size=(3, 20, 4)), np.arange(20) % 2
    means = class_means(jnp.asarray(x), labels, 2)
    for c in (0, 1):
        np.testing.assert_allclose(means[:, c], x[:, labels == c].mean(1), rtol=1e-5, atol=1e-6)
    found = mean_difference(jnp.asarray(x), labels == 1)
    raw = x[:, labels == 1].mean(1) - x[:, labels == 0].mean(1)
    np.testing.assert_allclose(found.raw, raw, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.unit, raw / np.linalg.norm(raw, axis=-1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_the_principal_direction_is_that_of_scikit_learn_turned_towards_the_mean():
    x = RNG.normal(size=(50, 5)) * [1, 5, 1, 1, 1] + [0, -3, 0, 0, 1]
    found = pca_direction(jnp.asarray(x))
    theirs = PCA(1).fit(x).components_[0]
    np.testing.assert_allclose(np.abs(found.unit), np.abs(theirs), atol=1e-3)
    assert (np.asarray(found.unit) * x.mean(0)).sum() > 0
    np.testing.assert_allclose(found.raw, found.unit * np.linalg.norm(x.mean(0)), rtol=1e-4)


def test_the_mean_over_tokens_leaves_padding_out():
    acts, mask = RNG.normal(size=(2, 3, 4, 5)), np.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    found = token_mean(jnp.asarray(acts), mask)
    for b in range(3):
        np.testing.assert_allclose(found[:, b], acts[:, b, mask[b] == 1].mean(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="a token that counts"):
        token_mean(jnp.asarray(acts), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="mask: wanted"):
        token_mean(jnp.asarray(acts), np.ones((3, 5)))


def test_bad_labels_and_single_differences_are_refused():
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="wrong: \\[2\\]"):
        class_means(x, np.asarray([0, 1, 1, 0]), 3)
    with pytest.raises(ValueError, match="labels: wanted integers"):
        class_means(x, np.asarray([0, 1, 1]), 2)
    with pytest.raises(ValueError, match="N >= 2"):
        pca_direction(jnp.zeros((1, 3)))
