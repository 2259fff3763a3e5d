"""Margins between candidate answers, and what they are worth once a constant bias is taken away.

A model that has to choose between a few answers may prefer one of them whatever is asked. Any disturbance of it changes
this preference, and with it the plain accuracy, in both directions. So three numbers belong together: plain accuracy,
accuracy after the best constant offsets of the answers (tuned on other items), and the AUROC of ``metrics``, which
knows no offset.

Scores are logits of the candidates, (..., N, A) for N items with A candidates each; ``right`` (N,) says which one is
right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


def candidate_scores(logits: Float[Array, "... N V"], candidates: Int[ArrayLike, "N A"]) -> Float[Array, "... N A"]:
    """The logits of each item's candidates.

    Args:
      logits: (..., N, V).
      candidates: (N, A) tokens, or (A,) where all items have the same answer list.

    Raises:
      ValueError: shapes that do not fit or, where they are known, an item with the same token twice.
    """
    shape = np.shape(logits)
    tokens = np.shape(candidates)
    if len(shape) < 2 or len(tokens) not in (1, 2) or tokens[:-1] not in ((), shape[-2:-1]):
        raise ValueError(f"candidates: wanted (N, A) or (A,) tokens for logits {shape}, got shape {tokens}.")
    if not isinstance(candidates, jax.core.Tracer):
        ordered = np.sort(np.atleast_2d(np.asarray(candidates)), -1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("candidates: an item has the same token twice; answers must differ in the token scored.")
    index = jnp.broadcast_to(jnp.asarray(candidates), (*shape[:-1], tokens[-1]))
    return jnp.take_along_axis(logits, index, axis=-1)


def log_odds(scores: Float[Array, "... N A"], right: Int[ArrayLike, " N"]) -> Float[Array, "... N"]:
    """Log-odds of the right answer within the list, nats: s_right - log sum of exp over the others.

    With two candidates it is the difference of their logits.

    >>> log_odds(jnp.asarray([[3.0, 1.0]]), jnp.asarray([1])).tolist()
    [-2.0]
    """
    is_right = _is_right(scores, right)
    chosen = jnp.where(is_right, scores, 0).sum(-1)
    return chosen - jax.nn.logsumexp(jnp.where(is_right, -jnp.inf, scores), axis=-1)


def list_correct(
    scores: Float[Array, "... N A"], right: Int[ArrayLike, " N"], offsets: Float[ArrayLike, "... A"] = 0.0
) -> Bool[Array, "... N"]:
    """Whether the right answer has the largest score of the list, after adding ``offsets``; ties go to the first."""
    _is_right(scores, right)
    shifted = scores + jnp.asarray(offsets)[..., None, :] if np.ndim(offsets) else scores + offsets
    return shifted.argmax(-1) == jnp.asarray(right)


def tune_offsets(
    scores: Float[Array, "... N A"], right: Int[ArrayLike, " N"], *, rounds: int = 3
) -> Float[Array, "... A"]:
    """Constant offsets of the answers under which most items are right: what removing a bias alone can give.

    One answer's offset at a time: accuracy as a function of it is a step function, so all of its values are tried. With
    two candidates the result is exact; with more it is a local optimum. Of equally good offsets the smallest is taken.

    Args:
      scores: (..., N, A) of items for tuning, never of those that are reported.
      right: (N,) in 0..A - 1.
      rounds: passes over the answers.

    Returns:
      (..., A).

    >>> tune_offsets(jnp.asarray([[3.0, 1.0], [3.0, 2.0], [5.0, 1.0]]), jnp.asarray([1, 1, 0])).tolist()
    [-3.0, 0.0]
    """
    is_right = _is_right(scores, right)
    answers = scores.shape[-1]

    def tune(scores: jax.Array) -> jax.Array:
        def better(step: jax.Array, offsets: jax.Array) -> jax.Array:
            a = step % answers
            others = jnp.where(jnp.arange(answers) == a, -jnp.inf, scores + offsets)
            # Answer a is chosen where its offset is above this.
            edges = jnp.sort(others.max(-1) - scores[:, a])
            between = (edges[1:] + edges[:-1]) / 2
            tried = jnp.concatenate([jnp.stack([offsets[a], edges[0] - 1, edges[-1] + 1]), between])
            chosen = (scores + offsets.at[a].set(0))[None] + tried[:, None, None] * jax.nn.one_hot(a, answers)
            hits = (is_right & jax.nn.one_hot(chosen.argmax(-1), answers, dtype=bool)).any(-1).sum(-1)
            best = jnp.where(hits == hits.max(), jnp.abs(tried), jnp.inf).argmin()
            return offsets.at[a].set(tried[best])

        return jax.lax.fori_loop(0, rounds * answers, better, jnp.zeros(answers, scores.dtype))

    flat = scores.reshape(-1, *scores.shape[-2:])
    return jax.lax.map(tune, flat).reshape(*scores.shape[:-2], answers)


def _is_right(scores: Float[Array, "... N A"], right: Int[ArrayLike, " N"]) -> Bool[Array, "N A"]:
    shape = np.shape(scores)
    if len(shape) < 2 or shape[-1] < 2 or np.shape(right) != shape[-2:-1]:
        raise ValueError(f"scores, right: wanted (..., N, A >= 2) and (N,), got {shape} and {np.shape(right)}.")
    if not isinstance(right, jax.core.Tracer):
        low, high = int(np.asarray(right).min()), int(np.asarray(right).max())
        if low < 0 or high >= shape[-1]:
            raise ValueError(f"right: wanted 0 to {shape[-1] - 1}, got values from {low} to {high}.")
    return jax.nn.one_hot(jnp.asarray(right), shape[-1], dtype=bool)
