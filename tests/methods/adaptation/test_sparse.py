"""The sparse optimiser and what can be asked of a set of entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.methods.adaptation.sparse import (
    SparseState,
    carry,
    density,
    entry_mask,
    hidden_channels,
    jaccard,
    optimiser_bytes,
    perturb_selected,
    sparse_adam,
)

RNG = np.random.default_rng(0)
PARAMS = {"mlp": {"down": {"kernel": jnp.asarray(RNG.normal(size=(2, 10, 4)), jnp.float32)}}, "bias": jnp.ones(3)}
compiled_carry = jax.jit(carry)
DOWN = "mlp/down/kernel"


def entries_of(*rows):
    return {DOWN: jnp.asarray(rows, jnp.int32)}


def test_marks_density_and_updates_agree():
    entries = entries_of([0, 5, 39], [1, 2, 3])
    mask = entry_mask(PARAMS, entries)
    assert not mask["bias"].any()
    flat = np.asarray(mask["mlp"]["down"]["kernel"]).reshape(2, -1)
    assert [np.flatnonzero(row).tolist() for row in flat] == [[0, 5, 39], [1, 2, 3]]
    assert density(PARAMS, entries) == 6 / 80
    optimiser = sparse_adam(0.1, entries, weight_decay=0.5)
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, PARAMS), optimiser.init(PARAMS), PARAMS)
    kernel = PARAMS["mlp"]["down"]["kernel"]
    # A first step is the learning rate, up to eps beside the root; the decay acts on trained entries only.
    wanted = np.where(mask["mlp"]["down"]["kernel"], -0.1 - 0.1 * 0.5 * kernel, 0)
    np.testing.assert_allclose(updates["mlp"]["down"]["kernel"], wanted, atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 5, 12]))
def test_carrying_equals_scattering_and_gathering(seed, k):
    rng = np.random.default_rng(seed)
    old, new = (np.sort(rng.permuted(np.tile(np.arange(20), (2, 1)), axis=1)[:, :k], axis=1) for _ in range(2))
    m, v, age = rng.normal(size=(2, k)), rng.normal(size=(2, k)), rng.integers(1, 9, size=(2, k))
    state = SparseState(jnp.asarray(3), *({"w": jnp.asarray(x)} for x in (old, m, v, age)), {})
    moved = compiled_carry(state, {"w": jnp.asarray(new)})
    for before, after in ((m, moved.m), (v, moved.v), (age, moved.age)):
        dense = np.zeros((2, 20))
        np.put_along_axis(dense, old, before, 1)
        np.testing.assert_allclose(after["w"], np.take_along_axis(dense, new, 1), rtol=1e-6)
    same = compiled_carry(state, state.idx)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    shared = [len(set(a) & set(b)) for a, b in zip(old.tolist(), new.tolist(), strict=True)]
    found = jaccard(jnp.asarray(old), jnp.asarray(new))
    np.testing.assert_allclose(found, [n / (2 * k - n) for n in shared], rtol=1e-6)


def test_hidden_channels_are_whole_rows_and_differ_by_layer():
    entries = hidden_channels(jax.random.key(0), PARAMS, 0.3)
    rows = np.asarray(entries[DOWN]).reshape(2, 3, 4)
    assert (np.diff(entries[DOWN]) > 0).all()
    np.testing.assert_array_equal(rows % 4, np.broadcast_to(range(4), rows.shape))
    assert (rows[0] // 4 != rows[1] // 4).any()
    with pytest.raises(ValueError, match="share must be in"):
        hidden_channels(jax.random.key(0), PARAMS, 0.0)


def test_noise_falls_on_the_entries_only_and_scales():
    entries = entries_of([0, 5, 39], [1, 2, 3])
    key = jax.random.key(1)
    change = perturb_selected(key, PARAMS, entries, 1.0)["mlp"]["down"]["kernel"] - PARAMS["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(change != 0, entry_mask(PARAMS, entries)["mlp"]["down"]["kernel"])
    half = jax.jit(perturb_selected)(key, PARAMS, entries, 0.5)["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(half - PARAMS["mlp"]["down"]["kernel"], change / 2, atol=1e-6)
    # Other entries of the same number receive the same draws.
    other = perturb_selected(key, PARAMS, entries_of([7, 8, 9], [4, 5, 6]), 1.0)["mlp"]["down"]["kernel"]
    moved = (other - PARAMS["mlp"]["down"]["kernel"]).reshape(2, -1)
    np.testing.assert_allclose(moved[0, 7:10], change.reshape(2, -1)[0, np.asarray([0, 5, 39])], atol=1e-6)


def test_the_state_takes_three_eighths_per_entry_of_dense_adam():
    params = {"kernel": jnp.ones((100, 100))}
    entries = {"kernel": jnp.arange(500, dtype=jnp.int32)}
    sparse = jax.eval_shape(sparse_adam(0.1, entries).init, params)
    dense = jax.eval_shape(optax.adam(0.1).init, params)
    assert optimiser_bytes(sparse) == 500 * 12 + 4
    assert (optimiser_bytes(sparse) - 4) / (optimiser_bytes(dense) - 4) == pytest.approx(0.05 * 12 / 8)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match='entries of "mlp/down/kernel"'):
        sparse_adam(0.1, {DOWN: jnp.arange(3)}).init(PARAMS)
    with pytest.raises(ValueError, match="update needs params"):
        sparse_adam(0.1, entries_of([0], [1])).update(PARAMS, None)
