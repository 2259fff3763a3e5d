"""CROWN with interval bounds inside (CROWN-IBP, Zhang et al. 2020, arXiv 1906.06316): margins by a backward pass.

Interval propagation bounds every unit on its own and forgets that they share inputs. CROWN keeps the margins as linear
functions of earlier layers and walks them back to the input, starting from the rows that ask for them::

    affine (A, b)   rows ← rows A,  constant ← constant + rows b
    ReLU on [l, u]  l ≥ 0: identity;  u ≤ 0: zero;  else between two lines,
                    u (x − l)/(u − l)  from above and  α x  from below,  α = 1 if u > −l else 0
    input           rows · c − |rows| · δ + constant

For a lower bound, positive entries of the rows take a ReLU's lower line and negative ones its upper line. In CROWN-IBP
the [l, u] come from interval propagation, so one backward pass with K − 1 rows per input is all that is added.

The result is usually tighter than interval propagation, not always: the line α = 1 goes down to l, where the ReLU
itself stays at 0. With α = 0 everywhere, a network of two layers is never bounded less tightly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mechlab.methods.architectures.interval import Branches, Interval, margin_bounds, specification
from mechlab.methods.architectures.piecewise import AFFINE, Dense, Network, ReLU, Residual, unsupported


def crown_bounds(net: Network, entering: tuple[Any, ...], box: Interval, rows: jax.Array) -> jax.Array:
    """A lower bound on rows · output, over the inputs in a box.

    Args:
      net: a fixed network, see ``piecewise.py``.
      entering: bounds on what enters each layer, from ``interval.propagate`` on the same box, or any others that hold.
      box: of inputs (B, ...).
      rows: (B, S, K), S linear functions of the output per input.

    Returns:
      (B, S).

    Raises:
      TypeError: an unsupported layer.
      ValueError: bounds are missing for a layer.

    Costs about S forwards and one more for each layer's constant.
    """
    rows, constant = _back(net, entering, rows, jnp.zeros(rows.shape[:2], rows.dtype))
    axes = tuple(range(2, rows.ndim))
    centre, radius = box.centre[:, None], box.radius[:, None]
    return constant + (rows * centre - jnp.abs(rows) * radius).sum(axes)


def crown_margins(net: Network, entering: tuple[Any, ...], box: Interval, labels: jax.Array) -> jax.Array:
    """Lower bounds on the true class's margins, (B, K − 1), classes k ≠ y in ascending order.

    Args:
      net, entering, box: as ``crown_bounds``; the last layer is ``Dense``.
      labels: (B,) integers.

    Raises:
      As ``crown_bounds`` and ``interval.specification``.
    """
    head = net[-1]
    if not isinstance(head, Dense):
        raise TypeError(f"crown_margins: the last layer must be Dense, got {type(head).__name__}.")
    rows = specification(labels, head.kernel.shape[1]).astype(head.kernel.dtype)
    return crown_bounds(net, entering, box, rows)


def fused_cross_entropy(net: Network, entering: tuple[Any, ...], box: Interval, labels: jax.Array) -> jax.Array:
    """An upper bound on each input's cross-entropy over the box, by one backward row instead of K − 1 (loss fusion).

    With z_k = −margin_k in [l_k, u_k] from intervals, the convex e^z is below its chord s_k z + t_k, so::

        log(1 + Σ_k e^{z_k}) ≤ log(1 + Σ_k t_k − min over the box of (Σ_k s_k margin_k))

    and the minimum is that of a single row, Σ_k s_k (w_y − w_k).

    Args:
      net, entering, box, labels: as ``crown_margins``.

    Returns:
      (B,) nats.

    References:
      Xu et al. 2020, arXiv 2002.12920, section on loss fusion.
    """
    margins = margin_bounds(net, entering, labels)
    low, high = -margins.upper, -margins.lower
    # All exponentials are relative to the largest, so that none overflows.
    top = jax.lax.stop_gradient(jnp.maximum(high.max(1, keepdims=True), 0))
    width = high - low
    wide = width > 1e-6
    slope = jnp.where(wide, (jnp.exp(high - top) - jnp.exp(low - top)) / jnp.where(wide, width, 1), jnp.exp(high - top))
    # Through the upper end: e^u there, and for a point interval the tangent.
    above = jnp.exp(high - top) - slope * high
    rows = jnp.einsum("bs,bsk->bk", slope, specification(labels, net[-1].kernel.shape[1]).astype(slope.dtype))
    least = crown_bounds(net, entering, box, rows[:, None])[:, 0]
    total = jnp.exp(-top[:, 0]) + above.sum(1) - least
    # Σ e^z over the box is at least Σ e^l; rounding may not bring the bound below it.
    total = jnp.maximum(total, jnp.exp(-top[:, 0]) + jnp.exp(low - top).sum(1))
    return top[:, 0] + jnp.log(total)


def _back(net: Network, entering: tuple[Any, ...], rows: jax.Array, constant: jax.Array) -> tuple[jax.Array, jax.Array]:
    if entering is None or len(entering) != len(net):
        given = "none" if entering is None else len(entering)
        raise ValueError(f"crown: bounds must be given for each of the {len(net)} layers, got {given}.")
    for index in reversed(range(len(net))):
        layer, box = net[index], _present(net, entering, index)
        if isinstance(layer, ReLU):
            rows, constant = _relaxed(box, rows, constant)
        elif isinstance(layer, Residual):
            short, constant = _back(layer.shortcut, box.shortcut, rows, constant)
            rows, constant = _back(layer.body, box.body, rows, constant)
            rows = rows + short
        elif isinstance(layer, AFFINE):
            rows, constant = _affine(layer, box.centre.shape[1:], rows, constant)
        else:
            raise unsupported(layer)
    return rows, constant


def _present(net: Network, entering: tuple[Any, ...], index: int) -> Any:
    wanted = Branches if isinstance(net[index], Residual) else Interval
    if not isinstance(entering[index], wanted):
        raise ValueError(f"crown: bounds are missing for layer {index} ({type(net[index]).__name__}).")
    return entering[index]


def _affine(layer: Any, shape: tuple[int, ...], rows: jax.Array, constant: jax.Array) -> tuple[jax.Array, jax.Array]:
    if layer.offset is not None:
        constant = constant + (rows * layer.offset).sum(tuple(range(2, rows.ndim)))
    # Layers act on each input alone, so rows of all inputs go through the transpose as one batch.
    batch = rows.shape[0] * rows.shape[1]
    transpose = jax.linear_transpose(layer.linear, jax.ShapeDtypeStruct((batch, *shape), rows.dtype))
    (back,) = transpose(rows.reshape(batch, *rows.shape[2:]))
    return back.reshape(*rows.shape[:2], *shape), constant


def _relaxed(box: Interval, rows: jax.Array, constant: jax.Array) -> tuple[jax.Array, jax.Array]:
    lower, upper = box.lower[:, None], box.upper[:, None]
    active, unstable = lower >= 0, (lower < 0) & (upper > 0)
    above = jnp.where(unstable, upper / jnp.where(unstable, upper - lower, 1), active)
    below = jnp.where(unstable, upper > -lower, active)
    negative = jnp.minimum(rows, 0)
    # The upper line is above · x − above · l where the unit is unstable, and passes through 0 elsewhere.
    intercept = jnp.where(unstable, -above * lower, 0)
    constant = constant + (negative * intercept).sum(tuple(range(2, rows.ndim)))
    return jnp.maximum(rows, 0) * below + negative * above, constant
