"""Batches: every example once an epoch, and the same batch for a step however the plan is cut."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.training.batches import generated, numbered, shuffled, whole


def plan(n: int, batch: int, first: int, count: int, seed: int = 0, rows: Any = None) -> np.ndarray:
    data = jnp.zeros(n if rows is None else 1000)
    return np.asarray(shuffled(data, batch, rows).plan(jax.random.key(seed), first, count))


# Few shapes, because each compiles anew; steps and seeds are data.
SIZES = st.sampled_from([(1, 1), (5, 2), (12, 4), (7, 7)])
COUNTS = st.sampled_from([3, 8])


@given(SIZES, st.integers(0, 99))
def test_every_example_comes_at_most_once_an_epoch(sizes: tuple[int, int], seed: int) -> None:
    n, batch = sizes
    per_epoch = n // batch
    steps = plan(n, batch, 0, 3 * per_epoch, seed)
    assert steps.shape == (3 * per_epoch, batch)
    for epoch in steps.reshape(3, per_epoch * batch):
        assert len(set(epoch)) == per_epoch * batch
        assert set(epoch) <= set(range(n))
        if n % batch == 0:
            assert sorted(epoch) == list(range(n))


@settings(max_examples=15)
@given(SIZES, st.integers(0, 30), COUNTS, st.integers(0, 30), COUNTS)
def test_overlapping_plans_agree(sizes: tuple[int, int], a: int, n: int, b: int, m: int) -> None:
    first, second = plan(*sizes, a, n), plan(*sizes, b, m)
    for step in range(max(a, b), min(a + n, b + m)):
        np.testing.assert_array_equal(first[step - a], second[step - b])
    whole = plan(*sizes, 0, 40)
    np.testing.assert_array_equal(first, whole[a : a + n])
    np.testing.assert_array_equal(second, whole[b : b + m])


def test_epochs_and_keys_shuffle_differently() -> None:
    epochs = plan(50, 50, 0, 4)
    assert len(np.unique(epochs, axis=0)) == 4
    assert not np.array_equal(plan(50, 50, 0, 1, seed=1), epochs[:1])
    assert not np.array_equal(epochs[0], np.arange(50))


def test_a_traced_first_step_gives_the_same_plan() -> None:
    batches = shuffled(jnp.zeros(7), 2)
    traced = jax.jit(lambda first: batches.plan(jax.random.key(0), first, 5))(4)
    np.testing.assert_array_equal(traced, plan(7, 2, 4, 5))


def test_rows_limit_the_examples_and_may_differ_per_seed() -> None:
    rows = jnp.asarray([3, 7, 11, 500])
    steps = plan(4, 2, 0, 4, rows=rows)
    for epoch in steps.reshape(2, 4):
        assert sorted(epoch) == rows.tolist()
    data = jnp.arange(1000.0)

    def batch(seed: jax.Array, rows: jax.Array) -> jax.Array:
        batches = shuffled(data, 2, rows)
        return batches.fetch(batches.plan(jax.random.key(seed), 0, 2).reshape(-1))

    mapped = jax.vmap(batch)(jnp.arange(2), jnp.stack([rows, rows + 1]))
    assert sorted(mapped[0].tolist()) == rows.tolist()
    assert sorted(mapped[1].tolist()) == (rows + 1).tolist()


def test_fetch_takes_the_rows_of_every_leaf() -> None:
    data = {"x": jnp.arange(20.0).reshape(10, 2), "y": (jnp.arange(10),)}
    batches = shuffled(data, 3)
    index = batches.plan(jax.random.key(0), 0, 1)[0]
    batch = batches.fetch(index)
    np.testing.assert_array_equal(batch["x"], np.asarray(data["x"])[index])
    np.testing.assert_array_equal(batch["y"][0], index)


def test_numpy_data_can_be_fetched_inside_a_compiled_loop() -> None:
    batches = shuffled({"x": np.arange(10.0)}, 3)
    fetched = jax.jit(batches.fetch)(jnp.asarray([1, 4, 2]))
    np.testing.assert_array_equal(fetched["x"], [1, 4, 2])


def test_generated_draws_a_new_batch_every_step_and_the_same_again() -> None:
    batches = generated(lambda key: jax.random.normal(key, (4,)))

    def draw(first: int, count: int) -> np.ndarray:
        return np.asarray(jax.vmap(batches.fetch)(batches.plan(jax.random.key(0), first, count)))

    steps = draw(0, 6)
    assert len(np.unique(steps)) == 24
    np.testing.assert_array_equal(draw(2, 3), steps[2:5])


def test_numbered_adds_the_step_and_leaves_the_batches_as_they_are() -> None:
    plain = shuffled({"x": jnp.arange(12)}, 3)
    with_steps = numbered(plain)
    index, plan = plain.plan(jax.random.key(0), 5, 4), with_steps.plan(jax.random.key(0), 5, 4)
    for i in range(4):
        batch = with_steps.fetch(jax.tree.map(lambda leaf, i=i: leaf[i], plan))
        assert set(batch) == {"x", "step"} and batch["step"] == 5 + i
        np.testing.assert_array_equal(batch["x"], plain.fetch(index[i])["x"])


@pytest.mark.parametrize(
    "data, batch, rows, message",
    [
        ({"x": jnp.zeros(4), "y": jnp.zeros(5)}, 2, None, r"common length, got \[4, 5\]"),
        ({}, 2, None, r"common length, got \[\]"),
        (jnp.zeros(4), 5, None, "between 1 and the 4 examples, got 5"),
        (jnp.zeros(4), 0, None, "got 0"),
        (jnp.zeros(9), 3, jnp.asarray([1, 2]), "the 2 examples, got 3"),
    ],
)
def test_bad_arguments_are_refused(data: Any, batch: int, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shuffled(data, batch, rows)


def test_whole_gives_all_of_the_data_at_every_step() -> None:
    data = {"x": jnp.arange(5), "y": jnp.arange(10.0).reshape(5, 2)}
    batches = whole(data)
    steps = batches.plan(jax.random.key(0), jnp.asarray(3), 4)
    assert steps.shape == (4,)
    for step in steps:
        jax.tree.map(np.testing.assert_array_equal, batches.fetch(step), data)
