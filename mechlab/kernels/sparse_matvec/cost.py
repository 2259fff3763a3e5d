"""What the sparse product must move: the rows of the inputs that are on, and the vectors.

At best it is 1 / density times as fast as the dense product. Over several vectors the union of their masks is soon all
inputs, so the kernels take one vector.
"""

from __future__ import annotations

from mechlab.kernels.cost import Cost


def cost(active: int, k: int, n: int, *, itemsize: int = 2) -> Cost:
    """Of y (N,) = x (K,) @ w (K, N) with some inputs on.

    Args:
      active: inputs that are on.
      k, n: sizes.
      itemsize: bytes of an element of x and w.

    >>> dense, half = cost(4096, 4096, 4096).bytes, cost(2048, 4096, 4096).bytes
    >>> round(dense / half, 2)
    2.0
    """
    return Cost(itemsize * active * n + (itemsize + 4) * k + 4 * n, 2 * active * n)
