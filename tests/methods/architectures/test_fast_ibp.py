"""The method against stored vectors (auto_LiRPA and the official regulariser, float64), closed forms and limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis.metrics import cross_entropy
from mechlab.methods.architectures import networks
from mechlab.methods.architectures.batch_norm import clean_pass, fix, initial_running
from mechlab.methods.architectures.crown import crown_margins
from mechlab.methods.architectures.fast_ibp import (
    certify,
    fast_ibp_loss,
    relu_balance,
    relu_regulariser,
    robust_cross_entropy,
    smoothed_eps,
    tightness_regulariser,
    verified,
    verified_error,
)
from mechlab.methods.architectures.interval import (
    Interval,
    ball,
    between,
    margin_bounds,
    propagate,
    relu_boxes,
    specification,
)
from mechlab.methods.architectures.pgd import pgd
from mechlab.methods.architectures.piecewise import ChannelAffine, Conv, Dense, ReLU, Residual, apply
from tests.methods.architectures.nets import channels_first, every_layer, from_torch, images, two_layers


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-4)])
def test_bounds_margins_and_losses_equal_the_vectors(vectors, dtype, tolerance):
    v = vectors("fast_ibp")
    with jax.enable_x64(dtype is np.float64):
        net, x, y = from_torch(v, dtype), images(v["x"], dtype), jnp.asarray(v["y"])
        eps, tolerance_of = dtype(v["eps"]), float(v["tol"])
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731

        clean = clean_pass(net, x)
        close(clean.output, v["logits_train"])
        np.testing.assert_array_equal(specification(y, 4), v["spec_C"])
        box = ball(x, eps)
        bounded = propagate(clean.fixed, box)
        boxes = relu_boxes(clean.fixed, bounded.entering)
        for i, each in enumerate(boxes):
            close(channels_first(each.lower), v[f"pre_lb{i}"])
            close(channels_first(each.upper), v[f"pre_ub{i}"])
        margins = margin_bounds(clean.fixed, bounded.entering, y).lower
        close(margins, v["ibp_margin_lb"])
        crown = crown_margins(clean.fixed, bounded.entering, box, y)
        close(crown, v["crown_backward_margin_lb_with_ibp_intermediate"])
        close(robust_cross_entropy(margins), v["robust_ce"])
        close(verified_error(margins), v["verified_err"].astype(np.float32))

        # τ = 0.95, so that both regularisers are active. In float32 the ratios of radii are less precise.
        loose = 1 if dtype is np.float64 else 10
        tight = tightness_regulariser(boxes, box.radius, tolerance=tolerance_of)
        np.testing.assert_allclose(tight, v["reg_tightness"], rtol=loose * tolerance)
        np.testing.assert_allclose(
            relu_regulariser(boxes, tolerance=tolerance_of), v["reg_relu"], rtol=loose * tolerance
        )
        # The same bounds at a quarter of the target: λ = 0.5 (1 − 1/4).
        loss, terms, _ = fast_ibp_loss(net, x, y, eps, eps_max=4 * eps, tolerance=tolerance_of)
        regularised = terms.weight * (terms.tightness + terms.relu)
        np.testing.assert_allclose(regularised, v["reg_total_at_quarter_eps"], rtol=loose * tolerance)
        close(loss, v["robust_ce"] + v["reg_total_at_quarter_eps"])


def test_the_schedule_equals_the_vectors_and_needs_no_python_step(vectors):
    wanted = vectors("fast_ibp")["sched_eps"]
    options = {"start": 2, "length": 3, "batches": 10, "eps_max": 0.4}
    np.testing.assert_allclose(smoothed_eps(np.arange(60), **options), wanted, rtol=1e-5, atol=1e-7)
    together = jax.jit(jax.vmap(lambda step: smoothed_eps(step, **options)))(jnp.arange(60))
    np.testing.assert_allclose(together, wanted, rtol=1e-5, atol=1e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(smoothed_eps(np.arange(60), **options), wanted, rtol=1e-12)


def test_the_schedule_is_continuous_with_one_slope_at_its_middle():
    values = np.asarray(smoothed_eps(jnp.arange(400), start=1, length=4, batches=100, eps_max=1.0))
    assert values[0] == 0 and (np.diff(values) >= 0).all()
    assert smoothed_eps(400, start=1, length=4, batches=100, eps_max=1.0) == 1
    np.testing.assert_allclose(values[101] - values[100], values[100] - values[99], rtol=0.03)


def test_a_ramp_of_fewer_than_four_steps_is_linear():
    values = [float(smoothed_eps(s, start=1, length=1, batches=2, eps_max=1.0)) for s in range(4)]
    assert values == [0.0, 0.5, 1.0, 1.0]


def test_gain_of_a_layer_is_one_at_ibp_initialisation():
    """(n/2) E|W| = 1: a box of radius 1 through a dense layer and, halved, a ReLU."""
    n = 4096
    layer, _ = networks.ibp_init(jax.random.key(0), (networks.dense(jax.random.key(1), n, 64), _head()))
    np.testing.assert_allclose(layer.kernel.std(), np.sqrt(2 * np.pi) / n, rtol=0.01)
    radius = propagate((layer,), Interval(jnp.zeros((1, n)), jnp.ones((1, n)))).output.radius
    np.testing.assert_allclose(radius.mean() / 2, 1, rtol=0.03)


def _head(inputs=64):
    return networks.dense(jax.random.key(9), inputs, 3)


@pytest.mark.parametrize(
    ("draw", "std"),
    [
        (networks.ibp_init, np.sqrt(2 * np.pi) / 36),
        (networks.xavier_init, np.sqrt(2 / (36 + 9 * 400))),
        (networks.kaiming_init, np.sqrt(2 / 36)),
    ],
)
def test_initialisers_draw_a_convolution_from_its_fan_and_leave_biases_and_the_classifier(draw, std):
    net = (Conv(jnp.zeros((3, 3, 4, 400)), jnp.ones(400)), ReLU(), _head())
    drawn = draw(jax.random.key(0), net)
    np.testing.assert_allclose(drawn[0].kernel.std(), std, rtol=0.03)
    np.testing.assert_array_equal(drawn[0].bias, 1)
    np.testing.assert_array_equal(drawn[2].kernel, net[2].kernel)


def test_orthogonal_kernels_keep_lengths():
    drawn = networks.orthogonal_init(jax.random.key(0), (networks.dense(jax.random.key(1), 8, 8), ReLU(), _head(8)))
    np.testing.assert_allclose(drawn[0].kernel @ drawn[0].kernel.T, np.eye(8), atol=1e-5)


def test_layers_that_read_a_residual_sum_are_halved():
    def drawn(residual):
        body = (networks.dense(jax.random.key(0), 6, 6),)
        second = (networks.dense(jax.random.key(1), 6, 6), ReLU(), networks.dense(jax.random.key(2), 6, 6))
        net = (Residual(body) if residual else body[0], ReLU(), *second, _head(6))
        return networks.ibp_init(jax.random.key(3), net)

    plain, after = drawn(False), drawn(True)
    np.testing.assert_array_equal(after[0].body[0].kernel, plain[0].kernel)
    np.testing.assert_allclose(after[2].kernel, plain[2].kernel / 2)
    np.testing.assert_array_equal(after[4].kernel, plain[4].kernel)


def test_radii_keep_their_size_at_ibp_initialisation_and_explode_at_xavier():
    net = networks.perceptron(jax.random.key(0), (64, *(128,) * 5, 10), batch_norm=False)
    box = ball(jax.random.uniform(jax.random.key(1), (50, 64)), 0.1)

    def growth(net):
        boxes = relu_boxes(net, propagate(net, box).entering)
        return np.asarray([each.radius.mean() / box.radius.mean() for each in boxes])

    ours, theirs = (
        growth(networks.ibp_init(jax.random.key(2), net)),
        growth(networks.xavier_init(jax.random.key(2), net)),
    )
    assert (ours > 1).all() and (ours < 4).all()
    assert (theirs[1:] / theirs[:-1] > 4).all()


def test_robust_cross_entropy_and_verification_by_hand():
    margins = jnp.asarray([[2.0, 0.0], [-1e-6, 3.0]])
    by_hand = np.mean([np.log(1 + np.exp(-2.0) + 1), np.log(1 + np.exp(1e-6) + np.exp(-3.0))])
    np.testing.assert_allclose(robust_cross_entropy(margins), by_hand, rtol=1e-6)
    np.testing.assert_array_equal(verified(margins), [True, False])  # a margin of 0 violates nothing
    assert verified_error(margins) == 0.5


def test_regularisers_by_hand():
    # One layer of two units for one input: centres 3 and −1, radii 1 and 0.5, input radius 0.25.
    box = Interval(jnp.asarray([[3.0, -1.0]]), jnp.asarray([[1.0, 0.5]]))
    radius = jnp.asarray([[0.25]])
    np.testing.assert_allclose(tightness_regulariser([box], radius), (0.5 - 0.25 / 0.75) / 0.5, rtol=1e-6)
    balance = relu_balance(box)
    np.testing.assert_allclose(balance.mean, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(balance.variance, 1, rtol=1e-6)
    np.testing.assert_allclose(relu_regulariser([box]), (0.5 - 1 / 3) / 0.5, rtol=1e-5)
    assert tightness_regulariser([box], 4 * radius) == 0
    # A layer without inactive units adds 0 and still counts.
    active = Interval(jnp.asarray([[3.0, 2.0]]), jnp.asarray([[1.0, 0.5]]))
    np.testing.assert_allclose(relu_regulariser([box, active]), (0.5 - 1 / 3) / 0.5 / 2, rtol=1e-5)
    assert not relu_balance(active).both


@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_regularisers_have_finite_gradients_where_a_side_is_empty(shift):
    def total(centre):
        box = Interval(centre, jnp.full_like(centre, 0.1))
        return relu_regulariser([box]) + tightness_regulariser([box], jnp.ones(1))

    gradient = jax.grad(total)(jnp.asarray([[1.0, -4.0, 0.5]]) + shift)
    assert jnp.isfinite(gradient).all()
    assert (gradient == 0).all() if shift else (jnp.abs(gradient) > 0).any()


@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10))
def test_balance_does_not_depend_on_scale_and_swaps_with_the_sign(seed, factor):
    keys = jax.random.split(jax.random.key(seed))
    centre = jax.random.normal(keys[0], (6, 9))
    box = Interval(centre, 0.1 * jax.random.uniform(keys[1], (6, 9)))
    balance = jax.jit(relu_balance)
    for other in (Interval(factor * box.centre, factor * box.radius), Interval(-box.centre, box.radius)):
        np.testing.assert_allclose(balance(other)[:2], balance(box)[:2], rtol=1e-3, atol=1e-5)


def _batch():
    keys = jax.random.split(jax.random.key(5), 2)
    return every_layer(keys[0]), jax.random.uniform(keys[1], (8, 6, 6, 2)), jnp.arange(8) % 4


def test_while_eps_is_zero_the_loss_is_plain_and_the_regularisers_are_at_full_weight():
    net, x, y = _batch()
    loss, terms, clean = fast_ibp_loss(net, x, y, 0.0, eps_max=0.1)
    np.testing.assert_allclose(terms.robust, cross_entropy(clean.output, y), rtol=1e-6)
    assert terms.weight == 0.5 and terms.tightness > 0
    np.testing.assert_allclose(loss, terms.robust + 0.5 * (terms.tightness + terms.relu), rtol=1e-6)
    tiny, _, _ = fast_ibp_loss(net, x, y, 1e-9, eps_max=0.1)
    np.testing.assert_allclose(tiny, loss, rtol=1e-3)


def test_at_the_target_the_regularisers_are_gone_and_crown_is_intervals():
    net, x, y = _batch()
    loss, terms, clean = fast_ibp_loss(net, x, y, 0.1, eps_max=0.1)
    assert terms.weight == 0 and loss == terms.robust
    margins, _ = certify(clean.fixed, x, y, 0.1)
    np.testing.assert_allclose(loss, robust_cross_entropy(margins), rtol=1e-6)
    assert fast_ibp_loss(net, x, y, 0.1, eps_max=0.1, crown=True)[0] == loss
    half = fast_ibp_loss(net, x, y, 0.05, eps_max=0.1, crown=True, weight=0.0)[0]
    assert half < fast_ibp_loss(net, x, y, 0.05, eps_max=0.1, weight=0.0)[0]


def test_the_loss_under_jit_and_vmap_is_the_plain_one_and_its_gradient_a_difference_quotient():
    net, x, y = _batch()

    def loss(net, eps):
        return fast_ibp_loss(net, x, y, eps, eps_max=0.1, crown=True)[0]

    steps = jnp.asarray([0.0, 0.02, 0.1])
    together = jax.jit(jax.vmap(loss, (None, 0)))(net, steps)
    alone = jax.jit(loss)
    np.testing.assert_allclose(together, [alone(net, eps) for eps in steps], rtol=1e-4)
    np.testing.assert_allclose(together[1], loss(net, 0.02), rtol=1e-4)
    # In float64, so that the step is too short to pass a kink of a ReLU.
    with jax.enable_x64(True):
        x = x.astype(jnp.float64)
        net = jax.tree.map(lambda w: w.astype(jnp.float64), net)
        gradient = jax.jit(jax.grad(loss))(net, 0.02)
        length = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
        ahead, behind = (jax.tree.map(lambda w, g, s=s: w + s * g / length, net, gradient) for s in (1e-5, -1e-5))
        exact = jax.jit(loss)
        np.testing.assert_allclose((exact(ahead, 0.02) - exact(behind, 0.02)) / 2e-5, length, rtol=1e-6)


def test_a_normalisation_as_first_layer_is_a_box_of_eps_over_std():
    net, x, y = _batch()
    fixed = clean_pass(net, x).fixed
    mean, std = jnp.asarray([0.1, 0.3]), jnp.asarray([0.5, 0.25])
    inside = (ChannelAffine(1 / std, -mean / std), *fixed)
    box = ball((x - mean) / std, 0.1 / std, low=-mean / std, high=(1 - mean) / std)
    outside = margin_bounds(fixed, propagate(fixed, box).entering, y).lower
    np.testing.assert_allclose(certify(inside, x, y, 0.1)[0], outside, rtol=1e-4, atol=1e-4)


def test_errors_are_ordered_clean_attacked_verified_input_by_input():
    net, x, y = _batch()
    fixed = fix(net, initial_running(net, x))

    @jax.jit
    def judged(eps):
        worst = pgd(jax.random.key(1), lambda x: apply(fixed, x), x, y, eps, steps=5, restarts=2)
        right = [apply(fixed, points).argmax(-1) == y for points in (x, worst)]
        return worst, *right, verified(certify(fixed, x, y, eps)[0])

    for eps in (0.0, 0.02, 0.2):
        worst, clean, attacked, certain = judged(eps)
        assert (jnp.abs(worst - x) <= eps + 1e-6).all() and (worst >= 0).all() and (worst <= 1).all()
        assert (clean | ~attacked).all() and (attacked | ~certain).all()


def test_the_attack_finds_the_worst_corner_of_a_linear_model():
    layer = networks.dense(jax.random.key(0), 6, 2)
    x, y = jax.random.uniform(jax.random.key(1), (5, 6), minval=0.3, maxval=0.7), jnp.asarray([0, 1, 0, 1, 0])
    worst = pgd(jax.random.key(2), lambda x: apply((layer,), x), x, y, 0.2, steps=20)
    signs = jnp.where(y[:, None] == 0, 1, -1) * jnp.sign(layer.kernel[:, 1] - layer.kernel[:, 0])
    np.testing.assert_allclose(worst, x + 0.2 * signs, atol=1e-6)


def test_bad_input_is_refused_by_name():
    net, x, y = _batch()
    box = between(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    for tolerance in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\]"):
            tightness_regulariser([box], jnp.ones(1), tolerance=tolerance)
        with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\]"):
            relu_regulariser([box], tolerance=tolerance)
    with pytest.raises(ValueError, match="at least one ReLU"):
        relu_regulariser([])
    for start, length in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="start, length and batches must be at least 1"):
            smoothed_eps(0, start=start, length=length, batches=2, eps_max=0.1)
    with pytest.raises(ValueError, match="eps_max must not be negative"):
        smoothed_eps(0, start=1, length=1, batches=2, eps_max=-0.1)
    with pytest.raises(ValueError, match="eps must be finite and not negative"):
        fast_ibp_loss(net, x, y, -0.1, eps_max=0.1)
    with pytest.raises(ValueError, match="eps_max must be positive"):
        fast_ibp_loss(net, x, y, 0.0, eps_max=0.0)
    with pytest.raises(ValueError, match="x must be within"):
        fast_ibp_loss(net, x + 1, y, 0.05, eps_max=0.1)
    with pytest.raises(ValueError, match="labels must be 0 to 3"):
        certify(clean_pass(net, x).fixed, x, y + 1, 0.1)
    with pytest.raises(ValueError, match="steps and restarts must be at least 1"):
        pgd(jax.random.key(0), lambda x: x, x, y, 0.1, steps=0)
    with pytest.raises(TypeError, match="last layer must be Dense, got ReLU"):
        networks.ibp_init(jax.random.key(0), (Dense(jnp.ones((2, 2)), jnp.zeros(2)), ReLU()))


def test_cnn_7_has_its_seven_layers_and_two_layers_are_two():
    net = networks.cnn7(jax.random.key(0), (6, 6, 1), 4, width=2, hidden=5, batch_norm=True)
    assert sum(isinstance(layer, Conv | Dense) for layer in net) == 7
    assert clean_pass(net, jnp.zeros((3, 6, 6, 1))).output.shape == (3, 4)
    assert apply(two_layers(jax.random.key(0)), jnp.zeros((2, 5))).shape == (2, 3)
