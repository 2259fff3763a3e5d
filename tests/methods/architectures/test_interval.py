"""Interval bounds are sound, exact where they must be, and refuse what is not theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.methods.architectures.batch_norm import clean_pass
from mechlab.methods.architectures.interval import (
    Interval,
    ball,
    between,
    margin_bounds,
    propagate,
    relu_boxes,
    specification,
)
from mechlab.methods.architectures.networks import dense
from mechlab.methods.architectures.piecewise import BatchNorm, Dense, Flatten, ReLU, Residual, apply
from tests.methods.architectures.nets import every_layer, two_layers

SEEDS = st.integers(0, 10_000)


@jax.jit
def example(seed):
    """A fixed network of every layer, inputs, labels, a key."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.uniform(keys[1], (3, 6, 6, 2))
    return clean_pass(every_layer(keys[0]), x).fixed, x, jnp.asarray([0, 3, 1]), keys[2]


def pre_activations(net, x):
    """What enters each ReLU, as values."""
    return [box.centre for box in relu_boxes(net, propagate(net, Interval(x, jnp.zeros_like(x))).entering)]


@jax.jit
def escape(net, x, labels, key, eps):
    """By how much, relative to rounding, points and corners of the box leave the bounds; at most 1 is sound."""
    box = ball(x, eps)
    bounded = propagate(net, box)
    bounds = [*relu_boxes(net, bounded.entering), bounded.output, margin_bounds(net, bounded.entering, labels)]
    drawn = jax.random.uniform(key, (16, *x.shape), minval=-1, maxval=1)
    drawn = drawn.at[:8].set(jnp.sign(drawn[:8]))

    def one(point):
        logits = apply(net, point)
        margins = jnp.einsum("bsk,bk->bs", specification(labels, 4), logits)
        values = [*pre_activations(net, point), logits, margins]
        return jnp.stack([outside(v - b.centre, b) for v, b in zip(values, bounds, strict=True)])

    return jax.vmap(one)(box.centre + box.radius * drawn).max()


def outside(gap, box):
    return ((jnp.abs(gap) - box.radius) / (1e-5 * (1 + jnp.abs(box.centre) + box.radius))).max()


@given(seed=SEEDS, eps=st.floats(0, 0.5))
def test_points_of_the_box_never_escape_the_bounds(seed, eps):
    assert escape(*example(seed), eps) <= 1


@jax.jit
def shrinkage(net, x, labels, small, more):
    """By how much, relative to rounding, bounds at a larger radius fail to contain those at a smaller one."""

    def boxes(eps):
        bounded = propagate(net, ball(x, eps))
        return [*relu_boxes(net, bounded.entering), margin_bounds(net, bounded.entering, labels)]

    pairs = zip(boxes(small), boxes(small + more), strict=True)
    return jnp.stack([outside(jnp.abs(a.centre - b.centre) + a.radius, b) for a, b in pairs]).max()


@given(seed=SEEDS, small=st.floats(0, 0.3), more=st.floats(0.01, 0.3))
def test_bounds_grow_with_eps(seed, small, more):
    assert shrinkage(*example(seed)[:3], small, more) <= 1


def test_a_radius_of_zero_is_the_clean_forward_to_the_bit():
    net, x, labels, _ = example(0)
    bounded = propagate(net, ball(x, 0.0))
    np.testing.assert_array_equal(bounded.output.lower, bounded.output.upper)
    np.testing.assert_array_equal(bounded.output.centre, apply(net, x))
    logits = apply(net, x)
    true = jnp.einsum("bsk,bk->bs", specification(labels, 4), logits)
    np.testing.assert_allclose(margin_bounds(net, bounded.entering, labels).lower, true, rtol=1e-5, atol=1e-6)


def test_one_affine_layer_is_exact_attained_at_a_corner():
    layer = dense(jax.random.key(0), 4, 3)
    box = between(jnp.full((1, 4), 0.2), jnp.full((1, 4), 0.7))
    output = propagate((layer,), box).output
    corners = jnp.stack(jnp.meshgrid(*[jnp.asarray([0.2, 0.7])] * 4), -1).reshape(-1, 4)
    values = apply((layer,), corners)
    np.testing.assert_allclose(output.lower[0], values.min(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(output.upper[0], values.max(0), rtol=1e-6, atol=1e-6)


def test_fused_margins_of_one_layer_are_exact_and_tighter_than_bounded_logits():
    layer = dense(jax.random.key(1), 4, 3)
    box, labels = between(jnp.full((1, 4), 0.2), jnp.full((1, 4), 0.7)), jnp.asarray([1])
    bounded = propagate((layer,), box)
    fused = margin_bounds((layer,), bounded.entering, labels).lower[0]
    corners = jnp.stack(jnp.meshgrid(*[jnp.asarray([0.2, 0.7])] * 4), -1).reshape(-1, 4)
    logits = apply((layer,), corners)
    np.testing.assert_allclose(fused, (logits[:, [1]] - logits[:, [0, 2]]).min(0), rtol=1e-5, atol=1e-6)
    by_logits = bounded.output.lower[0, 1] - bounded.output.upper[0, jnp.asarray([0, 2])]
    assert (fused > by_logits).all()


def test_positive_weights_and_inputs_make_the_bounds_exact():
    keys = jax.random.split(jax.random.key(2), 4)
    net = tuple(ReLU() if i % 2 else Dense(jax.random.uniform(keys[i // 2], (5, 5)), jnp.zeros(5)) for i in range(5))
    box = ball(jax.random.uniform(keys[3], (2, 5), minval=0.2, maxval=0.8), 0.1)
    output = propagate(net, box).output
    np.testing.assert_allclose(output.lower, apply(net, box.lower), rtol=1e-5)
    np.testing.assert_allclose(output.upper, apply(net, box.upper), rtol=1e-5)


@given(seed=SEEDS, factor=st.floats(0.1, 10))
def test_scaling_a_kernel_scales_the_radius(seed, factor):
    layer = dense(jax.random.key(seed), 4, 3)
    box = ball(jnp.full((2, 4), 0.5), 0.2)
    scaled = Dense(factor * layer.kernel, layer.bias)
    before, after = (propagate((each,), box).output.radius for each in (layer, scaled))
    np.testing.assert_allclose(after, factor * before, rtol=1e-5)


def test_the_radius_of_a_stable_unit_is_not_lost_to_rounding():
    # As two ends in float32, 1 ± 1e-9 would be 1 and 1.
    box = Interval(jnp.asarray([[1.0, -1.0]]), jnp.asarray([[1e-9, 1e-9]]))
    np.testing.assert_array_equal(propagate((ReLU(),), box).output.radius, np.float32([[1e-9, 0]]))


def test_the_ball_is_cut_to_valid_inputs_and_takes_eps_per_channel():
    x = jnp.asarray([[[[0.0, 0.5], [1.0, 0.95]]]])
    box = ball(x, jnp.asarray([0.1, 0.2]))
    np.testing.assert_allclose(box.lower, [[[[0, 0.3], [0.9, 0.75]]]], rtol=1e-6)
    np.testing.assert_allclose(box.upper, [[[[0.1, 0.7], [1, 1]]]], rtol=1e-6)
    # Normalised by a mean and a standard deviation per channel: the same pixels, in other units.
    mean, std = jnp.asarray([0.1, 0.3]), jnp.asarray([0.5, 0.25])
    normalised = ball((x - mean) / std, 0.2 / std, low=-mean / std, high=(1 - mean) / std)
    np.testing.assert_allclose(normalised.lower * std + mean, ball(x, 0.2).lower, atol=1e-6)
    np.testing.assert_allclose(normalised.upper * std + mean, ball(x, 0.2).upper, atol=1e-6)


def test_jit_and_grad_go_through_the_bounds():
    net, x, labels, _ = example(3)

    def worst(net, x, eps):
        return margin_bounds(net, propagate(net, ball(x, eps)).entering, labels).lower.sum()

    compiled = jax.jit(worst)
    np.testing.assert_allclose(compiled(net, x, 0.1), worst(net, x, 0.1), rtol=1e-4)
    grads, slope = jax.jit(jax.grad(worst, (0, 2)))(net, x, 0.1)
    numeric = (compiled(net, x, 0.1 + 1e-3) - compiled(net, x, 0.1 - 1e-3)) / 2e-3
    np.testing.assert_allclose(slope, numeric, rtol=0.05)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_bad_input_is_refused_by_name():
    net, x, labels, _ = example(0)
    with pytest.raises(ValueError, match=r"eps must be finite and not negative, got -0\.1"):
        ball(x, -0.1)
    with pytest.raises(ValueError, match=r"x must be within \[low, high\] = \[0.0, 0.5\]"):
        ball(x, 0.1, high=0.5)
    with pytest.raises(ValueError, match="1 of 2 lower ends are above"):
        between(jnp.asarray([0.0, 2.0]), jnp.asarray([1.0, 1.0]))
    with pytest.raises(ValueError, match="ends must have one shape"):
        between(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="lower ends above its upper ends"):
        propagate(net, Interval(x, -jnp.ones_like(x)))
    with pytest.raises(ValueError, match="labels must be 0 to 3, got 0 to 4"):
        specification(jnp.asarray([0, 4]), 4)
    with pytest.raises(ValueError, match="labels must be integers"):
        specification(jnp.asarray([0.0]), 4)
    with pytest.raises(ValueError, match="at least 2 classes"):
        specification(jnp.asarray([0]), 1)
    with pytest.raises(TypeError, match="BatchNorm has no statistics"):
        propagate((BatchNorm(jnp.ones(2), jnp.zeros(2)),), ball(x, 0.1))
    with pytest.raises(TypeError, match=r"type tuple is not supported. Known: Dense"):
        propagate((Flatten(), ()), ball(x, 0.1))
    with pytest.raises(TypeError, match="type object is not supported"):
        apply((object(),), x)
    with pytest.raises(TypeError, match="last layer must be Dense, got ReLU"):
        margin_bounds((ReLU(),), (ball(x, 0.1),), labels)


def test_bounds_that_are_not_finite_are_refused_with_their_layer():
    first, _, last = two_layers(jax.random.key(0))
    broken = (first, ReLU(), Dense(last.kernel.at[0, 0].set(jnp.inf), last.bias))
    with pytest.raises(ValueError, match=r"after layer 2 \(Dense\) are not finite"):
        propagate(broken, ball(jnp.full((1, 5), 0.5), 0.1))


def test_a_residual_layer_without_shortcut_adds_its_input():
    box = Interval(jnp.asarray([[1.0]]), jnp.asarray([[0.5]]))
    net = (Residual((Dense(jnp.asarray([[-2.0]]), jnp.zeros(1)),)),)
    output = propagate(net, box).output
    # -2x + x = -x exactly would have radius 0.5: intervals forget that both branches read the same x.
    np.testing.assert_array_equal([output.centre[0, 0], output.radius[0, 0]], [-1.0, 1.5])
