"""The definition: the kernel made whole again, then a product in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mechlab.kernels.w4a16.layout import unpack_int4


def matmul(x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array, *, block: int) -> jax.Array:
    """``x @ (scale (code - zero))`` for x (M, K) and one layer's arrays; float32 (M, N)."""
    codes = unpack_int4(packed, block).astype(jnp.float32)
    group = len(codes) // len(scales)
    kernel = (codes - zeros.repeat(group, 0)) * scales.repeat(group, 0)
    return jnp.matmul(x.astype(jnp.float32), kernel, precision="highest")
