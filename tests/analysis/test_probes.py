"""Probes equal scikit-learn's, at every depth of one call; held-out accuracy leaks nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from mechlab.analysis.probes import fit_logistic, fit_ridge, held_out_accuracy

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_logistic_regression_is_that_of_scikit_learn(classes, strength):
    x = RNG.normal(size=(2, 60, 5)) + 1.5
    labels = np.argmax(x[0] @ RNG.normal(size=(5, classes)) + RNG.gumbel(size=(60, classes)), 1)
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, fit_logistic(jnp.asarray(x), jnp.asarray(labels), classes=classes, C=strength))
    for depth in range(2):
        theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x[depth], labels)
        coef, intercept = theirs.coef_.T, theirs.intercept_
        if classes == 2:
            coef, intercept = np.pad(coef, ((0, 0), (1, 0))), np.pad(intercept, (1, 0))
        np.testing.assert_allclose(found.weights[depth], coef, atol=2e-5)
        np.testing.assert_allclose(found.bias[depth], intercept, atol=2e-5)


def test_separable_data_in_float32_stay_finite_and_are_separated():
    x = np.concatenate([RNG.normal(size=(30, 3)) - 20, RNG.normal(size=(30, 3)) + 20])
    labels = np.repeat([0, 1], 30)
    probe = fit_logistic(jnp.asarray(x), jnp.asarray(labels), C=1e4)
    assert np.isfinite(probe.weights).all() and ((probe(jnp.asarray(x))[:, 1] > 0) == labels).all()


def test_ridge_is_that_of_scikit_learn():
    x, y = RNG.normal(size=(3, 40, 5)) + 2, RNG.normal(size=(40, 2))
    found = fit_ridge(jnp.asarray(x), jnp.asarray(y), penalty=3.0)
    for depth in range(3):
        theirs = Ridge(alpha=3.0).fit(x[depth], y)
        np.testing.assert_allclose(found.weights[depth], theirs.coef_.T, atol=1e-4)
        np.testing.assert_allclose(found.bias[depth], theirs.intercept_, atol=1e-4)
        np.testing.assert_allclose(found(jnp.asarray(x))[depth], theirs.predict(x[depth]), atol=1e-4)


def test_held_out_accuracy_finds_what_is_there_and_only_that():
    labels = np.arange(300) % 3
    noise, signal = RNG.normal(size=(300, 4)), RNG.normal(size=(300, 4))
    signal[:, :3] += 6 * np.eye(3)[labels]
    train, test = np.arange(200), np.arange(200, 300)
    found = held_out_accuracy(jnp.asarray([noise, 1e3 * signal]), labels, train, test, classes=3)
    assert found[0] < 0.5 and found[1] > 0.97
    with pytest.raises(ValueError, match="share 1 items, such as 200"):
        held_out_accuracy(jnp.asarray([noise]), labels, np.arange(201), test, classes=3)


def test_bad_input_is_refused():
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="every class"):
        fit_logistic(x, jnp.asarray([0, 1, 0, 1]), classes=3)
    with pytest.raises(ValueError, match="N items"):
        fit_logistic(x, jnp.asarray([0, 1, 0]))
    with pytest.raises(ValueError, match="integer"):
        fit_logistic(x, jnp.asarray([0.0, 1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="C > 0"):
        fit_logistic(x, jnp.asarray([0, 1, 0, 1]), C=0)
    with pytest.raises(ValueError, match="positive penalty"):
        fit_ridge(x, x, penalty=0)
    with pytest.raises(ValueError, match="y: wanted"):
        fit_ridge(x, jnp.zeros(4))
