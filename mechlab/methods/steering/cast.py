"""Steering at fixed strengths, and only where a condition holds: what a learned controller is compared with.

    h_l <- h_l + c_l r                                    from the last prompt token on                    (constant)
    CAST   the same if  sign cos(h, tanh((v.h / v.v) v)) > theta,  h the prompt's last state at one layer

The second is conditional activation steering (Lee et al. 2024, arXiv 2409.05907) as we recall it, with v a difference
of means; layer, sign and theta are those with the best F1 on dev prompts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mechlab.core.edits import Add, at
from mechlab.core.model import Model
from mechlab.methods.steering.vectors import SITE

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int


def constant_edits(
    model: Model, direction: Float[ArrayLike, " D"], strengths: Float[ArrayLike, "L ..."], lengths: Int[ArrayLike, " B"]
) -> dict[str, Any]:
    """The baselines: r times a fixed strength for each layer, at the same positions that a controller acts on.

    ``c * jnp.ones(L)`` is uniform steering, ``c * jax.nn.one_hot(layer, L)`` that of a single layer, and strengths
    (L, B), one for each prompt, are CAST's (see ``cast_gate``).

    Args:
      model: the decoder.
      direction: r.
      strengths: (L,) or (L, B).
      lengths: (B,) of the prompts; the edit acts from their last token on.

    Raises:
      ValueError: another number of layers or prompts.
    """
    layers, sizes, many = model.module.config.layers, jnp.asarray(strengths), np.shape(lengths)
    if sizes.shape not in ((layers,), (layers, *many)):
        raise ValueError(f"strengths: wanted ({layers},) or {(layers, *many)}, got {sizes.shape}.")
    values = sizes.reshape(layers, -1, 1, 1) * jnp.asarray(direction)
    last = jnp.asarray(lengths) - 1
    return at(
        model.sites, SITE, Add(values), span=(last, jnp.full_like(last, model.module.config.context)), stacked=True
    )


def cast_similarity(h: Float[ArrayLike, "... D"], v: Float[ArrayLike, "... D"]) -> Float[Array, "..."]:
    """Conditional activation steering's condition (arXiv 2409.05907, recalled): cos(h, tanh(proj_v h))."""
    h, v = jnp.asarray(h), jnp.asarray(v)
    projected = jnp.tanh(((h * v).sum(-1) / (v * v).sum(-1))[..., None] * v)
    return (h * projected).sum(-1) / (jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(projected, axis=-1) + 1e-12)


class CastRule(NamedTuple):
    """When CAST steers: ``sign * similarity > threshold`` at one layer; with its F1 on dev prompts."""

    layer: int
    sign: int
    threshold: float
    f1: float


def fit_cast(
    h_target: Float[ArrayLike, "N L D"], h_benign: Float[ArrayLike, "M L D"], v: Float[ArrayLike, "L D"]
) -> CastRule:
    """The layer, sign and threshold with the best F1 on dev prompts; ties go to the lowest layer.

    Args:
      h_target, h_benign: states of dev prompts.
      v: condition vectors, from train prompts.

    Raises:
      ValueError: no prompts of a kind, or shapes that do not fit.
    """
    shapes = np.shape(h_target), np.shape(h_benign)
    if any(len(s) != 3 or s[1:] != np.shape(v) or not s[0] for s in shapes):
        raise ValueError(f"fit_cast: wanted states (N, {np.shape(v)}), got {shapes[0]} and {shapes[1]}.")
    sims = np.asarray(cast_similarity(jnp.concatenate([jnp.asarray(h_target), jnp.asarray(h_benign)]), v)).T
    label = np.arange(sims.shape[1]) < shapes[0][0]
    best = CastRule(0, 1, math.inf, -1.0)
    for layer, values in enumerate(sims):
        for sign in (1, -1):
            sorted_values = np.sort(sign * values)
            thresholds = np.append(sorted_values[0] - 1e-3, (sorted_values[1:] + sorted_values[:-1]) / 2)
            fires = sign * values > thresholds[:, None]
            hit = (fires & label).sum(1)
            f1 = 2 * hit / (fires.sum(1) + label.sum())
            if f1.max() > best.f1:
                best = CastRule(layer, sign, float(thresholds[f1.argmax()]), float(f1.max()))
    return best


def cast_gate(rule: CastRule, states: Float[ArrayLike, "N L D"], v: Float[ArrayLike, "L D"]) -> Float[Array, " N"]:
    """1 for the prompts that CAST steers, 0 for the others; decided once, at the prompt."""
    similarity = cast_similarity(jnp.asarray(states)[:, rule.layer], jnp.asarray(v)[rule.layer])
    return (rule.sign * similarity > rule.threshold).astype(jnp.float32)
