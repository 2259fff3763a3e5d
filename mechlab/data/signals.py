"""One-dimensional signals with known spectra, as targets for networks that fit a signal.

Every generator gives (N, 1) float32 whose largest magnitude is 1. Frequencies are in cycles per sample, 0 to 1/2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from scipy.io import wavfile

from mechlab.core.rng import stream

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def band(key: jax.Array, samples: int, low: float, high: float) -> Float[Array, "N 1"]:
    """All frequencies low <= f <= high with equal amplitude and random phases; no constant part.

    Args:
      key: typed key, for the phases.
      samples: N, at least 4.
      low, high: 0 <= low < high <= 1/2.

    Raises:
      ValueError: too few samples, or no frequency k / N > 0 in the band.
    """
    _require(samples, low, high)
    frequency = np.fft.rfftfreq(samples)
    inside = (frequency >= low) & (frequency <= high) & (frequency > 0)
    if not inside.any():
        raise ValueError(f"band: {samples} samples have no frequency between {low} and {high}.")
    return _random_phases(key, samples, inside)


def white(key: jax.Array, samples: int) -> Float[Array, "N 1"]:
    """White Gaussian noise."""
    _require(samples)
    return _normalised(jax.random.normal(key, (samples,)))


def pink(key: jax.Array, samples: int) -> Float[Array, "N 1"]:
    """Amplitudes 1 / sqrt(f), random phases: equal power in every octave."""
    _require(samples)
    frequency = np.fft.rfftfreq(samples)
    return _random_phases(key, samples, np.r_[0, frequency[1:] ** -0.5])


def chirp(key: jax.Array, samples: int, low: float = 0.01, high: float = 0.4) -> Float[Array, "N 1"]:
    """A tone whose frequency rises linearly from low to high; the key decides its phase."""
    _require(samples, low, high)
    n = np.arange(samples)
    cycles = low * n + (high - low) * n**2 / (2 * samples)  # float64: float32 has no phase left at the end of long ones
    phase = jax.random.uniform(key, maxval=2 * jnp.pi)
    return _normalised(jnp.sin(jnp.asarray(2 * np.pi * (cycles % 1), jnp.float32) + phase))


def impulses(key: jax.Array, samples: int, count: int = 12, frequency: float = 0.15) -> Float[Array, "N 1"]:
    """Clicks at random times and of random sign, each ringing at a frequency and gone after some 30 samples."""
    _require(samples)
    times = jax.random.randint(stream(key, "times"), (count,), 0, samples)
    clicks = jnp.zeros(samples).at[times].add(jax.random.rademacher(stream(key, "signs"), (count,), jnp.float32))
    n = np.arange(min(samples, 64))
    return _normalised(jnp.convolve(clicks, np.exp(-n / 10) * np.cos(2 * np.pi * frequency * n))[:samples])


def recording(key: jax.Array, samples: int, strokes: int = 6, partials: int = 8) -> Float[Array, "N 1"]:
    """Like a recording of an instrument: strokes at random times, each a burst of noise and decaying partials.

    Partials lie anywhere up to f = 0.4 and die out the faster the higher they are; the noise is short and weaker.
    """
    _require(samples)
    n = jnp.arange(samples, dtype=jnp.float32)
    hiss = jax.random.normal(stream(key, "hiss"), (samples,))

    def stroke(key: jax.Array) -> jax.Array:
        start = jax.random.uniform(stream(key, "start"), maxval=0.9 * samples)
        since = n - start
        frequency = jax.random.uniform(stream(key, "frequency"), (partials, 1), minval=0.01, maxval=0.4)
        phase = jax.random.uniform(stream(key, "phase"), (partials, 1), maxval=2 * jnp.pi)
        decay = jnp.exp(-jnp.maximum(since, 0) * (2 + 20 * frequency) / (0.3 * samples))
        tones = (decay * jnp.sin(2 * jnp.pi * frequency * since + phase)).sum(0)
        burst = hiss * jnp.exp(-jnp.maximum(since, 0) / (0.02 * samples))
        return jnp.where(since >= 0, tones + 0.5 * burst, 0.0)

    keys = jax.vmap(lambda i: stream(key, "strokes", i))(jnp.arange(strokes))
    return _normalised(jax.lax.map(stroke, keys).sum(0))


def read_sound(path: Path, samples: int) -> Float[Array, "N 1"]:
    """The first samples of a sound file, its channels averaged, divided by the largest magnitude.

    Args:
      path: a .wav file.
      samples: N, at most the length of the file.

    Raises:
      ValueError: the file is too short, or silent.
    """
    _require(samples)
    _, sound = wavfile.read(path)
    mono = np.asarray(sound, np.float64).reshape(len(sound), -1).mean(-1)[:samples]
    if len(mono) < samples or not np.abs(mono).max() > 0:
        raise ValueError(f"{path}: wanted {samples} samples that are not silent, got {len(mono)}.")
    return jnp.asarray(mono / np.abs(mono).max(), jnp.float32)[:, None]


def _random_phases(key: jax.Array, samples: int, amplitude: np.ndarray) -> jax.Array:
    phase = jax.random.uniform(key, amplitude.shape, maxval=2 * jnp.pi)
    if samples % 2 == 0:
        # The highest frequency of an even length has no phase but its sign: its term must be real.
        phase = phase.at[-1].set(jnp.where(phase[-1] < jnp.pi, 0, jnp.pi))
    return _normalised(jnp.fft.irfft(jnp.asarray(amplitude, jnp.float32) * jnp.exp(1j * phase), samples))


def _normalised(y: jax.Array) -> jax.Array:
    return (y / jnp.abs(y).max())[:, None]


def _require(samples: int, low: float = 0.0, high: float = 0.5) -> None:
    if samples < 4:
        raise ValueError(f"samples must be at least 4, got {samples}.")
    if not 0 <= low < high <= 0.5:
        raise ValueError(f"frequencies must be 0 <= low < high <= 0.5, got {low} and {high}.")
