"""Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715): what each activation can be, given the input's box.

A box is a centre c and a radius δ, {x : |x − c| ≤ δ}. Layers map boxes to boxes::

    affine (A, b)   c' = A c + b,   δ' = |A| δ         exact for each unit on its own
    ReLU            l' = max(l, 0),  u' = max(u, 0)     with l = c − δ, u = c + δ
    residual        the sum of both branches' boxes

The last layer is fused with what is asked of it. The margin of the true class y over class k is affine in the last
hidden layer, with row w_y − w_k, so its lower bound over the box is::

    m_k = (w_y − w_k)·c + (b_y − b_k) − |w_y − w_k|·δ,   k ≠ y

which is tighter than the difference of two bounded logits. The network is certified at an input if no m_k < 0.

Bounds are computed in floating point without outward rounding: they hold up to rounding errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.methods.architectures.piecewise import (
    AFFINE,
    Dense,
    Network,
    ReLU,
    Residual,
    affine,
    unsupported,
)


@struct.dataclass
class Interval:
    """A box of activations.

    Attributes:
      centre: (B, ...).
      radius: (B, ...), not negative. Kept beside the centre, not as two ends, so that a radius of 1e-6 around a centre
        of 1 is not lost to rounding in float32.
    """

    centre: jax.Array
    radius: jax.Array

    @property
    def lower(self) -> jax.Array:
        """The lower ends."""
        return self.centre - self.radius

    @property
    def upper(self) -> jax.Array:
        """The upper ends."""
        return self.centre + self.radius

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.centre + other.centre, self.radius + other.radius)


def between(lower: Any, upper: Any) -> Interval:
    """The box with these ends.

    Args:
      lower, upper: (B, ...), lower ≤ upper.

    Raises:
      ValueError: different shapes, NaN, or, where the values are known, a lower end above its upper end.
    """
    if np.shape(lower) != np.shape(upper):
        raise ValueError(f"between: ends must have one shape, got {np.shape(lower)} and {np.shape(upper)}.")
    if _known(lower, upper) and not np.all(np.asarray(lower) <= np.asarray(upper)):
        bad = int((~(np.asarray(lower) <= np.asarray(upper))).sum())
        raise ValueError(f"between: {bad} of {np.size(lower)} lower ends are above their upper ends, or NaN.")
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    return Interval((lower + upper) / 2, (upper - lower) / 2)


def ball(x: jax.Array, eps: Any, *, low: Any = 0.0, high: Any = 1.0) -> Interval:
    """The inputs within eps of x in every coordinate, cut to the range of valid inputs.

    Args:
      x: (B, ...) inputs in [low, high].
      eps: radius in the units of x, at least 0; an array per channel where inputs were divided by a standard deviation:
        eps/std. May be traced.
      low, high: smallest and largest valid input, in the units of x; per channel where inputs were normalised.

    Returns:
      The box [max(x − eps, low), min(x + eps, high)].

    Raises:
      ValueError: where the values are known: eps < 0 or not finite, or x outside [low, high].

    >>> box = ball(jnp.asarray([[0.0, 0.5]]), 0.25)
    >>> box.lower.tolist(), box.upper.tolist()
    ([[0.0, 0.25]], [[0.25, 0.75]])
    """
    if _known(eps) and not (np.isfinite(np.asarray(eps)).all() and (np.asarray(eps) >= 0).all()):
        raise ValueError(f"ball: eps must be finite and not negative, got {eps}.")
    if _known(x, low, high):
        values = np.asarray(x)
        if not ((values >= np.asarray(low)) & (values <= np.asarray(high))).all():
            raise ValueError(
                f"ball: x must be within [low, high] = [{low}, {high}], got {values.min()} to {values.max()}."
            )
    # Written by the room on both sides: x - eps and x + eps would round away a small eps.
    x = jnp.asarray(x)
    down, up = jnp.minimum(eps, x - low), jnp.minimum(eps, high - x)
    return Interval(x + (up - down) / 2, (up + down) / 2)


class Branches(NamedTuple):
    """The boxes inside a residual layer: what enters each layer of its body and of its shortcut."""

    body: tuple[Any, ...]
    shortcut: tuple[Any, ...]


class Bounded(NamedTuple):
    """What interval propagation gives.

    Attributes:
      output: the box of the network's output.
      entering: the box that enters each layer (``Branches`` for a residual layer). Under ``jit``, what nobody reads is
        not computed.
    """

    output: Interval
    entering: tuple[Any, ...]


def propagate(net: Network, box: Interval) -> Bounded:
    """Bounds on everything a fixed network computes from inputs in a box.

    Args:
      net: a fixed network, see ``piecewise.py``.
      box: of inputs (B, ...).

    Returns:
      The output's box and the box that enters each layer.

    Raises:
      TypeError: an unsupported layer.
      ValueError: where values are known: a negative radius in ``box``, or a bound that is not finite, with its layer.

    Costs two forwards.

    >>> net = (Dense(jnp.asarray([[1.0], [-1.0]]), jnp.zeros(1)), ReLU())
    >>> output = propagate(net, ball(jnp.asarray([[0.5, 0.5]]), 0.1)).output
    >>> float(output.lower[0, 0]), round(float(output.upper[0, 0]), 4)
    (0.0, 0.2)
    """
    if _known(box.radius) and (np.asarray(box.radius) < 0).any():
        raise ValueError("propagate: the box has lower ends above its upper ends (a negative radius).")
    entering: list[Any] = []
    for index, layer in enumerate(net):
        if isinstance(layer, Residual):
            body, shortcut = propagate(layer.body, box), propagate(layer.shortcut, box)
            entering.append(Branches(body.entering, shortcut.entering))
            box = body.output + shortcut.output
        else:
            entering.append(box)
            box = _through(layer, box)
        if _known(box.centre, box.radius) and not all(np.isfinite(part).all() for part in (box.centre, box.radius)):
            raise ValueError(f"propagate: the bounds after layer {index} ({type(layer).__name__}) are not finite.")
    return Bounded(box, tuple(entering))


def relu_boxes(net: Network, entering: tuple[Any, ...]) -> list[Interval]:
    """The boxes of pre-activations: what enters each ReLU, in order of the forward."""
    found: list[Interval] = []
    for layer, box in zip(net, entering, strict=True):
        if isinstance(layer, Residual):
            found += relu_boxes(layer.body, box.body) + relu_boxes(layer.shortcut, box.shortcut)
        elif isinstance(layer, ReLU):
            found.append(box)
    return found


def specification(labels: jax.Array, classes: int) -> jax.Array:
    """Rows c_k with c_k · logits = logit_y − logit_k, for every class k ≠ y in ascending order.

    Args:
      labels: (B,) integers y, from 0 to classes − 1.
      classes: K, at least 2.

    Returns:
      (B, K − 1, K) of −1, 0 and 1. The true class itself, whose margin is always 0, has no row.

    Raises:
      ValueError: fewer than 2 classes, labels that are not integers (B,) or, where known, out of range.

    >>> specification(jnp.asarray([1]), 3).tolist()
    [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]
    """
    if classes < 2:
        raise ValueError(f"specification: there must be at least 2 classes, got {classes}.")
    if jnp.ndim(labels) != 1 or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"specification: labels must be integers (B,), got {jnp.result_type(labels)} {labels.shape}.")
    if _known(labels) and not ((np.asarray(labels) >= 0) & (np.asarray(labels) < classes)).all():
        given = np.asarray(labels)
        raise ValueError(f"specification: labels must be 0 to {classes - 1}, got {given.min()} to {given.max()}.")
    labels = jnp.asarray(labels)[:, None]
    others = jnp.arange(classes - 1)
    others = others + (others >= labels)
    return jax.nn.one_hot(labels, classes) - jax.nn.one_hot(others, classes)


def margin_bounds(net: Network, entering: tuple[Any, ...], labels: jax.Array) -> Interval:
    """The box of the true class's margins over every other class, its last layer fused with the difference.

    Args:
      net: a fixed network whose last layer is ``Dense``.
      entering: of ``propagate``.
      labels: (B,) integers y.

    Returns:
      (B, K − 1): ``lower`` is m_k of this module's docstring, classes k ≠ y in ascending order.

    Raises:
      TypeError: the last layer is not ``Dense``.
      ValueError: as ``specification``.
    """
    head, box = net[-1], entering[-1]
    if not isinstance(head, Dense):
        raise TypeError(f"margin_bounds: the last layer must be Dense, got {type(head).__name__}.")
    asked = specification(labels, head.kernel.shape[1]).astype(head.kernel.dtype)
    rows = jnp.einsum("bsk,fk->bsf", asked, head.kernel)
    centre = jnp.einsum("bsf,bf->bs", rows, box.centre) + asked @ head.bias
    return Interval(centre, jnp.einsum("bsf,bf->bs", jnp.abs(rows), box.radius))


def _through(layer: Any, box: Interval) -> Interval:
    if isinstance(layer, ReLU):
        # By cases rather than by its ends, so that a stable unit's radius passes without rounding.
        active, inactive, half = box.lower >= 0, box.upper <= 0, box.upper / 2
        parts = (jnp.where(active, part, jnp.where(inactive, 0, half)) for part in (box.centre, box.radius))
        return Interval(*parts)
    if isinstance(layer, AFFINE):
        return Interval(affine(layer, box.centre), layer.absolute().linear(box.radius))
    raise unsupported(layer)


def _known(*values: Any) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)
