"""The sparse product in plain ``jax.numpy``: what every kernel must compute.

    y_n = sum of x_k w_kn over the inputs k with |x_k| > t_k

in float32. With t_k = tau / c_k and c_k the norm of row k of w it is WINA's gate |x_k| c_k > tau (arXiv 2505.19427),
with t_k = tau TEAL's (arXiv 2408.14690). A mask m is t = 0 and x m in the place of x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def matvec(x: Float[Array, "M K"], threshold: Float[Array, " K"], w: Float[Array, "K ..."]) -> Float[Array, "M N"]:
    """y (M, N), float32; w is (K, N), or cut into slabs (K, N / 128, 128)."""
    # Products of two numbers of 16 bits are exact in float32, so w need not be made wide.
    rows = w.reshape(w.shape[0], -1)
    return jnp.matmul(gated(x, threshold), rows, preferred_element_type=jnp.float32, precision="highest")


def gated(x: Any, threshold: Any) -> jax.Array:
    """x with 0 where an input is off."""
    return jnp.where(jnp.abs(x).astype(jnp.float32) > threshold, x, 0)
