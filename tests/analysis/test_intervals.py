"""Intervals against SciPy, and against what they are for: how often they cover the truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis import bootstrap_mean, intervals, paired_bootstrap, wilson
from mechlab.analysis.intervals import resampled_auroc
from mechlab.analysis.metrics import auroc


def skewed(n: int) -> np.ndarray:
    return np.random.default_rng(0).exponential(size=n).astype(np.float32)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_equals_scipy_percentile(level: float) -> None:
    values = skewed(60)
    mean, lo, hi = bootstrap_mean(jax.random.key(0), values, level=level, resamples=20_000)
    wanted = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    # Two Monte Carlo ends, each with an error of about 0.02 of the interval's width.
    atol = 0.04 * (wanted.high - wanted.low)
    np.testing.assert_allclose(mean, values.mean(), rtol=1e-6)
    np.testing.assert_allclose([lo, hi], [wanted.low, wanted.high], atol=atol)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    samples = jax.random.normal(jax.random.key(1), (400, 50))
    keys = jax.random.split(jax.random.key(2), 400)
    _, lo, hi = jax.vmap(lambda key, x: bootstrap_mean(key, x, level=0.9, resamples=500))(keys, samples)
    covered = float(((lo < 0) & (hi > 0)).mean())
    # 0.9, less what a percentile interval loses at N = 50, give or take three standard errors.
    assert 0.84 < covered < 0.94


def test_bootstrap_of_a_constant_has_no_width() -> None:
    mean, lo, hi = bootstrap_mean(jax.random.key(0), jnp.full(7, 3.0))
    np.testing.assert_allclose([mean, lo, hi], 3, rtol=1e-6)


def test_bootstrap_takes_booleans_and_gives_back_the_rate() -> None:
    mean, lo, hi = bootstrap_mean(jax.random.key(0), jnp.arange(200) < 150)
    wanted = scipy.stats.binomtest(150, 200).proportion_ci(method="wilson")
    np.testing.assert_allclose([mean, lo, hi], [0.75, wanted.low, wanted.high], atol=0.012)


def test_same_key_same_interval_and_jit_equals_eager() -> None:
    values = skewed(40)
    once = bootstrap_mean(jax.random.key(3), values)
    assert once == bootstrap_mean(jax.random.key(3), values)
    assert once.lo != bootstrap_mean(jax.random.key(4), values).lo
    np.testing.assert_allclose(jax.jit(bootstrap_mean)(jax.random.key(3), values), once, rtol=1e-6)
    closed_over = jax.jit(lambda key: bootstrap_mean(key, values))
    np.testing.assert_allclose(closed_over(jax.random.key(3)), once, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 100, 10_000])
def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    values = skewed(30)
    wanted = bootstrap_mean(jax.random.key(0), values, resamples=101)
    monkeypatch.setattr(intervals, "_MOST_VALUES", most)
    jax.clear_caches()  # the constant is read when tracing
    np.testing.assert_allclose(bootstrap_mean(jax.random.key(0), values, resamples=101), wanted, rtol=1e-5)


def test_memory_does_not_grow_with_resamples_times_items() -> None:
    lowered = intervals._resampled_means.lower(jax.random.key(0), jnp.zeros(10_000), resamples=2000)
    whole = 2000 * 10_000 * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes < whole / 2


def test_paired_bootstrap_resamples_items_jointly_over_seeds_and_arms() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=(1, 80))
    b = difficulty * 10 + rng.normal(size=(3, 80)) * 0.1
    a = b + 0.5 + rng.normal(size=(3, 80)) * 0.1
    mean, lo, hi = paired_bootstrap(jax.random.key(0), a, b, resamples=20_000)
    wanted = scipy.stats.bootstrap(
        (a.mean(0), b.mean(0)),
        lambda x, y, axis: (x - y).mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=1,
    ).confidence_interval
    np.testing.assert_allclose(mean, (a - b).mean(), rtol=1e-5)
    np.testing.assert_allclose([lo, hi], [wanted.low, wanted.high], atol=0.05 * (wanted.high - wanted.low))
    # Unpaired, the difficulty of the items alone would make it about 4 wide.
    assert hi - lo < 0.1


def test_seeds_are_pooled_and_do_not_count_as_items() -> None:
    a = np.tile(skewed(50), (1, 1))
    one = paired_bootstrap(jax.random.key(0), a, np.zeros_like(a))
    five = paired_bootstrap(jax.random.key(0), np.tile(a, (5, 1)), np.zeros((5, 50)))
    np.testing.assert_allclose(one, five, rtol=1e-5)


def test_swapping_the_arms_mirrors_the_interval() -> None:
    a, b = skewed(40)[None], skewed(80)[None, 40:]
    mean, lo, hi = paired_bootstrap(jax.random.key(0), a, b)
    swapped = paired_bootstrap(jax.random.key(0), b, a)
    np.testing.assert_allclose(swapped, [-mean, -hi, -lo], atol=1e-5)


@given(n=st.integers(1, 20_000), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_equals_scipy(n: int, share: float, level: float) -> None:
    successes = round(share * n)
    p, lo, hi = wilson(successes, n, level=level)
    wanted = scipy.stats.binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    np.testing.assert_allclose([p, lo, hi], [successes / n, wanted.low, wanted.high], atol=1e-5)
    assert 0 <= lo <= p <= hi <= 1


def test_wilson_maps_over_arrays() -> None:
    counts = jnp.array([0, 3, 10])
    p, lo, hi = wilson(counts, 10)
    assert p.shape == lo.shape == hi.shape == (3,)
    assert lo[0] == 0 and hi[2] == 1
    np.testing.assert_allclose(jax.jit(jax.vmap(wilson, (0, None)))(counts, 10), (p, lo, hi), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3)), r"values: wanted shape \(N,\) .* got shape \(2, 3\)"),
        (np.zeros(0), r"got shape \(0,\)"),
        (np.array([1.0, np.nan, np.inf]), "values: wanted finite numbers, got 2 of 3"),
    ],
)
def test_bad_values_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(jax.random.key(0), values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_bad_levels_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match=f"level: .* got {level}"):
        bootstrap_mean(jax.random.key(0), np.ones(3), level=level)
    with pytest.raises(ValueError, match=f"level: .* got {level}"):
        wilson(1, 2, level=level)


def test_no_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="resamples: wanted at least 1, got 0"):
        bootstrap_mean(jax.random.key(0), np.ones(3), resamples=0)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2, 3), (2, 4)), ((1, 3), (2, 3)), ((2, 0), (2, 0))])
def test_arms_of_different_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"a, b: wanted two arrays of one shape \(S, N\)"):
        paired_bootstrap(jax.random.key(0), np.zeros(shapes[0]), np.zeros(shapes[1]))


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, 0), (np.array([1, 9]), 3)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes, n: wanted"):
        wilson(successes, n)


def test_resampled_aurocs_are_those_of_drawn_items() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(30) % 3 == 0
    # Whole numbers, so that there are ties.
    scores = rng.integers(0, 6, (2, 30)).astype(np.float32)
    draws = resampled_auroc(jax.random.key(0), scores, labels, resamples=3)
    assert draws.shape == (2, 3)
    counts = [intervals._draw_counts(jax.random.fold_in(jax.random.key(0), i), n, 3) for i, n in enumerate((10, 20))]
    for r in range(3):
        rows = np.concatenate(
            [np.repeat(np.flatnonzero(labels == side), np.asarray(counts[i][r], int)) for i, side in enumerate((1, 0))]
        )
        assert len(rows) == 30
        np.testing.assert_allclose(draws[:, r], auroc(scores[:, rows], labels[rows]), rtol=1e-5)


def test_resampled_aurocs_have_the_spread_of_hanley_and_mcneil() -> None:
    labels = np.arange(400) % 2 == 0
    scores = np.random.default_rng(4).normal(size=400) + labels
    draws = np.asarray(resampled_auroc(jax.random.key(1), scores, labels, resamples=2000))
    a = float(auroc(jnp.asarray(scores), labels))
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    wanted = np.sqrt((a * (1 - a) + 199 * (q1 - a**2) + 199 * (q2 - a**2)) / 200**2)
    np.testing.assert_allclose([draws.mean(), draws.std()], [a, wanted], rtol=0.1)


@pytest.mark.parametrize(
    ("scores", "labels", "resamples", "message"),
    [
        (np.zeros(3), np.ones(3), 5, "both classes"),
        (np.zeros((2, 3)), np.array([0, 1]), 5, "both classes"),
        (np.array([np.nan, 1.0]), np.array([0, 1]), 5, "finite"),
        (np.zeros(2), np.array([0, 1]), 0, "resamples"),
    ],
)
def test_bad_scores_to_resample_are_refused(scores, labels, resamples, message) -> None:
    with pytest.raises(ValueError, match=message):
        resampled_auroc(jax.random.key(0), scores, labels, resamples=resamples)
