"""Steps with a gradient of another function, or with none that could be trained by mistake."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def straight_through(forward: jax.Array, backward: jax.Array) -> jax.Array:
    """The value of ``forward`` (exactly) with the gradient of ``backward``."""
    return jax.lax.stop_gradient(forward) + (backward - jax.lax.stop_gradient(backward))


@jax.custom_jvp
def above(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """1 where z > threshold, else 0; differentiating by the threshold is refused."""
    return jnp.greater(z, threshold).astype(z.dtype)


def _above_jvp(primals: Any, tangents: Any) -> Any:
    # d/d threshold is 0 almost everywhere: training would freeze the thresholds and still look like a weak success.
    if not isinstance(tangents[1], jax.custom_derivatives.SymbolicZero):
        raise ValueError(
            "the hard gate has zero gradient with respect to its threshold; train with hard=False, or with "
            "straight_through=True."
        )
    value = above(*primals)
    return value, jnp.zeros_like(value)


above.defjvp(_above_jvp, symbolic_zeros=True)
