"""Random streams: independent, and the same numbers on every machine and version."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mechlab.core.rng import stream, streams


def data(key: jax.Array) -> list[int]:
    return jax.random.key_data(key).tolist()


def test_streams_are_stable_numbers() -> None:
    root = jax.random.key(0)
    assert data(stream(root, "init")) == [12655956, 2336749057]
    assert data(stream(root, "data")) == [2560165541, 4007404438]
    assert data(stream(root, "init", 3, "lane")) == [3146259930, 2594436793]
    assert data(stream(jax.random.key(7), 5)) == [3583082021, 1947592014]


@settings(max_examples=50)
@given(st.text(max_size=20), st.text(max_size=20))
def test_different_names_give_different_streams(a: str, b: str) -> None:
    assume(a != b)
    root = jax.random.key(0)
    assert data(stream(root, a)) != data(stream(root, b))
    assert data(stream(root, a)) == data(stream(jax.random.key(0), a))
    assert data(stream(root, a)) != data(stream(jax.random.key(1), a))


def test_order_and_nesting_of_names_count() -> None:
    root = jax.random.key(0)
    assert data(stream(root, "a", "b")) != data(stream(root, "b", "a"))
    assert data(stream(root, "a", "b")) == data(stream(stream(root, "a"), "b"))
    assert data(stream(root, "ab")) != data(stream(root, "a", "b"))
    assert data(stream(root)) == data(root)


def test_streams_are_named_streams_in_order() -> None:
    root = jax.random.key(3)
    init, batches = streams(root, "init  batches")
    assert data(init) == data(stream(root, "init"))
    assert data(batches) == data(stream(root, "batches"))
    samples = [jax.random.normal(key, (1000,)) for key in (init, batches)]
    assert abs(np.corrcoef(*samples)[0, 1]) < 0.15


def test_streams_work_under_jit_and_vmap() -> None:
    seeds = jnp.arange(3)
    mapped = jax.vmap(lambda seed, step: stream(jax.random.key(seed), "init", step))(seeds, jnp.arange(3))
    assert data(mapped) == [data(stream(jax.random.key(i), "init", i)) for i in range(3)]
    jitted = jax.jit(lambda key: stream(key, "init"))(jax.random.key(0))
    assert data(jitted) == data(stream(jax.random.key(0), "init"))


def test_a_legacy_key_is_refused() -> None:
    with pytest.raises(TypeError, match=r"jax\.random\.key, got an array of dtype uint32"):
        stream(jnp.zeros(2, jnp.uint32), "init")
    with pytest.raises(TypeError, match="typed key"):
        streams(jnp.zeros(2, jnp.uint32), "init data")


@pytest.mark.parametrize("names", ["a b a", "x x"])
def test_duplicate_names_are_refused(names: str) -> None:
    with pytest.raises(ValueError, match=names):
        streams(jax.random.key(0), names)


def test_a_number_instead_of_a_key_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="typed key"):
        stream(0, "init")
