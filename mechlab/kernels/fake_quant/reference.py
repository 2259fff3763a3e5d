"""Fake quantisation in plain ``jax.numpy``: what every kernel must compute.

A row is the numbers that share a scale, along ``axis`` of a matrix. With b bits and n = 2^(b-1) (arXiv 2302.02210)::

    StatsQ   alpha = 2 mean |w|      u = clip(w / alpha, -1, 1 - 1e-6)      y = alpha (round(u n - 0.5) + 0.5) / n
    LSQ      v = clip(x / s, low, high)                                     y = s round(v)
    grid     step = max(max w - min w, 1e-5) / (2^b - 1), zero = clip(-round(min w / step), 0, 2^b - 1)
             y = step (clip(round(w / step) + zero, 0, 2^b - 1) - zero);  symmetric: step = max |w| / (n - 1), zero = 0

in float32, rounding half to even: in bfloat16 the bound 1 - 1e-6 would be 1, and StatsQ would have a level too many.
Gradients are straight-through: of StatsQ and the grid the identity, also where clipped; of LSQ, with upstream g::

    dx = g where low <= x / s <= high, else 0
    ds = sum over the row of g (round(x / s) - x / s   inside;   low or high   outside)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

DEAD = 1e-8
"""The least alpha: a row of zeros gets it instead of a division by 0."""

Nearest = Callable[[Any], Any]


def statsq(w: Float[Array, "R I"], *, bits: int, axis: int) -> Float[Array, "R I"]:
    """StatsQ of every row of a matrix, typed like w; ``axis`` is the one along which a row runs."""
    wide = w.astype(jnp.float32)
    return statsq_rows(wide, bits=bits, axis=axis, length=w.shape[axis]).astype(w.dtype)


def round_groups(w: Float[Array, "R G"], *, bits: int, symmetric: bool) -> Float[Array, "R G"]:
    """Every row of a matrix rounded to the grid of its own, typed like w."""
    return grid_rows(w.astype(jnp.float32), bits=bits, symmetric=symmetric).astype(w.dtype)


def lsq(x: Float[Array, "R I"], s: Float[Array, "R 1"], *, low: int, high: int, axis: int) -> Float[Array, "R I"]:
    """LSQ with one scale a row: s has length 1 along ``axis``."""
    del axis
    return lsq_rows(x.astype(jnp.float32), s.astype(jnp.float32), low=low, high=high).astype(x.dtype)


def lsq_backward(
    x: Float[Array, "R I"], s: Float[Array, "R 1"], upstream: Float[Array, "R I"], *, low: int, high: int, axis: int
) -> tuple[Float[Array, "R I"], Float[Array, "R 1"]]:
    """dx, typed like x, and ds, float32, shaped like s."""
    x, s, g = (array.astype(jnp.float32) for array in (x, s, upstream))
    dx, ds = lsq_gradient(x, s, g, low=low, high=high, axis=axis)
    return dx.astype(upstream.dtype), ds


def statsq_rows(w: Any, *, bits: int, axis: int, length: int, nearest: Nearest = jnp.round) -> Any:
    """StatsQ of a block of whole rows in float32; numbers past a row's ``length`` must be 0."""
    n = 2 ** (bits - 1)
    alpha = jnp.maximum(2 * (jnp.abs(w).sum(axis, keepdims=True) / length), DEAD)
    u = jnp.minimum(jnp.maximum(w / alpha, -1.0), 1 - 1e-6)
    return alpha * ((nearest(u * n - 0.5) + 0.5) / n)


def grid_rows(
    w: Any, *, bits: int, symmetric: bool, inside: jax.Array | None = None, nearest: Nearest = jnp.round
) -> Any:
    """The nearest points of the grid of each row, along the last axis of a block in float32.

    ``inside`` says which numbers belong to the row; all by default. The others must be 0.
    """

    def only_inside(fill: float) -> Any:
        return w if inside is None else jnp.where(inside, w, fill)

    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        largest = jnp.abs(w).max(-1, keepdims=True)
        step = jnp.where(largest == 0, 1.0, largest / high)
        return step * jnp.minimum(jnp.maximum(nearest(w / step), float(low)), float(high))
    top = float(2**bits - 1)
    least = only_inside(jnp.inf).min(-1, keepdims=True)
    step = jnp.maximum(only_inside(-jnp.inf).max(-1, keepdims=True) - least, 1e-5) / top
    zero = jnp.minimum(jnp.maximum(-nearest(least / step), 0.0), top)
    return step * (jnp.minimum(jnp.maximum(nearest(w / step) + zero, 0.0), top) - zero)


def lsq_rows(x: Any, s: Any, *, low: int, high: int, nearest: Nearest = jnp.round) -> Any:
    """LSQ of a block in float32."""
    return s * nearest(jnp.minimum(jnp.maximum(x / s, float(low)), float(high)))


def lsq_gradient(
    x: Any, s: Any, g: Any, *, low: int, high: int, axis: int, nearest: Nearest = jnp.round
) -> tuple[Any, Any]:
    """dx and ds of a block of whole rows in float32; g must be 0 past a row's end."""
    v = x / s
    bounded = jnp.minimum(jnp.maximum(v, float(low)), float(high))
    inside = v == bounded
    slope = nearest(bounded) - jnp.where(inside, v, 0.0)
    return jnp.where(inside, g, 0.0), (g * slope).sum(axis, keepdims=True)
