"""WINNER: Spectral Bottleneck in Deep Neural Networks, Noise is All You Need (2025, arXiv 2509.09719), "SIREN²".

A SIREN whose activations carry no energy in the band of its target cannot learn it, and may end at output zero, even if
it could represent it: the *spectral bottleneck*. WINNER adds Gaussian noise to the first two kernels of the initial
network, scaled by where the target's spectrum has its centre. Nothing else changes, and no parameter is added::

    psi = 2 mean_c(c) / C        c = sum_k f_k |y_k| / sum_k |y_k| per channel, f_k = k/N in [0, 1/2]
    s_0 = s_0^max (1 - exp(-a psi / C)),   s_1 = b psi / C
    W_1 += (s_0 / omega_0) eta,   W_2 += (s_1 / omega_0) eta',   eta, eta' ~ N(0, 1)

    audio  (s_0^max, a, b) = (3500, 7, 3)        images  (50, 5, 0.4)        d = 3: scales by hand

Layer 1 of the paper is ``layer_0`` here. The first layer then runs at omega_0 = 30, also for audio, where SIREN itself
takes 3000. The networks, SIREN and those it is compared with, are ``models/implicit.py``.

Differs from the paper's text, follows its released code: a = 7 (the text prints 5); psi of C channels is divided by C
after averaging over channels, and psi by C again in the scales. Ours: ``ScaleRule.for_length``, and the choice of psi
and of the stopping time in denoising.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.spectra import power_spectrum
from mechlab.core import linalg
from mechlab.core.rng import stream
from mechlab.models.implicit import Params, siren_init

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

AUDIO_SAMPLES = 150_000
"""Samples of the paper's audio clips, for which ``AUDIO`` was made."""
OVER_SUBTRACTION = 3.0
"""How many times the mean power of noise ``centroid_under_noise`` takes off."""


def spectral_centroid(y: Float[Array, "*spatial C"], *, axis: int = -2) -> Float[Array, ""]:
    """psi: where the centre of a target's amplitude spectrum lies, as a share of the highest frequency.

    c = Σ f_k |ŷ_k| / Σ |ŷ_k| for every line of samples (0 for a line of zeros), averaged over lines, then channels;
    psi = 2 c / C. The constant part counts in the denominator.

    Args:
      y: one, two or three spatial axes, then channels; real, at least 4 samples along ``axis``.
      axis: the spatial axis of the lines. The last one, as released: an image is read along its rows, and its
        transpose has another psi.

    Returns:
      psi in [0, 1].

    Raises:
      ValueError: no channel axis, too few samples, complex, or (where values are known) not finite.

    >>> round(float(spectral_centroid(jnp.cos(2 * jnp.pi * 3 * jnp.arange(16) / 16)[:, None])), 4)
    0.375
    """
    return _centroid(y, axis)


def centroid_under_noise(
    y: Float[Array, "*spatial C"], noise_std: float | jax.Array, *, axis: int = -2
) -> Float[Array, ""]:
    """psi of the clean part of a signal with white noise of known strength: spectral subtraction (our choice).

    |ŷ_k|² is lowered by three times what the noise adds in mean, N noise_std², and cut at zero. Three times (Berouti
    et al. 1979), because the noise's power is spread exponentially: of bins of noise alone, e^-3 = 5 % survive, while
    37 % would if the mean were taken off. Parts of the signal weaker than the noise are lost with it.

    Args:
      y, axis: as ``spectral_centroid``.
      noise_std: standard deviation of the noise, in the unit of y, >= 0.

    Returns:
      psi in [0, 1]; without noise that of ``spectral_centroid``.
    """
    if not isinstance(noise_std, jax.core.Tracer) and not np.all(np.asarray(noise_std) >= 0):
        raise ValueError(f"noise_std must not be negative, got {noise_std}.")
    return _centroid(y, axis, noise_std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """s_0 = s0_max (1 - exp(-a psi / C)), s_1 = b psi / C.

    Attributes:
      s0_max: the largest s_0, rad per unit of x.
      a, b: slopes.
    """

    s0_max: float
    a: float
    b: float

    def for_length(self, samples: int) -> ScaleRule:
        """The rule with s0_max · samples / 150,000 (our choice): the highest frequency of N samples is pi N / 2."""
        return dataclasses.replace(self, s0_max=self.s0_max * samples / AUDIO_SAMPLES)


AUDIO = ScaleRule(s0_max=3500, a=7, b=3)
IMAGE = ScaleRule(s0_max=50, a=5, b=0.4)
RULES: Mapping[int, ScaleRule] = {1: AUDIO, 2: IMAGE}
"""By number of spatial dimensions."""


def winner_scales(
    psi: float | jax.Array, channels: int, rule: ScaleRule = AUDIO
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(s_0, s_1) from the spectral centroid.

    Args:
      psi: from ``spectral_centroid``, in [0, 1].
      channels: C >= 1.
      rule: ``AUDIO``, ``IMAGE`` or another.

    Raises:
      ValueError: no channels, or psi out of range.

    >>> s0, s1 = winner_scales(0.0, 1)
    >>> float(s0), float(s1)
    (0.0, 0.0)
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}.")
    if not isinstance(psi, jax.core.Tracer) and not np.all((np.asarray(psi) >= 0) & (np.asarray(psi) <= 1)):
        raise ValueError(f"psi must be in [0, 1], got {psi}.")
    share = jnp.asarray(psi) / channels
    return rule.s0_max * (1 - jnp.exp(-rule.a * share)), rule.b * share


class Noise(NamedTuple):
    """Standard normal numbers, shaped like the first two kernels."""

    first: Float[Array, "d H"]
    second: Float[Array, "H H"]


def draw_noise(key: jax.Array, params: Params) -> Noise:
    """eta and eta' for these parameters."""
    return Noise(
        *(
            jax.random.normal(stream(key, layer), params[layer]["kernel"].shape, params[layer]["kernel"].dtype)
            for layer in ("layer_0", "layer_1")
        )
    )


def add_noise(
    params: Params, noise: Noise, *, s0: float | jax.Array, s1: float | jax.Array, omega0: float = 30.0
) -> Params:
    """W_1 + (s_0 / omega_0) eta, W_2 + (s_1 / omega_0) eta'; everything else is shared.

    Args:
      params: of a SIREN, at least two hidden layers.
      noise: from ``draw_noise``.
      s0, s1: scales >= 0, rad; may be traced: a sweep is a ``vmap``.
      omega0: omega_0 > 0 of the *hidden* layers, whatever the first layer's is.

    Raises:
      ValueError: negative scales, omega0 not positive, or fewer than two hidden layers.
    """
    if len(params) < 3:
        raise ValueError(f"params: wanted at least two hidden layers and an output layer, got {sorted(params)}.")
    if not omega0 > 0:
        raise ValueError(f"omega0 must be positive, got {omega0}.")
    for name, scale in (("s0", s0), ("s1", s1)):
        if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) >= 0):
            raise ValueError(f"{name} must not be negative, got {scale}.")
    moved = dict(params)
    for layer, scale, eta in (("layer_0", s0, noise.first), ("layer_1", s1, noise.second)):
        moved[layer] = params[layer] | {"kernel": params[layer]["kernel"] + scale / omega0 * eta}
    return moved


def winner_perturb(
    key: jax.Array, params: Params, *, s0: float | jax.Array, s1: float | jax.Array, omega0: float = 30.0
) -> Params:
    """WINNER: a transform of a SIREN's initial parameters. ``add_noise`` with noise drawn from the key."""
    return add_noise(params, draw_noise(key, params), s0=s0, s1=s1, omega0=omega0)


def winner_init(
    key: jax.Array,
    widths: Sequence[int],
    target: Float[Array, "*spatial C"],
    *,
    omega0: float = 30.0,
    scales: tuple[float | jax.Array, float | jax.Array] | None = None,
) -> Params:
    """SIREN² for a target: SIREN's initialisation, psi, the rule for its dimension, the noise.

    Args:
      key: typed key; with ``scales=(0, 0)`` the result is ``siren_init(stream(key, "siren"), widths)``.
      widths: (d, hidden ..., C).
      target: ``(*spatial, C)``.
      omega0: omega_0 of the hidden layers; run the network with the same omega in its first layer.
      scales: (s_0, s_1) by hand.

    Raises:
      ValueError: as ``siren_init`` and ``spectral_centroid``; a target of other dimensions than the widths; three
        dimensions and no scales, since the paper has no rule for them.
    """
    dimensions = np.ndim(target) - 1
    if (dimensions, np.shape(target)[-1:]) != (widths[0], (widths[-1],)):
        raise ValueError(f"target of shape {np.shape(target)} does not fit widths {tuple(widths)}, (d, hidden ..., C).")
    if scales is None:
        if dimensions not in RULES:
            raise ValueError(f"there is no rule for {dimensions} dimensions: give scales=(s0, s1).")
        psi = spectral_centroid(target)
        scales = winner_scales(psi, widths[-1], RULES[dimensions])
    s0, s1 = scales
    params = siren_init(stream(key, "siren"), widths, omega0=omega0)
    return winner_perturb(stream(key, "noise"), params, s0=s0, s1=s1, omega0=omega0)


def first_frequency_std(dimensions: int, s0: float, *, omega0: float = 30.0) -> float:
    """Standard deviation of the first layer's angular frequencies omega_0 w: sqrt(omega_0² / (3 d²) + s_0²), rad."""
    return float(np.sqrt(omega0**2 / (3 * dimensions**2) + s0**2))


def second_phase_variance(width: int, s1: float, *, omega0: float = 30.0) -> float:
    """Variance of omega_0 z_2 if the first layer's phases are uniform: 1 + s_1² H / 2 + omega_0² / (3 H), rad².

    The last term is the bias's. SIREN is s_1 = 0; layers after the second keep SIREN's variance.
    """
    return 1 + s1**2 * width / 2 + omega0**2 / (3 * width)


class NTKSpectrum(NamedTuple):
    """A tangent kernel over the N points of a signal, eigenvector by eigenvector, largest eigenvalue first.

    Attributes:
      eigenvalues: (N,) decreasing.
      eigenvectors: (N, N), eigenvector i in row i, unit length.
      centroids: (N,) spectral centroid of eigenvector i, in [0, 1].
      energy: (N,) share of the target's energy in the first i + 1 eigenvectors, in [0, 1].
    """

    eigenvalues: Float[Array, " N"]
    eigenvectors: Float[Array, "N N"]
    centroids: Float[Array, " N"]
    energy: Float[Array, " N"]


def ntk_spectrum(kernel: Float[Array, "N N"], y: Float[Array, "N C"]) -> NTKSpectrum:
    """Eigenvalues, the frequencies of the eigenvectors, and Σ_{i<=k} (v_iᵀ y)² / ‖y‖².

    Gradient flow on the linearised network removes the error along v_i at rate lambda_i: a target whose energy lies in
    eigenvectors of small eigenvalues is not learnt in time.

    Args:
      kernel: symmetric, from ``analysis.tangent.empirical_ntk(..., contract=True)``; of a signal, so that the order
        of its points is that of the samples.
      y: the target at the same points; not all zero.

    Raises:
      ValueError: shapes that do not fit.
    """
    n = np.shape(y)[0]
    if np.ndim(y) != 2 or np.shape(kernel) != (n, n):
        raise ValueError(f"ntk_spectrum: wanted a kernel (N, N) and y (N, C), got {np.shape(kernel)}, {np.shape(y)}.")
    values, vectors = linalg.eigh(kernel)
    values, vectors = values[::-1], vectors[:, ::-1].T
    centroids = jax.vmap(lambda vector: _centroid(vector[:, None]))(vectors)
    energy = jnp.square(jnp.matmul(vectors, y, precision=jax.lax.Precision.HIGHEST)).sum(-1)
    return NTKSpectrum(values, vectors, centroids, jnp.cumsum(energy) / jnp.square(y).sum())


def effective_modes(eigenvalues: Float[Array, "... N"]) -> Float[Array, "..."]:
    """How slowly eigenvalues decay: (Σ lambda)² / Σ lambda², 1 for a single mode and N for equal ones."""
    positive = jnp.maximum(eigenvalues, 0)
    return jnp.square(positive.sum(-1)) / jnp.square(positive).sum(-1)


def activation_spectra(preactivations: Sequence[Float[Array, "N H"]]) -> Float[Array, "L N//2+1"]:
    """Which frequencies each layer carries: the power spectrum of its units along x, averaged over units.

    Args:
      preactivations: (N, H) per layer over a one-dimensional grid, such as from ``siren_preactivations``.

    Returns:
      (L, N // 2 + 1) one-sided power, see ``analysis.spectra``.
    """
    return jnp.stack([power_spectrum(layer, axis=0).mean(-1) for layer in preactivations])


def psnr(mse: Float[Array, "..."], value_range: float) -> Float[Array, "..."]:
    """10 log10(range² / MSE), dB. The range is 2 for audio in [-1, 1] and 1 for images in [0, 1] (our convention)."""
    return 10 * jnp.log10(value_range**2 / mse)


def held_out(key: jax.Array, samples: int, share: float = 0.1) -> Bool[Array, " N"]:
    """Which samples of a noisy signal are not fitted, but decide when to stop: round(share · N) of them, at random.

    Raises:
      ValueError: a share that leaves no sample on either side.
    """
    count = round(share * samples)
    if not 0 < count < samples:
        raise ValueError(f"share {share} of {samples} samples leaves none on one side.")
    return jnp.zeros(samples, bool).at[jax.random.permutation(key, samples)[:count]].set(True)


def stopping_step(held_out_error: Float[Array, "... steps"]) -> Int[Array, "..."]:
    """When to stop: the step of the smallest error on held-out noisy samples, the first of several."""
    return jnp.argmin(held_out_error, -1)


def _centroid(y: Any, axis: int = -2, noise_std: float | jax.Array | None = None) -> jax.Array:
    if np.ndim(y) - 1 not in (1, 2, 3):
        raise ValueError(f"y: wanted 1 to 3 spatial axes and a channel axis, got shape {np.shape(y)}.")
    if axis % np.ndim(y) == np.ndim(y) - 1:
        raise ValueError(f"axis {axis} is the channel axis; wanted a spatial one.")
    samples = np.shape(y)[axis]
    if samples < 4 or 0 in np.shape(y):
        raise ValueError(f"y: wanted at least 4 samples along axis {axis}, got shape {np.shape(y)}.")
    complex_valued = jnp.issubdtype(jnp.result_type(y), jnp.complexfloating)
    if complex_valued or not (isinstance(y, jax.core.Tracer) or np.isfinite(np.asarray(y)).all()):
        raise ValueError("y: wanted real and finite samples.")
    amplitude = jnp.moveaxis(jnp.abs(jnp.fft.rfft(jnp.asarray(y), axis=axis)), axis, 0)
    if noise_std is not None:
        amplitude = jnp.sqrt(jnp.maximum(amplitude**2 - OVER_SUBTRACTION * samples * noise_std**2, 0))
    total = amplitude.sum(0)  # (*lines, C)
    frequency = jnp.asarray(np.fft.rfftfreq(samples), amplitude.dtype)
    c = jnp.tensordot(frequency, amplitude, 1, precision=jax.lax.Precision.HIGHEST) / jnp.where(total == 0, 1, total)
    return 2 * c.mean() / np.shape(y)[-1]
