"""Fast certified robust training with a short warm-up (Shi et al. 2021, arXiv 2103.17268).

Training a network on its interval bounds (``interval.py``) certifies it, but needed hundreds of warm-up epochs: bounds
explode at initialisation and ReLUs end up inactive. Three things shorten it. With n_i the fan-in of layer i::

    IBP initialisation   W_i ~ N(0, σ_i²),  σ_i = √(2π)/n_i: E[δ] keeps its size (``networks.ibp_init``)
    batch norm           after every hidden layer, at the statistics of the clean pass (``batch_norm.py``)
    regularisers         on the pre-activation boxes (c, δ) = ([l, u]) of ReLU i = 1..m, with tolerance τ:
      L_tight = 1/m Σ_i relu(τ − E[δ_0]/E[δ_i]) / τ
      L_relu  = 1/m Σ_i [relu(τ − min(α_i, 1/α_i)) + relu(τ − min(κ_i, 1/κ_i))] / τ
      α_i = E[c 1(l>0)] / −E[c 1(u<0)],   κ_i = Σ (c − E c)² 1(l>0) / Σ (c − E c)² 1(u<0)

    loss = robust cross-entropy + λ (L_tight + L_relu),   λ = λ_0 (1 − ε/ε_target)

ε is 0 at first and then grows smoothly (``smoothed_eps``). The robust cross-entropy is that of the worst margins m_k,
log(1 + Σ_k e^{−m_k}); while ε = 0 it is the plain one, and the regularisers read bounds at ε = 1e-6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.metrics import cross_entropy
from mechlab.methods.architectures.batch_norm import CleanPass, clean_pass
from mechlab.methods.architectures.crown import crown_margins
from mechlab.methods.architectures.interval import Bounded, Interval, ball, margin_bounds, propagate, relu_boxes
from mechlab.methods.architectures.piecewise import Network

NATURAL_EPS = 1e-6
"""Radius of the bounds that the regularisers read while ε = 0."""


def smoothed_eps(
    step: jax.Array | int, *, start: int, length: int, batches: int, eps_max: float | jax.Array
) -> jax.Array:
    """ε at a step: 0, then a quarter of the ramp as A s⁴, then linear to eps_max with the same slope where they meet.

    With S = (start − 1) batches, T = length batches, mid = ⌊T/4⌋ and s = step − S::

        A = eps_max / ((T − mid) 4 mid³ + mid mid³)
        ε = 0 (s ≤ 0),  A s⁴ (s < mid),  A mid⁴ + (eps_max − A mid⁴)(s − mid)/(T − mid),  at most eps_max

    Args:
      step: number of the step, from 0; may be traced.
      start: first epoch of the ramp, counted from 1.
      length: epochs of the ramp.
      batches: steps per epoch.
      eps_max: ε at the end; may be traced.

    Returns:
      ε, like ``step`` in shape.

    Raises:
      ValueError: start, length or batches below 1, or eps_max < 0.

    >>> [round(float(smoothed_eps(s, start=2, length=2, batches=4, eps_max=1.0)), 3) for s in (4, 5, 6, 9, 12)]
    [0.0, 0.005, 0.077, 0.538, 1.0]
    """
    if min(start, length, batches) < 1:
        raise ValueError(
            f"smoothed_eps: start, length and batches must be at least 1, got {start}, {length} and {batches}."
        )
    if not isinstance(eps_max, jax.core.Tracer) and not (np.asarray(eps_max) >= 0).all():
        raise ValueError(f"smoothed_eps: eps_max must not be negative, got {eps_max}.")
    total, mid = length * batches, length * batches // 4
    s = jnp.asarray(step) - (start - 1) * batches
    # As a share of mid: s⁴ itself leaves the exact integers of float32 within a few epochs.
    at_mid = eps_max * mid / ((total - mid) * 4 + mid)
    early = at_mid * (jnp.clip(s, 0, mid) / max(mid, 1)) ** 4
    late = at_mid + (eps_max - at_mid) * jnp.clip((s - mid) / (total - mid), 0, 1)
    return jnp.where(s <= 0, 0.0, jnp.where(s < mid, early, late))


def robust_cross_entropy(margins: jax.Array) -> jax.Array:
    """Mean over inputs of log(1 + Σ_k e^{−m_k}): the cross-entropy of the logits (0, −m_1, ..) with label 0.

    Args:
      margins: (B, K − 1) lower bounds of the true class's margins.

    Returns:
      Scalar, nats. For true margins, as at ε = 0, it is the plain cross-entropy.

    >>> round(float(robust_cross_entropy(jnp.zeros((1, 9)))), 4)  # log 10
    2.3026
    """
    return jax.nn.logsumexp(jnp.pad(-margins, ((0, 0), (1, 0))), axis=-1).mean()


def verified(margins: jax.Array) -> jax.Array:
    """Which inputs are certified, (B,) bool: no margin bound of (B, K − 1) is below 0. A bound of 0 is no violation."""
    return ~(margins < 0).any(-1)


def verified_error(margins: jax.Array) -> jax.Array:
    """Share of inputs that are not certified, in [0, 1], from margin bounds (B, K − 1)."""
    return 1 - verified(margins).mean(dtype=jnp.float32)


def tightness_regulariser(boxes: list[Interval], radius: jax.Array, *, tolerance: float = 0.5) -> jax.Array:
    """L_tight: mean over layers of relu(τ − E[δ_0]/E[δ_i]) / τ.

    Args:
      boxes: what enters each ReLU (``interval.relu_boxes``).
      radius: δ_0, (B, ...), of the input's box.
      tolerance: τ in (0, 1].

    Returns:
      Scalar in [0, 1): 0 where no layer's radius is more than 1/τ of the input's.

    Raises:
      ValueError: τ outside (0, 1], or no boxes.
    """
    _check(boxes, tolerance)
    ratios = jnp.stack([radius.mean() / jnp.maximum(box.radius.mean(), 1e-12) for box in boxes])
    return jax.nn.relu(tolerance - ratios).mean() / tolerance


class Balance(NamedTuple):
    """How evenly the active and the inactive units of a layer share mean and variance.

    Attributes:
      mean: min(α, 1/α); variance: min(κ, 1/κ). In [0, 1], 1 is balanced; 0 where a side is empty.
      both: whether there are active and inactive units.
    """

    mean: jax.Array
    variance: jax.Array
    both: jax.Array


def relu_balance(box: Interval) -> Balance:
    """α and κ of what enters one ReLU, over batch and units, each as the smaller of ratio and reciprocal.

    Args:
      box: (B, ...).

    Returns:
      Scalars.
    """
    active, inactive = box.lower > 0, box.upper < 0
    centre, spread = box.centre, (box.centre - box.centre.mean()) ** 2
    # Means over all units: the number of units on a side counts as well as their size.
    pairs = ((centre, -centre), (spread, spread))
    sums = [((a * active).mean(), (b * inactive).mean()) for a, b in pairs]
    both = jnp.stack([x > 0 for pair in sums for x in pair]).all()

    def smaller(up: jax.Array, down: jax.Array) -> jax.Array:
        # Divisions are by 1 where a side is empty: a where alone would keep the other branch's NaN in the gradient.
        ratio = jnp.where(both, up, 1) / jnp.maximum(jnp.where(both, down, 1), 1e-12)
        return jnp.where(both, jnp.minimum(ratio, 1 / jnp.maximum(ratio, 1e-12)), 0)

    return Balance(smaller(*sums[0]), smaller(*sums[1]), both)


def relu_regulariser(boxes: list[Interval], *, tolerance: float = 0.5) -> jax.Array:
    """L_relu: mean over layers of [relu(τ − min(α, 1/α)) + relu(τ − min(κ, 1/κ))] / τ.

    A layer without active or without inactive units adds 0, and still counts.

    Args:
      boxes: what enters each ReLU.
      tolerance: τ in (0, 1].

    Returns:
      Scalar in [0, 2].

    Raises:
      ValueError: as ``tightness_regulariser``.
    """
    _check(boxes, tolerance)
    layers = []
    for balance in map(relu_balance, boxes):
        term = jax.nn.relu(tolerance - balance.mean) + jax.nn.relu(tolerance - balance.variance)
        layers.append(jnp.where(balance.both, term, 0))
    return jnp.stack(layers).mean() / tolerance


class Terms(NamedTuple):
    """The parts of the loss, scalars: robust cross-entropy, L_tight, L_relu (without λ), λ, and ε of this step."""

    robust: jax.Array
    tightness: jax.Array
    relu: jax.Array
    weight: jax.Array
    eps: jax.Array


def fast_ibp_loss(
    net: Network,
    x: jax.Array,
    labels: jax.Array,
    eps: Any,
    *,
    eps_max: Any,
    weight: Any = 0.5,
    tolerance: float = 0.5,
    crown: bool = False,
    low: Any = 0.0,
    high: Any = 1.0,
) -> tuple[jax.Array, Terms, CleanPass]:
    """The loss of one batch in training.

    Args:
      net: a network, with batch norm or without.
      x: (B, ...) inputs in [low, high].
      labels: (B,) integers.
      eps: of this step, in units of x, see ``smoothed_eps``. Where inputs are normalised per channel, make that the
        network's first layer, a ``ChannelAffine``; eps then stays in pixels.
      eps_max: ε_target > 0, in the same units.
      weight: λ_0; 0 leaves the regularisers out.
      tolerance: τ in (0, 1].
      crown: blend in CROWN's margins, ρ CROWN + (1 − ρ) IBP with ρ = (ε_target − ε)/ε_target (CROWN-IBP).
      low, high: range of valid inputs.

    Returns:
      The loss, its terms, and the clean pass, whose statistics the caller carries on.

    Raises:
      ValueError, TypeError: as ``interval.ball``, ``interval.propagate`` and the regularisers.
    """
    if not isinstance(eps, jax.core.Tracer) and not (np.ndim(eps) == 0 and np.isfinite(eps) and eps >= 0):
        raise ValueError(f"fast_ibp_loss: eps must be finite and not negative, one number, got {eps}.")
    if not isinstance(eps_max, jax.core.Tracer) and not eps_max > 0:
        raise ValueError(f"fast_ibp_loss: eps_max must be positive, got {eps_max}.")
    clean = clean_pass(net, x)
    # In the natural phase only the regularisers need bounds, and a radius of 0 would say nothing.
    box = ball(x, jnp.where(eps > 0, eps, NATURAL_EPS), low=low, high=high)
    bounded = propagate(clean.fixed, box)
    boxes = relu_boxes(clean.fixed, bounded.entering)
    margins = certified_margins(clean.fixed, box, bounded, labels, share=1 - eps / eps_max if crown else None)
    robust = jnp.where(eps > 0, robust_cross_entropy(margins), cross_entropy(clean.output, labels))
    terms = Terms(
        robust,
        tightness_regulariser(boxes, box.radius, tolerance=tolerance),
        relu_regulariser(boxes, tolerance=tolerance),
        jnp.asarray(weight * jnp.maximum(1 - eps / eps_max, 0)),
        jnp.asarray(eps),
    )
    return robust + terms.weight * (terms.tightness + terms.relu), terms, clean


def certified_margins(
    fixed: Network, box: Interval, bounded: Bounded, labels: jax.Array, *, share: Any = None
) -> jax.Array:
    """Lower margin bounds (B, K − 1) by intervals, or with a share ρ of CROWN's: ρ CROWN + (1 − ρ) IBP.

    Args:
      fixed: a fixed network.
      box, bounded: the inputs' box and what ``propagate`` gave for it.
      labels: (B,) integers.
      share: ρ in [0, 1]; None leaves CROWN out. Below 1e-5 it counts as 0.
    """
    by_intervals = margin_bounds(fixed, bounded.entering, labels).lower
    if share is None:
        return by_intervals
    share = jnp.where(share < 1e-5, 0, share)
    return share * crown_margins(fixed, bounded.entering, box, labels) + (1 - share) * by_intervals


def certify(
    fixed: Network, x: jax.Array, labels: jax.Array, eps: Any, *, low: Any = 0.0, high: Any = 1.0
) -> tuple[jax.Array, list[Interval]]:
    """Margin bounds by intervals, and what enters each ReLU, of a fixed network.

    Args:
      fixed: a fixed network: ``batch_norm.fix(net, running)``.
      x, labels, low, high: as ``fast_ibp_loss``.
      eps: radius to certify.

    Returns:
      (B, K − 1) lower margin bounds for ``verified``, and the boxes of the ReLUs.
    """
    bounded = propagate(fixed, ball(x, eps, low=low, high=high))
    return margin_bounds(fixed, bounded.entering, labels).lower, relu_boxes(fixed, bounded.entering)


def _check(boxes: list[Interval], tolerance: float) -> None:
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance must be in (0, 1], got {tolerance}.")
    if not boxes:
        raise ValueError("the regularisers need at least one ReLU's box, got none.")
