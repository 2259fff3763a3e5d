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


def auroc(scores: Float[ArrayLike, "... N"], labels: Bool[ArrayLike, " N"]) -> Float[Array, "..."]:
    """Area under the ROC curve: the probability that an item of class 1 scores higher than one of class 0, ties half.

    It does not change under a constant that is added to all scores: unlike accuracy it knows no bias.

    Args:
      scores: (..., N).
      labels: (N,) booleans, or 0 and 1; both occur.

    Returns:
      (...) float32 in [0, 1].

    Raises:
      ValueError: shapes or labels that do not fit or, where they are known, a single class.

    >>> float(auroc(jnp.array([0.1, 0.4, 0.4, 0.8]), jnp.array([0, 0, 1, 1])))
    0.875
    """
    scores, positive = _scored(scores, labels)
    count = positive.sum()
    rank_mean = (mean_ranks(scores) * positive).sum(-1) / count
    return (rank_mean - (count + 1) / 2) / (positive.size - count)


def tpr_at_fpr(scores: Float[ArrayLike, "... N"], labels: Bool[ArrayLike, " N"], fpr: float) -> Float[Array, "..."]:
    """The largest true positive rate of a threshold whose false positive rate is at most ``fpr``.

    An item counts as positive where its score is at least the threshold, so equal scores are decided together.

    Args:
      scores: (..., N).
      labels: (N,) booleans, or 0 and 1; both occur.
      fpr: in [0, 1].

    Returns:
      (...) float32 in [0, 1].

    Raises:
      ValueError: as ``auroc``, or ``fpr`` outside [0, 1].
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"tpr_at_fpr: fpr must be in [0, 1], got {fpr}.")
    scores, positive = _scored(scores, labels)
    order = jnp.argsort(-scores, axis=-1)
    ranked = jnp.take_along_axis(scores, order, -1)
    hits = positive[order]
    true, false = jnp.cumsum(hits, -1), jnp.cumsum(1 - hits, -1)
    # A threshold lies behind the last of equal scores.
    last = jnp.concatenate([ranked[..., 1:] != ranked[..., :-1], jnp.ones((*ranked.shape[:-1], 1), bool)], -1)
    # Counts are compared, because 0.05 * 20 is not 1 in float32.
    allowed = last & (false <= jnp.floor(fpr * (positive.size - positive.sum()) + 1e-4))
    return jnp.where(allowed, true, 0).max(-1) / positive.sum()


def mean_ranks(x: Float[ArrayLike, "... N"]) -> Float[Array, "... N"]:
    """Ranks from 1 along the last axis; equal values share the mean of their ranks.

    >>> mean_ranks(jnp.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    x = jnp.asarray(x)

    def one(row: jax.Array) -> jax.Array:
        ordered = jnp.sort(row)
        low, high = (jnp.searchsorted(ordered, row, side=side) for side in ("left", "right"))
        return (low + high + 1) / 2

    return jax.vmap(one)(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def spearman(x: Float[ArrayLike, "... N"], y: Float[ArrayLike, "... N"]) -> Float[Array, "..."]:
    """Rank correlation: Pearson's correlation of the mean ranks; NaN where one side is constant.

    Args:
      x, y: (..., N) with N >= 2; leading axes broadcast.

    Raises:
      ValueError: fewer than two values, or different numbers of them.

    >>> round(float(spearman(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 3.0, 2.0, 4.0]))), 4)
    0.8
    """
    if np.shape(x)[-1:] != np.shape(y)[-1:] or np.shape(x)[-1:] in ((), (1,)):
        raise ValueError(f"spearman: wanted N >= 2 values of both, got shapes {np.shape(x)} and {np.shape(y)}.")
    a, b = (ranks - ranks.mean(-1, keepdims=True) for ranks in (mean_ranks(x), mean_ranks(y)))
    return (a * b).sum(-1) / jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def macro_f1(predicted: Int[ArrayLike, "... N"], labels: Int[ArrayLike, " N"], classes: int) -> Float[Array, "..."]:
    """Mean over classes of 2 TP / (2 TP + FP + FN); a class that neither occurs nor is predicted counts 0.

    Args:
      predicted: (..., N) integer classes.
      labels: (N,) integer classes, 0..classes - 1.
      classes: number of classes.

    Returns:
      (...) float32 in [0, 1].

    >>> float(macro_f1(jnp.array([0, 1, 1, 1]), jnp.array([0, 0, 1, 1]), 2))  # of classes: 2/3 and 4/5
    0.7333333492279053
    """
    guess, truth = (jax.nn.one_hot(x, classes, axis=-1) for x in (predicted, labels))
    true = (guess * truth).sum(-2)
    return (2 * true / jnp.maximum(guess.sum(-2) + truth.sum(-2), 1)).mean(-1)


def confusion(
    predicted: Int[ArrayLike, "... N"], labels: Int[ArrayLike, " N"], classes: int
) -> Float[Array, "... C C"]:
    """How many items of each class (rows) were predicted as each class (columns).

    >>> confusion(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), 2).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    guess, truth = (jax.nn.one_hot(x, classes, axis=-1) for x in (predicted, labels))
    return jnp.einsum("nt,...np->...tp", truth, guess)


def kl_divergence(
    p: Float[ArrayLike, "... V"], q: Float[ArrayLike, "... V"], *, eps: float = 0.0
) -> Float[Array, "..."]:
    """KL(p | q) = sum p (log(p + eps) - log(q + eps)) of two distributions given by their logits, nats.

    Args:
      p, q: (..., V) logits; leading axes broadcast.
      eps: added to probabilities inside the logarithms, which bounds what a token that q excludes can cost. Exact, and
        at least 0 but for rounding, without it.

    Returns:
      (...) float32.

    >>> round(float(kl_divergence(jnp.array([50.0, 0.0]), jnp.array([0.0, 0.0]))), 4)  # log 2
    0.6931
    """
    a, b = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32), -1) for x in (p, q))
    log_p, log_q = (jnp.log(jnp.exp(x) + eps) if eps else x for x in (a, b))
    return (jnp.exp(a) * (log_p - log_q)).sum(-1)


def jensen_shannon(p: Float[ArrayLike, "... V"], q: Float[ArrayLike, "... V"]) -> Float[Array, "..."]:
    """Jensen-Shannon divergence of two distributions given by their logits, nats, in [0, log 2].

    Args:
      p, q: (..., V) logits; leading axes broadcast, so (A, 1, V) and (1, A, V) give all pairs.

    Returns:
      (...) float32.

    >>> round(float(jensen_shannon(jnp.array([50.0, 0.0]), jnp.array([0.0, 50.0]))), 4)  # log 2
    0.6931
    """
    a, b = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32), -1) for x in (p, q))
    middle = jnp.logaddexp(a, b) - jnp.log(2.0)
    halves = [(jnp.exp(side) * (side - middle)).sum(-1) for side in (a, b)]
    return jnp.maximum(sum(halves, start=jnp.zeros(())) / 2, 0)


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


def _scored(scores: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Float scores and labels as 0 and 1."""
    if np.ndim(labels) != 1 or np.shape(scores)[-1:] != np.shape(labels) or not np.size(labels):
        raise ValueError(f"scores, labels: wanted (..., N) and (N,), got {np.shape(scores)} and {np.shape(labels)}.")
    if not isinstance(labels, jax.core.Tracer) and set(np.unique(np.asarray(labels)).tolist()) != {0, 1}:
        raise ValueError(f"labels: wanted both 0 and 1 and nothing else, got {np.unique(np.asarray(labels))[:5]}.")
    return jnp.asarray(scores), jnp.asarray(labels, jnp.int32)
