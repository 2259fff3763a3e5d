"""Batches as pure functions of a key and a step: training can be compiled, mapped over seeds and resumed exactly.

A ``Batches`` is a pair. ``plan`` says once per training segment what every step will see (indices or keys: small);
``fetch`` turns one step's part of the plan into a batch, inside the compiled loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class _Keys:
    """Keys as numbers: slicing a typed key inside a loop counts as using it, for jax's check of reused keys."""

    data: jax.Array
    impl: Any = struct.field(pytree_node=False)


class Batches(NamedTuple):
    """Where a training loop gets its batches.

    Attributes:
      plan: ``plan(key, first, count)``: a pytree whose leaves have a leading axis ``count``, for the steps ``first`` ..
        ``first + count - 1``. ``first`` may be traced. The same key and step always give the same batch.
      fetch: ``fetch(x)``: the batch of one step from its slice of the plan.
    """

    plan: Callable[[jax.Array, jax.Array, int], Any]
    fetch: Callable[[Any], Any]


def shuffled(data: Any, batch: int, rows: jax.Array | None = None) -> Batches:
    """Epochs over a data set, a new permutation each, without replacement; the remainder of an epoch is left out.

    Args:
      data: pytree of arrays with a common leading axis (N, ...).
      batch: examples per step, B.
      rows: (n,) int, the examples to use; all by default. It may differ per seed under ``vmap`` while data is shared.

    Returns:
      Batches of the same structure as data, leaves (B, ...).

    Raises:
      ValueError: leaves of different lengths, or fewer examples than B.
    """
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1:
        raise ValueError(f"shuffled: arrays must have one common length, got {sorted(sizes)}.")
    data = jax.tree.map(jnp.asarray, data)  # NumPy arrays cannot be indexed by a traced plan
    n = next(iter(sizes)) if rows is None else rows.shape[0]
    if not 1 <= batch <= n:
        raise ValueError(f"shuffled: batch must be between 1 and the {n} examples, got {batch}.")
    per_epoch = n // batch

    def plan(key: jax.Array, first: jax.Array, count: int) -> jax.Array:
        steps = first + jnp.arange(count)
        first_epoch = first // per_epoch
        epochs = first_epoch + jnp.arange(count // per_epoch + 2)
        orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))(epochs)
        orders = orders[:, : per_epoch * batch].reshape(-1, per_epoch, batch)
        index = orders[steps // per_epoch - first_epoch, steps % per_epoch]
        return index if rows is None else rows[index]

    return Batches(plan, lambda index: jax.tree.map(lambda leaf: leaf[index], data))


def whole(data: Any) -> Batches:
    """All of the data in every step: full-batch training, in which the key decides nothing."""
    return Batches(lambda key, first, count: first + jnp.arange(count), lambda step: data)


def generated(sample: Callable[[jax.Array], Any]) -> Batches:
    """Fresh batches from a generator: ``sample(key) -> batch``, a new key every step."""

    def plan(key: jax.Array, first: jax.Array, count: int) -> _Keys:
        keys = jax.vmap(lambda step: jax.random.fold_in(key, step))(first + jnp.arange(count))
        return _Keys(jax.random.key_data(keys), jax.random.key_impl(key))

    return Batches(plan, lambda keys: sample(jax.random.wrap_key_data(keys.data, impl=keys.impl)))


def numbered(batches: Batches) -> Batches:
    """The same batches (dictionaries) with the number of the step under ``"step"``: for schedules in a loss."""

    def plan(key: jax.Array, first: jax.Array, count: int) -> Any:
        return batches.plan(key, first, count), first + jnp.arange(count)

    return Batches(plan, lambda x: {**batches.fetch(x[0]), "step": x[1]})
