"""Scores against NumPy in float64, their closed forms and their refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis import accuracy, correct, cross_entropy


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
