"""Confidence intervals: the percentile bootstrap over items, paired between two arms, and Wilson's for rates.

The unit that is drawn again is the *item* (an image, a prompt), not the seed: two to five seeds are too few
to resample. Seeds are pooled, and each item carries its values of all seeds along.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float

# Values drawn at once: 4 MB of float32, and about six times that with their indices and random bits.
_MOST_VALUES = 1 << 20


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Attributes:
      mean: the estimate.
      lo: lower end.
      hi: upper end.
    """

    mean: Float[Array, "..."]
    lo: Float[Array, "..."]
    hi: Float[Array, "..."]


def bootstrap_mean(
    key: jax.Array, values: Float[ArrayLike, " N"], *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Mean over items, with the percentile bootstrap interval.

    Draws N items with replacement ``resamples`` times; the interval runs between the (1 - level)/2 and
    (1 + level)/2 quantiles of the means. About a million drawn values are held at once, whatever N is.

    Args:
      key: typed key, scalar.
      values: (N,) one number per item, booleans allowed.
      level: coverage wanted, in (0, 1).
      resamples: number of draws, at least 1.

    Returns:
      ``(mean, lo, hi)``, float32 scalars in the unit of ``values``.

    Raises:
      ValueError: if ``values`` is not one non-empty axis or, where its values are known, not finite; or if
        ``level`` or ``resamples`` is out of range.

    References:
      Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    >>> mean, lo, hi = bootstrap_mean(jax.random.key(0), jnp.arange(100.0))
    >>> float(mean), bool(lo < mean < hi)
    (49.5, True)
    """
    if np.ndim(values) != 1 or np.size(values) == 0:
        raise ValueError(f"values: wanted shape (N,) with N >= 1, got shape {np.shape(values)}.")
    _require_level(level)
    if resamples < 1:
        raise ValueError(f"resamples: wanted at least 1, got {resamples}.")
    if not isinstance(values, jax.core.Tracer):
        # NumPy, because under jit even an operation on a constant is traced.
        bad = np.size(values) - int(np.isfinite(np.asarray(values)).sum())
        if bad:
            raise ValueError(f"values: wanted finite numbers, got {bad} of {np.size(values)} that are not.")
    values = jnp.asarray(values, jnp.float32)
    means = _resampled_means(key, values, resamples)
    lo, hi = jnp.quantile(means, jnp.array([(1 - level) / 2, (1 + level) / 2]))
    return Interval(values.mean(), lo, hi)


def paired_bootstrap(
    key: jax.Array,
    a: Float[ArrayLike, "S N"],
    b: Float[ArrayLike, "S N"],
    *,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of ``a - b`` with its interval: both arms, and every seed, see the same items in each draw.

    Args:
      key: typed key, scalar.
      a: (S, N) one number per seed and item, e.g. whether arm a was right; booleans allowed.
      b: (S, N) the same items and seeds for arm b.
      level: coverage wanted, in (0, 1).
      resamples: number of draws, at least 1.

    Returns:
      ``(mean, lo, hi)`` of the difference a - b, float32 scalars.

    Raises:
      ValueError: if the shapes are not (S, N), equal and non-empty; otherwise as ``bootstrap_mean``.

    >>> right = jnp.array([[True, True, True, False]])
    >>> tuple(map(float, paired_bootstrap(jax.random.key(0), right, right)))
    (0.0, 0.0, 0.0)
    """
    if np.ndim(a) != 2 or np.shape(a) != np.shape(b) or np.size(a) == 0:
        raise ValueError(f"a, b: wanted two arrays of one shape (S, N), got {np.shape(a)} and {np.shape(b)}.")
    difference = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
    return bootstrap_mean(key, difference.mean(axis=0), level=level, resamples=resamples)


def wilson(successes: Float[ArrayLike, "..."], n: Float[ArrayLike, "..."], *, level: float = 0.95) -> Interval:
    """Wilson's score interval for a rate p = successes / n.

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
      successes: (...) counts, 0 to ``n``.
      n: (...) numbers of trials, at least 1; broadcasts with ``successes``.
      level: coverage wanted, in (0, 1).

    Returns:
      ``(p, lo, hi)``, float32 of the broadcast shape, in [0, 1].

    Raises:
      ValueError: if ``level`` is out of range, or a count is, where the values are known.

    References:
      Wilson, Probable inference, the law of succession, and statistical inference (1927).

    >>> [round(float(end), 4) for end in wilson(8, 10)]
    [0.8, 0.4902, 0.9433]
    """
    _require_level(level)
    if not any(isinstance(count, jax.core.Tracer) for count in (successes, n)):
        counts, trials = np.asarray(successes), np.asarray(n)
        if not np.all((trials >= 1) & (0 <= counts) & (counts <= trials)):
            raise ValueError(f"successes, n: wanted n >= 1 and 0 <= successes <= n, got {successes} of {n}.")
    successes, n = jnp.asarray(successes, jnp.float32), jnp.asarray(n, jnp.float32)
    z = jax.scipy.special.ndtri((1 + level) / 2)
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * jnp.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At the ends the two terms cancel exactly; in float32 they would leave about 1e-8.
    lo = jnp.where(successes == 0, 0.0, jnp.clip(centre - half, 0, 1))
    hi = jnp.where(successes == n, 1.0, jnp.clip(centre + half, 0, 1))
    return Interval(p, lo, hi)


def resampled_auroc(
    key: jax.Array, scores: Float[ArrayLike, "... N"], labels: Bool[ArrayLike, " N"], *, resamples: int = 1000
) -> Float[Array, "... R"]:
    """AUROC of bootstrap samples of the items, drawn within each class; the same draws along all leading axes.

    So differences between arms are paired: quantiles of ``draws[a] - draws[b]`` are the interval of arm a against b.

    Args:
      key: typed key, scalar.
      scores: (..., N).
      labels: (N,) booleans, or 0 and 1; both occur.
      resamples: R, at least 1.

    Returns:
      (..., R) float32 in [0, 1], ties counted half as in ``metrics.auroc``.

    Raises:
      ValueError: shapes that do not fit, a single class or, where they are known, scores that are not finite; or
        ``resamples`` out of range.
    """
    known, shape = np.asarray(labels), np.shape(scores)
    if known.ndim != 1 or shape[-1:] != known.shape or set(np.unique(known).tolist()) != {0, 1}:
        raise ValueError(f"scores, labels: wanted (..., N) and (N,) with both classes, got {shape} and {known.shape}.")
    if resamples < 1:
        raise ValueError(f"resamples: wanted at least 1, got {resamples}.")
    if not isinstance(scores, jax.core.Tracer) and not np.isfinite(np.asarray(scores)).all():
        raise ValueError("scores: wanted finite numbers.")
    sides = [np.flatnonzero(known == side) for side in (1, 0)]
    counts = [_draw_counts(jax.random.fold_in(key, i), len(rows), resamples) for i, rows in enumerate(sides)]
    values = jnp.asarray(scores, jnp.float32)
    return _weighted_auroc(values[..., sides[0]], values[..., sides[1]], *counts)


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: wanted a number between 0 and 1, got {level}.")


@partial(jax.jit, static_argnames="resamples")
def _resampled_means(key: jax.Array, values: jax.Array, resamples: int) -> jax.Array:
    n = values.shape[0]

    def draw(i: jax.Array) -> jax.Array:
        return values[jax.random.randint(jax.random.fold_in(key, i), (n,), 0, n)].mean()

    return jax.lax.map(draw, jnp.arange(resamples), batch_size=min(resamples, max(1, _MOST_VALUES // n)))


@partial(jax.jit, static_argnames=("n", "resamples"))
def _draw_counts(key: jax.Array, n: int, resamples: int) -> jax.Array:
    """(R, n): how often each of n items is drawn in n draws with replacement."""
    drawn = jax.random.randint(key, (resamples, n), 0, n)
    return jnp.zeros((resamples, n)).at[jnp.arange(resamples)[:, None], drawn].add(1)


@jax.jit
def _weighted_auroc(
    positive: jax.Array, negative: jax.Array, times_positive: jax.Array, times_negative: jax.Array
) -> jax.Array:
    """(..., R) from scores (..., P) and (..., M) of the classes and how often items count, (R, P) and (R, M)."""

    def one(arm: tuple[jax.Array, jax.Array]) -> jax.Array:
        high, low = arm[0][:, None], arm[1][None]
        wins = (high > low) + 0.5 * (high == low)
        return ((times_positive @ wins) * times_negative).sum(-1) / wins.size

    flat = positive.reshape(-1, positive.shape[-1]), negative.reshape(-1, negative.shape[-1])
    return jax.lax.map(one, flat).reshape(*positive.shape[:-1], len(times_positive))
