"""Layers shared by the models: linear maps with several input or output axes, norms, rotary positions, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.kernel_forms import LowRank, Quantised, as_array
from mechlab.core.sites import in_use, site
from mechlab.kernels.w4a16 import Packed4, w4a16_matmul

MASKED = -1e30
"""Score of a forbidden key. Finite, so that an edit which scales scores never makes an infinity or NaN of it."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

NORMS = ("layer", "rms", "rms_plus_one")


def linear(x: jax.Array, kernel: jax.Array | Quantised | LowRank, bias: jax.Array | None, inputs: int = 1) -> jax.Array:
    """``x @ kernel + bias`` in x's dtype.

    Args:
      x: ``(..., *in)``.
      kernel: ``(*in, *out)``, with ``inputs`` input axes; an array, or in a form of ``core/kernel_forms.py``. A
        ``Packed4`` is never made whole where ``kernels/w4a16`` has a kernel for the platform and the number of rows.
      bias: ``(*out,)`` or None.
      inputs: number of input axes.

    Returns:
      ``(..., *out)``.
    """
    if isinstance(kernel, LowRank):
        low = jnp.tensordot(x, kernel.a.astype(x.dtype), axes=inputs)
        y = linear(x, kernel.kernel, None, inputs) + jnp.tensordot(low, kernel.b.astype(x.dtype), axes=1)
    elif isinstance(kernel, Packed4):
        leading = x.shape[: x.ndim - inputs]
        y = w4a16_matmul(x.reshape(*leading, -1), kernel).reshape(*leading, *kernel.shape[inputs:])
    else:
        y = jnp.tensordot(x, as_array(kernel, x.dtype), axes=inputs)
    return y if bias is None else y + bias.astype(x.dtype)


class Linear(nn.Module):
    """Parameters of ``linear``: ``kernel (*in, *out)`` and, with ``use_bias``, ``bias (*out,)``.

    ``init_std`` is the kernel's standard deviation when it is made; None means 1 / sqrt(number of inputs).
    """

    out: tuple[int, ...]
    inputs: int = 1
    use_bias: bool = True
    init_std: float | None = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.inputs :], *self.out)
        std = math.prod(shape[: self.inputs]) ** -0.5 if self.init_std is None else self.init_std
        # Flax compares the parameter's leaves with those of its initialiser; a kernel in another form has others.
        given: Any = self.get_variable("params", "kernel")
        other = isinstance(given, Quantised | LowRank)
        kernel = given if other else self.param("kernel", nn.initializers.normal(std), shape)
        bias = self.param("bias", nn.initializers.zeros, self.out) if self.use_bias else None
        return linear(x, kernel, bias, self.inputs)


class Norm(nn.Module):
    """LayerNorm ("layer") or RMSNorm ("rms") over the last axis, computed in float32.

    "rms_plus_one" multiplies with 1 + scale, so that a scale of 0 is neutral (and bfloat16 resolves it near there).
    """

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
        if self.kind == "rms_plus_one":
            wide = wide * (1 + self.param("scale", nn.initializers.zeros, (width,)).astype(jnp.float32))
        else:
            wide = wide * self.param("scale", nn.initializers.ones, (width,))
        if self.kind == "layer" and self.use_bias:
            wide = wide + self.param("bias", nn.initializers.zeros, (width,))
        return wide.astype(x.dtype)


def rotation(positions: jax.Array, frequencies: jax.Array, amplitude: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864, eq. 34), for ``rotate``.

    Args:
      positions: (T,) or (B, T) absolute positions.
      frequencies: (R / 2,) radians per token.
      amplitude: factor on the result of ``rotate``.

    Returns:
      Two arrays (..., T, 1, R / 2) float32, because bfloat16 cannot count past 256.
    """
    angle = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the first R channels of every head, half-split: channel i is paired with i + R/2; the others pass.

    Args:
      x: (B, T, H, K).
      cos_sin: from ``rotation``, (..., T, 1, R / 2).

    Returns:
      (B, T, H, K) in x's dtype, computed in float32.
    """
    cos, sin = cos_sin
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], -1)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap * tanh(x / cap)``, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    module: nn.Module,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Softmax attention with the sites ``attn_scores`` and ``attn_pattern``, fused when nobody uses them.

    Args:
      module: the Flax module that owns the two sites.
      q: (B, T, H, K).
      k, v: (B, S, G, K) with G key-value heads, G divides H.
      allowed: (B or 1, 1, T, S) bool: which keys a query may see.
      positions: of the queries, (T,) or (B, T).
      scale: factor on the scores, 1 / sqrt(K) by default.
      cap: soft cap of the scaled scores; never fused.

    Returns:
      (B, T, H, K).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cap is None and not in_use(module, "attn_scores", "attn_pattern"):
        return jax.nn.dot_product_attention(q, k, v, mask=allowed, scale=scale)
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(allowed, softcap(scores, cap), MASKED)
    scores = site(module, "attn_scores", scores, "B H T S", positions=positions)
    pattern = site(module, "attn_pattern", jax.nn.softmax(scores, -1), "B H T S", positions=positions)
    return jnp.einsum("bhts,bshk->bthk", pattern.astype(v.dtype), v)
