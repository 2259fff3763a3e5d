"""Globs over parameter paths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.core import select
from tests.models.tiny import decoder

TREE = {
    "kernel": 1,
    "blocks": {"attn": {n: {"kernel": 2, "bias": 3} for n in "qkvo"}, "mlp": [{"kernel": 4}, {"kernel": 5}]},
}
ATTENTION = [f"blocks/attn/{n}/kernel" for n in "kqv"]

NAMES = st.text("abcxyz", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(-9, 9).map(np.asarray),
    lambda child: st.dictionaries(NAMES, child, min_size=1, max_size=3) | st.lists(child, min_size=1, max_size=2),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "pattern, wanted",
    [
        ("kernel", ["kernel"]),
        ("*", ["kernel"]),
        (
            "**/kernel",
            [
                "kernel",
                *(f"blocks/attn/{n}/kernel" for n in "kqvo"),
                *(f"blocks/mlp/{i}/kernel" for i in "01"),
            ],
        ),
        ("*/kernel", []),
        ("blocks/attn/[qkv]/kernel", ATTENTION),
        ("**/[qkv]/kernel", ATTENTION),
        (
            "blocks/*/*/kernel",
            [*ATTENTION, "blocks/attn/o/kernel", "blocks/mlp/0/kernel", "blocks/mlp/1/kernel"],
        ),
        ("blocks/**/bias", [f"blocks/attn/{n}/bias" for n in "kqvo"]),
        ("blocks/attn/**/q/kernel", ["blocks/attn/q/kernel"]),
        ("blocks/mlp/**", ["blocks/mlp/0/kernel", "blocks/mlp/1/kernel"]),
        ("kernel|**/o/bias", ["kernel", "blocks/attn/o/bias"]),
        ("blocks/mlp/[01]/ker*", ["blocks/mlp/0/kernel", "blocks/mlp/1/kernel"]),
        ("k.rnel", []),
        ("kern", []),
        ("Kernel", []),
        ("", []),
    ],
)
def test_globs(pattern: str, wanted: list[str]) -> None:
    assert sorted(select.matching(TREE, pattern)) == sorted(wanted)
    assert select.matching(TREE, pattern) == {path: select.matching(TREE, "**")[path] for path in wanted}


def test_paths_are_in_the_order_of_the_leaves() -> None:
    assert select.paths(TREE) == list(select.matching(TREE, "**"))
    assert list(select.matching(TREE, "**").values()) == jax.tree.leaves(TREE)


@given(TREES)
def test_put_of_get_is_the_tree(tree: Any) -> None:
    changed = select.put(tree, {path: -leaf for path, leaf in select.get(tree, "**").items()})
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    assert jax.tree.leaves(changed) == [-leaf for leaf in jax.tree.leaves(tree)]
    assert jax.tree.leaves(select.put(changed, select.get(tree, "**"))) == jax.tree.leaves(tree)


@given(tree=TREES, letter=st.sampled_from("abcxyz"))
def test_map_at_touches_matches_only(tree: Any, letter: str) -> None:
    pattern = f"**/*{letter}*|**/*{letter}*/**"
    if not select.matching(tree, pattern):
        with pytest.raises(KeyError):
            select.map_at(tree, pattern, lambda leaf: leaf)
        return
    touched: list[int] = []
    changed = select.map_at(tree, pattern, lambda leaf: touched.append(1) or leaf + 100)
    assert len(touched) == len(select.get(tree, pattern))
    for path, old, new in zip(select.paths(tree), jax.tree.leaves(tree), jax.tree.leaves(changed), strict=True):
        assert new == old + 100 if letter in path else new is old
    assert jax.tree.leaves(select.mask(tree, pattern)) == [letter in path for path in select.paths(tree)]


@pytest.mark.parametrize("function", [select.get, select.mask, select.count, lambda t, p: select.map_at(t, p, abs)])
def test_a_pattern_without_a_match_is_an_error_with_the_nearest_path(function: Any) -> None:
    with pytest.raises(KeyError, match=r'"blocks/attn/q/kernels".*Did you mean "blocks/attn/q/kernel"'):
        function(TREE, "blocks/attn/q/kernels")
    assert select.matching(TREE, "nothing") == {}


def test_put_refuses_unknown_paths_and_other_shapes() -> None:
    tree = {"a": np.zeros((2, 3))}
    with pytest.raises(KeyError, match=r'Did you mean "a"|unknown parameter path "aa"'):
        select.put(tree, {"aa": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r'"a" has shape \(2, 3\), got \(3, 2\)'):
        select.put(tree, {"a": np.zeros((3, 2))})
    assert not tree["a"].any()


def test_put_and_map_at_share_what_they_do_not_touch() -> None:
    params = decoder("gpt2")[1]
    changed = select.map_at(params, "**/q/kernel", lambda x: 2 * x)
    assert changed["blocks"]["attn"]["k"]["kernel"] is params["blocks"]["attn"]["k"]["kernel"]
    np.testing.assert_array_equal(changed["blocks"]["attn"]["q"]["kernel"], 2 * params["blocks"]["attn"]["q"]["kernel"])


def test_count_adds_up_the_parameters_of_a_decoder() -> None:
    params = decoder("gpt2")[1]
    v, n, d, f, t = 11, 3, 16, 24, 12
    assert select.count(params, "**/embed/*|embed/*") == (v + t) * d
    assert select.count(params, "**/attn/**") == n * 4 * (d * d + d)
    assert select.count(params) == (v + t) * d + n * (4 * (d * d + d) + 2 * d * f + d + f + 4 * d) + 2 * d
    assert select.count({"scalar": 1.0}) == 1


def test_mask_is_a_tree_of_booleans() -> None:
    marked = select.mask(TREE, "**/bias")
    assert jax.tree.structure(marked) == jax.tree.structure(TREE)
    assert marked["blocks"]["attn"]["q"] == {"bias": True, "kernel": False}


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 3))
def test_as_matrix_goes_both_ways(shape: list[int], inputs: int) -> None:
    kernel = jnp.arange(float(np.prod(shape))).reshape(shape)
    if inputs >= len(shape):
        with pytest.raises(ValueError, match=f"between 1 and {len(shape) - 1}"):
            select.as_matrix(kernel, inputs=inputs)
        return
    matrix = select.as_matrix(kernel, inputs=inputs)
    assert matrix.shape == (np.prod(shape[:inputs]), np.prod(shape[inputs:]))
    np.testing.assert_array_equal(matrix.reshape(kernel.shape), kernel)
    x = np.random.default_rng(0).normal(size=shape[:inputs])
    np.testing.assert_allclose(x.reshape(-1) @ matrix, np.tensordot(x, kernel, inputs).reshape(-1), rtol=1e-5)


def test_as_matrix_maps_over_layers() -> None:
    params = decoder("llama")[1]
    o = params["blocks"]["attn"]["o"]["kernel"]
    matrices = jax.vmap(lambda kernel: select.as_matrix(kernel, inputs=2))(o)
    assert matrices.shape == (3, 16, 16)
    np.testing.assert_array_equal(matrices.reshape(o.shape), o)
