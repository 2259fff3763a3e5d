"""Reproducible splits of items into disjoint parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike
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


def group_folds(key: jax.Array, groups: ArrayLike, folds: int) -> Int[np.ndarray, " N"]:
    """Folds for cross-validation in which a group of related items is never cut.

    Groups come in random order, and a new fold begins when the last one has its share of items.

    Args:
      key: typed key, scalar.
      groups: (N,) integers, the group of every item.
      folds: number of folds, at least 2 and at most the number of groups.

    Returns:
      (N,) the fold of every item, 0..folds - 1.

    Raises:
      ValueError: fewer groups than folds, fewer than two folds, or a group so large that a fold stays empty.

    >>> fold = group_folds(jax.random.key(0), [7, 7, 1, 1, 4, 4], 3)
    >>> sorted(fold.tolist()), fold[0] == fold[1]
    ([0, 0, 1, 1, 2, 2], np.True_)
    """
    _, index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if not 2 <= folds <= len(sizes):
        raise ValueError(f"folds: wanted 2 up to the {len(sizes)} groups, got {folds}.")
    order = np.asarray(jax.random.permutation(key, len(sizes)))
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    of_group = np.empty(len(sizes), int)
    of_group[order] = np.minimum(middle * folds // sizes.sum(), folds - 1)
    if len(set(of_group.tolist())) < folds:
        raise ValueError(f"folds: a group of {sizes.max()} of {sizes.sum()} items leaves one of {folds} folds empty.")
    return of_group[index.reshape(-1)]
