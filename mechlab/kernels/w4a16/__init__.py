"""Matrix product with kernels of 4 bits, two codes a byte, and activations of 16 or 32 (AWQ, arXiv 2306.00978)."""

from mechlab.kernels.dispatch import Choice
from mechlab.kernels.w4a16.api import choose, w4a16_matmul
from mechlab.kernels.w4a16.layout import Packed4, pack, pack_int4, unpack_int4

__all__ = ["Choice", "Packed4", "choose", "pack", "pack_int4", "unpack_int4", "w4a16_matmul"]
