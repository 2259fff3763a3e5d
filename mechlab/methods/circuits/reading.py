"""What the methods of this family read: the logits at one position of every prompt, and metrics of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model, Variables

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

Metric = Callable[[jax.Array], jax.Array]
"""Of the logits (B, V) that are read: one number per prompt, (B,). Prompts must not be mixed."""

Read = Any
"""Which position is read: one for all prompts (-1: the last), or (B,) one per prompt, ``lengths - 1`` when padded."""


def at_read(x: Float[Array, "B T ..."], read: Read = -1) -> Float[Array, "B ..."]:
    """The values at the position that is read.

    Args:
      x: (B, T, ...).
      read: one position for all prompts, -T..T - 1, or (B,) int, 0..T - 1.

    Returns:
      (B, ...).

    Raises:
      ValueError: positions of another shape, not integers or, where they are known, out of range.

    >>> at_read(jnp.arange(6).reshape(2, 3), jnp.asarray([0, 2])).tolist()
    [0, 5]
    """
    return x[jnp.arange(len(x)), _positions(read, *x.shape[:2])]


def logits_at(model: Model, variables: Variables, tokens: Int[Array, "B T"], read: Read = -1) -> Float[Array, "B V"]:
    """The logits at the position that is read; no other is unembedded, unless the final norm or the logits are edited.

    Args:
      model: a decoder from ``models.transformer``.
      variables: params and edits, as for ``model.apply``.
      tokens: (B, T).
      read: see ``at_read``.

    Returns:
      (B, V) float32.

    Raises:
      ValueError: as ``at_read``.
    """
    if {"final_norm", "logits"} & set(variables.get("edits") or {}):
        return at_read(model.apply(variables, tokens), read)  # such edits may be shaped for all positions
    logits: jax.Array = model.apply(variables, tokens, None, None, None, _positions(read, *tokens.shape))
    return logits[:, 0]


def logit_difference(answers: Int[ArrayLike, "B 2"]) -> Metric:
    """The metric ``logits[right] - logits[wrong]``.

    Args:
      answers: (B, 2) or (2,) tokens, right and wrong.

    Returns:
      A function of logits (B, V), giving (B,) nats.

    >>> logit_difference(jnp.asarray([2, 0]))(jnp.asarray([[1.0, 0.0, 4.0]])).tolist()
    [3.0]
    """
    pairs = jnp.atleast_2d(jnp.asarray(answers))
    if pairs.ndim != 2 or pairs.shape[-1] != 2 or not jnp.issubdtype(pairs.dtype, jnp.integer):
        raise ValueError(f"answers: wanted tokens (B, 2), right and wrong, got {pairs.dtype}{pairs.shape}.")

    def metric(logits: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(logits, jnp.broadcast_to(pairs, (len(logits), 2)), axis=-1)
        return chosen[:, 0] - chosen[:, 1]

    return metric


def _positions(read: Read, batch: int, length: int) -> Int[Array, " B"]:
    if np.shape(read) not in ((), (batch,)) or not jnp.issubdtype(jnp.result_type(read), jnp.integer):
        raise ValueError(f"read: wanted one position, or integers of shape ({batch},), got {read}.")
    if not isinstance(read, jax.core.Tracer):
        # NumPy, because under jit even an operation on a constant is traced.
        known, low = np.asarray(read), -length if np.ndim(read) == 0 else 0
        if known.min() < low or known.max() >= length:
            raise ValueError(f"read: wanted positions {low}..{length - 1}, got {read}.")
    return jnp.broadcast_to(jnp.asarray(read), (batch,)) % length
