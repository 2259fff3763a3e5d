"""Generated signals have the spectra that they claim."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.io import wavfile

from mechlab.data import signals

GENERATORS = {
    "band": lambda key, n: signals.band(key, n, 0.1, 0.3),
    "white": signals.white,
    "pink": signals.pink,
    "chirp": signals.chirp,
    "impulses": signals.impulses,
    "recording": signals.recording,
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("samples", [101, 256])
def test_every_signal_is_a_channel_of_largest_magnitude_one(name, samples):
    y = np.asarray(GENERATORS[name](jax.random.key(0), samples))
    assert y.shape == (samples, 1) and y.dtype == np.float32
    np.testing.assert_allclose(np.abs(y).max(), 1, rtol=1e-6)
    np.testing.assert_array_equal(y, GENERATORS[name](jax.random.key(0), samples))
    assert not np.allclose(y, GENERATORS[name](jax.random.key(1), samples))


@pytest.mark.parametrize("samples", [100, 101])
def test_a_band_is_flat_inside_and_empty_outside(samples):
    y = np.asarray(signals.band(jax.random.key(2), samples, 0.2, 0.5), np.float64)[:, 0]
    amplitude, frequency = np.abs(np.fft.rfft(y)), np.fft.rfftfreq(samples)
    inside = frequency >= 0.2
    assert amplitude[inside].min() > 0.999 * amplitude[inside].max()
    assert amplitude[~inside].max() < 1e-4 * amplitude.max()
    assert np.abs(signals.band(jax.random.key(2), samples, 0.0, 0.1).mean()) < 1e-6


def test_pink_amplitudes_fall_with_the_root_of_the_frequency():
    amplitude = np.abs(np.fft.rfft(np.asarray(signals.pink(jax.random.key(3), 1024), np.float64)[:, 0]))
    np.testing.assert_allclose(amplitude[400] / amplitude[4], 0.1, rtol=1e-3)
    assert amplitude[0] < 1e-3 * amplitude[1]


def test_a_chirp_rises():
    y = np.asarray(signals.chirp(jax.random.key(4), 4096, 0.05, 0.45))[:, 0]
    loudest = [np.abs(np.fft.rfft(y[at : at + 256])).argmax() / 256 for at in (0, 1920, 3840)]
    np.testing.assert_allclose(loudest, [0.05 + 0.4 * (at + 128) / 4096 for at in (0, 1920, 3840)], atol=0.02)


def test_impulses_are_sparse_and_ring():
    y = np.asarray(signals.impulses(jax.random.key(5), 4096, count=3))[:, 0]
    assert (np.abs(y) > 1e-3).mean() < 0.06
    assert 0.1 < np.abs(np.fft.rfft(y)).argmax() / 4096 < 0.2


def test_a_sound_file_is_averaged_cut_and_scaled(tmp_path):
    stereo = np.asarray([[100, 300], [-400, -400], [0, 50], [9, 9], [1, 1], [2, 2]], np.int16)
    wavfile.write(tmp_path / "clip.wav", 8000, stereo)
    y = signals.read_sound(tmp_path / "clip.wav", 4)
    np.testing.assert_allclose(y[:, 0], [0.5, -1, 0.0625, 0.0225], rtol=1e-6)
    with pytest.raises(ValueError, match="wanted 7 samples that are not silent, got 6"):
        signals.read_sound(tmp_path / "clip.wav", 7)


def test_bad_input_is_refused():
    key = jax.random.key(6)
    with pytest.raises(ValueError, match="samples must be at least 4"):
        signals.white(key, 3)
    with pytest.raises(ValueError, match="0 <= low < high"):
        signals.band(key, 64, 0.4, 0.2)
    with pytest.raises(ValueError, match="no frequency between"):
        signals.band(key, 16, 0.01, 0.02)
