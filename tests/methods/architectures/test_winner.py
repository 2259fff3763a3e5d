"""WINNER against stored vectors of an independent float64 reference, closed forms, limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.analysis.tangent import empirical_ntk
from mechlab.core.rng import stream
from mechlab.methods.architectures import winner as w
from mechlab.models.implicit import coordinates, siren_apply, siren_init, siren_preactivations

WIDTHS = (1, 16, 16, 16, 1)


def stored(v, dtype):
    return {
        f"layer_{i}": {"kernel": jnp.asarray(v[f"W{i}"], dtype), "bias": jnp.asarray(v[f"b{i}"], dtype)}
        for i in range(4)
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_centroids_and_scales_equal_the_vectors(vectors, dtype, tolerance):
    v = vectors("winner")
    with jax.enable_x64(dtype is np.float64):
        for name in ("audio", "image", "volume"):
            psi = w.spectral_centroid(jnp.asarray(v[name], dtype))
            np.testing.assert_allclose(psi, v[f"psi_{name}"], rtol=tolerance)
        audio, image = (jnp.asarray(v[f"psi_{name}"], dtype) for name in ("audio", "image"))
        s0, s1 = w.winner_scales(audio, 1)
        np.testing.assert_allclose([s0, s1], [v["s0_audio"], v["s1_audio"]], rtol=tolerance)
        text = w.ScaleRule(s0_max=3500, a=5, b=3)
        np.testing.assert_allclose(w.winner_scales(audio, 1, text)[0], v["s0_audio_paper_a5"], rtol=tolerance)
        s0, s1 = w.winner_scales(image, 3, w.IMAGE)
        np.testing.assert_allclose([s0, s1], [v["s0_image"], v["s1_image"]], rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-4)])
def test_outputs_and_kernels_equal_the_vectors(vectors, dtype, tolerance):
    v = vectors("winner")
    with jax.enable_x64(dtype is np.float64):
        params, x = stored(v, dtype), jnp.asarray(v["x"], dtype)
        noise = w.Noise(jnp.asarray(v["eta0"], dtype), jnp.asarray(v["eta1"], dtype))
        omegas = {"omega_first": float(v["first_omega"]), "omega0": float(v["omega0"])}
        moved = w.add_noise(params, noise, s0=float(v["s0_used"]), s1=float(v["s1_used"]), omega0=float(v["omega0"]))

        def apply(params, x):
            return siren_apply(params, x, **omegas)

        for name, p in (("siren", params), ("winner", moved)):
            np.testing.assert_allclose(apply(p, x), v[f"out_{name}"], rtol=tolerance, atol=tolerance)
            kernel = empirical_ntk(apply, p, x, contract=True, block=10)
            largest = np.abs(v[f"ntk_{name}"]).max()
            np.testing.assert_allclose(kernel, v[f"ntk_{name}"], atol=tolerance * largest)
            spectrum = w.ntk_spectrum(kernel, x)
            np.testing.assert_allclose(spectrum.eigenvalues, v[f"eig_{name}"], atol=tolerance * v[f"eig_{name}"][0])
            np.testing.assert_allclose(spectrum.energy[-1], 1, rtol=1e-4)


@settings(max_examples=5)
@given(samples=st.integers(4, 40), seed=st.integers(0, 9))
def test_a_pure_tone_is_where_it_is(samples, seed):
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    for k in range(1, (samples + 1) // 2):
        tone = np.cos(2 * np.pi * k * np.arange(samples) / samples + phase)[:, None].astype(np.float32)
        np.testing.assert_allclose(w.spectral_centroid(tone), 2 * k / samples, atol=1e-4)


def test_centroids_of_noise_constants_and_scaled_targets():
    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    psi = float(w.spectral_centroid(noise))
    np.testing.assert_allclose(psi, 0.5, atol=0.01)
    np.testing.assert_allclose(w.spectral_centroid(-7 * noise), psi, rtol=1e-5)
    assert float(w.spectral_centroid(jnp.ones((16, 1)))) < 1e-6
    assert float(w.spectral_centroid(jnp.zeros((16, 1)))) == 0


def test_channels_divide_twice():
    tone = jnp.cos(2 * jnp.pi * 3 * jnp.arange(16) / 16)[:, None]
    one = w.spectral_centroid(tone)
    three = w.spectral_centroid(jnp.concatenate([tone] * 3, -1))
    np.testing.assert_allclose(three, one / 3, rtol=1e-6)
    np.testing.assert_allclose(w.winner_scales(three, 3)[1], 3 * one / 9, rtol=1e-6)


def test_images_are_read_along_rows():
    tone = jnp.cos(2 * jnp.pi * 3 * jnp.arange(16) / 16)
    image = jnp.broadcast_to(tone, (8, 16))[..., None]
    np.testing.assert_allclose(w.spectral_centroid(image), 0.375, rtol=1e-5)
    assert float(w.spectral_centroid(image.swapaxes(0, 1))) < 1e-5
    np.testing.assert_allclose(w.spectral_centroid(image.swapaxes(0, 1), axis=0), 0.375, rtol=1e-5)


def test_subtracting_the_floor_of_noise_recovers_a_tone_s_centroid():
    tone = jnp.cos(2 * jnp.pi * 20 * jnp.arange(1000) / 1000)[:, None]
    noisy = tone + 0.2 * jax.random.normal(jax.random.key(1), tone.shape)
    raw, less = float(w.spectral_centroid(noisy)), float(w.centroid_under_noise(noisy, 0.2))
    assert 0.04 < less < 0.5 * raw
    np.testing.assert_allclose(w.centroid_under_noise(tone, 0.0), w.spectral_centroid(tone), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(w.centroid_under_noise)(noisy, 0.2), less, rtol=1e-4)


def test_the_rule_saturates_and_scales_with_the_length():
    psi = jnp.linspace(0, 1, 11)
    s0, s1 = w.winner_scales(psi, 1)
    assert s0[0] == s1[0] == 0 and (jnp.diff(s0) > 0).all() and s0[-1] < 3500
    np.testing.assert_allclose(s1, 3 * psi, rtol=1e-6)
    short = w.AUDIO.for_length(1500)
    np.testing.assert_allclose(w.winner_scales(psi, 1, short)[0], s0 / 100, rtol=1e-5)
    np.testing.assert_allclose(w.winner_scales(psi, 1, short)[1], s1, rtol=1e-6)


def test_without_scales_the_start_is_siren_s_bit_for_bit():
    key = jax.random.key(2)
    params = siren_init(key, WIDTHS)
    jax.tree.map(np.testing.assert_array_equal, w.winner_perturb(key, params, s0=0.0, s1=0.0), params)
    target = jnp.sin(jnp.arange(32.0))[:, None]
    by_hand = w.winner_init(key, WIDTHS, target, scales=(0.0, 0.0))
    jax.tree.map(np.testing.assert_array_equal, by_hand, siren_init(stream(key, "siren"), WIDTHS))


def test_only_two_kernels_move_by_the_scale_over_omega0():
    key, widths, omega0 = jax.random.key(3), (2, 300, 300, 300, 1), 20.0
    params = siren_init(jax.random.key(4), widths)
    moved = w.winner_perturb(key, params, s0=40.0, s1=3.0, omega0=omega0)
    for layer, scale in (("layer_0", 40.0), ("layer_1", 3.0)):
        added = np.asarray(moved[layer]["kernel"] - params[layer]["kernel"])
        four_sigma = 4 / np.sqrt(2 * added.size)
        np.testing.assert_allclose(added.std(), scale / omega0, rtol=four_sigma)
        np.testing.assert_array_equal(moved[layer]["bias"], params[layer]["bias"])
    for layer in ("layer_2", "layer_3"):
        jax.tree.map(np.testing.assert_array_equal, moved[layer], params[layer])


def test_winner_init_follows_the_rule_of_its_dimension():
    key = jax.random.key(5)
    image = jax.random.uniform(jax.random.key(6), (12, 12, 3))
    widths = (2, 8, 8, 3)
    s0, s1 = w.winner_scales(w.spectral_centroid(image), 3, w.IMAGE)
    expected = w.winner_perturb(stream(key, "noise"), siren_init(stream(key, "siren"), widths), s0=s0, s1=s1)
    jax.tree.map(np.testing.assert_array_equal, w.winner_init(key, widths, image), expected)


def test_frequencies_and_phases_have_their_closed_forms():
    width, s0, s1 = 4096, 50.0, 0.05
    widths = (1, width, width, width, 1)
    params = siren_init(jax.random.key(7), widths)
    moved = w.winner_perturb(jax.random.key(8), params, s0=s0, s1=s1)
    frequencies = 30 * moved["layer_0"]["kernel"]
    np.testing.assert_allclose(frequencies.std(), w.first_frequency_std(1, s0), rtol=0.04)
    # Phases over one place and all units are not uniform enough for SIREN alone: take places far apart.
    x = coordinates((40,))
    variance = w.second_phase_variance(width, s1)
    np.testing.assert_allclose(variance, 1 + s1**2 * width / 2 + 900 / (3 * width))
    layers = siren_preactivations(moved, x)
    np.testing.assert_allclose(jnp.square(layers[1]).mean(), variance, rtol=0.03)
    np.testing.assert_allclose(jnp.square(layers[2]).mean(), w.second_phase_variance(width, 0.0), rtol=0.05)


def test_activation_spectra_see_the_noise():
    params = siren_init(jax.random.key(9), (1, 64, 64, 64, 1))
    x = coordinates((256,))
    spectra = [
        w.activation_spectra(siren_preactivations(p, x)[:-1])
        for p in (params, w.winner_perturb(jax.random.key(10), params, s0=200.0, s1=1.0))
    ]
    assert spectra[0].shape == (3, 129)
    high = [float(s[1, 32:].sum() / s[1].sum()) for s in spectra]
    assert high[0] < 0.01 < 0.1 < high[1]


def test_kernel_spectrum_by_hand():
    order = np.fft.fft(np.eye(8))  # eigenvectors of a circulant kernel are tones
    k = np.fft.fftfreq(8) * 8
    kernel = (order * np.exp(-np.abs(k))) @ order.conj().T / 8
    tone = jnp.cos(2 * jnp.pi * 2 * jnp.arange(8) / 8)[:, None]
    found = w.ntk_spectrum(jnp.asarray(kernel.real), tone)
    np.testing.assert_allclose(found.eigenvalues, np.sort(np.exp(-np.abs(k)))[::-1], rtol=1e-4)
    np.testing.assert_allclose(found.centroids, [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1], atol=1e-3)
    np.testing.assert_allclose(found.energy, [0, 0, 0, found.energy[3], 1, 1, 1, 1], atol=1e-4)
    np.testing.assert_allclose(
        found.eigenvectors @ kernel.real, found.eigenvalues[:, None] * found.eigenvectors, atol=1e-5
    )


def test_effective_modes():
    np.testing.assert_allclose(w.effective_modes(jnp.asarray([[1.0, 1, 1, 1], [5.0, 0, 0, -1e-9]])), [4, 1])


def test_psnr_held_out_and_stopping():
    np.testing.assert_allclose(w.psnr(jnp.asarray([1.0, 0.04]), 2.0), [6.0206, 20.0], rtol=1e-4)
    mask = w.held_out(jax.random.key(11), 100, 0.13)
    assert mask.shape == (100,) and int(mask.sum()) == 13
    assert w.stopping_step(jnp.asarray([[3.0, 1, 1, 2], [1.0, 2, 0, 0]])).tolist() == [1, 2]


def test_transformations():
    target = jnp.sin(jnp.arange(64.0))[:, None]
    keys = jax.random.split(jax.random.key(12), 3)
    starts = jax.vmap(lambda key: w.winner_init(key, WIDTHS, target))(keys)
    one = w.winner_init(keys[1], WIDTHS, target)
    jax.tree.map(lambda all_, x: np.testing.assert_allclose(all_[1], x, rtol=1e-5, atol=1e-5), starts, one)
    params = siren_init(jax.random.key(13), WIDTHS)
    noise = w.draw_noise(jax.random.key(14), params)
    grid = jnp.asarray([0.0, 3.0])
    moved = jax.jit(jax.vmap(lambda s0: w.add_noise(params, noise, s0=s0, s1=0.0)))(grid)
    np.testing.assert_array_equal(moved["layer_0"]["kernel"][0], params["layer_0"]["kernel"])
    slope = jax.grad(lambda s0: w.add_noise(params, noise, s0=s0, s1=0.0)["layer_0"]["kernel"].sum())(1.0)
    np.testing.assert_allclose(slope, noise.first.sum() / 30, rtol=1e-4)


def test_bad_input_is_refused_by_name():
    params = siren_init(jax.random.key(15), WIDTHS)
    for shape in ((16,), (2, 2, 2, 16, 1)):
        with pytest.raises(ValueError, match="1 to 3 spatial axes and a channel axis"):
            w.spectral_centroid(jnp.ones(shape))
    with pytest.raises(ValueError, match="at least 4 samples"):
        w.spectral_centroid(jnp.ones((3, 1)))
    for bad in (jnp.ones((8, 1)) * 1j, jnp.full((8, 1), jnp.nan)):
        with pytest.raises(ValueError, match="real and finite"):
            w.spectral_centroid(bad)
    with pytest.raises(ValueError, match="channel axis; wanted a spatial one"):
        w.spectral_centroid(jnp.ones((8, 4)), axis=-1)
    with pytest.raises(ValueError, match="noise_std must not be negative"):
        w.centroid_under_noise(jnp.ones((8, 1)), -1.0)
    with pytest.raises(ValueError, match="no rule for 3 dimensions: give scales"):
        w.winner_init(jax.random.key(16), (3, 8, 8, 1), jnp.ones((4, 4, 4, 1)))
    w.winner_init(jax.random.key(16), (3, 8, 8, 1), jnp.ones((4, 4, 4, 1)), scales=(10.0, 0.1))
    with pytest.raises(ValueError, match="does not fit widths"):
        w.winner_init(jax.random.key(16), WIDTHS, jnp.ones((8, 2)))
    with pytest.raises(ValueError, match="s0 must not be negative"):
        w.winner_perturb(jax.random.key(17), params, s0=-1.0, s1=0.0)
    with pytest.raises(ValueError, match="omega0 must be positive"):
        w.winner_perturb(jax.random.key(17), params, s0=1.0, s1=0.0, omega0=0.0)
    shallow = {name: params[name] for name in ("layer_0", "layer_1")}
    with pytest.raises(ValueError, match="at least two hidden layers"):
        w.winner_perturb(jax.random.key(17), shallow, s0=1.0, s1=0.0)
    with pytest.raises(ValueError, match=r"psi must be in \[0, 1\]"):
        w.winner_scales(1.5, 1)
    with pytest.raises(ValueError, match="channels must be at least 1"):
        w.winner_scales(0.5, 0)
    with pytest.raises(ValueError, match=r"wanted a kernel \(N, N\)"):
        w.ntk_spectrum(jnp.eye(4), jnp.ones((5, 1)))
    with pytest.raises(ValueError, match="none on one side"):
        w.held_out(jax.random.key(18), 10, 0.0)
