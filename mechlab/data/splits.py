"""Reproducible splits of items into disjoint parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Int


def split_indices(key: jax.Array, n: int, sizes: Sequence[int]) -> tuple[Int[Array, " size"], ...]:
    """Disjoint random parts of ``range(n)``; what ``sizes`` does not use is left out.

    Args:
      key: typed key, scalar. ``jax.vmap`` over keys gives one split per seed.
      n: number of items, at least 1.
      sizes: size of each part, each at least 1; their sum at most ``n``.

    Returns:
      One int32 array of indices per part, shapes ``(sizes[0],)``, ``(sizes[1],)``, ..., in random order.

    Raises:
      ValueError: if a size is below 1 or the parts need more than ``n`` items.

    >>> train, test = split_indices(jax.random.key(0), 10, (7, 2))
    >>> train.shape, test.shape, len(set(train.tolist()) & set(test.tolist()))
    ((7,), (2,), 0)
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes: wanted at least one part, each of at least 1 item, got {tuple(sizes)}.")
    if sum(sizes) > n:
        raise ValueError(f"sizes: the parts {tuple(sizes)} need {sum(sizes)} items, but n is {n}.")
    order = jax.random.permutation(key, n)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(order[end - size : end] for end, size in zip(ends, sizes, strict=True))
