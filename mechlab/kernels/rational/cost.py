"""What the rational function must move and compute: the floor that its kernels are measured against.

Forward reads x and writes y; backward reads x and the upstream gradient and writes dx. The coefficients are some
hundred bytes. At about 5 (forward) and 10 (backward) operations per byte in bfloat16 both are bound by memory on a GPU;
on a TPU the backward pass is near the limit of the vector unit.
"""

from __future__ import annotations

from mechlab.kernels.cost import Cost

FORWARD_FLOPS = 21
"""Per element: |x|, two Horner schemes (10 and 8), one reciprocal, one product."""

BACKWARD_FLOPS = 62
"""Per element: |x|, its sign and F(x) again (22), both slopes (15), dx (4), ten summands and their sums (21)."""


def forward_cost(elements: int, itemsize: int, groups: int) -> Cost:
    """Of y = F(x).

    Args:
      elements: E, of x.
      itemsize: bytes of one.
      groups: G.

    >>> forward_cost(64 * 197 * 768, 2, 8).bytes / 1e6  # ViT-B at batch 64, bfloat16
    38.732096
    """
    return Cost(2 * itemsize * elements + 40 * groups, FORWARD_FLOPS * elements)


def backward_cost(elements: int, itemsize: int, groups: int) -> Cost:
    """Of dx, da and db; arguments as in ``forward_cost``."""
    return Cost(3 * itemsize * elements + 80 * groups, BACKWARD_FLOPS * elements)
