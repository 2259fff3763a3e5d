"""Scores of predictions against labels.

Items are the last axis of the labels; what comes before it (seeds, arms) is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


def correct(logits: Float[ArrayLike, "... N C"], labels: Int[ArrayLike, "... N"]) -> Bool[Array, "... N"]:
    """Whether the largest logit is that of the label; ties go to the lowest class.

    Args:
      logits: (..., N, C) scores of C classes for N items.
      labels: (..., N) integer classes, 0 to C - 1; leading axes of ``logits`` may be left out.

    Returns:
      (..., N) bool.

    Raises:
      ValueError: if the shapes do not fit, if labels are not integers or, where known, out of range.
    """
    logits, labels = _checked(logits, labels)
    return logits.argmax(axis=-1) == labels


def accuracy(logits: Float[ArrayLike, "... N C"], labels: Int[ArrayLike, "... N"]) -> Float[Array, "..."]:
    """Share of items whose largest logit is that of the label.

    Args:
      logits: (..., N, C) scores of C classes for N items.
      labels: (..., N) integer classes, 0 to C - 1; leading axes of ``logits`` may be left out.

    Returns:
      (...) float32 in [0, 1].

    Raises:
      ValueError: as ``correct``.

    >>> float(accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])))
    0.5
    """
    return correct(logits, labels).mean(axis=-1, dtype=jnp.float32)


def cross_entropy(logits: Float[ArrayLike, "... N C"], labels: Int[ArrayLike, "... N"]) -> Float[Array, "..."]:
    """Mean cross-entropy over items, in nats, computed in float32: -(1/N) Σ_n log softmax(logits_n)[label_n].

    Args:
      logits: (..., N, C) scores of C classes for N items, any floating dtype.
      labels: (..., N) integer classes, 0 to C - 1; leading axes of ``logits`` may be left out.

    Returns:
      (...) at least float32, nats.

    Raises:
      ValueError: as ``correct``.

    >>> round(float(cross_entropy(jnp.zeros((4, 10)), jnp.array([0, 3, 5, 9]))), 4)  # log 10
    2.3026
    """
    logits, labels = _checked(logits, labels)
    # float64 is kept where it is switched on (references in tests); bfloat16 is widened.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0].mean(axis=-1)


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    shape, given = np.shape(logits), np.shape(labels)
    if len(shape) < 2 or 0 in shape or not given or shape[:-1][-len(given) :] != given:
        raise ValueError(f"logits, labels: wanted shapes (..., N, C) and (..., N), got {shape} and {given}.")
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"labels: wanted integer classes, got dtype {jnp.result_type(labels)}.")
    if not isinstance(labels, jax.core.Tracer):
        # NumPy, because under jit even an operation on a constant is traced.
        low, high = int(np.asarray(labels).min()), int(np.asarray(labels).max())
        if low < 0 or high >= shape[-1]:
            raise ValueError(f"labels: wanted classes 0 to {shape[-1] - 1}, got values from {low} to {high}.")
    return jnp.asarray(logits), jnp.asarray(labels)
