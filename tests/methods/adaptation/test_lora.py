"""LoRA as an adapter: the battery of every adapter, and its own numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core import select
from mechlab.core.transforms import AdapterState, on_state
from mechlab.methods.adaptation.lora import lora, normal_init, uniform_init
from mechlab.models.mlp import MLPConfig, mlp


@pytest.fixture
def params():
    return mlp(MLPConfig(widths=(6, 8, 5, 3))).init(jax.random.key(0))


def test_before_training_nothing_changes(params):
    adapter = lora(2)
    merged = adapter.merge(params, adapter.init(jax.random.key(1), params))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merge_adds_the_scaled_product_and_leaves_its_input_alone(params):
    adapter = lora(2, alpha=6.0)
    before = jax.tree.map(np.array, params)
    state = adapter.init(jax.random.key(1), params)
    state = AdapterState(jax.tree.map(lambda leaf: leaf + 1, state.train))
    merged = adapter.merge(params, state)
    for path, ab in state.train.items():
        expected = np.asarray(select.get(params, path)[path]) + 3.0 * np.asarray(ab["A"]) @ np.asarray(ab["B"])
        np.testing.assert_allclose(select.get(merged, path)[path], expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for path, bias in select.get(params, "**/bias").items():
        np.testing.assert_array_equal(select.get(merged, path)[path], bias)


def test_rank_one_costs_in_plus_out_per_matrix():
    params = mlp(MLPConfig(widths=(784, 256, 256, 10))).init(jax.random.key(0))
    state = lora(1).init(jax.random.key(1), params)
    assert select.count(state.train) == 784 + 4 * 256 + 10


def test_the_change_has_the_rank(params):
    adapter = lora(2)
    state = adapter.init(jax.random.key(1), params)
    keys = iter(jax.random.split(jax.random.key(2), 6))
    state = AdapterState(jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), state.train))
    change = jax.tree.map(jnp.subtract, adapter.merge(params, state), params)
    for kernel in select.get(change, "**/kernel").values():
        assert np.linalg.matrix_rank(np.asarray(kernel), tol=1e-4) == 2


def test_both_initialisations_have_their_variance():
    first, second = jax.random.split(jax.random.key(0))
    assert float(uniform_init(first, (400, 50), 400).std()) == pytest.approx(np.sqrt(1 / (3 * 400)), rel=0.02)
    assert float(normal_init(second, (400, 50), 400).std()) == pytest.approx(np.sqrt(1 / 400), rel=0.02)


def test_only_the_state_gets_a_gradient(params):
    adapter = lora(2, init=normal_init)
    state = adapter.init(jax.random.key(1), params)
    loss = on_state(adapter, params, lambda p: sum((k**2).sum() for k in select.get(p, "**/kernel").values()))
    grads = jax.jit(jax.grad(loss))(state.train, state.fixed)
    assert jax.tree.structure(grads) == jax.tree.structure(state.train)
    assert all(float(jnp.abs(g["B"]).max()) > 0 for g in grads.values())


def test_stacked_kernels_equal_one_by_one():
    kernels = jax.random.normal(jax.random.key(0), (3, 4, 5))
    adapter = lora(2)
    state = adapter.init(jax.random.key(1), {"kernel": kernels})
    state = AdapterState(jax.tree.map(lambda leaf: leaf + 0.1, state.train))
    merged = adapter.merge({"kernel": kernels}, state)["kernel"]
    for layer in range(3):
        one = AdapterState(jax.tree.map(lambda leaf, i=layer: leaf[i], state.train))
        np.testing.assert_allclose(merged[layer], adapter.merge({"kernel": kernels[layer]}, one)["kernel"], rtol=1e-6)


def test_bad_input_is_refused(params):
    with pytest.raises(ValueError, match="at least 1"):
        lora(0)
    with pytest.raises(ValueError, match="rank 4 is above"):
        lora(4).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"\(in, out\)"):
        lora(1, pattern="**/bias").init(jax.random.key(0), params)
    with pytest.raises(KeyError, match="kernel"):
        lora(1, pattern="**/kernels").init(jax.random.key(0), params)
