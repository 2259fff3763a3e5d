"""The rational function and its gradients: stored vectors of an independent float64 source, closed forms."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.kernels.rational import cost, rational
from mechlab.kernels.rational.reference import gradient, spread, value

IDENTITY = jnp.asarray([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])


def draw(seed: int, shape: tuple[int, ...] = (5, 12), groups: int = 4, shared: bool = False):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = 2 * jax.random.normal(keys[0], shape)
    a = jax.random.normal(keys[1], (1 if shared else groups, 6))
    return x, a, jax.random.normal(keys[2], (groups, 4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_values_and_gradients_equal_the_vectors(vectors, dtype, tolerance):
    v = vectors("kat")
    with jax.enable_x64(dtype is np.float64):
        x, a, b, upstream = (jnp.asarray(v[name], dtype) for name in ("x", "numer", "denom", "grad_out"))
        assert not v["denom"][-1].any()
        assert v["x"][0, 0, 0] == 0

        @jax.jit
        def run(x, a, b, upstream):
            y, pull = jax.vjp(lambda x, a, b: rational(x, a, b, groups=8), x, a, b)
            return y, *pull(upstream)

        for got, name in zip(run(x, a, b, upstream), ("y", "dx", "dnumer", "ddenom"), strict=True):
            assert got.dtype == dtype
            scale = np.abs(v[name]).max()
            np.testing.assert_allclose(got, v[name], rtol=tolerance, atol=tolerance * scale, err_msg=name)
        nonneg = rational(jnp.asarray(v["x_nonneg"], dtype), a, b, groups=8)
        np.testing.assert_allclose(nonneg, v["y_nonneg"], rtol=tolerance, atol=tolerance)


def test_a_shared_numerator_gets_the_sum_of_the_groups_gradients(vectors):
    v = vectors("kat")
    x, b, upstream = (jnp.asarray(v[name], jnp.float32) for name in ("x", "denom", "grad_out"))
    a = jnp.asarray(v["numer"][:1], jnp.float32)

    def weighted(a):
        return (upstream * rational(x, a, b, groups=8)).sum()

    one, each = jax.grad(weighted)(a), jax.grad(weighted)(jnp.repeat(a, 8, 0))
    assert one.shape == (1, 6)
    np.testing.assert_allclose(one, each.sum(0, keepdims=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(v["dnumer_shared"], v["dnumer"].sum(0, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("form", ["A", "B"])
def test_gradients_equal_finite_differences(form):
    with jax.enable_x64(True):
        parts = [jnp.asarray(part, jnp.float64) for part in draw(0)]
        flat, unflatten = jax.flatten_util.ravel_pytree(parts)
        weights = jnp.sin(jnp.arange(parts[0].size)).reshape(parts[0].shape)

        def total(flat):
            x, a, b = unflatten(flat)
            return (weights * rational(x, a, b, groups=4, form=form)).sum()

        steps = 1e-6 * jnp.eye(flat.size)
        numeric = jax.jit(jax.vmap(lambda step: (total(flat + step) - total(flat - step)) / 2e-6))(steps)
        np.testing.assert_allclose(jax.jit(jax.grad(total))(flat), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_denominator_of_the_identity_moves(form):
    x = jnp.asarray([[1.0, 2.0]])
    gradients = jax.grad(lambda b: rational(x, IDENTITY, b, groups=1, form=form).sum())(jnp.zeros((1, 4)))
    np.testing.assert_allclose(gradients, [[-(1 + 2**2), -(1 + 2**3), -(1 + 2**4), -(1 + 2**5)]], rtol=1e-6)


def test_identity_coefficients_return_x_to_the_bit():
    x = jnp.concatenate([jnp.linspace(-7, 7, 1001), jnp.asarray([0.0, 1e-30, 1e20])])[:, None]
    for form in ("A", "B"):
        np.testing.assert_array_equal(rational(x, IDENTITY, jnp.zeros((1, 4)), groups=1, form=form), x)


def test_without_a_denominator_it_is_the_polynomial():
    x, a, _ = draw(1, groups=1)
    wanted = np.polynomial.polynomial.polyval(np.asarray(x, np.float64), np.asarray(a[0], np.float64))
    np.testing.assert_allclose(rational(x, a, jnp.zeros((1, 4)), groups=1), wanted, rtol=1e-4)


def test_it_is_even_where_odd_numerators_vanish():
    x, a, b = draw(2)
    even = a.at[:, 1::2].set(0)
    np.testing.assert_array_equal(rational(-x, even, b, groups=4), rational(x, even, b, groups=4))


def test_the_forms_agree_for_positive_coefficients_and_inputs_and_not_otherwise():
    x, a, b = draw(3)
    both = [rational(jnp.abs(x), a, jnp.abs(b), groups=4, form=form) for form in ("A", "B")]
    np.testing.assert_allclose(*both, rtol=1e-5)
    apart = [rational(x, a, b, groups=4, form=form) for form in ("A", "B")]
    assert np.abs(apart[0] - apart[1]).max() > 0.1


def test_it_grows_linearly_far_out():
    _, a, b = draw(4, groups=1)
    x = jnp.asarray([[1e6], [-1e6]])
    np.testing.assert_allclose(rational(x, a, b, groups=1), a[0, 5] / jnp.abs(b[0, 3]) * x, rtol=1e-3)


@given(st.floats(0.25, 4), st.integers(0, 100))
def test_scaling_x_is_scaling_the_coefficients(scale, seed):
    x, a, b = draw(seed)
    powers = scale ** jnp.arange(6)
    moved = rational(scale * x, a / powers, b / powers[1:5], groups=4)
    np.testing.assert_allclose(moved, rational(x, a, b, groups=4), rtol=1e-3, atol=1e-4)


def test_channels_of_a_group_may_be_permuted_and_groups_may_not():
    x, a, b = draw(5)
    inside = np.asarray([2, 0, 1, 3, 5, 4, 8, 7, 6, 11, 9, 10])
    y = rational(x, a, b, groups=4)
    np.testing.assert_array_equal(rational(x[:, inside], a, b, groups=4), y[:, inside])
    assert not np.allclose(rational(x[:, ::-1], a, b, groups=4), y[:, ::-1])


def test_one_group_a_channel_is_a_function_of_its_own_for_each_channel():
    x, a, b = draw(6, groups=12)
    alone = [rational(x[:, i : i + 1], a[i : i + 1], b[i : i + 1], groups=1) for i in range(12)]
    np.testing.assert_allclose(rational(x, a, b, groups=12), jnp.concatenate(alone, 1), rtol=1e-6)


def test_the_closed_form_of_the_kernels_equals_autodiff():
    x, a, b = draw(7)
    upstream = jax.random.normal(jax.random.key(8), x.shape)
    top, bottom = list(spread(a, 4, 12)), list(spread(jnp.abs(b), 4, 12))
    y, pull = jax.vjp(lambda x, a, b: rational(x, a, b, groups=4), x, a, b)
    dx, summands = gradient(x, upstream, top, bottom)
    np.testing.assert_allclose(value(x, top, bottom), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, pull(upstream)[0], rtol=1e-4, atol=1e-5)
    assert len(list(summands)) == 10


def test_narrow_inputs_are_computed_wide():
    x = jnp.asarray([[30.0]])  # 30^5 overflows float16
    _, a, b = draw(9, groups=1)
    wanted = rational(x, a, b, groups=1)
    for dtype, tolerance in ((jnp.float16, 1e-3), (jnp.bfloat16, 8e-3)):
        y = rational(x.astype(dtype), a, b, groups=1)
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=tolerance)


def test_the_floor_is_the_papers_sheet():
    elements = 64 * 197 * 768
    assert cost.forward_cost(elements, 2, 8).floor(3.35e12) == pytest.approx(11.6e-6, rel=0.01)
    assert cost.backward_cost(elements, 2, 8).floor(0.82e12) == pytest.approx(71e-6, rel=0.01)
