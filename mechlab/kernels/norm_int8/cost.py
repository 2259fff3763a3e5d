"""What the norm must move: x read, codes written.

A norm that writes bfloat16 and a rounding pass after it read and write four bytes an element more.
"""

from __future__ import annotations

from mechlab.kernels.cost import Cost

FLOPS = 10
"""Per element: mean and square (4), scaling (3), bounds and rounding (3)."""


def cost(n: int, width: int, itemsize: int = 2) -> Cost:
    """Of the codes of x (N, C).

    Args:
      n, width: sizes.
      itemsize: bytes of an element of x.

    >>> cost(2048, 4096).bytes / 2**20
    24.03125
    """
    return Cost(n * width * (itemsize + 1) + 8 * width, FLOPS * n * width)
