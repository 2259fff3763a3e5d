"""Splits: disjoint, complete, reproducible on every version of jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.data import split_indices
from mechlab.data.splits import group_folds


@settings(max_examples=12)  # every size compiles anew
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    spare=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_parts_are_disjoint_and_in_range(sizes: list[int], spare: int, seed: int) -> None:
    n = sum(sizes) + spare
    parts = split_indices(jax.random.key(seed), n, sizes)
    assert [len(part) for part in parts] == sizes
    drawn = jnp.concatenate(parts).tolist()
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(n))


def test_same_key_same_split_and_another_key_another() -> None:
    first, again, other = (split_indices(jax.random.key(seed), 100, (60, 40))[0] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert first.tolist() != sorted(first.tolist())


def test_vmap_over_seeds_equals_a_loop() -> None:
    train, test = jax.vmap(lambda key: split_indices(key, 20, (12, 8)))(jax.random.split(jax.random.key(0), 3))
    for i, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        alone = split_indices(key, 20, (12, 8))
        assert train[i].tolist() == alone[0].tolist()
        assert test[i].tolist() == alone[1].tolist()


@pytest.mark.parametrize(("sizes", "message"), [((), "at least one"), ((3, 0), "at least 1"), ((6, 5), "need 11")])
def test_bad_sizes_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"sizes: .*{message}"):
        split_indices(jax.random.key(0), 10, sizes)


def test_group_folds_cut_no_group_and_are_of_like_size():
    groups = np.repeat(np.arange(40), np.arange(40) % 5 + 1)
    fold = group_folds(jax.random.key(3), groups, 5)
    assert all(len(set(fold[groups == group])) == 1 for group in range(40))
    sizes = np.bincount(fold, minlength=5)
    assert sizes.max() - sizes.min() <= 5
    assert (group_folds(jax.random.key(3), groups, 5) == fold).all()
    assert (group_folds(jax.random.key(4), groups, 5) != fold).any()


def test_group_folds_refuse_what_leaves_a_fold_empty():
    with pytest.raises(ValueError, match="wanted 2 up to the 3 groups, got 4"):
        group_folds(jax.random.key(0), [0, 1, 2], 4)
    with pytest.raises(ValueError, match="empty"):
        group_folds(jax.random.key(0), [0] * 20 + [1, 2], 3)
