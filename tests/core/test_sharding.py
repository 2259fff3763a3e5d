"""Meshes, specs, and a decoder and its training on eight forced devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mechlab.core import select
from mechlab.core.edits import Add, at
from mechlab.core.sharding import RULES, make_mesh, partition_spec, shard, shard_batch, shardings
from mechlab.models.transformer import LOGICAL_AXES, llama, transformer
from tests.models.tiny import SIZES, TOKENS, decoder, scrambled


def specs(tree: Any, mesh: Any, axes: Any = LOGICAL_AXES) -> dict[str, P]:
    found = shardings(tree, mesh, axes)
    return {path: sharding.spec for path, sharding in select.get(found, "**").items()}


def test_the_suite_has_eight_devices() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize("data, model, shape", [(None, 1, (8, 1)), (None, 2, (4, 2)), (2, 2, (2, 2)), (1, 8, (1, 8))])
def test_make_mesh_fills_the_devices(data: int | None, model: int, shape: tuple[int, int]) -> None:
    mesh = make_mesh(data, model)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == shape[0] * shape[1]


def test_make_mesh_refuses_what_the_devices_do_not_allow() -> None:
    with pytest.raises(ValueError, match="data=5 x model=2 needs 10 devices, there are 8"):
        make_mesh(5, 2)
    with pytest.raises(ValueError, match="model=3 does not divide the 8 devices"):
        make_mesh(model=3)


@pytest.mark.parametrize("data, model", [(None, 0), (0, 1), (-1, 1), (None, -2)])
def test_make_mesh_refuses_less_than_one_device(data: int | None, model: int) -> None:
    with pytest.raises(ValueError, match=r"data|model"):
        assert make_mesh(data, model).devices.size == 0  # what came instead
        pytest.fail("a mesh without devices")


def test_partition_spec_follows_the_rules() -> None:
    assert partition_spec(("layer", "residual", "head", "width")) == P(None, None, "model", None)
    assert partition_spec((None, "batch")) == P(None, "data")
    assert partition_spec(()) == P()
    assert partition_spec(("residual",), RULES | {"residual": "data"}) == P("data")


def test_partition_spec_refuses_a_mesh_axis_used_twice() -> None:
    with pytest.raises(ValueError, match=r"\('hidden', 'head'\) would use a mesh axis twice"):
        partition_spec(("hidden", "head"))
    with pytest.raises(KeyError, match=r'unknown logical axis "heads".*Did you mean "head"'):
        partition_spec(("heads",))


def test_every_kernel_of_a_decoder_is_sharded_as_its_logical_axes_say() -> None:
    found = specs(decoder("gpt2")[1], make_mesh(data=4, model=2))
    assert found["blocks/attn/q/kernel"] == P(None, None, "model", None)
    assert found["blocks/attn/v/bias"] == P(None, "model", None)
    assert found["blocks/attn/o/kernel"] == P(None, "model", None, None)
    assert found["blocks/mlp/up/kernel"] == P(None, None, "model")
    assert found["blocks/mlp/down/kernel"] == P(None, "model", None)
    assert found["blocks/norm_mlp/scale"] == P(None, None)
    assert found["final_norm/bias"] == P(None)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_logical_axis_pattern_matches_and_has_the_rank_of_its_leaf(kind: str) -> None:
    params = decoder(kind)[1]
    for pattern, names in LOGICAL_AXES.items():
        for leaf in select.matching(params, pattern).values():
            assert leaf.ndim == len(names), pattern
    unnamed = set(select.paths(params)) - {p for pattern in LOGICAL_AXES for p in select.matching(params, pattern)}
    assert all("norm" in path or path.endswith(("o/bias", "down/bias")) for path in unnamed)


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    mesh = make_mesh(data=4, model=2)
    assert specs(decoder("gpt2")[1], mesh)["embed/tokens"] == P(None, None)  # 11 tokens over 2 devices
    even = transformer(llama(**SIZES | {"vocabulary": 12}, tied=False))
    params = jax.eval_shape(even.init, jax.random.key(0))
    assert specs(params, mesh)["embed/tokens"] == P("model", None)
    assert specs(params, mesh)["unembed/kernel"] == P(None, "model")
    one_group = jax.eval_shape(transformer(llama(**SIZES, kv_heads=1)).init, jax.random.key(0))
    assert specs(one_group, mesh)["blocks/attn/k/kernel"] == P(None, None, None, None)
    assert specs(one_group, mesh)["blocks/attn/q/kernel"] == P(None, None, "model", None)


def test_moments_of_the_optimiser_are_sharded_like_their_parameters() -> None:
    params = decoder("gpt2")[1]
    found = specs(optax.adam(1e-3).init(params), make_mesh(data=4, model=2))
    for moment in ("mu", "nu"):
        assert found[f"0/{moment}/blocks/mlp/up/kernel"] == P(None, None, "model")
    assert found["0/count"] == P()


def test_the_first_matching_pattern_counts_and_a_wrong_rank_is_refused() -> None:
    mesh, tree = make_mesh(data=4, model=2), {"a": jnp.zeros((4, 2))}
    assert specs(tree, mesh, {"a": ("batch", None), "**": ("hidden", None)})["a"] == P("data", None)
    assert specs(tree, mesh, {})["a"] == P(None, None)
    with pytest.raises(ValueError, match=r'"a" has shape \(4, 2\), but its logical axes are \(\'batch\',\)'):
        shardings(tree, mesh, {"a": ("batch",)})


def test_a_sharded_decoder_equals_one_device() -> None:
    model, params = decoder("llama")
    mesh = make_mesh(data=4, model=2)
    tokens = jnp.tile(TOKENS, (4, 1))
    edits = at(model.sites, "resid_post", Add(jnp.linspace(-1, 1, 16)), layer=1, position=2)

    @jax.jit
    def run(params: Any, tokens: jax.Array, edits: Any) -> Any:
        logits, acts = model.capture({"params": params, "edits": edits}, tokens, sites=("mlp_act",))
        return (
            logits,
            acts["mlp_act"],
            jax.grad(lambda p: jnp.square(model.apply({"params": p, "edits": edits}, tokens)).mean())(params),
        )

    placed = shard(params, mesh, LOGICAL_AXES)
    q = placed["blocks"]["attn"]["q"]["kernel"]
    assert {s.data.shape for s in q.addressable_shards} == {(3, 16, 2, 4)}
    batch = shard_batch(tokens, mesh)
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 5)}
    alone = run(params, tokens, edits)
    spread = run(placed, batch, edits)
    assert len(spread[0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, alone)


def test_shard_batch_splits_every_leaf_and_refuses_an_odd_batch() -> None:
    mesh = make_mesh(data=4, model=2)
    batch = shard_batch({"x": np.arange(24.0).reshape(8, 3), "y": np.arange(8)}, mesh)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["y"], np.arange(8))
    with pytest.raises(ValueError, match="batch of 6 does not divide over 4 devices"):
        shard_batch({"x": np.zeros((8, 3)), "y": np.zeros(6)}, mesh)


def test_sharded_scrambled_parameters_come_back_whole() -> None:
    params = scrambled(jax.eval_shape(decoder("llama")[0].init, jax.random.key(0)), seed=3)
    placed = shard(params, make_mesh(data=2, model=4), LOGICAL_AXES)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
