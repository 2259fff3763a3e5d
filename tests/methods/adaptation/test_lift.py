"""LIFT against the official optimiser's own trajectory, closed forms, limits and invariants."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from mechlab.core import select
from mechlab.methods.adaptation import lift as lift_module
from mechlab.methods.adaptation.lift import (
    BOTTOM,
    BOTTOM_RANK,
    GRADIENT,
    LINEAR,
    MAGNITUDE,
    MIXED,
    MOMENTUM,
    MOVEMENT,
    PRINCIPAL,
    RANDOM,
    RANDOM_PART,
    SMALLEST,
    Filter,
    Selection,
    choose,
    lift,
    principal_indices,
)
from mechlab.methods.adaptation.matrices import get_matrices
from mechlab.methods.adaptation.sparse import SparseState, carry, entry_mask
from mechlab.models.transformer import llama, transformer

RNG = np.random.default_rng(0)
ALL = "**"


compiled_indices = jax.jit(functools.partial(principal_indices, None), static_argnums=(1, 2))


def dense_adam(weights, gradients, rate, eps=1e-6, b1=0.9, b2=0.999):
    """Adam of all entries in float64, eps beside the uncorrected root."""
    w, m, v = np.array(weights, float), 0.0, 0.0
    for t, g in enumerate(np.asarray(gradients, float), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    return w


def trained(optimiser, weights, gradients):
    """Parameters and state after every step, from a compiled update."""
    params = {"kernel": jnp.asarray(weights)}
    state, update, history = optimiser.init(params), jax.jit(optimiser.update), []
    for g in gradients:
        updates, state = update({"kernel": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        history.append((np.asarray(params["kernel"]), state))
    return history


@pytest.fixture(scope="module")
def official(request):
    with np.load(request.path.parents[2] / "vectors" / "34-lift.npz") as stored:
        return dict(stored)


def official_selection(v, **other):
    return Selection(budget_rank=int(v["budget_rank"]), filter_rank=int(v["filter_rank"]), pattern=ALL, **other)


def test_low_rank_and_first_masks_equal_the_vectors(official):
    v = official
    weights, filter_ = jnp.asarray(v["W0"]), Filter(int(v["filter_rank"]))
    np.testing.assert_allclose(lift_module.reduced(None, weights, filter_), v["lowrank"], atol=1e-5)
    assert official_selection(v).entries(*weights.shape) == v["k"]
    for rule, name in ((PRINCIPAL, "mask0_independent"), (MAGNITUDE, "mask0_weightmag")):
        idx = principal_indices(None, weights, int(v["k"]), filter_, rule=rule)
        np.testing.assert_array_equal(idx, np.flatnonzero(v[name]))


def test_the_official_trajectory_with_its_refreshes(official):
    v = official
    every, params = int(v["refresh_every"]), {"kernel": jnp.asarray(v["W0"])}
    selection = official_selection(v)
    optimiser = lift(float(v["lr"]), selection, refresh_every=every, eps=float(v["eps"]))
    history = trained(optimiser, v["W0"], v["grads"])
    for t, (weights, state) in enumerate(history):
        np.testing.assert_array_equal(entry_mask(params, state.idx)["kernel"], v["masks_used"][t], err_msg=f"step {t}")
        np.testing.assert_allclose(weights, v["weights_after"][t], atol=2e-5)
        if (t + 2) % every == 0:  # theirs is refreshed at the end of this step, ours at the start of the next one
            state = carry(state, choose(None, {"kernel": jnp.asarray(weights)}, selection))
        dense = np.zeros(v["W0"].size)
        dense[np.asarray(state.idx["kernel"])] = state.m["kernel"]
        np.testing.assert_allclose(dense.reshape(v["W0"].shape), v["first_moment_after_dense"][t], atol=2e-5)


def test_periods_with_a_refresh_between_them_equal_the_optimiser(official):
    v = official
    selection, every = official_selection(v), int(v["refresh_every"])
    whole = trained(lift(0.05, selection, refresh_every=every), v["W0"], v["grads"])
    params = {"kernel": jnp.asarray(v["W0"])}
    optimiser = lift(0.05, selection, refresh_every=None)
    state = optimiser.init(params)
    for t, g in enumerate(v["grads"]):
        if t and (t + 1) % every == 0:
            state = carry(state, choose(None, params, selection))
        updates, state = optimiser.update({"kernel": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], whole[t][0], atol=1e-6)


def test_all_entries_and_no_refresh_are_dense_adam():
    weights, gradients = RNG.normal(size=(6, 4)).astype("f"), RNG.normal(size=(5, 6, 4)).astype("f")
    optimiser = lift(0.02, Selection(density=1.0, filter_rank=2, pattern=ALL), refresh_every=None)
    final = trained(optimiser, weights, gradients)[-1][0]
    np.testing.assert_allclose(final, dense_adam(weights, gradients, 0.02), atol=1e-5)


def test_untrained_entries_keep_their_bits_and_with_refresh_lie_in_the_union_of_masks():
    weights, gradients = RNG.normal(size=(9, 7)).astype("f"), RNG.normal(size=(12, 9, 7)).astype("f")
    selection = Selection(density=0.2, filter_rank=2, pattern=ALL)
    for every in (None, 3):
        history = trained(lift(0.3, selection, refresh_every=every), weights, gradients)
        masks = [entry_mask({"kernel": weights}, state.idx)["kernel"] for _, state in history]
        union = np.any(masks, 0)
        changed = history[-1][0].view(np.int32) != weights.view(np.int32)
        assert not (changed & ~union).any()
        assert union.sum() == 13 if every is None else union.sum() > 13
        assert changed.sum() == union.sum()


def test_gradients_outside_the_mask_change_nothing():
    weights, gradients = RNG.normal(size=(6, 5)).astype("f"), RNG.normal(size=(4, 6, 5)).astype("f")
    optimiser = lift(0.1, Selection(density=0.3, filter_rank=1, pattern=ALL), refresh_every=None)
    mask = entry_mask({"kernel": weights}, optimiser.init({"kernel": jnp.asarray(weights)}).idx)["kernel"]
    masked = trained(optimiser, weights, gradients * np.asarray(mask))
    np.testing.assert_array_equal(masked[-1][0], trained(optimiser, weights, gradients)[-1][0])


@settings(max_examples=15)
@given(rank=st.sampled_from([1, 3]), seed=st.integers(0, 1000))
def test_selection_ignores_sign_and_follows_permutations(rank, seed):
    rng = np.random.default_rng(seed)
    weights, rows, columns = rng.normal(size=(6, 5)).astype("f"), rng.permutation(6), rng.permutation(5)

    def mask(w):
        idx = compiled_indices(jnp.asarray(w), 8, Filter(rank))
        return np.isin(np.arange(30), idx).reshape(6, 5)

    np.testing.assert_array_equal(mask(-weights), mask(weights))
    np.testing.assert_array_equal(mask(weights[rows][:, columns]), mask(weights)[rows][:, columns])


def test_limits_of_the_rules():
    weights = jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)

    def chosen(rule, rank=5, k=9, key=None, evidence=None):
        idx = principal_indices(key, weights, k, Filter(rank), rule=rule, evidence=evidence)
        assert (np.diff(idx) > 0).all()
        return set(np.asarray(idx).tolist())

    assert chosen(PRINCIPAL) == chosen(MAGNITUDE)  # a filter of full rank filters nothing
    assert chosen(PRINCIPAL, k=20).isdisjoint(chosen(SMALLEST, k=15))
    u, s, v = np.linalg.svd(weights, full_matrices=False)
    first, rest = (u[:, :1] * s[:1]) @ v[:1], (u[:, 1:] * s[1:]) @ v[1:]
    top = lambda scores: set(np.argsort(-np.abs(scores).ravel())[:9].tolist())  # noqa: E731
    # Of rank one, |W_1| = s |u| |v|ᵀ.
    assert chosen(PRINCIPAL, 1) == top(s[0] * np.outer(np.abs(u[:, 0]), np.abs(v[0])))
    assert chosen(BOTTOM_RANK, 1) == top(rest) == chosen(BOTTOM, 4)
    assert chosen(MIXED, 2) == top(first + s[-1] * np.outer(u[:, -1], v[-1]))
    keys = jax.random.split(jax.random.key(0), 4)
    assert chosen(RANDOM, key=keys[0]) != chosen(RANDOM, key=keys[1])
    assert chosen(RANDOM_PART, 5, key=keys[2]) == chosen(MAGNITUDE)
    gradients = jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)
    for rule in (GRADIENT, MOMENTUM):
        assert chosen(rule, evidence=rule.evidence(jnp.zeros((7, 5)), gradients, weights)) == top(gradients)
    moved = MOVEMENT.evidence(gradients, gradients, weights)
    np.testing.assert_allclose(moved, gradients - gradients * weights, rtol=1e-6)
    assert chosen(MOVEMENT, evidence=moved) == set(np.argsort(-np.ravel(moved))[:9].tolist())


def test_ties_go_to_the_lowest_index():
    idx = principal_indices(None, jnp.ones((3, 4)), 5, Filter(3), rule=MAGNITUDE)
    np.testing.assert_array_equal(idx, range(5))


def test_the_randomised_filter_finds_the_entries_of_a_matrix_of_that_rank():
    weights = jnp.asarray(RNG.normal(size=(30, 3)) @ RNG.normal(size=(3, 20)), jnp.float32)
    exact = principal_indices(None, weights, 40, Filter(3))
    random = principal_indices(jax.random.key(0), weights, 40, Filter(3, power=2))
    assert len(set(np.asarray(exact)) & set(np.asarray(random))) >= 39


@pytest.mark.parametrize("rule", [GRADIENT, MOMENTUM, MOVEMENT])
def test_rules_that_read_gradients_choose_at_the_first_one_and_at_refreshes(rule):
    weights, gradients = RNG.normal(size=(5, 4)).astype("f"), RNG.normal(size=(5, 5, 4)).astype("f")
    optimiser = lift(0.1, Selection(density=0.2, filter_rank=1, pattern=ALL, rule=rule), refresh_every=3)
    history = trained(optimiser, weights, gradients)
    seen, before = np.zeros((5, 4)), weights
    for t, (after, state) in enumerate(history):
        seen = np.asarray(rule.evidence(seen, gradients[t], before))
        if t in (0, 2):
            scores = seen if rule is MOVEMENT else np.abs(seen)
            wanted = np.sort(np.argsort(-scores.ravel(), kind="stable")[:4])
        np.testing.assert_array_equal(state.idx["kernel"], wanted)
        before = after


def decoder():
    model = transformer(llama(vocabulary=11, layers=2, width=8, heads=2, kv_heads=1, hidden=12, context=8))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), shapes)


def test_every_layer_of_a_decoder_has_its_own_svd_and_embeddings_and_norms_stay():
    params = decoder()
    entries = jax.jit(lambda params: choose(None, params, Selection(density=0.1, filter_rank=2)))(params)
    assert set(entries) == set(select.get(params, LINEAR)) and len(entries) == 7
    for path, stack in get_matrices(params, "**/mlp/down/kernel|**/attn/o/kernel").items():
        for layer in range(2):
            k = entries[path].shape[-1]
            np.testing.assert_array_equal(entries[path][layer], compiled_indices(stack[layer], k, Filter(2)))
    optimiser = lift(0.1, Selection(density=0.1, filter_rank=2), refresh_every=2)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(lambda g, params: optimiser.update(g, optimiser.init(params), params))(gradients, params)
    marked = jax.tree.map(np.asarray, entry_mask(params, entries))
    for path, change in select.get(updates, ALL).items():
        np.testing.assert_array_equal(change != 0, select.get(marked, path)[path], err_msg=path)


def test_lanes_of_rates_under_vmap_equal_single_runs():
    weights, gradients = RNG.normal(size=(6, 5)).astype("f"), RNG.normal(size=(5, 6, 5)).astype("f")
    selection = Selection(density=0.2, filter_rank=2, pattern=ALL)

    def final(rate):
        optimiser = lift(rate, selection, refresh_every=2)

        def step(carried, g):
            params, state = carried
            updates, state = optimiser.update({"kernel": g}, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"kernel": jnp.asarray(weights)}
        return jax.lax.scan(step, (start, optimiser.init(start)), jnp.asarray(gradients))[0][0]["kernel"]

    rates = jnp.asarray([0.01, 0.5])
    together = jax.jit(jax.vmap(final))(rates)
    for rate, mine in zip((0.01, 0.5), together, strict=True):
        alone = trained(lift(rate, selection, refresh_every=2), weights, gradients)[-1][0]
        np.testing.assert_allclose(mine, alone, atol=1e-6)


def test_it_composes_with_optax_and_keeps_dtypes():
    params = {"kernel": jnp.asarray(RNG.normal(size=(6, 5)), jnp.bfloat16), "bias": jnp.zeros(5, jnp.bfloat16)}
    sparse = lift(optax.linear_schedule(0.1, 0.0, 3), Selection(density=0.2, filter_rank=2, pattern="kernel"))
    optimiser = optax.multi_transform({"lift": sparse, "adam": optax.adam(0.1)}, {"kernel": "lift", "bias": "adam"})
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    gradients = jax.tree.map(jnp.ones_like, params)
    for _ in range(4):
        updates, state = update(gradients, state, params)
        assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    assert (np.asarray(updates["bias"], float) != 0).all()
    np.testing.assert_allclose(updates["kernel"], 0, atol=1e-6)  # the schedule has ended


def test_a_matrix_that_is_not_finite_keeps_its_entries_and_fails_under_checkify():
    selection = Selection(density=0.2, filter_rank=1, pattern=ALL)
    optimiser = lift(0.1, selection, refresh_every=1)
    weights = jnp.asarray(RNG.normal(size=(2, 5, 4)), jnp.float32)
    state = optimiser.init({"kernel": weights})._replace(steps=jnp.asarray(1))
    broken = {"kernel": weights.at[1, 0, 0].set(jnp.nan)[:, ::-1]}
    gradients = jax.tree.map(jnp.ones_like, broken)
    _, after = jax.jit(optimiser.update)(gradients, state, broken)
    np.testing.assert_array_equal(after.idx["kernel"][1], state.idx["kernel"][1])
    assert (after.idx["kernel"][0] != state.idx["kernel"][0]).any()
    error, _ = checkify.checkify(jax.jit(optimiser.update))(gradients, state, broken)
    assert '"kernel" is not finite' in (error.get() or "")


def test_a_late_entry_starts_with_a_jump_unless_its_bias_is_corrected():
    weights = np.diag([3.0, 2.0, 1.0]).astype("f")
    for corrected, size in ((False, (1 - 0.9) / np.sqrt(1 - 0.999)), (True, 1.0)):
        selection = Selection(density=1 / 9, filter_rank=3, pattern=ALL)
        optimiser = lift(1.0, selection, refresh_every=None, per_entry_bias_correction=corrected)
        params = {"kernel": jnp.asarray(weights)}
        state = optimiser.init(params)._replace(steps=jnp.asarray(10_000))
        state = carry(state, {"kernel": jnp.asarray([4], jnp.int32)})
        updates, _ = optimiser.update({"kernel": jnp.ones((3, 3))}, state, params)
        assert float(-updates["kernel"][1, 1]) == pytest.approx(size, rel=1e-3)


def test_the_budget_is_that_of_lora_or_a_share():
    assert Selection(budget_rank=2).entries(14, 10) == 48
    assert Selection(budget_rank=128).entries(64, 64) == 64 * 64
    assert Selection(density=0.05).entries(10, 10) == 5
    assert Selection(density=0.05).entries(10, 11) == 6
    assert Selection(density=1e-9).entries(3, 3) == 1


def test_bad_input_is_refused_by_name():
    for wrong, message in (
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, "density must be"),
        ({"budget_rank": 0}, "budget_rank must be at least 1"),
        ({"filter_rank": 0}, "filter_rank must be at least 1"),
        ({"power": -1}, "power must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Selection(**wrong)
    with pytest.raises(ValueError, match="refresh_every must be at least 1"):
        lift(0.1, refresh_every=0)
    matrix = {"mlp": {"up": {"kernel": jnp.ones((4, 6))}}}
    small = Selection(budget_rank=1, filter_rank=2)
    with pytest.raises(ValueError, match=r'filter_rank 5 is above what "mlp/up/kernel" \(4 x 6\)'):
        lift(0.1, Selection(filter_rank=5)).init(matrix)
    with pytest.raises(ValueError, match='"mlp/up/bias" must be a kernel'):
        choose(None, {"mlp": {"up": {"bias": jnp.ones(4)}}}, Selection(pattern="**/bias"))
    with pytest.raises(KeyError, match="mlp/up/kernel"):
        choose(None, matrix, Selection(pattern="mlp/ups/kernel"))
    with pytest.raises(ValueError, match="too many entries for int32"):
        huge = {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}}}
        jax.eval_shape(lambda params: choose(None, params, small), huge)
    with pytest.raises(ValueError, match="update needs params"):
        optimiser = lift(0.1, small)
        optimiser.update(matrix, optimiser.init(matrix))
    for rule in (RANDOM, RANDOM_PART):
        with pytest.raises(ValueError, match="give a key"):
            choose(None, matrix, Selection(budget_rank=1, filter_rank=2, rule=rule))
    with pytest.raises(ValueError, match="give a key"):
        choose(None, matrix, Selection(budget_rank=1, filter_rank=2, power=1))
    with pytest.raises(ValueError, match="give its evidence"):
        choose(None, matrix, Selection(budget_rank=1, filter_rank=2, rule=GRADIENT))
    for k in (0, 25):
        with pytest.raises(ValueError, match="k must be between 1 and the 24 entries"):
            principal_indices(None, matrix["mlp"]["up"]["kernel"], k, Filter(1))


def test_the_state_is_two_floats_and_an_index_per_entry():
    params = {"kernel": jnp.ones((20, 10))}
    state = jax.eval_shape(lift(0.1, Selection(density=0.05, filter_rank=1, pattern=ALL)).init, params)
    assert isinstance(state, SparseState)
    assert {leaf.size for leaf in jax.tree.leaves((state.idx, state.m, state.v))} == {10}
    assert not state.age and not state.evidence
