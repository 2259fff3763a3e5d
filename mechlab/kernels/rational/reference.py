"""The rational function in plain ``jax.numpy``: what every kernel must compute.

With the coefficients of the channel's group (arXiv 2409.10594, section 4.1; released code for form A)::

    P(x) = a_0 + a_1 x + ... + a_5 x^5
    form A:  Q(x) = 1 + |b_1| |x| + ... + |b_4| |x|^4            F(x) = P(x) / Q(x)
    form B:  Q(x) = 1 + |b_1 x + ... + b_4 x^4|

The slope of |v| at 0 is taken as +1, not as autodiff's 0: the identity starts with b = 0, whose denominators would
otherwise never move. The gradients of form A, with upstream g, r = 1 / Q and y = P r::

    dx   = g r (P'(x) - y Q'(x))
    da_i = sum g r x^i                  db_j = -sgn(b_j) sum g y r |x|^j

``forward`` is the definition and ``backward`` its autodiff. ``value`` and ``gradient`` are the same in closed form, for
the kernels: they work on blocks, as vectors or scalars of any kind.

Axis letters: N rows (everything but channels), D channels, G groups, g = 1 or G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

NUMERATOR, DENOMINATOR = 6, 4
"""How many coefficients a and b a group has: orders (5, 4)."""


def forward(x: Float[Array, "... D"], a: Float[Array, "g 6"], b: Float[Array, "G 4"], form: str = "A") -> Array:
    """F(x) by its definition.

    Args:
      x: (..., D), floating, D a multiple of G; |x| below 5e7, where x^5 leaves float32.
      a: (1, 6), shared by all groups, or (G, 6).
      b: (G, 4).
      form: "A" or "B".

    Returns:
      Shaped and typed like x, computed in float32 (float64 for float64).
    """
    v = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    top, bottom = (list(spread(c, b.shape[0], x.shape[-1]).astype(v.dtype)) for c in (a, b))
    if form == "A":
        size = magnitude(v)
        q = 1 + size * horner([magnitude(c) for c in bottom], size)
    else:
        q = 1 + magnitude(v * horner(bottom, v))
    return (horner(top, v) / q).astype(x.dtype)


def backward(
    x: Float[Array, "... D"], a: Float[Array, "g 6"], b: Float[Array, "G 4"], upstream: Float[Array, "... D"]
) -> tuple[Float[Array, "... D"], Float[Array, "g 6"], Float[Array, "G 4"]]:
    """The gradients of form A from (x, a, b) alone: what the forward pass computed is computed again, not kept.

    Args:
      x, a, b: as in ``forward``.
      upstream: g, shaped like x.

    Returns:
      dx, da, db, shaped and typed like x, a and b. Rows are summed per channel first, channels after: one sum over
      1e7 numbers in float32 would be off by 1e-3.
    """
    gradients: tuple[jax.Array, jax.Array, jax.Array] = jax.vjp(forward, x, a, b)[1](upstream)
    return gradients


def value(x: Any, top: Sequence[Any], bottom: Sequence[Any]) -> Any:
    """P(x) / Q(x) of form A.

    Args:
      x: any shape, float32.
      top, bottom: the 6 a_i and 4 |b_j|, each of a shape that broadcasts with x.
    """
    size = jnp.abs(x)
    return horner(top, x) * (1 / (1 + size * horner(bottom, size)))


def gradient(x: Any, g: Any, top: Sequence[Any], bottom: Sequence[Any]) -> tuple[Any, Iterator[Any]]:
    """dx of form A, and the ten summands of the coefficients' gradients one after another.

    Args:
      x, g: input and upstream gradient, float32.
      top, bottom: as in ``value``.

    Returns:
      dx, and an iterator over g r x^i (i = 0..5), then -g y r |x|^j (j = 1..4), shaped like x. What is yielded next is
      the last times x or |x|, so a kernel holds one of them at a time.
    """
    size, sign = jnp.abs(x), sgn(x)
    r = 1 / (1 + size * horner(bottom, size))
    y = horner(top, x) * r
    slope_p = horner([i * c for i, c in enumerate(top) if i], x)
    slope_q = sign * horner([j * c for j, c in enumerate(bottom, 1)], size)
    scaled = g * r

    def summands() -> Iterator[Any]:
        term = scaled
        yield term
        for _ in range(1, NUMERATOR):
            term = term * x
            yield term
        term = -scaled * y
        for _ in range(DENOMINATOR):
            term = term * size
            yield term

    return scaled * (slope_p - y * slope_q), summands()


def collect(sums: Float[Array, "10 D"], a: Array, b: Array) -> tuple[Array, Array]:
    """Gradients of the coefficients from the summands' sums per channel (10, D), or per group (10, G)."""
    grouped = sums.reshape(NUMERATOR + DENOMINATOR, b.shape[0], -1).sum(-1).T
    da, db = grouped[:, :NUMERATOR], grouped[:, NUMERATOR:] * sgn(b)
    if a.shape[0] == 1:
        da = da.sum(0, keepdims=True)
    return da.astype(a.dtype), db.astype(b.dtype)


def spread(coefficients: Float[Array, "g k"], groups: int, width: int) -> Float[Array, "k D"]:
    """The coefficients of every channel, (k, D): channel i is of group floor(i G / D)."""
    every = jnp.broadcast_to(coefficients, (groups, coefficients.shape[1]))
    return jnp.repeat(every, width // groups, axis=0).T


def horner(coefficients: Sequence[Any], x: Any) -> Any:
    """c_0 + c_1 x + c_2 x^2 + ..."""
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def sgn(x: Any) -> Any:
    """-1 below 0, else +1: at 0 of either sign, +1."""
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)


def magnitude(x: Any) -> Any:
    """|x| with slope +1 at 0."""
    return x * jax.lax.stop_gradient(sgn(x))


def shape_like(x: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """The abstract value of an output of a kernel over x: inside ``shard_map`` it differs between devices as x does."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.reshape(-1)[:1].sum().astype(dtype or x.dtype), shape), x)
