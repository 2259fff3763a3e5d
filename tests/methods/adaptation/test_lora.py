"""LoRA and its variants as adapters: the battery of every adapter, the papers' starting points, and LoRA+'s rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechlab.core import select
from mechlab.core.kernel_forms import as_array
from mechlab.core.transforms import AdapterState, on_state
from mechlab.methods.adaptation.lora import (
    beside,
    dora,
    lora,
    lora_ga,
    loraplus,
    normal_init,
    olora,
    pissa,
    uniform_init,
)
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.models.transformer import llama, transformer


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


def attention():
    """Kernels in all four layouts."""
    shapes = {"q": (2, 8, 2, 3), "o": (2, 2, 3, 8), "up": (2, 8, 10)}
    kernels = {
        name: {"kernel": jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)}
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {"blocks": kernels, "head": {"kernel": kernels["up"]["kernel"][0]}}


def variants(params):
    """Every variant, for rank 2; the gradients are any array of the right shape."""
    return {
        "lora": lora(2),
        "dora": dora(2),
        "pissa": pissa(2),
        "pissa fast": pissa(2, iterations=4),
        "olora": olora(2, alpha=3.0),
        "lora_ga": lora_ga(2, jax.tree.map(lambda x: x[..., ::-1], params)),
    }


@pytest.mark.parametrize("name", variants(attention()))
def test_every_variant_starts_at_the_base_and_trains_every_layout(name):
    params = attention()
    adapter = variants(params)[name]
    state = adapter.init(jax.random.key(1), params)
    merged = adapter.merge(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, params)
    assert state.train["blocks/q/kernel"]["A"].shape == (2, 8, 2) and state.train["blocks/q/kernel"]["B"].shape == (
        2,
        2,
        6,
    )
    assert state.train["blocks/o/kernel"]["A"].shape == (2, 6, 2) and state.train["blocks/o/kernel"]["B"].shape == (
        2,
        2,
        8,
    )
    # Every trained number has an effect: no factor is used twice or dropped.
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.train)
    loss = on_state(adapter, params, lambda p: sum((x**3).sum() for x in jax.tree.leaves(p)))
    for gradient in jax.tree.leaves(jax.grad(loss)(moved, state.fixed)):
        assert float(jnp.abs(gradient).min()) > 0


def test_the_change_is_the_scaled_difference_from_the_start():
    params = attention()
    adapter = olora(2, alpha=3.0)
    state = adapter.init(jax.random.key(0), params)
    moved = AdapterState(jax.tree.map(lambda leaf: leaf + 0.2, state.train), state.fixed)
    merged = adapter.merge(params, moved)["blocks"]["o"]["kernel"]
    now, start = moved.train["blocks/o/kernel"], state.fixed["blocks/o/kernel"]
    change = 1.5 * (now["A"] @ now["B"] - start["A"] @ start["B"])
    np.testing.assert_allclose(
        merged, params["blocks"]["o"]["kernel"] + change.reshape(2, 2, 3, 8), rtol=1e-4, atol=1e-5
    )


def test_starting_points_are_the_papers(vectors):
    """In the vectors' layout (out, in), through products and projectors, since signs are free."""
    v = vectors("bone")
    rank = int(v["rank"])
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(v["W"].T)}

        def start(adapter):
            ab = adapter.init(jax.random.key(0), params).train["kernel"]
            return np.asarray(ab["A"]), np.asarray(ab["B"])

        a, b = start(pissa(rank))
        np.testing.assert_allclose((a @ b).T, v["pissa_BA"], atol=1e-10)
        np.testing.assert_allclose(v["W"] - (a @ b).T, v["pissa_residual"], atol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), v["pissa_sqrtS"], atol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), v["pissa_sqrtS"], atol=1e-10)
        twice = start(pissa(rank, alpha=2 * rank))
        np.testing.assert_allclose(2 * (twice[0] @ twice[1]).T, v["pissa_BA"], atol=1e-10)

        a, b = start(olora(rank))
        np.testing.assert_allclose((a @ b).T, v["olora_BA"], atol=1e-10)
        np.testing.assert_allclose(v["W"] - (a @ b).T, v["olora_residual"], atol=1e-10)
        np.testing.assert_allclose(b @ b.T, np.eye(rank), atol=1e-10)

        a, b = start(lora_ga(rank, {"kernel": jnp.asarray(v["grad_W"].T)}, gamma=16.0))
        c = 12**0.25 / 4
        np.testing.assert_allclose(a @ a.T / c**2, v["loraga_A_rowspace_proj"], atol=1e-8)
        np.testing.assert_allclose(b.T @ b / c**2, v["loraga_B_colspace_proj"], atol=1e-8)


def test_lora_ga_scales_by_the_root_of_the_rank():
    params = attention()
    adapter = lora_ga(2, params, alpha=6.0, pattern="head/kernel")
    state = adapter.init(jax.random.key(0), params)
    ab = state.train["head/kernel"]
    moved = AdapterState({"head/kernel": {"A": ab["A"], "B": ab["B"] + 1}}, state.fixed)
    change = adapter.merge(params, moved)["head"]["kernel"] - params["head"]["kernel"]
    np.testing.assert_allclose(change, 6 / np.sqrt(2) * ab["A"].sum(1, keepdims=True) * jnp.ones(10), rtol=1e-4)


def test_dora_trains_lengths_apart_from_directions():
    params = {"kernel": attention()["head"]["kernel"]}
    adapter = dora(2)
    train = adapter.init(jax.random.key(0), params).train["kernel"]
    np.testing.assert_allclose(train["m"], np.linalg.norm(params["kernel"], axis=0), rtol=1e-6)
    moved = AdapterState({"kernel": {"A": train["A"], "B": train["B"] + 0.3, "m": 2 * train["m"]}})
    merged = adapter.merge(params, moved)["kernel"]
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), 2 * train["m"], rtol=1e-5)
    direction = params["kernel"] + train["A"] @ (train["B"] + 0.3)
    np.testing.assert_allclose(
        merged / jnp.linalg.norm(merged, axis=0), direction / jnp.linalg.norm(direction, axis=0), rtol=1e-4
    )
    # No gradient through the norm: that of A is along m / |V| alone.
    gradient = jax.grad(lambda ab: adapter.merge(params, AdapterState({"kernel": ab}))["kernel"].sum())(
        moved.train["kernel"]
    )
    weights = moved.train["kernel"]["m"] / jnp.linalg.norm(direction, axis=0)
    np.testing.assert_allclose(gradient["A"], jnp.ones((8, 1)) * (moved.train["kernel"]["B"] @ weights), rtol=1e-4)


def test_loraplus_moves_b_sixteen_times_as_fast():
    params = attention()
    train = lora(2).init(jax.random.key(0), params).train
    optimiser = loraplus(0.5, optimiser=optax.sgd)
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, train), optimiser.init(train), train)
    for ab in updates.values():
        assert float(ab["A"].max()) == float(ab["A"].min()) == -0.5
        assert float(ab["B"].max()) == float(ab["B"].min()) == -8.0


def test_variants_refuse_what_they_cannot_start_from():
    params = attention()
    key = jax.random.key(0)
    for make in (dora, pissa, olora, lambda rank: lora_ga(rank, params)):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            make(0)
    for make in (dora, pissa, olora):
        with pytest.raises(ValueError, match='rank 7 is above what "blocks/'):
            make(7).init(key, params)
    with pytest.raises(ValueError, match="rank 4 is above half of"):
        lora_ga(4, params).init(key, params)
    with pytest.raises(ValueError, match="gradients of the loss at the base are needed"):
        lora_ga(1, None)
    with pytest.raises(ValueError, match=r'"head/kernel" needs a gradient of shape \(8, 10\), got none'):
        lora_ga(1, {"blocks": params["blocks"]}).init(key, params)
    with pytest.raises(ValueError, match="gamma must be positive"):
        lora_ga(1, params, gamma=0.0)
    with pytest.raises(ValueError, match="ratio must be positive"):
        loraplus(0.1, ratio=0.0)
    with pytest.raises(ValueError, match='"kernel" has an output whose weights are all zero'):
        dora(1).init(key, {"kernel": jnp.zeros((3, 3))})


DECODER = transformer(llama(vocabulary=11, layers=2, width=8, heads=2, hidden=12, context=8))
EVERY_KERNEL = "blocks/attn/[qkvo]/kernel|blocks/mlp/*/kernel"


@pytest.mark.parametrize("make", [lora, pissa, olora])
def test_beside_acts_as_merged_in_value_and_gradient(make):
    params, tokens = DECODER.init(jax.random.key(0)), jnp.asarray([[1, 5, 2, 7]])
    adapter = make(2, pattern=EVERY_KERNEL, alpha=6.0)
    state = adapter.init(jax.random.key(1), params)
    train = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), state.train)

    def loss(train, build):
        return jnp.square(DECODER.apply({"params": build(params, AdapterState(train, state.fixed))}, tokens)).mean()

    def unmerged(params, state):
        return beside(params, state, scale=3.0)

    merged, apart = (jax.jit(jax.value_and_grad(lambda x, f=f: loss(x, f)))(train) for f in (adapter.merge, unmerged))
    assert abs(float(loss(state.train, unmerged)) - float(apart[0])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), apart, merged)


def test_one_program_serves_many_adapters_beside_one_base():
    params = DECODER.init(jax.random.key(0))
    adapter, tokens = lora(2, pattern=EVERY_KERNEL), jnp.asarray([[1, 5, 2], [3, 3, 9]])

    def trained(key):
        train = adapter.init(key, params).train
        return AdapterState({path: ab | {"B": jax.random.normal(key, ab["B"].shape)} for path, ab in train.items()})

    many = jax.vmap(trained)(jax.random.split(jax.random.key(1), 2))
    served = jax.vmap(lambda state, text: DECODER.apply({"params": beside(params, state)}, text[None])[0])(many, tokens)
    for i in range(2):
        merged = adapter.merge(params, jax.tree.map(lambda leaf, i=i: leaf[i], many))
        np.testing.assert_allclose(served[i], DECODER.apply({"params": merged}, tokens[i][None])[0], atol=1e-5)
    assert float(jnp.abs(served[0] - served[1]).max()) > 1e-2


def test_beside_refuses_what_has_no_such_form(params):
    adapter = dora(2)
    with pytest.raises(ValueError, match="got A, B, m"):
        beside(params, adapter.init(jax.random.key(0), params))
    with pytest.raises(KeyError, match="nowhere"):
        beside(params, AdapterState({"nowhere/kernel": {"A": jnp.ones((6, 1)), "B": jnp.ones((1, 8))}}))


def test_analysis_that_needs_a_kernel_refuses_one_with_a_change_beside_it(params):
    path, kernel = next(iter(select.get(params, "**/kernel").items()))
    state = AdapterState({path: {"A": jnp.ones((kernel.shape[0], 1)), "B": jnp.ones((1, kernel.shape[1]))}})
    low = beside(params, state)
    for key in path.split("/"):
        low = low[key]
    with pytest.raises(TypeError, match="merge the adapter"):
        as_array(low, jnp.float32)
