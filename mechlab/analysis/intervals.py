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
    from jaxtyping import Array, Float

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


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: wanted a number between 0 and 1, got {level}.")


@partial(jax.jit, static_argnames="resamples")
def _resampled_means(key: jax.Array, values: jax.Array, resamples: int) -> jax.Array:
    n = values.shape[0]

    def draw(i: jax.Array) -> jax.Array:
        return values[jax.random.randint(jax.random.fold_in(key, i), (n,), 0, n)].mean()

    return jax.lax.map(draw, jnp.arange(resamples), batch_size=min(resamples, max(1, _MOST_VALUES // n)))
