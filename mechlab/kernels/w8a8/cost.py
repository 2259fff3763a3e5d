"""What a product of integers must move: the floor that it is measured against.

At few rows the weights are nearly all of it, one byte where bfloat16 has two: at most twice as fast. Beyond about 295
rows on an H100 and 240 on a TPU v5e arithmetic is the limit, of which there is twice as much for int8 (not on a v4).
"""

from __future__ import annotations

from mechlab.kernels.cost import Cost

INPUTS = 131_072
"""K up to which the sum cannot leave int32: K 128 128 < 2^31."""


def cost(m: int, k: int, n: int, *, out_bytes: int = 2) -> Cost:
    """Of y (M, N) = x (M, K) @ w (K, N).

    Args:
      m, k, n: sizes.
      out_bytes: of an element of y.

    >>> cost(1, 4096, 4096).bytes / 4096**2
    1.001708984375
    """
    return Cost(k * n + m * k + out_bytes * m * n + 4 * n, 2 * m * k * n)
