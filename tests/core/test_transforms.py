"""Transforms and adapters: the shared battery on full and bias tuning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core import select
from mechlab.core.transforms import AdapterState, compose, on_state, tune
from tests.models.tiny import TOKENS, decoder

PATTERNS = ["**", "**/bias", "**/attn/[qv]/kernel|unembed/**"]


def params_of(kind: str) -> Any:
    params = decoder(kind)[1]
    # One leaf in another dtype, to see that dtypes are kept.
    return params | {"final_norm": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["final_norm"])}


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x, y in zip(select.paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        np.testing.assert_array_equal(x, y, err_msg=path)


def moved(state: AdapterState) -> AdapterState:
    return state._replace(train=jax.tree.map(lambda x: x + jnp.asarray(0.5, x.dtype), state.train))


def test_compose_applies_left_to_right() -> None:
    assert compose(lambda p: p + 1, lambda p: p * 10, str)(2) == "30"
    assert compose()(5) == 5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tune_is_the_identity_at_init(pattern: str) -> None:
    params, adapter = params_of("gpt2"), tune(pattern)
    assert_equal(adapter.merge(params, adapter.init(jax.random.key(0), params)), params)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merge_changes_matching_leaves_only_and_keeps_structure_and_dtype(pattern: str) -> None:
    params, adapter = params_of("gpt2"), tune(pattern)
    before = jax.tree.map(np.array, params)
    merged = adapter.merge(params, moved(adapter.init(jax.random.key(0), params)))
    assert_equal(params, jax.tree.map(jnp.asarray, before))
    assert jax.tree.map(lambda x: (x.dtype, x.shape), merged) == jax.tree.map(lambda x: (x.dtype, x.shape), params)
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)]
    assert changed == jax.tree.leaves(select.mask(params, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merge_under_jit_equals_eager(pattern: str) -> None:
    params, adapter = params_of("gpt2"), tune(pattern)
    state = moved(jax.jit(adapter.init)(jax.random.key(0), params))
    assert_equal(jax.jit(adapter.merge)(params, state), adapter.merge(params, state))


def test_on_state_gives_gradients_of_the_state_only() -> None:
    model, params = decoder("gpt2")
    adapter = tune("**/mlp/*/bias")
    state = adapter.init(jax.random.key(0), params)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.square(model.apply({"params": params}, tokens)).mean()

    gradient = jax.jit(jax.grad(on_state(adapter, params, loss)))(state.train, state.fixed, TOKENS)
    full = jax.grad(loss)(params, TOKENS)
    assert set(gradient) == {"blocks/mlp/up/bias", "blocks/mlp/down/bias"}
    for path, g in gradient.items():
        assert g.any()
        np.testing.assert_allclose(g, select.get(full, path)[path], rtol=1e-5, atol=1e-6)


def test_full_tuning_follows_plain_gradient_descent() -> None:
    model, params = decoder("gpt2")
    adapter = tune("**")
    state = adapter.init(jax.random.key(0), params)

    def loss(params: Any) -> jax.Array:
        return jnp.square(model.apply({"params": params}, TOKENS)).mean()

    plain = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    step = jax.grad(on_state(adapter, params, loss))(state.train, state.fixed)
    tuned = adapter.merge(params, AdapterState(jax.tree.map(lambda x, g: x - 0.1 * g, state.train, step)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tuned, plain)


def test_adapters_map_over_a_batch_of_states() -> None:
    params, adapter = decoder("gpt2")[1], tune("**/bias")
    state = adapter.init(jax.random.key(0), params)
    two = jax.tree.map(lambda x: jnp.stack([x, x + 1]), state)
    merged = jax.vmap(adapter.merge, (None, 0))(params, two)
    for i in range(2):
        one = adapter.merge(params, jax.tree.map(lambda x, i=i: x[i], two))
        assert_equal(jax.tree.map(lambda x, i=i: x[i], merged), one)


def test_tune_refuses_a_pattern_without_a_match() -> None:
    with pytest.raises(KeyError, match="Did you mean"):
        tune("blocks/attn/q/kernels").init(jax.random.key(0), decoder("gpt2")[1])
