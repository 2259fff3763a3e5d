"""Power spectra of real signals, by frequency and by band.

Frequencies are in cycles per sample, 0 to 1/2. The spectrum is one-sided and scaled so that its sum is the mean square
of the signal (Parseval), whatever its length::

    P_k = w_k |X_k|² / N²,   w = 1 at k = 0 and at N/2 (N even), else 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def power_spectrum(x: Float[Array, "..."], *, axis: int = -1) -> Float[Array, "..."]:
    """One-sided power along an axis; ``np.fft.rfftfreq(N)`` are its frequencies.

    Args:
      x: real, N samples along ``axis``.
      axis: the axis that is transformed.

    Returns:
      Like x with N // 2 + 1 entries along ``axis``, in the square of its unit; they sum to the mean square.

    Raises:
      ValueError: complex input, or no samples.

    >>> tone = jnp.cos(2 * jnp.pi * 3 * jnp.arange(16) / 16)
    >>> power_spectrum(tone).round(4).tolist()[:5]
    [0.0, 0.0, 0.0, 0.5, 0.0]
    """
    if np.ndim(x) == 0 or np.shape(x)[axis] == 0 or jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise ValueError(f"x: wanted real samples along axis {axis}, got {jnp.result_type(x)} of {np.shape(x)}.")
    n = x.shape[axis]
    twice = np.full(n // 2 + 1, 2.0)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    magnitude = jnp.moveaxis(jnp.abs(jnp.fft.rfft(x, axis=axis)), axis, -1) / n
    return jnp.moveaxis(jnp.asarray(twice, magnitude.dtype) * magnitude**2, -1, axis)


def band_power(x: Float[Array, "..."], edges: Sequence[float], *, axis: int = -1) -> Float[Array, "... bands"]:
    """Power between neighbouring frequencies: band b holds edges[b] <= f < edges[b + 1], the last one also its end.

    Args:
      x: real, N samples along ``axis``.
      edges: increasing frequencies in [0, 1/2], at least two; known when tracing.
      axis: the axis that is transformed.

    Returns:
      (..., bands): the transformed axis is gone, the bands come last. From 0 to 1/2 they sum to the mean square.

    Raises:
      ValueError: edges that are not increasing in [0, 1/2].

    >>> band_power(jnp.cos(2 * jnp.pi * 3 * jnp.arange(16) / 16), (0, 0.1, 0.25, 0.5)).round(4).tolist()
    [0.0, 0.5, 0.0]
    """
    bounds = np.asarray(edges, float)
    if bounds.ndim != 1 or len(bounds) < 2 or (np.diff(bounds) <= 0).any() or bounds[0] < 0 or bounds[-1] > 0.5:
        raise ValueError(f"edges: wanted increasing frequencies in [0, 0.5], got {tuple(edges)}.")
    power = jnp.moveaxis(power_spectrum(x, axis=axis), axis, -1)
    frequency = np.fft.rfftfreq(np.shape(x)[axis])[:, None]
    inside = (bounds[:-1] <= frequency) & (frequency < bounds[1:])
    inside[:, -1] |= frequency[:, 0] == bounds[-1]
    return jnp.matmul(power, jnp.asarray(inside, power.dtype), precision=jax.lax.Precision.HIGHEST)
