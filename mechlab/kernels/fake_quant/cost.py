"""What fake quantisation must move: numbers read and written once, the backward pass of LSQ with one more read.

XLA fuses what is element-wise, but reads twice where a scale is found first: 3 for 2, so a kernel gains at most 1.5.
"""

from __future__ import annotations

from mechlab.kernels.cost import Cost

FORWARD_FLOPS = 8
"""Per element: magnitude and sum (2), scaling, bounds, rounding and back (6)."""

BACKWARD_FLOPS = 8
"""Per element of LSQ: scaling, bounds, rounding (4), choice and slope (2), product and sum (2)."""


def forward_cost(elements: int, itemsize: int, scales: int = 0) -> Cost:
    """Of y.

    Args:
      elements: of w or x.
      itemsize: bytes of one.
      scales: read from memory, float32: LSQ's.

    >>> forward_cost(4096 * 4096, 4).bytes / 2**20
    128.0
    """
    return Cost(2 * itemsize * elements + 4 * scales, FORWARD_FLOPS * elements)


def backward_cost(elements: int, itemsize: int, scales: int) -> Cost:
    """Of dx and ds of LSQ; arguments as in ``forward_cost``."""
    return Cost(3 * itemsize * elements + 8 * scales, BACKWARD_FLOPS * elements)
