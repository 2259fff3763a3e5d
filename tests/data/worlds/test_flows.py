"""Flows against exact solutions and conservation laws, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.data.worlds import flows

GRID = 16
X = np.arange(GRID) * 2 * np.pi / GRID


def shear(n=2, **changes):
    sizes = {"nu": 0.01, "diffusivity": 0.02, "amplitude": 0.3, "speed": 1.0, "frames": 24, "grid": GRID}
    return np.asarray(flows.simulate_shear(jax.random.key(0), n, **(sizes | changes)))


def test_a_laminar_profile_decays_mode_by_mode():
    nu = jnp.asarray([0.02, 0.1])
    shown = shear(amplitude=0.0, nu=nu, frames=9)
    spectra = np.abs(np.fft.rfft(shown[:, :, 0, 0], axis=-1))
    t, k = 0.25 * np.arange(9), np.arange(GRID // 2 + 1)
    decay = np.exp(-np.asarray(nu)[:, None, None] * k**2 * t[:, None])
    # 160 factors exp(-nu k^2 dt / 2) in float32 are off by up to 1e-5.
    np.testing.assert_allclose(spectra, spectra[:, :1] * decay, atol=1e-5 * spectra.max())
    np.testing.assert_allclose(shown[:, :, 1], 0, atol=1e-6)


def test_without_viscosity_energy_and_enstrophy_stay():
    shown = shear(nu=0.0, diffusivity=0.0, amplitude=0.05)
    u, v = shown[:, :, 0], shown[:, :, 1]
    for kept in ((u**2 + v**2).mean((2, 3)), np.square(flows.vorticity(u, v)).mean((2, 3))):
        np.testing.assert_allclose(kept, np.broadcast_to(kept[:, :1], kept.shape), rtol=0.01)


def test_the_flow_has_no_divergence_and_keeps_the_tracers_mean():
    shown = shear()
    kx, ky = (np.asarray(k) for k in flows.wavenumbers(GRID))
    u, v = np.fft.rfft2(shown[:, :, 0]), np.fft.rfft2(shown[:, :, 1])
    assert np.abs(kx * u + ky * v).max() < 1e-3  # of coefficients of order 100
    mean = shown[:, :, 2].mean((2, 3))
    np.testing.assert_allclose(mean, np.broadcast_to(mean[:, :1], mean.shape), atol=1e-5)
    assert shown[:, 0, 1].std() < shown[:, -1, 1].std()  # it rolls up


def test_evolution_goes_on_from_a_frame():
    shown = shear(n=1, frames=5)
    middle = shown[:, 2]
    omega = flows.vorticity(middle[:, 0], middle[:, 1])
    again = flows.evolve_shear(omega, jnp.asarray(middle[:, 2]), nu=0.01, diffusivity=0.02, frames=3)
    np.testing.assert_allclose(again, shown[:, 2:], atol=1e-4)


def test_advection_shifts_and_decays():
    tracer = np.cos(X)[:, None] + np.sin(2 * X)[None]
    c, d = np.asarray([[0.4, -0.8]]), 0.05
    shown = flows.evolve_advect(jnp.asarray(tracer, jnp.float32)[None], jnp.asarray(c), diffusivity=d, frames=5)
    t = 1.0
    exact = np.exp(-d * t) * np.cos(X - 0.4 * t)[:, None] + np.exp(-4 * d * t) * np.sin(2 * (X + 0.8 * t))[None]
    np.testing.assert_allclose(shown[0, 4, 2], exact, atol=1e-5)
    np.testing.assert_allclose(shown[0, :, :2].mean((2, 3)), np.broadcast_to(c, (5, 2)), rtol=1e-5)


def test_gray_scott_rests_at_its_fixed_point_and_grows_patterns():
    one, zero = jnp.ones((1, GRID, GRID)), jnp.zeros((1, GRID, GRID))
    rest = flows.evolve_gray_scott(one, zero, feed=0.03, kill=0.06, frames=3)
    np.testing.assert_array_equal(rest[:, -1], np.stack([one, zero], 1))
    grown = np.asarray(flows.simulate_gray_scott(jax.random.key(1), 2, feed=0.035, kill=0.06, frames=3, grid=GRID))
    assert grown.shape == (2, 3, 2, GRID, GRID)
    v = grown[:, -1, 1] * flows.SIZE[1] + flows.SHIFT[1]
    assert v.max() > 0.15 and v.min() > -0.01


def test_waves_keep_their_energy():
    shown = np.asarray(flows.simulate_wave(jax.random.key(2), 2, speed=jnp.asarray([0.7, 1.2]), frames=9, grid=GRID))
    kx, ky = (np.asarray(k) for k in flows.wavenumbers(GRID))
    p, rate = np.fft.rfft2(shown[:, :, 0]), np.fft.rfft2(shown[:, :, 1])
    twice = np.where((ky > 0) & (ky < GRID / 2), 2, 1)
    stiff = np.asarray([0.7, 1.2])[:, None, None, None] ** 2 * (kx**2 + ky**2)
    energy = (twice * (np.abs(rate) ** 2 + stiff * np.abs(p) ** 2)).sum((2, 3))
    np.testing.assert_allclose(energy, np.broadcast_to(energy[:, :1], energy.shape), rtol=1e-4)


def test_burgers_loses_energy():
    shown = np.asarray(flows.simulate_burgers(jax.random.key(3), 2, nu=0.1, frames=6, grid=GRID))
    energy = np.square(shown).mean((2, 3, 4))
    assert (np.diff(energy, axis=1) < 0).all()


def test_bad_parameters_and_runs_that_blow_up_are_refused():
    with pytest.raises(ValueError, match="n and frames must be at least 1"):
        shear(frames=0)
    with pytest.raises(ValueError, match=r"nu must be a number or \(2,\)"):
        shear(nu=jnp.ones(3))
    with pytest.raises(ValueError, match="speed must be finite and not negative"):
        shear(speed=-1.0)
    with pytest.raises(ValueError, match=r"velocity must be \(2, 2\)"):
        flows.simulate_advect(jax.random.key(0), 2, velocity=jnp.ones(2), diffusivity=0.1)
    with pytest.raises(FloatingPointError, match=r"run 1 of 2 blew up .*'speed': 40"):
        shear(speed=jnp.asarray([1.0, 40.0]), frames=2)
    with pytest.raises(FloatingPointError, match=r"run 0 of 1 blew up .*'feed': 30"):
        flows.simulate_gray_scott(jax.random.key(0), 1, feed=30.0, kill=0.06, frames=2, grid=GRID)
