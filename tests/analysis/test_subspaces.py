"""Principal angles and overlaps against SciPy, closed forms and bases that are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from mechlab.analysis.subspaces import energy_inside, principal_cosines, subspace_overlap

RNG = np.random.default_rng(0)


def test_principal_cosines_are_those_of_scipy():
    a, b = (np.linalg.qr(RNG.normal(size=(3, 9, 4)))[0][..., :n] for n in (4, 2))
    found = principal_cosines(*(jnp.asarray(np.swapaxes(x, -1, -2)) for x in (a, b)))
    for i in range(3):
        np.testing.assert_allclose(found[i], np.cos(np.sort(subspace_angles(a[i], b[i]))), atol=1e-5)


def test_a_matrix_overlaps_fully_with_itself_scaled_and_not_with_its_complement():
    u, s, v = np.linalg.svd(RNG.normal(size=(2, 7, 5)), full_matrices=False)
    matrix = (u * s[:, None]) @ v
    same = subspace_overlap(jnp.asarray(matrix), jnp.asarray(-3 * matrix), 2)
    np.testing.assert_allclose(same.left, 1, atol=1e-5)
    np.testing.assert_allclose(same.right, 1, atol=1e-5)
    # The same singular vectors in another order: the leading two are the last two.
    turned = (u[..., ::-1] * s[:, None]) @ v
    crossed = subspace_overlap(jnp.asarray(matrix), jnp.asarray(turned), 2)
    np.testing.assert_allclose(crossed.left, 0, atol=1e-5)
    np.testing.assert_allclose(crossed.right, 1, atol=1e-5)


def test_energy_inside_by_hand_and_of_random_changes():
    matrix = jnp.diag(jnp.asarray([3.0, 2.0, 1.0]))
    change = jnp.asarray([[1.0, 0, 2.0], [0, 2.0, 0], [0, 0, 4.0]])
    np.testing.assert_allclose(energy_inside(change, matrix, 2), (1 + 4) / 25, rtol=1e-6)
    np.testing.assert_allclose(energy_inside(change, matrix, 3), 1, rtol=1e-6)
    assert float(energy_inside(jnp.zeros((3, 3)), matrix, 1)) == 0
    keys = jax.random.split(jax.random.key(0), 400)
    matrix = jax.random.normal(keys[0], (12, 10))
    shares = jax.vmap(lambda key: energy_inside(jax.random.normal(key, (12, 10)), matrix, 3))(keys[1:])
    assert float(shares.mean()) == pytest.approx(9 / 120, rel=0.1)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="wanted bases"):
        principal_cosines(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="one shape"):
        subspace_overlap(jnp.ones((2, 3)), jnp.ones((3, 2)), 1)
    with pytest.raises(ValueError, match="one shape"):
        energy_inside(jnp.ones((2, 3)), jnp.ones((3, 2)), 1)
    with pytest.raises(ValueError, match="rank must be"):
        subspace_overlap(jnp.ones((2, 3)), jnp.ones((2, 3)), 3)
