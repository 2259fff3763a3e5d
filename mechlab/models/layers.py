"""Layers shared by the models: linear maps with several input or output axes, norms, rotary positions, attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.sites import in_use, site

MASKED = -1e30
"""Score of a forbidden key. Finite, so that an edit which scales scores never makes an infinity or NaN of it."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int = 1) -> jax.Array:
    """``x @ kernel + bias`` in x's dtype.

    Args:
      x: ``(..., *in)``.
      kernel: ``(*in, *out)``, with ``inputs`` input axes.
      bias: ``(*out,)`` or None.
      inputs: number of input axes.

    Returns:
      ``(..., *out)``.
    """
    y = jnp.tensordot(x, kernel.astype(x.dtype), axes=inputs)
    return y if bias is None else y + bias.astype(x.dtype)


class Linear(nn.Module):
    """Parameters of ``linear``: ``kernel (*in, *out)`` and, with ``use_bias``, ``bias (*out,)``."""

    out: tuple[int, ...]
    inputs: int = 1
    use_bias: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.inputs :], *self.out)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape)
        bias = self.param("bias", nn.initializers.zeros, self.out) if self.use_bias else None
        return linear(x, kernel, bias, self.inputs)


class Norm(nn.Module):
    """LayerNorm (``kind="layer"``) or RMSNorm (``kind="rms"``) over the last axis, computed in float32."""

    kind: str
    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        wide = wide * self.param("scale", nn.initializers.ones, (width,))
        if self.kind == "layer" and self.use_bias:
            wide = wide + self.param("bias", nn.initializers.zeros, (width,))
        return wide.astype(x.dtype)


def rotate_positions(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-split: channel i is paired with i + K/2 (arXiv 2104.09864, eq. 34).

    Args:
      x: (B, T, H, K), K even.
      positions: (T,) or (B, T) absolute positions.
      theta: base of the wavelengths.

    Returns:
      (B, T, H, K) in x's dtype; angles are computed in float32, because bfloat16 cannot count past 256.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = (f(angle)[..., None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attention(
    module: nn.Module, q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, positions: jax.Array
) -> jax.Array:
    """Softmax attention with the sites ``attn_scores`` and ``attn_pattern``, fused when nobody uses them.

    Args:
      module: the Flax module that owns the two sites.
      q: (B, T, H, K).
      k, v: (B, S, G, K) with G key-value heads, G divides H.
      allowed: (B or 1, 1, T, S) bool: which keys a query may see.
      positions: of the queries, (T,) or (B, T).

    Returns:
      (B, T, H, K).
    """
    if not in_use(module, "attn_scores", "attn_pattern"):
        return jax.nn.dot_product_attention(q, k, v, mask=allowed)
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = site(module, "attn_scores", jnp.where(allowed, scores, MASKED), "B H T S", positions=positions)
    pattern = site(module, "attn_pattern", jax.nn.softmax(scores, -1), "B H T S", positions=positions)
    return jnp.einsum("bhts,bshk->bthk", pattern.astype(v.dtype), v)
