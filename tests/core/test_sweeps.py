"""Sweeps equal loops of single calls for any chunks and devices; the memory estimate is an upper bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.core.edits import Add, Noise, Replace, Scale, at
from mechlab.core.sharding import make_mesh
from mechlab.core.sites import list_sites
from mechlab.core.sweeps import grid, peak_bytes, sweep, zero_probes
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.models.transformer import gpt2, transformer
from tests.models.tiny import TOKENS, decoder

LAYERS, LENGTH = 3, TOKENS.shape[1]
CELLS = grid(layer=jnp.arange(LAYERS), position=jnp.arange(LENGTH))


@pytest.fixture(scope="module")
def patching() -> tuple[Callable[..., jax.Array], Any, jax.Array]:
    """Residual patching of a corrupted run: the function of a cell, and its shared arguments."""
    model, params = decoder("gpt2")
    _, acts = model.capture({"params": params}, TOKENS[:, ::-1], sites=("resid_post",))

    def logit(cell: dict[str, jax.Array], params: Any, clean: jax.Array) -> jax.Array:
        where = {"layer": cell["layer"], "position": cell["position"]}
        patch = at(model.sites, "resid_post", Replace(clean), stacked=True, **where)
        return model.apply({"params": params, "edits": patch}, TOKENS)[:, -1]

    return logit, params, acts["resid_post"]


@pytest.fixture(scope="module")
def one_by_one(patching: Any) -> np.ndarray:
    function, *shared = patching
    single = jax.jit(function)
    return np.stack([single({"layer": i, "position": j}, *shared) for i in range(LAYERS) for j in range(LENGTH)])


def test_vmap_over_traced_layer_and_position_equals_a_loop(patching: Any, one_by_one: np.ndarray) -> None:
    function, *shared = patching
    mapped = jax.jit(jax.vmap(function, in_axes=(0, None, None)))(CELLS, *shared)
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-5, atol=1e-5)
    # All cells differ, but for the last layer's first four positions, which the last token does not read.
    assert len(np.unique(one_by_one.round(4), axis=0)) == LAYERS * LENGTH - 3


@pytest.mark.parametrize("batch", [1, 4, 7, 15, 100])
def test_sweep_equals_a_loop_for_any_batch(batch: int, patching: Any, one_by_one: np.ndarray) -> None:
    function, *shared = patching
    np.testing.assert_allclose(sweep(function, CELLS, *shared, batch=batch), one_by_one, rtol=1e-5, atol=1e-5)


def test_sweep_limits_its_chunks_to_the_memory(patching: Any, one_by_one: np.ndarray) -> None:
    function, *shared = patching
    one = peak_bytes(function, {"layer": jnp.int32(0), "position": jnp.int32(0)}, *shared)
    for memory, chunks in ((1.0, 15), (4.5 * one, 4), (1e12, 1)):
        calls: list[tuple[int, int]] = []
        swept = sweep(function, CELLS, *shared, memory=memory, progress=lambda *x, calls=calls: calls.append(x))
        np.testing.assert_allclose(swept, one_by_one, rtol=1e-5, atol=1e-5)
        assert len(calls) == chunks
        assert calls[-1] == (15, 15)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("batch", [3, 15])
def test_sweep_over_eight_devices_equals_a_loop(batch: int, patching: Any, one_by_one: np.ndarray) -> None:
    function, *shared = patching
    swept = sweep(function, CELLS, *shared, batch=batch, mesh=make_mesh())
    np.testing.assert_allclose(swept, one_by_one, rtol=1e-5, atol=1e-5)


def test_sweep_on_a_mesh_spreads_each_chunk_over_data(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[jax.Array] = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: chunks.append(put(*args)) or chunks[-1])
    swept = sweep(lambda x: 2 * x, jnp.arange(10.0), batch=5, mesh=make_mesh(data=4, model=2))
    np.testing.assert_array_equal(swept, 2 * np.arange(10.0))
    assert [len(chunk) for chunk in chunks] == [8, 8]
    assert {shard.data.shape for chunk in chunks for shard in chunk.addressable_shards} == {(2,)}


def test_vmap_over_stacked_edits_equals_a_loop() -> None:
    model, params = decoder("llama")
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32)
    edits = jax.vmap(lambda v, layer: at(model.sites, "mlp_out", Add(v), layer=layer))(vectors, jnp.arange(5) % 3)
    run = jax.jit(lambda edit: model.apply({"params": params, "edits": edit}, TOKENS))
    wanted = [run(at(model.sites, "mlp_out", Add(vectors[i]), layer=i % 3)) for i in range(5)]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(edits), jnp.stack(wanted), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sweep(run, edits, batch=2), jnp.stack(wanted), rtol=1e-5, atol=1e-5)


def test_vmap_over_heads_units_and_spans_equals_a_loop() -> None:
    model, params = decoder("llama")

    def run(head: Any, unit: Any, stop: Any) -> jax.Array:
        edits = at(model.sites, "attn_z", Scale(jnp.asarray(0.0)), layer=1, head=head, unit=unit, span=(1, stop))
        return model.apply({"params": params, "edits": edits}, TOKENS)

    cells = grid(head=jnp.arange(4), unit=jnp.arange(2), stop=jnp.asarray([2, 4]))
    mapped = jax.jit(jax.vmap(run))(*cells.values())
    single = jax.jit(run)
    wanted = [single(*(int(x[i]) for x in cells.values())) for i in (0, 5, 10, 15)]
    np.testing.assert_allclose(mapped[jnp.asarray([0, 5, 10, 15])], jnp.stack(wanted), rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.asarray(mapped).reshape(16, -1).round(5), axis=0)) == 16


def test_sweep_over_noise_keys_equals_a_loop() -> None:
    model, params = decoder("gpt2")

    def run(key: jax.Array) -> jax.Array:
        edits = at(model.sites, "resid_post", Noise(key, jnp.float32(1.0)), layer=0)
        return model.apply({"params": params, "edits": edits}, TOKENS)

    swept = sweep(run, jax.random.split(jax.random.key(1), 5), batch=2)
    keys = jax.random.split(jax.random.key(1), 5)
    for i in (0, 4):
        np.testing.assert_allclose(swept[i], run(keys[i]), rtol=1e-5, atol=1e-5)
    assert not np.allclose(swept[0], swept[1])


@settings(max_examples=15)
@given(cells=st.integers(1, 9), batch=st.integers(1, 12), data=st.sampled_from([None, 1, 3, 8]))
def test_sweep_keeps_order_and_number_of_cells(cells: int, batch: int, data: int | None) -> None:
    mesh = None if data is None else make_mesh(data=data)
    x = jnp.arange(cells, dtype=jnp.float32)
    swept = sweep(lambda x, k: {"square": x * x + k, "pair": jnp.stack([x, x])}, x, 1.0, batch=batch, mesh=mesh)
    np.testing.assert_array_equal(swept["square"], np.arange(cells) ** 2 + 1)
    np.testing.assert_array_equal(swept["pair"], np.stack([np.arange(cells)] * 2, 1))


def test_sweep_traces_its_function_once_for_all_chunks() -> None:
    traces: list[int] = []

    def function(x: jax.Array) -> jax.Array:
        traces.append(1)
        return x + 1

    sweep(function, jnp.arange(10.0), batch=3)
    assert len(traces) == 1


def test_sweep_returns_host_arrays() -> None:
    assert type(sweep(lambda x: x + 1, jnp.arange(3))) is np.ndarray


@pytest.mark.parametrize(
    "cells",
    [
        {},
        jnp.zeros((0, 2)),
        jnp.float32(1),
        {"a": jnp.zeros(3), "b": jnp.zeros(4)},
        3.0,
        {"a": jnp.zeros(3), "b": 1},
    ],
)
def test_sweep_refuses_cells_without_one_common_axis(cells: Any) -> None:
    with pytest.raises(ValueError, match="one leading axis"):
        sweep(lambda cell: cell, cells)


@pytest.mark.parametrize("batch", [0, -2])
def test_sweep_refuses_a_batch_below_one(batch: int) -> None:
    with pytest.raises(ValueError, match=f"got {batch}"):
        sweep(lambda x: x, jnp.arange(3), batch=batch)


def test_grid_runs_through_the_last_axis_fastest() -> None:
    cells = grid(a=jnp.arange(2), b=jnp.asarray([5, 6, 7]))
    assert list(zip(cells["a"].tolist(), cells["b"].tolist(), strict=True)) == [
        (a, b) for a in (0, 1) for b in (5, 6, 7)
    ]


def test_zero_probes_have_the_shape_of_the_sites_and_change_nothing() -> None:
    model, params = decoder("llama")
    table = list_sites(model.module, TOKENS)
    probes = zero_probes(table, *table)
    _, acts = model.capture({"params": params}, TOKENS, sites=tuple(table))
    assert {name: probe.value.shape for name, probe in probes.items()} == {n: a.shape for n, a in acts.items()}
    plain, _ = jax.jit(lambda: model.capture({"params": params}, TOKENS, sites=tuple(table)))()
    probed = jax.jit(lambda p: model.capture({"params": params, "edits": p}, TOKENS, sites=tuple(table)))(probes)[0]
    np.testing.assert_array_equal(probed, plain)


def test_zero_probes_of_an_unscanned_model_cover_every_layer() -> None:
    model = mlp(MLPConfig(widths=(4, 8, 6, 3)))
    probes = zero_probes(list_sites(model.module, jnp.zeros((5, 4))), "mlp_act", "logits")
    assert {name: probe.value.shape for name, probe in probes.items()} == {
        "mlp_act.0": (5, 8),
        "mlp_act.1": (5, 6),
        "logits": (5, 3),
    }
    with pytest.raises(KeyError, match='Did you mean "mlp_act'):
        zero_probes(model.sites, "mlp_akt")


def chain(x: jax.Array) -> jax.Array:
    for _ in range(6):
        x = jnp.sin(x) + 1
    return x


def product(x: jax.Array) -> jax.Array:
    return ((x @ x.T) @ x).sum(0)


def keeps_everything(x: jax.Array) -> jax.Array:
    parts = [jnp.sin(x * i) for i in range(5)]
    return sum(part @ part.T for part in parts).sum() + sum(jnp.tanh(part).sum() for part in parts)


def scanned(x: jax.Array) -> jax.Array:
    def step(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.cos(carry @ x.T @ x), carry

    last, history = jax.lax.scan(step, x, length=5)
    return history.mean() + last.sum()


@pytest.mark.parametrize("function", [chain, product, keeps_everything, scanned, jax.grad(scanned)])
def test_peak_bytes_is_an_upper_bound_on_what_the_compiler_uses(function: Callable[..., Any]) -> None:
    x = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    memory = jax.jit(function).lower(x).compile().memory_analysis()
    assert peak_bytes(function, x) >= memory.temp_size_in_bytes + memory.output_size_in_bytes - 1024


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert peak_bytes(lambda x: jnp.sin(x), x) == 4000
    assert peak_bytes(lambda x: jnp.sin(jnp.cos(jnp.tan(x))), x) == 8000
    assert peak_bytes(lambda x: (jnp.sin(x), jnp.cos(x), jnp.tan(x)), x) == 12_000
    assert peak_bytes(lambda x: x.astype(jnp.bfloat16), x) == 2000


@pytest.mark.parametrize("capture", [(), ("attn_pattern",)])
def test_peak_bytes_of_a_decoder_is_near_the_compiled_size(capture: tuple[str, ...]) -> None:
    model = transformer(gpt2(vocabulary=64, layers=4, width=64, heads=4, hidden=256, context=64))
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def run(params: Any, tokens: jax.Array) -> Any:
        return model.capture({"params": params}, tokens, sites=capture)

    memory = jax.jit(run).lower(params, tokens).compile().memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used <= peak_bytes(run, params, tokens) <= 3 * used
