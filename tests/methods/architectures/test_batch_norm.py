"""Batch norm: statistics of the clean pass, and running averages by PyTorch's rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechlab.methods.architectures.batch_norm import (
    batch_norms,
    clean_pass,
    fix,
    initial_running,
    running_pull,
    running_targets,
    update_running,
)
from mechlab.methods.architectures.networks import dense
from mechlab.methods.architectures.piecewise import BatchNorm, Moments, apply
from tests.methods.architectures.nets import every_layer


@pytest.fixture
def batch():
    return jax.random.uniform(jax.random.key(0), (7, 6, 6, 2))


def test_the_clean_pass_is_the_fixed_network_s_forward(batch):
    clean = clean_pass(every_layer(jax.random.key(1)), batch)
    np.testing.assert_allclose(clean.output, apply(clean.fixed, batch), rtol=1e-5, atol=1e-6)
    assert clean.counts == (7 * 3 * 3, 7 * 3 * 3)
    assert batch_norms(clean.fixed) == []


def test_normalised_activations_have_scale_and_bias_for_moments(batch):
    x = batch.reshape(7, -1)[:, :4]
    norm = BatchNorm(jnp.asarray([1.0, 2.0, 3.0, 0.5]), jnp.asarray([0.0, 1.0, -1.0, 0.5]))
    y = clean_pass((norm,), x).output
    np.testing.assert_allclose(y.mean(0), norm.bias, atol=1e-6)
    np.testing.assert_allclose(y.std(0), norm.scale, rtol=1e-3)  # 1e-5 is added to the variance


def test_ablations_leave_out_mean_variance_or_affine_map(batch):
    x = batch.reshape(7, -1)[:, :4]
    mean, std = np.asarray(x.mean(0)), np.sqrt(np.asarray(x.var(0)) + 1e-5)
    two = jnp.full(4, 2.0)
    found = {
        "mean only": (BatchNorm(two, two, scaled=False), 2 * (x - mean) + 2),
        "variance only": (BatchNorm(two, two, centred=False), 2 * x / std + 2),
        "no affine": (BatchNorm(None, None), (x - mean) / std),
    }
    for name, (norm, wanted) in found.items():
        np.testing.assert_allclose(clean_pass((norm,), x).output, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_gradients_flow_through_the_statistics(batch):
    net = (dense(jax.random.key(2), 72, 3), BatchNorm(jnp.ones(3), jnp.zeros(3)))
    x = batch.reshape(7, 72)
    weights = jax.random.normal(jax.random.key(3), (7, 3))
    grads = jax.grad(lambda net: (weights * clean_pass(net, x).output).sum())(net)
    # A common shift is taken out by the mean, so the bias before it gets nothing.
    np.testing.assert_allclose(grads[0].bias, 0, atol=1e-5)
    frozen = clean_pass(net, x).moments
    constant = jax.grad(lambda net: (weights * apply(fix(net, frozen), x)).sum())(net)
    assert np.abs(constant[0].bias).max() > 0.1


def test_running_averages_follow_pytorch_s_rule_with_the_unbiased_variance():
    x = jnp.asarray([[1.0], [3.0], [8.0]])
    net = (BatchNorm(jnp.ones(1), jnp.zeros(1)),)
    running = update_running(initial_running(net, x), running_targets(clean_pass(net, x)))
    np.testing.assert_allclose(running[0].mean, [0.1 * 4.0], rtol=1e-6)
    np.testing.assert_allclose(running[0].variance, [0.9 + 0.1 * 13.0], rtol=1e-6)


def test_descent_on_the_pull_is_the_running_average(batch):
    net = every_layer(jax.random.key(1))
    running = initial_running(net, batch)
    targets = running_targets(clean_pass(net, batch))
    value, gradient = jax.value_and_grad(running_pull)(running, targets)
    assert value == 0
    updates, _ = optax.sgd(1.0).update(gradient, optax.sgd(1.0).init(running))
    moved = optax.apply_updates(running, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), moved, update_running(running, targets)
    )
    through = jax.grad(lambda net: running_pull(running, running_targets(clean_pass(net, batch))))(net)
    assert all((g == 0).all() for g in jax.tree.leaves(through))


def test_a_number_of_statistics_that_does_not_fit_is_refused(batch):
    net = every_layer(jax.random.key(1))
    with pytest.raises(ValueError, match="2 batch norms, got 1 running statistics"):
        fix(net, [Moments(jnp.zeros(5), jnp.ones(5))])


@pytest.mark.oracle
def test_running_averages_equal_pytorch_s(batch):
    torch = pytest.importorskip("torch")
    x = np.asarray(batch)
    theirs = torch.nn.BatchNorm2d(2)
    net = (BatchNorm(jnp.ones(2), jnp.zeros(2)),)
    running = initial_running(net, batch)
    for part in (x[:4], x[3:]):
        with torch.no_grad():
            output = theirs(torch.tensor(part.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        clean = clean_pass(net, jnp.asarray(part))
        np.testing.assert_allclose(clean.output, output, rtol=1e-4, atol=1e-5)
        running = update_running(running, running_targets(clean))
    np.testing.assert_allclose(running[0].mean, theirs.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(running[0].variance, theirs.running_var.numpy(), rtol=1e-5)
    theirs.eval()
    with torch.no_grad():
        output = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(apply(fix(net, running), batch), output, rtol=1e-4, atol=1e-5)
