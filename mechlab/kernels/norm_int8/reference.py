"""The norm that emits integers, in plain ``jax.numpy``: what every kernel must compute.

With gain and bias that have absorbed the static step s of each channel (arXiv 2406.18832: gain / s, bias / s)::

    LayerNorm   z = (x - mean x) / sqrt(mean (x - mean x)^2 + eps)
    RMSNorm     z = x / sqrt(mean x^2 + eps)
    code        round(clip(z gain + bias, -2^(b-1), 2^(b-1) - 1))

in float32, rounding half to even. The step is never multiplied back: it is in the kernel of the product that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8


def norm(
    x: Float[Array, "N C"],
    gain: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    bits: int,
    centred: bool,
    eps: float,
) -> Int8[Array, "N C"]:
    """Codes of x (N, C); ``centred`` for LayerNorm."""
    x, gain, bias = (array.astype(jnp.float32) for array in (x, gain, bias))
    return codes(x, gain, bias, width=x.shape[1], bits=bits, centred=centred, eps=eps).astype(jnp.int8)


def codes(
    x: Any,
    gain: Any,
    bias: Any,
    *,
    width: int,
    bits: int,
    centred: bool,
    eps: float,
    inside: jax.Array | None = None,
    nearest: Callable[[Any], Any] = jnp.round,
) -> Any:
    """The codes of a block of whole rows, as floats.

    Args:
      x: (rows, lanes) float32; 0 outside.
      gain, bias: (lanes,), or (1, lanes).
      width: C.
      bits, centred, eps: as in ``norm``.
      inside: which lanes belong to the row; all by default.
      nearest: rounding half to even.
    """
    if centred:
        x = x - x.sum(-1, keepdims=True) / width
        if inside is not None:
            x = jnp.where(inside, x, 0.0)
    power = (x * x).sum(-1, keepdims=True) / width
    y = x * jax.lax.rsqrt(power + eps) * gain + bias
    half = 2 ** (bits - 1)
    return nearest(jnp.minimum(jnp.maximum(y, float(-half)), float(half - 1)))
