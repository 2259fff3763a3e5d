"""The product of integers in plain ``jax.numpy``: what every kernel must compute.

    y_mn = s_n t_m sum_k x_mk w_kn + b_n

The sum is exact, in int32; scales and bias are applied to it in float32, and the result is rounded once. Steps of x's
channels cannot stand outside the sum: OutlierTune puts them into w before w is rounded, and then t is 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8


def matmul(
    x: Int8[Array, "M K"],
    w: Int8[Array, "K N"],
    w_scale: Float[Array, "1 N"],
    x_scale: Float[Array, "M 1"],
    bias: Float[Array, "1 N"],
    *,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """y (M, N)."""
    total = jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return epilogue(total, w_scale, x_scale, bias).astype(out_dtype)


def epilogue(total: Any, w_scale: Any, x_scale: Any, bias: Any) -> Any:
    """What follows the sum, in float32."""
    return total.astype(jnp.float32) * w_scale * x_scale + bias
