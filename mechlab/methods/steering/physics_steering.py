"""Physics Steering (Fear et al. 2025, arXiv 2511.20798): a concept of physics as a direction in activations.

A surrogate of partial differential equations runs on simulations that show a feature (set F) and on ones that do not
(G). With h in [T, B, C, X, Y, Z] the activation of one file at one layer::

    h_hat = (h - mean) / std          per (t, b), over (C, X, Y, Z) jointly, divisor n - 1, no epsilon      (1)
    delta = mean_tb mean_F h_hat - mean_tb mean_G h_hat                     in [1, 1, C, X, Y, Z]           (2)
    h'    = h + alpha |h| / |d| d     d = delta fitted to h's shape; norms per (t, b) over (C, X, Y, Z)     (3)

(3) is applied at the same layer in every step of a roll-out, with the same alpha. alpha = 0 is the plain roll-out;
0.1 to 0.7 is useful in the authors' experience, above 1 a roll-out is often unstable.

In order: directions (1, 2), their shape, edits (3), roll-outs, and read-outs, which turn frames into numbers.

Differs from the paper: its surrogate is Walrus (1.3 billion parameters), ours is ``models/surrogate.py``, whose sites
hold (B, X, Y, D) or (B, T, X, Y, D); ``from_site`` gives them the paper's axes. The paper's evidence is films; the
read-outs are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core import linalg
from mechlab.core.edits import AddRelative, at
from mechlab.core.model import Model
from mechlab.core.sites import SiteTable
from mechlab.data.worlds.flows import vorticity, wavenumbers

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

Mode = Literal["drop", "pad", "interpol", "none"]
MODES: tuple[Mode, ...] = ("drop", "pad", "interpol", "none")
SITE = "resid_post"
_GRID_AXES = (-4, -3, -2, -1)


def from_site(h: Float[Array, "B X Y D"]) -> Float[Array, "T B D X Y 1"]:
    """A site's activation, (B, X, Y, D) or (B, T, X, Y, D), with the paper's axes [T, B, C, X, Y, Z]."""
    if h.ndim == 4:
        h = h[:, None]
    return jnp.moveaxis(h, (0, 1, 4), (1, 0, 2))[..., None]


def to_site(delta: Float[Array, "T B D X Y 1"], ndim: int) -> Float[Array, "B X Y D"]:
    """The inverse: to (B, X, Y, D), ``ndim`` 4, or (B, T, X, Y, D), ``ndim`` 5."""
    h = jnp.moveaxis(delta[..., 0], (1, 0, 2), (0, 1, 4))
    return h[:, 0] if ndim == 4 else h


def normalise_activation(
    h: Float[Array, "... C X Y Z"], axes: tuple[int, ...] = _GRID_AXES
) -> Float[Array, "... C X Y Z"]:
    """(1): mean 0 and unbiased variance 1 over ``axes`` jointly. Channel means stay: they dominate delta.

    Raises:
      ValueError: where it is known, an activation that is not finite or is constant.

    >>> normalise_activation(jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)).ravel().tolist()
    [-1.0, 0.0, 1.0]
    """
    h = jnp.asarray(h, jnp.float32)
    std = h.std(axes, ddof=1, keepdims=True)
    if not isinstance(std, jax.core.Tracer):
        if not np.isfinite(np.asarray(std)).all():
            raise ValueError("normalise_activation: the activation is not finite.")
        if not (np.asarray(std) > 0).all():
            raise ValueError("normalise_activation: the activation is constant, so it has no standard deviation.")
    return (h - h.mean(axes, keepdims=True)) / std


def concept_delta(
    feature: Float[Array, "files T B C X Y Z"], control: Float[Array, "files T B C X Y Z"]
) -> Float[Array, "1 1 C X Y Z"]:
    """(2): the direction from control to feature, not normalised again.

    Args:
      feature, control: activations of F and of G, (files, T, B, C, X, Y, Z) each; within a set all files have one
        shape, T and B may differ between the sets.

    Raises:
      ValueError: an empty set, another number of axes, or C, X, Y, Z that differ; as ``normalise_activation``.
    """
    for name, one in (("feature", feature), ("control", control)):
        shapes = {np.shape(file) for file in one}
        if len(shapes) != 1:
            raise ValueError(f"concept_delta: {name} must hold files of one shape, got {sorted(shapes) or 'none'}.")
        if len(next(iter(shapes))) != 6:
            raise ValueError(f"concept_delta: files of {name} must be [T, B, C, X, Y, Z], got {next(iter(shapes))}.")
    if np.shape(feature[0])[2:] != np.shape(control[0])[2:]:
        raise ValueError(
            f"concept_delta: feature and control must agree in C, X, Y, Z, got {np.shape(feature[0])[2:]} and "
            f"{np.shape(control[0])[2:]}."
        )
    means = [normalise_activation(jnp.stack(list(one))).mean(0).mean((0, 1)) for one in (feature, control)]
    return (means[0] - means[1])[None, None]


def shuffled_delta(
    key: jax.Array, feature: Float[Array, "files T B C X Y Z"], control: Float[Array, "files T B C X Y Z"]
) -> Float[Array, "1 1 C X Y Z"]:
    """The control of (2): the mean difference of pairs whose labels are swapped at random."""
    swap = jax.random.bernoulli(key, 0.5, (len(feature), *(1,) * 6))
    return concept_delta(jnp.where(swap, control, feature), jnp.where(swap, feature, control))


def random_deltas(key: jax.Array, n: int, channels: int) -> Float[Array, "n 1 1 C 1 1 1"]:
    """Gaussian channel directions; their length does not matter in (3)."""
    return jax.random.normal(key, (n, 1, 1, channels, 1, 1, 1))


def channel_vector(delta: Float[Array, "1 1 C X Y Z"]) -> Float[Array, " C"]:
    """The mean over space: what mode ``drop`` keeps."""
    return delta.mean((0, 1, 3, 4, 5))


def without(delta: Float[Array, "1 1 C X Y Z"], others: Float[Array, "K C"]) -> Float[Array, "1 1 C 1 1 1"]:
    """The channel vector of delta minus its projection on the span of other channel vectors.

    Raises:
      ValueError: where it is known, nothing is left.
    """
    basis = linalg.qr(jnp.asarray(others).T)[0]
    vector = channel_vector(delta)
    left = vector - basis @ (basis.T @ vector)
    if not isinstance(left, jax.core.Tracer) and not jnp.linalg.norm(left) > 1e-5 * jnp.linalg.norm(vector):
        raise ValueError("without: delta lies in the span of the other directions.")
    return left.reshape(1, 1, -1, 1, 1, 1)


def fit_spatial(
    delta: Float[Array, "T B C X Y Z"], shape: tuple[int, ...], mode: Mode = "drop"
) -> Float[Array, "T B C X Y Z"]:
    """Give a direction the spatial shape of an activation, in the order of the official code.

    1. Axes X, Y, Z on which delta is larger are cropped about their centre.
    2. If all six sizes now agree, T and B included, delta is used as it is, *whatever the mode*: for T = B = 1 and
       equal grids ``drop`` silently keeps space.
    3. ``drop``: the mean over space, a pure channel vector. ``pad``: zeros at the high end of each short axis, so the
       direction is then off-centre. ``interpol``: trilinear, half-pixel centres. ``none``: as it is.

    Args:
      delta: [T or 1, B or 1, C, x, y, z].
      shape: of the activation, [T, B, C, X, Y, Z].
      mode: see above.

    Returns:
      [T or 1, B or 1, C, X, Y, Z]; to be broadcast over T and B.

    Raises:
      ValueError: unknown mode, channels that differ, another number of axes, or ``none`` with another spatial shape.
    """
    if mode not in MODES:
        raise ValueError(f'fit_spatial: unknown mode "{mode}"; known: {", ".join(MODES)}.')
    if np.ndim(delta) != 6 or len(shape) != 6 or delta.shape[2] != shape[2]:
        raise ValueError(
            f"fit_spatial: delta and the activation must be [T, B, C, X, Y, Z] with one C, got {np.shape(delta)} and "
            f"{tuple(shape)}."
        )
    space = tuple(shape[3:])
    starts = [max(0, (have - want) // 2) for have, want in zip(delta.shape[3:], space, strict=True)]
    delta = delta[(..., *(slice(start, start + want) for start, want in zip(starts, space, strict=True)))]
    if delta.shape == tuple(shape):
        return delta
    if mode == "drop":
        delta = delta.mean((3, 4, 5), keepdims=True)
    elif mode == "pad":
        short = [(0, want - have) for have, want in zip(delta.shape[3:], space, strict=True)]
        delta = jnp.pad(delta, ((0, 0), (0, 0), (0, 0), *short))
    elif mode == "interpol":
        delta = jax.image.resize(delta, (*delta.shape[:3], *space), "linear", antialias=False)
    elif delta.shape[3:] != space:
        raise ValueError(f'fit_spatial: mode "none" needs the spatial shape {space}, got {delta.shape[3:]}.')
    return jnp.broadcast_to(delta, (*delta.shape[:3], *space))


def relative_edits(
    sites: SiteTable,
    delta: Float[Array, "1 1 C X Y Z"],
    *,
    layer: int | jax.Array,
    alpha: float | jax.Array,
    mode: Mode = "drop",
    renormalise: bool = False,
) -> dict[str, Any]:
    """(3) as an edit at ``resid_post`` of one layer, for ``apply`` and ``rollout``.

    Args:
      sites: ``model.sites_for(frames, mask)``: the target's shape.
      delta: see ``concept_delta``.
      layer: may be traced.
      alpha: length of the patch over that of the state, of either sign; may be traced.
      mode: see ``fit_spatial``.
      renormalise: scale h' back to the length of h; off in the paper.

    Raises:
      KeyError: the model has no such site.
      ValueError: as ``fit_spatial``; a direction without length or not finite, a strength that is not finite, or a
        layer out of range.

    Warns:
      UserWarning: |alpha| > 1.
    """
    if not isinstance(alpha, jax.core.Tracer):
        if not np.isfinite(alpha).all():
            raise ValueError(f"relative_edits: alpha must be finite, got {alpha}.")
        if (np.abs(alpha) > 1).any():
            warnings.warn(f"alpha = {alpha}: a patch longer than the state is often unstable.", stacklevel=2)
    entry = sites.named(SITE)[0]
    batch, *rest = entry.value.shape
    time, (x, y, channels) = (1, rest) if len(rest) == 3 else (rest[0], rest[1:])
    fitted = fit_spatial(delta, (time, batch, channels, x, y, 1), mode)
    if not isinstance(fitted, jax.core.Tracer):
        length = float(jnp.linalg.norm(fitted))
        if not np.isfinite(length) or length == 0:
            raise ValueError(f"relative_edits: the direction must be finite and have a length, got length {length}.")
    value = to_site(fitted, len(entry.value.shape))
    return at(sites, SITE, AddRelative(value, jnp.asarray(alpha, jnp.float32), renormalise), layer=layer)


def record(
    model: Model, params: Any, frames: Float[Array, "B H F X Y"], mask: Float[Array, "B F"]
) -> Float[Array, "L T B D X Y 1"]:
    """Activations of the unedited model at ``resid_post`` of every layer, with the paper's axes.

    Args:
      model, params: see ``models/surrogate.py``.
      frames: B windows, one of each file; ``concept_delta`` wants files apart:
        ``jnp.moveaxis(acts[layer], 1, 0)[:, :, None]``.
      mask: 1 for fields that are there.
    """
    acts = model.capture({"params": params}, frames, mask, sites=(SITE,))[1][SITE]
    return jax.vmap(from_site)(acts)


def rollout(
    model: Model,
    params: Any,
    frames: Float[Array, "B H F X Y"],
    mask: Float[Array, "B F"],
    steps: int,
    edits: Mapping[str, Any] | None = None,
) -> Float[Array, "steps B F X Y"]:
    """Predict, append, predict again; the edits act in every step. One compiled scan.

    Args:
      model, params: see ``models/surrogate.py``.
      frames: the last H true frames.
      mask: 1 for fields that are there.
      steps: number of frames to predict, >= 1.
      edits: see ``relative_edits``; none by default.

    Raises:
      ValueError: ``steps`` < 1 or, where they are known, frames that are not finite.
    """
    if steps < 1:
        raise ValueError(f"rollout: steps must be at least 1, got {steps}.")
    if not isinstance(frames, jax.core.Tracer) and not np.isfinite(np.asarray(frames)).all():
        raise ValueError("rollout: frames must be finite.")
    variables = {"params": params} | ({"edits": edits} if edits else {})

    def step(window: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        predicted = model.apply(variables, window, mask)
        return jnp.concatenate([window[:, 1:], predicted[:, None]], 1), predicted

    return jax.lax.scan(step, jnp.asarray(frames), None, length=steps)[1]


def effective_diffusivity(
    s0: Float[Array, "... X Y"], s1: Float[Array, "... X Y"], t: Float[ArrayLike, ""] = 1.0
) -> Float[Array, "..."]:
    """D from |s1_k / s0_k| = exp(-D k^2 t): least squares of the logarithm over 0 < k^2 <= 9, weighted by amplitude.

    >>> x = jnp.arange(16) * 2 * jnp.pi / 16
    >>> s = jnp.cos(x)[:, None] + jnp.cos(2 * x)[None]
    >>> decayed = jnp.exp(-0.1) * jnp.cos(x)[:, None] + jnp.exp(-0.4) * jnp.cos(2 * x)[None]
    >>> round(float(effective_diffusivity(s, decayed)), 4)
    0.1
    """
    k2, weight, a, b = _low_modes(s0, s1, 9)
    loss = jnp.log(jnp.abs(a)) - jnp.log(jnp.abs(b))
    return (weight * k2 * loss).sum((-2, -1)) / ((weight * k2**2).sum((-2, -1)) * t)


def effective_speed(
    s0: Float[Array, "... X Y"], s1: Float[Array, "... X Y"], v: Float[Array, "... 2"], t: Float[ArrayLike, ""] = 1.0
) -> Float[Array, "..."]:
    """The speed along v at which s0 moves to s1.

    The phases of s1_k / s0_k are -k.c t; c is their least-squares solution over 0 < k^2 <= 2, weighted by amplitude. A
    displacement of more than about 2 in t wraps around.

    Args:
      s0, s1: before and after.
      v: the direction that counts as forward, (..., 2) of any length > 0.
      t: time between the two.
    """
    _, weight, a, b = _low_modes(s0, s1, 2)
    phase = jnp.angle(b * jnp.conj(a))
    kx, ky = wavenumbers(s0.shape[-1])

    def over(z: jax.Array) -> jax.Array:
        return (weight * z).sum((-2, -1))

    xx, xy, yy, px, py = over(kx * kx), over(kx * ky), over(ky * ky), over(kx * phase), over(ky * phase)
    det = -(xx * yy - xy**2) * t
    c = jnp.stack([yy * px - xy * py, xx * py - xy * px], -1) / det[..., None]
    return (c * v).sum(-1) / jnp.linalg.norm(v, axis=-1)


def enstrophy(u: Float[Array, "... X Y"], v: Float[Array, "... X Y"]) -> Float[Array, "..."]:
    """Half the mean squared vorticity."""
    return jnp.square(vorticity(u, v)).mean((-2, -1)) / 2


def cross_stream_energy(v: Float[Array, "... X Y"]) -> Float[Array, "..."]:
    """E_v = mean v^2: zero in a laminar shear flow, growing as it rolls up."""
    return jnp.square(v).mean((-2, -1))


def roughness(s: Float[Array, "... X Y"]) -> Float[Array, "..."]:
    """The mean squared wavenumber, sum k^2 |s_k|^2 / sum |s_k|^2 without the mean: lower after diffusion."""
    kx, ky = wavenumbers(s.shape[-1])
    twice = jnp.where((ky > 0) & (ky < s.shape[-1] / 2), 2, 1)
    power = jnp.square(jnp.abs(jnp.fft.rfft2(s))) * twice * (kx**2 + ky**2 > 0)
    return (power * (kx**2 + ky**2)).sum((-2, -1)) / power.sum((-2, -1))


def _low_modes(s0: jax.Array, s1: jax.Array, most: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """k^2, weights |s0_k s1_k|, and both spectra; 1 and no weight where k^2 is not in (0, most] or a mode is empty."""
    kx, ky = wavenumbers(s0.shape[-1])
    k2 = kx**2 + ky**2
    a, b = jnp.fft.rfft2(s0), jnp.fft.rfft2(s1)
    # Wavenumbers with k_y = 0 stand twice in a half spectrum, those with k_y > 0 once.
    weight = jnp.abs(a) * jnp.abs(b) * jnp.where(ky > 0, 2, 1) * ((k2 > 0) & (k2 <= most))
    used = weight > 0
    return k2, weight, jnp.where(used, a, 1), jnp.where(used, b, 1)
