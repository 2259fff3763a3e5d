"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083): an attack, for an error that no certificate beats.

From a random point of the box of radius ε around x, s times::

    x ← clip(x + a sign(∇ loss(x)), box)

The error under attack lies between the standard error and the verified error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mechlab.methods.architectures.interval import ball


def pgd(
    key: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    labels: jax.Array,
    eps: Any,
    *,
    steps: int = 20,
    restarts: int = 1,
    rate: float = 0.25,
    low: Any = 0.0,
    high: Any = 1.0,
) -> jax.Array:
    """The worst point found near every input: the one where the true class's margin is smallest.

    Args:
      key: typed key, for the starting points.
      logits_of: (B, ...) inputs to (B, K) logits; each input on its own.
      x: (B, ...) inputs in [low, high].
      labels: (B,) integers.
      eps: radius ε, in units of x.
      steps: of the attack, at least 1.
      restarts: random starting points, at least 1.
      rate: a as a share of ε.
      low, high: range of valid inputs.

    Returns:
      (B, ...) inputs within the box. x itself is among the candidates, so the error there is at least the standard one.

    Raises:
      ValueError: steps or restarts below 1, or as ``interval.ball``.

    Costs restarts x steps forwards and gradients.
    """
    if min(steps, restarts) < 1:
        raise ValueError(f"pgd: steps and restarts must be at least 1, got {steps} and {restarts}.")
    box = ball(x, eps, low=low, high=high)

    def margin(points: jax.Array) -> jax.Array:
        logits = logits_of(points)
        true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        return jnp.where(true, logits, 0).sum(-1) - jnp.where(true, -jnp.inf, logits).max(-1)

    def loss(points: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits_of(points))
        return -jnp.take_along_axis(log_p, labels[:, None], -1).sum()

    def keep(best: tuple[jax.Array, jax.Array], points: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = margin(points)
        better = found < best[1]
        wide = better.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(wide, points, best[0]), jnp.where(better, found, best[1])

    def attack(best: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        start = box.centre + box.radius * jax.random.uniform(key, x.shape, x.dtype, -1, 1)

        def step(_: Any, points: jax.Array) -> jax.Array:
            moved = points + rate * eps * jnp.sign(jax.grad(loss)(points))
            return jnp.clip(moved, box.lower, box.upper)

        return keep(best, jax.lax.fori_loop(0, steps, step, start)), None

    (worst, _), _ = jax.lax.scan(attack, (x, margin(x)), jax.random.split(key, restarts))
    return worst
