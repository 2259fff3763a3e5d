"""Decompositions of stacks against NumPy, mapped, differentiated, and many beside each other in one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mechlab.core import linalg

RNG = np.random.default_rng(0)
TALL, WIDE, STACK = (RNG.normal(size=shape).astype(np.float32) for shape in ((5, 3), (3, 5), (2, 4, 6, 3)))
SQUARE = RNG.normal(size=(2, 3, 4, 4)).astype(np.float32) + 4 * np.eye(4, dtype=np.float32)
RIGHT = RNG.normal(size=(2, 3, 4, 2)).astype(np.float32)
SYMMETRIC = SQUARE + np.swapaxes(SQUARE, -1, -2)


@pytest.mark.parametrize("matrix", [TALL, WIDE, STACK], ids=["tall", "wide", "stack"])
def test_qr_and_svd_are_numpys_up_to_signs(matrix):
    q, r = linalg.qr(matrix)
    np.testing.assert_allclose(q @ r, matrix, atol=1e-5)
    np.testing.assert_allclose(np.abs(q), np.abs(np.linalg.qr(matrix)[0]), atol=1e-4)
    u, s, v = linalg.svd(matrix)
    np.testing.assert_allclose((u * s[..., None, :]) @ v, matrix, atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(matrix, compute_uv=False), rtol=1e-5)
    np.testing.assert_allclose(linalg.singular_values(matrix), s, rtol=1e-5)


def test_eigh_inv_and_solve_are_numpys():
    values, vectors = linalg.eigh(SYMMETRIC)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(SYMMETRIC), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(SYMMETRIC @ vectors, vectors * values[..., None, :], atol=1e-4)
    np.testing.assert_allclose(linalg.inv(SQUARE), np.linalg.inv(SQUARE), atol=1e-5)
    np.testing.assert_allclose(linalg.solve(SQUARE, RIGHT), np.linalg.solve(SQUARE, RIGHT), atol=1e-5)


def test_mapped_it_is_the_same():
    np.testing.assert_array_equal(jax.jit(jax.vmap(linalg.inv))(SQUARE), linalg.inv(SQUARE))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(linalg.solve))(SQUARE, RIGHT), linalg.solve(SQUARE, RIGHT))
    both = jax.vmap(lambda scale: linalg.qr(scale * STACK)[0])(jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(both, np.stack([linalg.qr(STACK)[0]] * 2), atol=1e-5)


def test_derivatives_are_those_of_jax():
    def total(decompose, matrix):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(decompose(matrix)))

    pairs = [(linalg.inv, jnp.linalg.inv, SQUARE), (linalg.qr, jnp.linalg.qr, STACK)]
    for ours, theirs, matrix in pairs:
        gradient = jax.jit(jax.grad(lambda x, f=ours: total(f, x)))(matrix)
        np.testing.assert_allclose(gradient, jax.grad(lambda x, f=theirs: total(f, x))(matrix), rtol=1e-4, atol=1e-5)
        mapped = jax.vmap(jax.grad(lambda x, f=ours: total(f, x)))(matrix)
        np.testing.assert_allclose(mapped, gradient, rtol=1e-4, atol=1e-5)


def ranks(jaxpr):
    """Axes of what is given to a decomposition, anywhere in a program."""
    decompositions = {"qr", "svd", "eigh", "geqrf", "householder_product", "lu", "triangular_solve"}
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in decompositions:
            found.append(eqn.invars[0].aval.ndim)
        for inner in jaxprs_in_params(eqn.params):
            found += ranks(inner)
    return found


@pytest.mark.parametrize("name", ["qr", "svd", "singular_values", "eigh", "inv", "solve"])
def test_lapack_is_given_one_matrix_at_a_time(name):
    """Two stacks in one program can wait for each other for ever, now and then: hence what the program is made of."""
    arguments = (SQUARE, RIGHT) if name == "solve" else (SQUARE,)
    twice = jax.vmap(lambda scale: getattr(linalg, name)(*(scale * x for x in arguments)))
    found = ranks(jax.make_jaxpr(twice)(jnp.ones(2)).jaxpr)
    assert found and set(found) == {2}
    stacked = jax.make_jaxpr(jax.vmap(jnp.linalg.inv))(SQUARE[0]).jaxpr
    assert max(ranks(stacked)) == 3
