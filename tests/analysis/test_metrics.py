"""Scores against NumPy in float64, their closed forms and their refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis import accuracy, correct, cross_entropy, metrics


def scores(*shape: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(sum(shape))
    return rng.normal(scale=scale, size=shape).astype(np.float32), rng.integers(0, shape[-1], shape[:-1])


@given(
    n=st.sampled_from([1, 2, 30]),
    classes=st.sampled_from([1, 2, 12]),
    scale=st.sampled_from([0.1, 3.0, 300.0]),
)
def test_scores_equal_numpy(n: int, classes: int, scale: float) -> None:
    logits, labels = scores(n, classes, scale=scale)
    right = logits.argmax(-1) == labels
    losses = -scipy.special.log_softmax(logits.astype(np.float64), axis=-1)[np.arange(n), labels]
    np.testing.assert_array_equal(correct(logits, labels), right)
    np.testing.assert_allclose(accuracy(logits, labels), right.mean(), rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, labels), losses.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", [accuracy, cross_entropy, correct])
def test_leading_axes_are_kept_and_labels_shared_over_them(score) -> None:
    logits, _ = scores(2, 3, 7, 5)
    labels = np.arange(7) % 5
    alone = np.array([[score(logits[i, j], labels) for j in range(3)] for i in range(2)])
    np.testing.assert_allclose(score(logits, labels), alone, rtol=1e-6)
    np.testing.assert_allclose(score(logits, np.broadcast_to(labels, (2, 3, 7))), alone, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(score)(logits, labels), alone, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: score(x, labels))(logits), alone, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(score, (0, None))(logits, labels), alone, rtol=1e-6)


def test_ties_go_to_the_lowest_class() -> None:
    assert correct(jnp.zeros((3, 4)), jnp.array([0, 1, 3])).tolist() == [True, False, False]


def test_cross_entropy_is_in_float32_for_bfloat16() -> None:
    logits, labels = scores(200, 10)
    narrow = jnp.asarray(logits, jnp.bfloat16)
    loss = cross_entropy(narrow, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, cross_entropy(narrow.astype(jnp.float32), labels), rtol=1e-6)


def test_cross_entropy_keeps_float64() -> None:
    with jax.enable_x64(True):
        assert cross_entropy(jnp.zeros((2, 3), jnp.float64), jnp.array([0, 1])).dtype == jnp.float64


def test_gradient_is_softmax_minus_one_hot_over_n() -> None:
    logits, labels = scores(6, 4)
    wanted = (scipy.special.softmax(logits, axis=-1) - np.eye(4)[labels]) / 6
    np.testing.assert_allclose(jax.grad(cross_entropy)(logits, labels), wanted, atol=1e-6)


@pytest.mark.parametrize("score", [accuracy, cross_entropy, correct])
@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((3, 4), np.array([0, 1, 4]), "labels: wanted classes 0 to 3, got values from 0 to 4"),
        ((3, 4), np.array([-1, 1, 2]), "got values from -1 to 2"),
        ((3, 4), np.array([0.0, 1.0, 2.0]), "labels: wanted integer classes, got dtype float"),
        ((3, 4), np.array([0, 1]), r"got \(3, 4\) and \(2,\)"),
        ((3, 4), np.array([1]), r"got \(3, 4\) and \(1,\)"),
        ((3, 4), np.zeros((2, 3), int), r"got \(3, 4\) and \(2, 3\)"),
        ((4,), np.array(0), r"got \(4,\) and \(\)"),
        ((0, 4), np.zeros(0, int), r"got \(0, 4\)"),
    ],
)
def test_bad_labels_are_refused(score, shape: tuple[int, ...], labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(np.zeros(shape, np.float32), labels)


def scores_with_ties(seed=0, n=60):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3 == 0)
    return np.round(rng.normal(size=(2, n)) + labels, 1).astype(np.float32), labels


def test_auroc_is_scikit_learns_at_every_leading_index():
    scores, labels = scores_with_ties()
    wanted = [sklearn.metrics.roc_auc_score(labels, row) for row in scores]
    np.testing.assert_allclose(metrics.auroc(scores, labels), wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics.auroc(scores + 3, labels), wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics.auroc(np.zeros_like(scores), labels), 0.5)


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.1, 0.3, 1.0])
def test_tpr_at_fpr_is_the_best_threshold_of_scikit_learns_curve(fpr):
    scores, labels = scores_with_ties()
    for row in scores:
        false, true, _ = sklearn.metrics.roc_curve(labels, row, drop_intermediate=False)
        np.testing.assert_allclose(metrics.tpr_at_fpr(row, labels, fpr), true[false <= fpr + 1e-9].max(), rtol=1e-6)


def test_spearman_is_scipys_with_ties():
    a, b = np.round(np.random.default_rng(1).normal(size=(2, 40)), 0)
    np.testing.assert_allclose(metrics.spearman(a, b), scipy.stats.spearmanr(a, b).statistic, rtol=1e-5)
    np.testing.assert_allclose(metrics.mean_ranks(a), scipy.stats.rankdata(a))
    assert np.isnan(metrics.spearman(a, np.ones_like(a)))


def test_macro_f1_is_scikit_learns_and_an_absent_class_counts_nothing():
    rng = np.random.default_rng(2)
    predicted, labels = rng.integers(0, 4, (2, 50))
    for classes in (4, 5):
        wanted = sklearn.metrics.f1_score(
            labels, predicted, average="macro", labels=np.arange(classes), zero_division=0
        )
        np.testing.assert_allclose(metrics.macro_f1(predicted, labels, classes), wanted, rtol=1e-6)


def test_jensen_shannon_is_scipys_symmetric_and_zero_between_equals():
    p, q = np.random.default_rng(3).normal(size=(2, 5, 9)).astype(np.float32)
    probabilities = [np.asarray(jax.nn.softmax(x)) for x in (p, q)]
    wanted = [scipy.spatial.distance.jensenshannon(a, b) ** 2 for a, b in zip(*probabilities, strict=True)]
    np.testing.assert_allclose(metrics.jensen_shannon(p, q), wanted, atol=1e-6)
    np.testing.assert_allclose(metrics.jensen_shannon(q, p), wanted, atol=1e-6)
    np.testing.assert_allclose(metrics.jensen_shannon(p, p), 0, atol=1e-6)


def test_kl_is_scipys_and_eps_bounds_it():
    p, q = np.random.default_rng(4).normal(size=(2, 5, 9)).astype(np.float32)
    first, second = (np.asarray(jax.nn.softmax(x), np.float64) for x in (p, q))
    np.testing.assert_allclose(metrics.kl_divergence(p, q), scipy.stats.entropy(first, second, axis=-1), rtol=1e-5)
    with_eps = (first * np.log((first + 0.1) / (second + 0.1))).sum(-1)
    np.testing.assert_allclose(metrics.kl_divergence(p, q, eps=0.1), with_eps, rtol=1e-5)
    np.testing.assert_array_equal(metrics.kl_divergence(p, p), 0)
    sure, never = np.float32([100, 0]), np.float32([0, 100])
    np.testing.assert_allclose(metrics.kl_divergence(sure, never), 100, rtol=1e-5)
    np.testing.assert_allclose(metrics.kl_divergence(sure, never, eps=1e-8), np.log(1e8), rtol=1e-5)


def test_scores_of_a_single_class_and_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="both 0 and 1"):
        metrics.auroc(np.zeros(3), np.ones(3, int))
    with pytest.raises(ValueError, match=r"wanted \(..., N\) and \(N,\)"):
        metrics.tpr_at_fpr(np.zeros(3), np.ones(4, int), 0.1)
    with pytest.raises(ValueError, match="fpr must be in"):
        metrics.tpr_at_fpr(np.zeros(2), np.arange(2), 1.5)
    with pytest.raises(ValueError, match="N >= 2"):
        metrics.spearman(np.zeros(1), np.zeros(1))
