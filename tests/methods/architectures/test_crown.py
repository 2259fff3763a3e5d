"""CROWN with interval bounds inside: sound, tighter than intervals for two layers, exact where it is linear."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.methods.architectures.crown import crown_bounds, crown_margins, fused_cross_entropy
from mechlab.methods.architectures.interval import ball, margin_bounds, propagate, specification
from mechlab.methods.architectures.networks import dense
from mechlab.methods.architectures.piecewise import Dense, ReLU, Residual, apply
from tests.methods.architectures.nets import two_layers
from tests.methods.architectures.test_interval import SEEDS, example


@jax.jit
def slack(net, x, labels, key, eps):
    """Least room, relative to rounding, of margins and losses in the box to their bounds; from -1 on sound."""
    box = ball(x, eps)
    entering = propagate(net, box).entering
    bound = crown_margins(net, entering, box, labels)
    loss_bound = fused_cross_entropy(net, entering, box, labels)

    def one(drawn):
        logits = apply(net, box.centre + box.radius * drawn)
        margin = jnp.einsum("bsk,bk->bs", specification(labels, 4), logits)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        return jnp.minimum(
            ((margin - bound) / (1e-5 * (1 + jnp.abs(bound)))).min(),
            ((loss_bound - loss) / (1e-4 * (1 + loss_bound))).min(),
        )

    drawn = jax.random.uniform(key, (16, *x.shape), minval=-1, maxval=1)
    return jax.vmap(one)(drawn.at[:8].set(jnp.sign(drawn[:8]))).min()


@given(seed=SEEDS, eps=st.floats(0, 0.5))
def test_margins_and_losses_in_the_box_are_within_their_bounds(seed, eps):
    assert slack(*example(seed), eps) >= -1


def compared(net, x, eps):
    """CROWN's margins and those of intervals, classes 0, 1, 2, 0 being true."""
    box, labels = ball(x, eps), jnp.asarray([0, 1, 2, 0])
    entering = propagate(net, box).entering
    return crown_margins(net, entering, box, labels), margin_bounds(net, entering, labels).lower


@given(seed=SEEDS, eps=st.floats(0.001, 0.5))
def test_two_layers_are_bounded_at_least_as_tightly_as_by_intervals_where_alpha_is_zero(seed, eps):
    assert worst_gain(seed, eps) >= -1e-5


@jax.jit
def worst_gain(seed, eps):
    first, relu, last = two_layers(jax.random.key(seed))
    x = jax.random.uniform(jax.random.key(seed + 1), (4, 5))
    # With no centre above 0 every unstable unit has u ≤ −l.
    low = (ball(x, eps).centre @ first.kernel).max(0)
    net = (Dense(first.kernel, -low), relu, last)
    crown, intervals = compared(net, x, eps)
    return (crown - intervals).min()


def test_two_layers_are_bounded_more_tightly_than_by_intervals_on_average():
    def gain(seed):
        x = jax.random.uniform(jax.random.key(seed + 100), (4, 5))
        crown, intervals = compared(two_layers(jax.random.key(seed)), x, 0.1)
        return (crown - intervals).mean()

    gains = jax.vmap(gain)(jnp.arange(20))
    assert gains.mean() > 0 and (gains > 0).mean() > 0.9


def test_without_a_radius_bounds_and_fused_loss_are_the_values():
    net, x, labels, _ = example(0)

    @jax.jit
    def bounds_and_values(net, x):
        box = ball(x, 0.0)
        entering, logits = propagate(net, box).entering, apply(net, x)
        margin = jnp.einsum("bsk,bk->bs", specification(labels, 4), logits)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        bounds = crown_margins(net, entering, box, labels), fused_cross_entropy(net, entering, box, labels)
        return bounds, (margin, loss)

    for bound, value in zip(*bounds_and_values(net, x), strict=True):
        np.testing.assert_allclose(bound, value, rtol=1e-4, atol=1e-5)


def test_a_linear_network_is_bounded_exactly_where_intervals_are_not():
    net = (Residual((dense(jax.random.key(0), 3, 3),)), dense(jax.random.key(1), 3, 2))
    box = ball(jnp.full((1, 3), 0.5), 0.25)
    entering = propagate(net, box).entering
    rows = jnp.eye(2)[None]
    bound = crown_bounds(net, entering, box, rows)[0]
    corners = jnp.stack(jnp.meshgrid(*[jnp.asarray([0.25, 0.75])] * 3), -1).reshape(-1, 3)
    np.testing.assert_allclose(bound, apply(net, corners).min(0), rtol=1e-5, atol=1e-6)
    assert (bound > propagate(net, box).output.lower[0] + 1e-3).all()


def test_one_unstable_unit_by_hand():
    # x in [-1, 3] through a ReLU: below it the line x (3 > 1), above it 3 (x + 1)/4.
    box, net = ball(jnp.asarray([[1.0]]), 2.0, low=-9, high=9), (ReLU(),)
    entering = propagate(net, box).entering
    lower, minus_upper = crown_bounds(net, entering, box, jnp.asarray([[[1.0], [-1.0]]]))[0]
    np.testing.assert_allclose([lower, -minus_upper], [-1.0, 3.0], rtol=1e-6)
    # The line x is below what an interval knows: ReLU(x) ≥ 0.
    assert lower < propagate(net, box).output.lower[0, 0]


def test_jit_and_grad_go_through_the_backward_pass():
    net, x, labels, _ = example(4)

    def worst(net, eps):
        box = ball(x, eps)
        return crown_margins(net, propagate(net, box).entering, box, labels).sum()

    compiled = jax.jit(worst)
    np.testing.assert_allclose(compiled(net, 0.1), worst(net, 0.1), rtol=1e-4)
    grads = jax.jit(jax.grad(worst))(net, 0.1)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda w, g: w + 1e-4 * g, net, grads)
    step = 1e-4 * sum((g**2).sum() for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(compiled(moved, 0.1) - compiled(net, 0.1), step, rtol=0.1)


def test_bad_input_is_refused_by_name():
    net, x, labels, _ = example(0)
    box = ball(x, 0.1)
    entering = propagate(net, box).entering
    with pytest.raises(ValueError, match="for each of the 11 layers, got 10"):
        crown_margins(net, entering[:-1], box, labels)
    with pytest.raises(ValueError, match="for each of the 11 layers, got none"):
        crown_margins(net, None, box, labels)
    with pytest.raises(ValueError, match=r"missing for layer 1 \(ReLU\)"):
        crown_margins(net, (entering[0], None, *entering[2:]), box, labels)
    with pytest.raises(TypeError, match="type object is not supported"):
        crown_bounds((object(),), (box,), box, jnp.ones((3, 1, 6)))
    with pytest.raises(TypeError, match="last layer must be Dense"):
        crown_margins((ReLU(),), (box,), box, labels)
