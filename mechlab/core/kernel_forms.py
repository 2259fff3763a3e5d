"""Kernels in another form: a pytree that stands in the parameters where a kernel stood; every model runs with it.

    q = QTensor(codes, scales, zeros, shape=(64, 4, 16))      # codes (64, 64): 64 inputs, 4 heads of 16
    kernel = q.dequantise()                                   # (64, 4, 16)
    kernel = LowRank(q, a, b)                                 # acts as dequantise(q) + a b, which is never made

``models.layers.linear`` takes them. How codes and scales are found is the business of ``methods/compression``; a and
b come from ``methods/adaptation``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@runtime_checkable
class Quantised(Protocol):
    """A kernel in few bits, however it lies in memory: ``QTensor``, or ``kernels.w4a16.Packed4``."""

    def dequantise(self, dtype: jnp.dtype | str = ...) -> jax.Array:
        """The kernel as an array, its shape behind any layer axes."""
        ...


@struct.dataclass
class QTensor:
    """A kernel as whole numbers with a scale per group: ``w = scale (code - zero)``.

    Attributes:
      codes: (..., in, out) int8 or uint8; the kernel as a matrix, after any leading layer axes.
      scales: (..., in / G, out / G') float: each serves G inputs of G' outputs.
      zeros: shaped like scales; None for a grid around 0.
      shape: of one layer's kernel, input axes first: (D, H, K) for q, k, v, (H, K, D) for o.
    """

    codes: Int[Array, "... I O"]
    scales: Float[Array, "... I/G O/G"]
    zeros: Float[Array, "... I/G O/G"] | None = None
    shape: tuple[int, ...] = struct.field(pytree_node=False, kw_only=True)

    def dequantise(self, dtype: jnp.dtype | str = jnp.float32) -> jax.Array:
        """The kernel, its shape behind any layer axes, computed in float32.

        Raises:
          ValueError: scales that do not divide the codes, or codes that do not have the kernel's size.
        """
        size, groups = np.shape(self.codes)[-2:], np.shape(self.scales)[-2:]
        if any(n % g for n, g in zip(size, groups, strict=True)) or math.prod(size) != math.prod(self.shape):
            raise ValueError(f"QTensor: codes {size} with scales {groups} do not make a kernel {self.shape}.")

        def spread(x: jax.Array) -> jax.Array:
            return x.repeat(size[0] // groups[0], -2).repeat(size[1] // groups[1], -1).astype(jnp.float32)

        centred = self.codes.astype(jnp.float32) - (0 if self.zeros is None else spread(self.zeros))
        return (centred * spread(self.scales)).reshape(*np.shape(self.codes)[:-2], *self.shape).astype(dtype)


@struct.dataclass
class LowRank:
    """A kernel and a change of rank r beside it: ``x @ (W + A B)`` computed as ``x @ W + (x @ A) @ B``.

    Under ``vmap`` over A and B alone, W is used once for all of them.

    Attributes:
      kernel: W, ``(*in, *out)`` behind any layer axes, or quantised.
      a: ``(..., *in, r)``.
      b: ``(..., r, *out)``.
    """

    kernel: Float[Array, "... I O"] | Quantised
    a: Float[Array, "... I R"]
    b: Float[Array, "... R O"]


def as_array(kernel: jax.Array | Quantised, dtype: jnp.dtype | str) -> jax.Array:
    """A kernel, quantised or not, as an array of this dtype.

    Raises:
      TypeError: a ``LowRank``, whose sum nobody should make by accident; ``merge`` of its adapter makes it.
    """
    if isinstance(kernel, LowRank):
        raise TypeError("this needs the kernel itself, got one with a low-rank change beside it: merge the adapter.")
    return kernel.dequantise(dtype) if isinstance(kernel, Quantised) else kernel.astype(dtype)
