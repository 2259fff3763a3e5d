"""The surrogate: shapes and sites of both kinds, symmetry under shifts, masks, its convolution, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.models.surrogate import SurrogateConfig, surrogate

SPECTRAL = SurrogateConfig(scales=(0.1, 0.2), grid=8, layers=2, width=6, modes=3)
ATTENTION = SurrogateConfig(scales=(0.1, 0.2), grid=8, layers=2, width=8, heads=2, kind="attention")
FRAMES = jax.random.normal(jax.random.key(1), (2, 3, 2, 8, 8))
MASK = jnp.asarray([[1.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("config", "shape"), [(SPECTRAL, (2, 2, 8, 8, 6)), (ATTENTION, (2, 2, 3, 2, 2, 8))], ids=["spectral", "attention"]
)
def test_both_kinds_have_sites_masks_and_gradients(config, shape):
    model = surrogate(config)
    params = model.init(jax.random.key(0))
    out, acts = model.capture({"params": params}, FRAMES, MASK, sites=("resid_post", "embed", "increment"))
    assert out.shape == (2, 2, 8, 8) and acts["resid_post"].shape == shape and acts["embed"].shape == shape[1:]
    np.testing.assert_array_equal(out[1, 1], FRAMES[1, -1, 1])
    np.testing.assert_allclose(out - FRAMES[:, -1], jnp.moveaxis(acts["increment"], -1, 1), atol=1e-6)
    grads = jax.grad(lambda p: jnp.square(model.apply({"params": p}, FRAMES, MASK)).sum())(params)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(grads))


def test_shifted_frames_give_the_shifted_prediction():
    model = surrogate(SPECTRAL)
    params = model.init(jax.random.key(0))
    out = model.apply({"params": params}, FRAMES, MASK)
    shifted = model.apply({"params": params}, jnp.roll(FRAMES, (3, 5), (3, 4)), MASK)
    np.testing.assert_allclose(shifted, jnp.roll(out, (3, 5), (2, 3)), atol=1e-4)


def test_the_local_part_is_a_periodic_convolution():
    from mechlab.models.surrogate import _Conv3

    z = jax.random.normal(jax.random.key(2), (1, 8, 8, 3))
    params = _Conv3(4).init(jax.random.key(3), z)
    kernel = params["params"]["kernel"]
    wrapped = jnp.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    wanted = jax.lax.conv_general_dilated(wrapped, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(_Conv3(4).apply(params, z), wanted, rtol=1e-4, atol=1e-5)


def test_the_spectral_part_is_a_complex_matrix_per_mode():
    from mechlab.models.surrogate import _Spectral

    x = jnp.arange(8) * 2 * jnp.pi / 8
    wave = jnp.cos(2 * x[:, None] + x[None])
    z = jnp.stack([wave, jnp.zeros_like(wave)], -1)[None]
    params = _Spectral(2, 3).init(jax.random.key(3), z)
    a, b = params["params"]["real"][2, 1], params["params"]["imaginary"][2, 1]
    phase = 2 * x[:, None] + x[None]
    wanted = a[0] * jnp.cos(phase)[..., None] - b[0] * jnp.sin(phase)[..., None]
    np.testing.assert_allclose(_Spectral(2, 3).apply(params, z)[0], wanted, rtol=1e-4, atol=1e-5)
    beyond = jnp.cos(3 * x[:, None] + 3 * x[None])
    np.testing.assert_allclose(_Spectral(2, 3).apply(params, jnp.stack([beyond, beyond], -1)[None]), 0, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="only periodic grids"):
        SurrogateConfig(scales=(1.0,), periodic=False)
    with pytest.raises(ValueError, match="frames at least 2"):
        SurrogateConfig(scales=(1.0,), frames=1)
    with pytest.raises(ValueError, match="more than half of grid=8"):
        SurrogateConfig(scales=(1.0,), grid=8, modes=5)
    with pytest.raises(ValueError, match="multiple of 4"):
        SurrogateConfig(scales=(1.0,), grid=10, modes=2, kind="attention")
    model = surrogate(SPECTRAL)
    with pytest.raises(ValueError, match="inputs must be"):
        model.apply({"params": model.init(jax.random.key(0))}, FRAMES[:, :2], MASK)
