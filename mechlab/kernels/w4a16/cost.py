"""What a product with a kernel of 4 bits must move: the floor that it is measured against.

At G = 128 with scales and zeros of 2 bytes that is 0.53 bytes a weight, where bfloat16 has 2: at most 3.76 times as
fast while memory is the limit, which is up to about M = 64 rows; beyond, dequantise once and leave it to XLA.
"""

from __future__ import annotations

from mechlab.kernels.cost import Cost

ROWS = 64
"""M up to which the kernels are for: 0.53 peak / (2 bandwidth) is about 64 on TPU v5e and 78 on an H100."""


def cost(m: int, k: int, n: int, group: int, *, itemsize: int = 2, scale_bytes: int = 2) -> Cost:
    """Of y (M, N) = x (M, K) @ w (K, N).

    Args:
      m, k, n, group: sizes.
      itemsize: bytes of an element of x and y.
      scale_bytes: of a scale, and of a zero.

    >>> round(cost(1, 4096, 4096, 128).bytes / 4096**2, 3)
    0.532
    """
    weights = k * n // 2 + 2 * (k // group) * n * scale_bytes
    return Cost(weights + itemsize * m * (k + n), 2 * m * k * n)
