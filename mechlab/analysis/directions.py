"""Directions in activation space: from differences of class means, and from principal components.

All of them come as the raw difference and as the unit vector, because uses differ in how they scale: a steering vector
may be added raw, or as a unit vector times a strength; a projection needs the unit vector. Leading axes (depths) are
kept, so one call gives the direction at every depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.linalg import pca, unit

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


class Direction(NamedTuple):
    """A direction at every depth.

    Attributes:
      raw: (..., D) in the unit of the activations.
      unit: (..., D) of length 1.
    """

    raw: Float[Array, "... D"]
    unit: Float[Array, "... D"]


def token_mean(acts: Float[Array, "... B T D"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "... B D"]:
    """The mean over the tokens of each text that count.

    Args:
      acts: (..., B, T, D).
      mask: (B, T), at least one token of every text.

    Raises:
      ValueError: a mask of another shape or, where it is known, a text without tokens.
    """
    if np.shape(mask) != np.shape(acts)[-3:-1]:
        raise ValueError(f"mask: wanted shape (B, T) = {np.shape(acts)[-3:-1]}, got {np.shape(mask)}.")
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(-1).all():
        raise ValueError("mask: every text needs a token that counts.")
    weight = jnp.asarray(mask, jnp.float32)
    return jnp.einsum("...btd,bt->...bd", acts, weight / weight.sum(-1, keepdims=True))


def class_means(x: Float[Array, "... N D"], labels: Int[ArrayLike, " N"], classes: int) -> Float[Array, "... C D"]:
    """The mean of every class.

    Args:
      x: (..., N, D).
      labels: (N,) integer classes, 0..C - 1, each at least once.
      classes: C.

    Returns:
      (..., C, D) float32.

    Raises:
      ValueError: labels that do not fit or, where they are known, a class without items.
    """
    if np.shape(labels) != np.shape(x)[-2:-1] or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"labels: wanted integers of shape {np.shape(x)[-2:-1]}, got shape {np.shape(labels)}.")
    if not isinstance(labels, jax.core.Tracer):
        missing = set(range(classes)) ^ set(np.unique(np.asarray(labels)).tolist())
        if missing:
            raise ValueError(f"labels: wanted every class of 0..{classes - 1} and no other; wrong: {sorted(missing)}.")
    one_hot = jax.nn.one_hot(labels, classes)
    return jnp.einsum("...nd,nc->...cd", x, one_hot / one_hot.sum(0))


def mean_difference(x: Float[Array, "... N D"], labels: Int[ArrayLike, " N"]) -> Direction:
    """From the mean of class 0 to the mean of class 1: "mass mean shift" (Marks and Tegmark 2023, arXiv 2310.06824).

    With pairs of prompts in N, as in contrastive activation addition (arXiv 2312.06681), it is the mean of the pairs'
    differences.

    Args:
      x: (..., N, D) activations.
      labels: (N,) 0 or 1, or booleans.

    Raises:
      ValueError: as ``class_means``.

    >>> mean_difference(jnp.array([[0.0, 1.0], [3.0, 5.0]]), jnp.array([0, 1])).raw.tolist()
    [3.0, 4.0]
    """
    low, high = jnp.moveaxis(class_means(x, jnp.asarray(labels, int), 2), -2, 0)
    return Direction(high - low, unit(high - low))


def pca_direction(differences: Float[Array, "... N D"]) -> Direction:
    """The first principal component of differences between paired activations (Zou et al. 2023, arXiv 2310.01405).

    The component is that of the differences around their mean; its sign is that of the mean difference,
    <u, mean> >= 0, because a component by itself has none.

    Args:
      differences: (..., N, D), positive minus negative, N >= 2. What all pairs have in common is their mean, which
        ``mean_difference`` gives; the component is what they differ in most.

    Returns:
      ``unit`` is the component u; ``raw`` is u times the length of the mean difference.

    Raises:
      ValueError: fewer than two differences.
    """
    if np.ndim(differences) < 2 or np.shape(differences)[-2] < 2:
        raise ValueError(f"differences: wanted (..., N, D) with N >= 2, got shape {np.shape(differences)}.")
    mean, directions, _ = pca(differences, 1)
    first = directions[..., 0, :]
    first = jnp.where((first * mean).sum(-1, keepdims=True) < 0, -first, first)
    return Direction(first * jnp.linalg.norm(mean, axis=-1, keepdims=True), first)
