"""How codes of 4 bits lie in memory: two a byte, in split halves of blocks of P rows.

Byte row ``j P/2 + r`` holds code row ``j P + r`` in its low half and code row ``j P + P/2 + r`` in its high half. So a
tile of bytes unpacks into two whole tiles by one mask and one shift, without interleaving or a reshape, and each meets
its own contiguous part of x. P is the group G, or 2 G where half a group would be narrower than the hardware's tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.core.kernel_forms import QTensor

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, UInt8


@struct.dataclass
class Packed4:
    """A kernel of 4 bits as the kernels read it: ``w = scale (code - zero)``, groups along the inputs.

    Attributes:
      bytes: (..., K / 2, N) uint8, two codes each.
      scales, zeros: (..., K / G, N).
      block: P, rows whose halves share bytes.
      shape: of one layer's kernel, input axes first.
    """

    bytes: UInt8[Array, "... K/2 N"]
    scales: Float[Array, "... K/G N"]
    zeros: Float[Array, "... K/G N"]
    block: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def group(self) -> int:
        """G."""
        return 2 * self.bytes.shape[-2] // self.scales.shape[-2]

    def unpack(self) -> QTensor:
        """The same kernel with a byte for every code."""
        return QTensor(unpack_int4(self.bytes, self.block), self.scales, self.zeros, shape=self.shape)

    def dequantise(self, dtype: jnp.dtype | str = jnp.float32) -> jax.Array:
        """The kernel, computed in float32."""
        return self.unpack().dequantise(dtype)


def pack_int4(codes: ArrayLike, block: int) -> UInt8[Array, "... K/2 N"]:
    """Codes (..., K, N) of 0..15, two a byte.

    Raises:
      ValueError: a block that is odd or does not divide K, or codes out of range.

    >>> pack_int4(jnp.asarray([[1], [2], [3], [4]]), block=4).ravel().tolist()      # 1 + 16 * 3, 2 + 16 * 4
    [49, 66]
    """
    codes = jnp.asarray(codes)
    rows = codes.shape[-2]
    if block < 2 or block % 2 or rows % block:
        raise ValueError(f"pack_int4: the block must be even and divide the {rows} rows, got {block}.")
    if not isinstance(codes, jax.core.Tracer):
        low, high = int(np.asarray(codes).min()), int(np.asarray(codes).max())
        if low < 0 or high > 15:
            raise ValueError(f"pack_int4: codes must be in 0..15, got {low}..{high}.")
    halves = codes.astype(jnp.uint8).reshape(*codes.shape[:-2], rows // block, 2, block // 2, codes.shape[-1])
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*codes.shape[:-2], rows // 2, codes.shape[-1])


def unpack_int4(packed: ArrayLike, block: int) -> UInt8[Array, "... K N"]:
    """The codes of ``pack_int4``."""
    packed = jnp.asarray(packed)
    rows = 2 * packed.shape[-2]
    cut = packed.reshape(*packed.shape[:-2], rows // block, block // 2, packed.shape[-1])
    codes = jnp.concatenate([cut & 15, cut >> 4], -2)
    return codes.reshape(*packed.shape[:-2], rows, packed.shape[-1])


def pack(kernel: QTensor, block: int | None = None) -> Packed4:
    """A quantised kernel in packed form; it may have layer axes.

    Args:
      kernel: of 4 bits, asymmetric, with groups along the inputs.
      block: P; by default G, or 2 G for G = 32 where it divides the inputs, as TPUs want.

    Raises:
      ValueError: groups along the outputs, a grid around 0, or as ``pack_int4``.
    """
    rows, columns = kernel.codes.shape[-2:]
    if kernel.scales.shape[-1] != columns or kernel.zeros is None:
        raise ValueError('pack: wanted asymmetric groups along the inputs, as from quantise(..., bits=4, axis="oc").')
    group = rows // kernel.scales.shape[-2]
    if block is None:
        block = 2 * group if group == 32 and rows % 64 == 0 else group
    if block not in (group, 2 * group):
        raise ValueError(f"pack: the block must be the group of {group} or twice that, got {block}.")
    return Packed4(pack_int4(kernel.codes, block), kernel.scales, kernel.zeros, block=block, shape=kernel.shape)
