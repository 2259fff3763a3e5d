"""Implicit networks: formulas written out, statistics of their starts, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.select import count
from mechlab.models import implicit as n

WIDTHS = (2, 24, 20, 3)
X = n.coordinates((4, 5))

NETWORKS = {
    "siren": (n.siren_init, n.siren_apply, {}),
    "finer": (n.finer_init, n.finer_apply, {}),
    "finerpp": (n.finerpp_init, n.finer_apply, {}),
    "gauss": (n.gauss_init, n.gauss_apply, {}),
    "wire": (n.wire_init, n.wire_apply, {}),
    "relu": (n.relu_init, n.relu_apply, {"octaves": 3}),
    "rff": (n.rff_init, n.rff_apply, {}),
}


def dense(layer, h):
    return h @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


def by_hand(params, activations, h):
    layers = [params[f"layer_{i}"] for i in range(len(activations) + 1)]
    for layer, activation in zip(layers, activations, strict=False):
        h = activation(dense(layer, h))
    return dense(layers[-1], h)


def test_coordinates_are_inclusive_and_row_major():
    np.testing.assert_allclose(n.coordinates((3,)), [[-1], [0], [1]])
    grid = np.asarray(n.coordinates((2, 3))).reshape(2, 3, 2)
    np.testing.assert_allclose(grid[:, 0, 0], [-1, 1])
    np.testing.assert_allclose(grid[0, :, 1], [-1, 0, 1])


def test_siren_and_its_preactivations_equal_their_formula():
    params = n.siren_init(jax.random.key(0), WIDTHS)
    expected = by_hand(params, [lambda z: np.sin(90 * z), lambda z: np.sin(30 * z)], np.asarray(X, np.float64))
    y = n.siren_apply(params, X, omega_first=90.0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    first, second, last = n.siren_preactivations(params, X, omega_first=90.0)
    np.testing.assert_allclose(first, 90 * dense(params["layer_0"], X), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second, 30 * dense(params["layer_1"], np.sin(first)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(last, y)


def test_the_others_equal_their_formulas():
    x = np.asarray(X, np.float64)
    finer = n.finerpp_init(jax.random.key(1), WIDTHS)
    activation = lambda z: np.sin(30 * (np.abs(z) + 1) * z)  # noqa: E731
    np.testing.assert_allclose(n.finer_apply(finer, X), by_hand(finer, [activation] * 2, x), rtol=1e-3, atol=1e-3)
    gauss = n.gauss_init(jax.random.key(2), WIDTHS)
    activation = lambda z: np.exp(-((30 * z) ** 2))  # noqa: E731
    np.testing.assert_allclose(n.gauss_apply(gauss, X), by_hand(gauss, [activation] * 2, x), rtol=1e-4, atol=1e-5)
    relu = n.relu_init(jax.random.key(3), WIDTHS, octaves=3)
    angle = (np.pi * 2.0 ** np.arange(3) * x[..., None]).reshape(len(x), -1)
    encoded = np.concatenate([x, np.sin(angle), np.cos(angle)], -1)
    expected = by_hand(relu, [lambda z: np.maximum(z, 0)] * 2, encoded)
    np.testing.assert_allclose(n.relu_apply(relu, X), expected, rtol=1e-4, atol=1e-5)
    rff = n.rff_init(jax.random.key(4), WIDTHS)
    angle = 2 * np.pi * x @ np.asarray(rff["features"]["frequencies"], np.float64)
    expected = by_hand(rff, [lambda z: np.sin(30 * z)] * 2, np.concatenate([np.cos(angle), np.sin(angle)], -1))
    np.testing.assert_allclose(n.rff_apply(rff, X), expected, rtol=1e-3, atol=1e-3)


def test_wire_is_a_complex_network():
    params = n.wire_init(jax.random.key(5), WIDTHS)
    h = np.asarray(X, np.complex128)
    for i in range(3):
        layer = {k: np.asarray(v, np.float64) for k, v in params[f"layer_{i}"].items()}
        z = h @ (layer["kernel"] + 1j * layer["kernel_imaginary"]) + layer["bias"] + 1j * layer["bias_imaginary"]
        h = np.exp(1j * 10 * z - np.abs(10 * z) ** 2)
    y = n.wire_apply(params, X)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, z.real, rtol=1e-4, atol=1e-5)
    assert params["layer_0"]["kernel"].shape == (2, round(24 / 2**0.5))


def test_starts_have_their_ranges():
    params = n.siren_init(jax.random.key(6), (2, 400, 400, 1))
    limits = {"layer_0": 1 / 2, "layer_1": (6 / 400) ** 0.5 / 30, "layer_2": (6 / 400) ** 0.5 / 30}
    for name, limit in limits.items():
        largest = float(jnp.abs(params[name]["kernel"]).max())
        assert 0.95 * limit < largest <= limit
        fan_in = params[name]["kernel"].shape[0]
        assert 0.6 / fan_in**0.5 < float(jnp.abs(params[name]["bias"]).max()) <= 1 / fan_in**0.5
    wide = n.finerpp_init(jax.random.key(6), (2, 400, 400, 1))["layer_0"]["bias"]
    assert 4.9 < float(jnp.abs(wide).max()) <= 5
    np.testing.assert_allclose(
        n.rff_init(jax.random.key(7), (2, 800, 8, 1))["features"]["frequencies"].std(), 30, rtol=0.1
    )


def test_octaves():
    assert [n.octaves(samples) for samples in (2, 8, 48, 2048)] == [1, 1, 3, 9]


def test_finer_takes_its_factor_for_a_constant():
    def slope(z):
        params = {f"layer_{i}": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)} for i in range(2)}
        return jax.grad(lambda z: n.finer_apply(params, z[None, None], omega=1.0)[0, 0])(z)

    z = jnp.asarray(0.7)
    np.testing.assert_allclose(slope(z), (z + 1) * jnp.cos((z + 1) * z), rtol=1e-5)


def test_random_frequencies_are_not_trained():
    params = n.rff_init(jax.random.key(8), WIDTHS)
    gradient = jax.grad(lambda p: n.rff_apply(p, X).sum())(params)
    np.testing.assert_array_equal(gradient["features"]["frequencies"], 0)
    assert float(jnp.abs(gradient["layer_0"]["kernel"]).max()) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_signature_transformations_and_refusals(name):
    init, apply, options = NETWORKS[name]
    key = jax.random.key(9)
    params = init(key, WIDTHS, **options)
    y = apply(params, X)
    assert y.shape == (20, 3) and y.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, params, init(key, WIDTHS, **options))
    np.testing.assert_allclose(jax.jit(apply)(params, X), y, rtol=1e-3, atol=1e-3)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    np.testing.assert_allclose(jax.vmap(apply, (0, None))(stacked, X)[1], y, rtol=1e-3, atol=1e-3)
    gradient = jax.grad(lambda p: jnp.square(apply(p, X)).sum())(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert count(params) > 0
    with pytest.raises(ValueError, match=r"places in \[-1, 1\]"):
        apply(params, 1.5 * X)
    with pytest.raises(ValueError, match="at least two hidden"):
        init(key, (2, 8, 1), **options)


def test_omega_must_be_positive():
    params = n.siren_init(jax.random.key(10), WIDTHS)
    with pytest.raises(ValueError, match="omega0 must be positive"):
        n.siren_init(jax.random.key(10), WIDTHS, omega0=0.0)
    with pytest.raises(ValueError, match="omega_first must be positive"):
        n.siren_apply(params, X, omega_first=-1.0)
    with pytest.raises(ValueError, match="octaves must be at least 1"):
        n.relu_init(jax.random.key(10), WIDTHS, octaves=0)
    with pytest.raises(ValueError, match="at least 2 samples"):
        n.coordinates((1, 3))
    with pytest.raises(ValueError, match="real places"):
        n.siren_apply(params, X * 1j)
