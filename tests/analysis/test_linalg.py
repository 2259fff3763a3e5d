"""Decompositions against NumPy and scikit-learn; signs that do not depend on the routine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from mechlab.analysis.linalg import (
    fix_signs,
    low_rank,
    numerical_rank,
    pca,
    project,
    randomised_svd,
    truncated_svd,
    unit,
)

RNG = np.random.default_rng(0)


def test_signs_do_not_depend_on_the_sign_that_came():
    v = RNG.normal(size=(3, 4, 6))
    flips = RNG.choice([-1.0, 1.0], size=(3, 4, 1))
    fixed = fix_signs(jnp.asarray(v))
    np.testing.assert_array_equal(fixed, fix_signs(jnp.asarray(v * flips)))
    np.testing.assert_array_equal(np.abs(fixed), np.abs(jnp.asarray(v)))
    assert (np.take_along_axis(np.asarray(fixed), np.abs(v).argmax(-1)[..., None], -1) > 0).all()


def test_truncated_svd_is_the_best_approximation_of_its_rank():
    matrix = RNG.normal(size=(2, 7, 5))
    u, s, v = truncated_svd(jnp.asarray(matrix), 2)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    wanted = (left[..., :2] * values[:, None, :2]) @ right[:, :2]
    np.testing.assert_allclose((u * s[:, None]) @ v, wanted, atol=1e-4)
    np.testing.assert_array_equal(v, fix_signs(v))
    with pytest.raises(ValueError, match="rank must be"):
        truncated_svd(jnp.asarray(matrix), 6)


def test_principal_components_are_those_of_scikit_learn_at_every_depth():
    x = RNG.normal(size=(3, 40, 6)) @ RNG.normal(size=(6, 6)) + 5
    found = pca(jnp.asarray(x), 3)
    for depth in range(3):
        theirs = PCA(3).fit(x[depth])
        np.testing.assert_allclose(found.mean[depth], theirs.mean_, rtol=1e-4)
        np.testing.assert_allclose(found.directions[depth], fix_signs(jnp.asarray(theirs.components_)), atol=1e-3)
        np.testing.assert_allclose(found.variances[depth], theirs.explained_variance_ * 39 / 40, rtol=1e-3)
        signs = np.sign((np.asarray(found.directions[depth]) * theirs.components_).sum(1))
        np.testing.assert_allclose(project(jnp.asarray(x), found)[depth], theirs.transform(x[depth]) * signs, atol=2e-2)


def test_unit_vectors_and_zero():
    np.testing.assert_allclose(unit(jnp.asarray([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


def test_low_rank_is_the_truncated_svd_and_loses_what_eckart_and_young_say():
    matrix = RNG.normal(size=(3, 8, 6))
    reduced = low_rank(jnp.asarray(matrix), 2)
    s = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(np.square(matrix - reduced).sum((1, 2)), np.square(s[:, 2:]).sum(1), rtol=1e-4)
    np.testing.assert_allclose(low_rank(jnp.asarray(matrix), 6), matrix, atol=1e-5)


def test_numerical_rank_is_that_of_numpy():
    matrix = jnp.asarray(RNG.normal(size=(2, 9, 3)) @ RNG.normal(size=(2, 3, 7)), jnp.float32)
    s = jnp.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_array_equal(numerical_rank(s, 9), np.linalg.matrix_rank(matrix))
    assert int(numerical_rank(jnp.zeros(4), 4)) == 0


def test_randomised_svd_is_exact_where_the_rank_is_no_larger():
    numbers = np.random.default_rng(0)
    low = jnp.asarray(numbers.normal(size=(2, 9, 3)) @ numbers.normal(size=(2, 3, 7)), jnp.float32)
    u, s, v = randomised_svd(jax.random.key(0), low, 3, iterations=2)
    np.testing.assert_allclose((u * s[..., None, :]) @ v, low, atol=1e-4)
    np.testing.assert_allclose(s, truncated_svd(low, 3)[1], rtol=1e-4)


def test_randomised_svd_comes_near_with_iterations():
    full = jnp.asarray(np.random.default_rng(0).normal(size=(30, 20)), jnp.float32)
    exact = truncated_svd(full, 2)[1].sum()
    found = [float(randomised_svd(jax.random.key(0), full, 2, iterations=n)[1].sum()) for n in (0, 4, 16)]
    assert found[0] < found[1] < found[2] <= float(exact) * 1.0001
    assert found[2] > 0.99 * float(exact)
    with pytest.raises(ValueError, match=r"rank must be 1\.\.20"):
        randomised_svd(jax.random.key(0), full, 21)
    with pytest.raises(ValueError, match="cannot be negative"):
        randomised_svd(jax.random.key(0), full, 2, iterations=-1)
