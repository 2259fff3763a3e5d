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
    randomized_svd,
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


def test_a_full_sketch_gives_the_exact_svd_and_power_iterations_improve_a_small_one():
    matrix = jnp.asarray(RNG.normal(size=(2, 12, 8)), jnp.float32)
    exact, random = truncated_svd(matrix, 4), randomized_svd(jax.random.key(0), matrix, 4, power=0)
    for ours, theirs in zip(random, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    matrix = jnp.asarray(RNG.normal(size=(60, 50)), jnp.float32)
    best = np.square(matrix - low_rank(matrix, 5)).sum()
    errors = []
    for power in (0, 1, 4):
        u, s, v = randomized_svd(jax.random.key(1), matrix, 5, power=power)
        np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-4)
        np.testing.assert_array_equal(v, fix_signs(v))
        errors.append(float(np.square(matrix - (u * s) @ v).sum() / best - 1))
    assert errors[0] > errors[1] > errors[2] >= -1e-5
    assert errors[2] < 0.02
    for rank, power in ((0, 1), (51, 1), (2, -1)):
        with pytest.raises(ValueError, match="wanted a rank"):
            randomized_svd(jax.random.key(0), matrix, rank, power=power)
