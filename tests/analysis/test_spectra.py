"""Power spectra: Parseval, tones, bands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.analysis.spectra import band_power, power_spectrum


@settings(max_examples=8)
@given(st.integers(1, 9), st.integers(0, 2))
def test_power_sums_to_the_mean_square(samples, axis):
    x = jax.random.normal(jax.random.key(samples), (samples, samples + 1, samples + 2))
    power = power_spectrum(x, axis=axis)
    np.testing.assert_allclose(power.sum(axis), jnp.square(x).mean(axis), rtol=1e-5, atol=1e-6)
    assert power.shape[axis] == x.shape[axis] // 2 + 1
    np.testing.assert_allclose(band_power(x, (0, 0.2, 0.5), axis=axis).sum(-1), power.sum(axis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bin_", "power"), [(0, 1.0), (3, 0.5), (8, 1.0)])
def test_a_tone_has_its_power_in_its_bin(bin_, power):
    tone = jnp.cos(2 * jnp.pi * bin_ * jnp.arange(16) / 16)
    expected = np.zeros(9)
    expected[bin_] = power
    np.testing.assert_allclose(power_spectrum(tone), expected, atol=1e-6)


def test_bands_hold_their_lower_edge_and_the_last_its_upper_one():
    tones = jnp.stack([jnp.cos(2 * jnp.pi * k * jnp.arange(16) / 16) for k in (2, 4, 8)])
    np.testing.assert_allclose(band_power(tones, (0.125, 0.25, 0.5)), [[0.5, 0], [0, 0.5], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: band_power(x, (0.125, 0.25, 0.5)))(tones)[2], [0, 1], atol=1e-6)


def test_bad_input_is_refused():
    for edges in ((0.1,), (0.2, 0.1), (-0.1, 0.2), (0.1, 0.6)):
        with pytest.raises(ValueError, match="edges: wanted increasing"):
            band_power(jnp.ones(8), edges)
    with pytest.raises(ValueError, match="real samples"):
        power_spectrum(jnp.ones(8) * 1j)
    with pytest.raises(ValueError, match="real samples"):
        power_spectrum(jnp.ones((2, 0)))
