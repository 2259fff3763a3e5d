"""TauGate against stored vectors of an independent float64 reference, closed forms and limits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from mechlab.core import select
from mechlab.core.edits import Gate, Mask, at, chain
from mechlab.core.sites import Context
from mechlab.core.transforms import AdapterState
from mechlab.methods.adaptation import dopamine as d
from mechlab.models.cnn import CNNConfig, cnn
from mechlab.models.mlp import MLPConfig, mlp


def from_vectors(v, dtype):
    """The stored network as (model, params, state, sharpness)."""
    params = {f"layer_{i}": {"kernel": v[f"W{i}"].astype(dtype), "bias": v[f"b{i}"].astype(dtype)} for i in range(3)}
    train = {
        f"mlp_act.{i}": {"threshold": v[f"tau{i}"].astype(dtype), "gain": v[f"gain{i}"].astype(dtype)} for i in range(2)
    }
    model = mlp(MLPConfig(widths=(7, 11, 6, 4)))
    return model, jax.tree.map(jnp.asarray, params), AdapterState(jax.tree.map(jnp.asarray, train)), v["sharpness"]


def mean_cross_entropy(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_forward_gates_loss_and_gradients_equal_the_vectors(vectors, dtype, tolerance):
    v = vectors("dopamine")
    with jax.enable_x64(dtype is np.float64):
        model, params, state, s = from_vectors(v, dtype)
        x, y = jnp.asarray(v["x"].astype(dtype)), jnp.asarray(v["y"])
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731

        def run(train, hard=False):
            edits = d.taugate_edits(AdapterState(train), sharpness=jnp.asarray(s, dtype), hard=hard)
            logits, acts = model.capture({"params": params, "edits": edits}, x, sites=("mlp_pre",))
            return logits, edits, d.pre_activations(edits, acts)

        logits, edits, pre = run(state.train)
        close(logits, v["logits_soft"])
        close(run(state.train, hard=True)[0], v["logits_hard"])
        for i in range(2):
            gate = edits[f"mlp_act.{i}"]
            close(gate.open(pre[f"mlp_act.{i}"]), v[f"gate_soft{i}"])
            hard = d.taugate_to_mask(edits, pre)[f"mlp_act.{i}"]
            np.testing.assert_array_equal(hard, v[f"gate_hard{i}"].astype(bool))
        loss, grads = jax.value_and_grad(lambda train: mean_cross_entropy(run(train)[0], y))(state.train)
        close(loss, v["loss_soft"])
        for i in range(2):
            close(grads[f"mlp_act.{i}"]["threshold"], v[f"dloss_dtau{i}"])
            close(grads[f"mlp_act.{i}"]["gain"], v[f"dloss_dgain{i}"])


def test_autodiff_equals_the_closed_forms():
    keys = jax.random.split(jax.random.key(0), 5)
    z, delta = jax.random.normal(keys[0], (8, 5)), jax.random.normal(keys[1], (8, 5))
    tau, gain, s = jax.random.normal(keys[2], (5,)), jax.random.normal(keys[3], (5,)), 3.0

    def weighted(z, tau, gain):
        return (delta * d.taugate_apply(z, jax.nn.relu(z), Gate(tau, gain, s))[0]).sum()

    dz, dtau, dgain = jax.grad(weighted, (0, 1, 2))(z, tau, gain)
    g, phi, dphi = jax.nn.sigmoid(s * (z - tau)), jax.nn.relu(z), (z > 0).astype(float)
    np.testing.assert_allclose(dgain, (delta * g * phi).sum(0), rtol=1e-5)
    np.testing.assert_allclose(dtau, -s * (delta * gain * phi * g * (1 - g)).sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dz, delta * gain * (g * dphi + s * g * (1 - g) * phi), rtol=1e-4, atol=1e-6)


@pytest.fixture
def network():
    model = mlp(MLPConfig(widths=(6, 8, 5, 3)))
    params = model.init(jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (16, 6))
    start = d.taugate_init(model.sites)
    keys = iter(jax.random.split(jax.random.key(3), 4))
    state = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), start)
    return model, params, x, state


def test_two_numbers_per_hidden_unit(network):
    model, *_ = network
    state = d.taugate_init(model.sites)
    assert select.count(state.train) == 2 * (8 + 5)
    assert select.count(d.taugate_init(model.sites, train=("gain",), threshold=-jnp.inf).train) == 8 + 5


def test_a_steep_soft_gate_is_the_hard_gate_away_from_the_threshold(network):
    model, params, x, state = network
    soft, hard = d.taugate_edits(state, sharpness=1e4), d.taugate_edits(state, hard=True)
    _, acts = model.capture({"params": params, "edits": hard}, x, sites=("mlp_pre",))
    far = all((jnp.abs(acts[f"mlp_pre.{i}"] - hard[f"mlp_act.{i}"].threshold) > 40 / 1e4).all() for i in range(2))
    assert far
    variables = {"params": params, "edits": soft}
    np.testing.assert_allclose(
        model.apply(variables, x), model.apply({"params": params, "edits": hard}, x), rtol=1e-5, atol=1e-6
    )


def test_a_flat_gate_is_one_half():
    z = jnp.linspace(-3, 3, 7)
    h, g = d.taugate_apply(z, jax.nn.relu(z), Gate(jnp.zeros(7), jnp.full(7, 3.0), 0.0))
    np.testing.assert_array_equal(g, 0.5)
    np.testing.assert_allclose(h, 0.5 * 3 * jax.nn.relu(z))


def test_thresholds_at_minus_infinity_are_the_identity_and_have_finite_gradients(network):
    model, params, x, _ = network
    state = d.taugate_init(model.sites, train=("gain",), threshold=-jnp.inf)

    def run(train):
        edits = d.taugate_edits(AdapterState(train, state.fixed))
        return model.apply({"params": params, "edits": edits}, x)

    np.testing.assert_array_equal(run(state.train), model.apply({"params": params}, x))
    grads = jax.grad(lambda train: run(train).sum())(state.train)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_scaling_the_last_gains_scales_the_logits_less_their_bias(network):
    model, params, x, state = network
    scaled = select.map_at(state, "train/mlp_act.1/gain", lambda gain: 2.5 * gain)
    bias = params["layer_2"]["bias"]
    out = [model.apply({"params": params, "edits": d.taugate_edits(s)}, x) - bias for s in (state, scaled)]
    np.testing.assert_allclose(out[1], 2.5 * out[0], rtol=1e-5, atol=1e-6)


def test_permuting_units_with_everything_of_theirs_changes_nothing(network):
    model, params, x, state = network
    order = jnp.asarray([3, 0, 7, 1, 6, 2, 5, 4])
    moved = jax.tree.map(lambda leaf: leaf, params)
    moved["layer_0"] = {"kernel": params["layer_0"]["kernel"][:, order], "bias": params["layer_0"]["bias"][order]}
    moved["layer_1"] = params["layer_1"] | {"kernel": params["layer_1"]["kernel"][order]}
    shuffled = select.map_at(state, "train/mlp_act.0/*", lambda leaf: leaf[order])
    before = model.apply({"params": params, "edits": d.taugate_edits(state)}, x)
    after = model.apply({"params": moved, "edits": d.taugate_edits(shuffled)}, x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_gating_before_relu_equals_gating_after_it_for_positive_gains(network, hard):
    model, params, x, state = network
    positive = select.map_at(state, "train/*/gain", jnp.abs)
    after = d.taugate_edits(positive, hard=hard)
    before = {name.replace("act", "pre"): gate for name, gate in after.items()}
    out = [model.apply({"params": params, "edits": edits}, x) for edits in (before, after)]
    np.testing.assert_allclose(out[0], out[1], rtol=1e-5, atol=1e-6)


def test_a_sigmoid_gelu_is_a_gate_on_the_identity():
    z = jnp.linspace(-4, 4, 9)
    h, _ = d.taugate_apply(z, z, Gate(jnp.zeros(9), jnp.ones(9), 1.702))
    np.testing.assert_allclose(h, z * jax.nn.sigmoid(1.702 * z), rtol=1e-6)


def test_saturated_gates_do_not_overflow():
    z = jnp.asarray([-1e4, 1e4])
    h, g = d.taugate_apply(z, jax.nn.relu(z), Gate(jnp.zeros(2), jnp.ones(2), 50.0))
    np.testing.assert_array_equal(g, [0, 1])
    assert bool(jnp.isfinite(h).all())


def test_training_hard_gates_is_refused_and_straight_through_trains_them(network):
    model, params, x, state = network

    def total(train, **gate):
        edits = d.taugate_edits(AdapterState(train), **gate)
        return model.apply({"params": params, "edits": edits}, x).sum()

    with pytest.raises(ValueError, match="straight_through"):
        jax.jit(jax.grad(lambda train: total(train, hard=True)))(state.train)
    grads = jax.grad(lambda train: total(train, straight_through=True))(state.train)
    assert all(float(jnp.abs(g).max()) > 0 for g in select.get(grads, "*/threshold").values())
    np.testing.assert_array_equal(total(state.train, straight_through=True), total(state.train, hard=True))


def test_hardening_switches_the_forward_only(network):
    *_, state = network
    soft = d.taugate_edits(state, straight_through=True)
    hard = d.taugate_harden(soft)
    assert all(gate.hard and not gate.straight_through for gate in hard.values())
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(gates) for gates in (soft, hard)))


def test_positive_gain_is_a_softplus(network):
    *_, state = network
    raw = select.map_at(state, "train/*/gain", lambda gain: gain - 5)
    gates = d.taugate_edits(raw, positive_gain=True)
    np.testing.assert_allclose(gates["mlp_act.0"].gain, np.log1p(np.exp(raw.train["mlp_act.0"]["gain"])), rtol=1e-6)


def test_modes_are_a_stack_of_edits_under_vmap(network):
    model, params, x, state = network
    modes = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), state)
    together = jax.vmap(lambda s: model.apply({"params": params, "edits": d.taugate_edits(s)}, x))(modes)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], modes)
        alone = model.apply({"params": params, "edits": d.taugate_edits(one)}, x)
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


def test_readings_of_activity_by_hand():
    gate = Gate(jnp.zeros(2), jnp.ones(2), 10.0)
    pre = {"a": jnp.asarray([[1.0, -1.0], [1.0, 0.1]])}
    found = d.activity({"a": gate}, pre)
    expected = {"pairs_half": 0.75, "pairs_strong": 0.5, "units_strong": 0.5, "units_often": 0.5, "relu": 0.75}
    assert {name: float(x) for name, x in found.items()} == expected
    assert float(d.skipped({"a": gate}, pre)["a"]) == 0.25
    soft = jax.nn.sigmoid(10 * pre["a"])
    np.testing.assert_allclose(d.gate_penalty({"a": gate, "b": gate}, {"a": pre["a"], "b": pre["a"]}), 2 * soft.mean())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), features=st.integers(1, 12))
def test_reading_only_open_rows_gives_the_full_product(seed, features):
    keys = jax.random.split(jax.random.key(seed), 3)
    opened = jax.random.bernoulli(keys[0], 0.4, (features,))
    h = jnp.where(opened, jax.random.normal(keys[1], (features,)), 0)
    kernel = jax.random.normal(keys[2], (features, 3))
    np.testing.assert_allclose(d.gathered_product(h, opened, kernel, features), h @ kernel, rtol=1e-5, atol=1e-5)


def test_attribution_by_hand_and_by_closing_units(network):
    model, params, x, state = network
    edits = d.taugate_edits(state)
    logits, acts = model.capture({"params": params, "edits": edits}, x, sites=("mlp_act.1", "mlp_pre.1"))
    h, kernel = acts["mlp_act.1"], params["layer_2"]["kernel"]
    by_hand = np.mean([np.outer(row, np.ones(3)) * np.asarray(kernel) for row in np.asarray(h)], axis=0)
    np.testing.assert_allclose(d.class_contribution(h, kernel), by_hand, rtol=1e-5, atol=1e-6)
    often = (np.asarray(acts["mlp_pre.1"]) > np.asarray(edits["mlp_act.1"].threshold)).mean(0)
    np.testing.assert_allclose(d.firing(edits["mlp_act.1"], acts["mlp_pre.1"]), often, rtol=1e-6)

    ranked = d.rank_units(h, kernel, logits)
    row, best = 4, int(logits[4].argmax())
    strength = np.abs(np.asarray(h[row]) * np.asarray(kernel[:, best]))
    np.testing.assert_array_equal(ranked[row], np.argsort(-strength, kind="stable"))

    keep = d.keep_without(ranked, 2)
    assert (keep.sum(-1) == 3).all()
    closed = chain(edits, at(model.sites, "mlp_act.1", Mask(keep)))
    after = model.apply({"params": params, "edits": closed}, x)
    expected = logits[row, best] - sum(h[row, i] * kernel[i, best] for i in ranked[row, :2])
    np.testing.assert_allclose(after[row, best], expected, rtol=1e-4, atol=1e-5)


def test_gates_of_a_convolution_are_per_channel():
    model = cnn(CNNConfig(size=(8, 8), channels=(3, 4)))
    params = model.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, 64))
    state = d.taugate_init(model.sites, site="conv_act", train=("gain",), threshold=-jnp.inf)
    assert select.count(state.train) == 7
    closed = select.map_at(state, "train/conv_act.1/gain", jnp.zeros_like)
    logits = model.apply({"params": params, "edits": d.taugate_edits(closed)}, x)
    np.testing.assert_allclose(logits, jnp.broadcast_to(params["head"]["bias"], logits.shape), atol=1e-6)


def test_sharpness_anneals_geometrically():
    values = d.annealed_sharpness(jnp.arange(5), 5)
    np.testing.assert_allclose(values, 10 * 5 ** (np.arange(5) / 4), rtol=1e-5)


def test_bad_input_is_refused_by_name(network):
    model, params, x, state = network
    for sharpness in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="sharpness must be positive"):
            d.taugate_edits(state, sharpness=sharpness)
    broken = select.map_at(state, "train/mlp_act.0/threshold", lambda t: t.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match=r'thresholds at "mlp_act\.0" must not be NaN'):
        d.taugate_edits(broken)
    error, _ = checkify.checkify(jax.jit(lambda s: d.taugate_edits(s)["mlp_act.0"].gain))(broken)
    assert "must not be NaN" in (error.get() or "")
    with pytest.raises(ValueError, match="train must name parts"):
        d.taugate_init(model.sites, train=("tau",))
    with pytest.raises(KeyError, match=r'"mlp_act'):
        d.taugate_init(model.sites, site="mlp_acts")
    wrong = {"mlp_act.0": dataclasses.replace(d.taugate_edits(state)["mlp_act.0"], threshold=jnp.zeros(5))}
    with pytest.raises(ValueError, match=r'site "mlp_act\.0".*\(16, 8\)'):
        model.apply({"params": params, "edits": wrong}, x)
    with pytest.raises(ValueError, match="must agree in their last axis"):
        d.taugate_apply(jnp.ones((2, 3)), jnp.ones((2, 3)), Gate(jnp.zeros(4), jnp.ones(4)))


def test_the_gate_reads_the_pre_activation_of_its_site():
    gate = Gate(jnp.zeros(2), jnp.ones(2), hard=True)
    pre = jnp.asarray([[1.0, -1.0]])
    np.testing.assert_array_equal(gate(jnp.ones((1, 2)), Context(("B", "F"), pre=pre)), [[1.0, 0.0]])
