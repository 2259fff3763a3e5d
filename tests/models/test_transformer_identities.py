"""Things that must change nothing: neutral edits, self-patching, padding, starting at a captured layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Add, Placed, Replace, Scale, at, combine
from mechlab.core.sites import list_sites
from mechlab.models.transformer import run_layers, transformer, unembed
from tests.models.reference import forward
from tests.models.tiny import CONFIGS, TOKENS, decoder

LENGTH = TOKENS.shape[1]
STREAM = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_in",
    "attn_out",
    "attn_z",
    "q",
    "k",
    "v",
    "mlp_in",
    "mlp_out",
)
STREAM += ("mlp_pre", "mlp_act")


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_gate_of_zeros_changes_no_bit_at_any_site(kind: str) -> None:
    model, params = decoder(kind)
    table = list_sites(model.module, TOKENS)

    def ramp(name: str) -> Add:
        values = jnp.linspace(-1, 3, table[name].value.shape[-1])
        return Add(jnp.stack([values] * 3) if table[name].layers else values)

    @jax.jit
    def run(gates: dict[str, jax.Array]) -> Any:
        edits = {name: Placed(ramp(name), gate=gates[name]) for name in table}
        return model.capture({"params": params, "edits": edits}, TOKENS, sites=tuple(table))

    plain, acts = jax.jit(lambda: model.capture({"params": params}, TOKENS, sites=tuple(table)))()
    gates = {name: jnp.zeros(table[name].layers or ()) for name in table}
    closed, kept = run(gates)
    np.testing.assert_array_equal(bits(closed), bits(plain))
    for name in table:
        np.testing.assert_array_equal(kept[name], acts[name], err_msg=name)
        opened, _ = run(gates | {name: jnp.ones(table[name].layers or ())})
        assert not np.array_equal(opened, plain), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_edits_and_empty_edits_change_no_bit(kind: str) -> None:
    model, params = decoder(kind)
    plain = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_array_equal(bits(jax.jit(model.apply)({"params": params, "edits": {}}, TOKENS)), bits(plain))
    captured, _ = jax.jit(lambda p: model.capture({"params": p}, TOKENS, sites=STREAM))(params)
    np.testing.assert_array_equal(bits(captured), bits(plain))


@pytest.mark.parametrize("kind", CONFIGS)
def test_patching_a_run_with_itself_changes_no_bit_at_any_site(kind: str) -> None:
    model, params = decoder(kind)
    table = model.sites

    @jax.jit
    def clean() -> Any:
        return model.capture({"params": params}, TOKENS, sites=STREAM)

    @jax.jit
    def patched(values: dict[str, jax.Array], name: jax.Array, layer: jax.Array) -> Any:
        layers = jnp.where(jnp.arange(len(STREAM)) == name, layer, -1)
        edits = [at(table, name, Replace(values[name]), layer=layers[i], stacked=True) for i, name in enumerate(STREAM)]
        return model.capture({"params": params, "edits": combine(*edits)}, TOKENS, sites=STREAM)

    logits, acts = clean()
    others = {name: jnp.roll(value, 1, axis=0) for name, value in acts.items()}
    for i, name in enumerate(STREAM):
        for layer in range(3):
            again, kept = patched(acts, i, layer)
            np.testing.assert_array_equal(bits(again), bits(logits), err_msg=f"{name} {layer}")
            for site in STREAM:
                np.testing.assert_array_equal(kept[site], acts[site], err_msg=f"{name} {layer}: {site}")
        assert not np.array_equal(patched(others, i, 1)[0], logits), name


@pytest.mark.parametrize("name", ["resid_post", "attn_z", "mlp_act"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_patching_one_site_with_itself_changes_no_bit(kind: str, name: str) -> None:
    model, params = decoder(kind)
    logits, acts = jax.jit(lambda: model.capture({"params": params}, TOKENS, sites=(name,)))()
    run = jax.jit(lambda edits: model.apply({"params": params, "edits": edits}, TOKENS))
    patch = at(model.sites, name, Replace(acts[name]), layer=1, position=[0, 3], stacked=True)
    np.testing.assert_array_equal(bits(run(patch)), bits(logits))
    np.testing.assert_array_equal(bits(run({name: Replace(acts[name])})), bits(logits))
    assert not np.array_equal(run({name: Replace(2 * acts[name])}), logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_equals_unpadded_at_the_real_tokens(kind: str) -> None:
    model, params = decoder(kind)
    steer = at(model.sites, "resid_post", Add(jnp.linspace(-1, 1, 16)), layer=0, position=2)
    scores = at(model.sites, "attn_scores", Scale(jnp.asarray(1.3)), layer=2, position=3)
    for edits in ({}, combine(steer, scores)):

        @jax.jit
        def run(tokens: jax.Array, positions: jax.Array, edits: Any = edits) -> jax.Array:
            return model.apply({"params": params, "edits": edits}, tokens, positions)

        plain = run(TOKENS, jnp.arange(LENGTH))
        for first, second in ((3, 3), (0, 0), (1, 2)):
            starts = (first, second)  # where the text of each row starts; padding on both sides of it
            rows = [(start, 3 - start) for start in starts]
            tokens = jnp.stack([jnp.pad(t, r, constant_values=7) for t, r in zip(TOKENS, rows, strict=True)])
            positions = jnp.stack([jnp.pad(jnp.arange(LENGTH), r, constant_values=-1) for r in rows])
            padded = run(tokens, positions)
            assert np.isfinite(padded).all()
            for row, start in enumerate(starts):
                np.testing.assert_allclose(padded[row, start : start + LENGTH], plain[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_positions_with_an_offset_equal_the_reference(kind: str) -> None:
    model, params = decoder(kind)
    positions = np.asarray([[2, 3, 5, 6, 11], [0, 1, 2, 3, 4]])
    wanted, _ = forward(params, TOKENS, CONFIGS[kind], positions=positions)
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS, positions), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_span_per_row_edits_each_row_at_its_own_positions(kind: str) -> None:
    model, params = decoder(kind)
    edits = at(model.sites, "resid_mid", Add(jnp.ones(16)), layer=1, span=(jnp.asarray([0, 3]), jnp.asarray([2, 5])))
    inside = np.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])[..., None]
    wanted, _ = forward(params, TOKENS, CONFIGS[kind], {("resid_mid", 1): lambda x: x + inside})
    np.testing.assert_allclose(model.apply({"params": params, "edits": edits}, TOKENS), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_edits_steer_a_bfloat16_model_and_keep_its_dtype(kind: str) -> None:
    _, params = decoder(kind)
    model = transformer(dataclasses.replace(CONFIGS[kind], dtype="bfloat16"))
    table = list_sites(model.module, TOKENS)
    wide = {"attn_scores", "attn_pattern", "logits"}
    assert {name for name in table if table[name].value.dtype == jnp.float32} == wide

    steer = at(model.sites, "resid_post", Add(jnp.full(16, 2.0)), layer=1)
    scale = at(model.sites, "embed", Scale(jnp.asarray(1.5)))
    edits = combine(steer, scale, at(table, "attn_pattern", Scale(jnp.asarray(0.5)), layer=0))
    sites = ("embed", "resid_post", "attn_pattern", "attn_z", "mlp_act")
    logits, acts = jax.jit(lambda e: model.capture({"params": params, "edits": e}, TOKENS, sites=sites))(edits)
    assert logits.dtype == jnp.float32
    assert {name: acts[name].dtype for name in sites} == {
        name: jnp.float32 if name in wide else jnp.bfloat16 for name in sites
    }
    change: Any = {
        ("resid_post", 1): lambda x: x + 2.0,
        ("embed", None): lambda x: x * 1.5,
        ("attn_pattern", 0): lambda x: x * 0.5,
    }
    wanted, _ = forward(params, TOKENS, CONFIGS[kind], change)
    plain, _ = forward(params, TOKENS, CONFIGS[kind])
    error = np.abs(logits - wanted).max()
    assert error < 0.1 * np.abs(wanted).max() and error < 0.3 * np.abs(wanted - plain).max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_running_the_upper_layers_from_a_captured_stream_equals_the_whole_model(kind: str) -> None:
    model, params = decoder(kind)
    positions = jnp.asarray([[0, 1, 2, 3, 4], [-1, 0, 1, 2, 3]])
    edits = combine(
        at(model.sites, "resid_mid", Add(jnp.ones(16)), layer=2, position=1),
        at(model.sites, "mlp_out", Scale(jnp.asarray(0.5)), layer=0),
    )
    variables = {"params": params, "edits": edits}
    logits, acts = jax.jit(lambda: model.capture(variables, TOKENS, positions, sites=("resid_pre", "resid_post")))()
    rest = jax.jit(
        lambda resid, start: unembed(model, variables, run_layers(model, variables, resid, start, positions))
    )
    for start in range(3):
        np.testing.assert_allclose(rest(acts["resid_pre"][start], start), logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rest(acts["resid_post"][start], start + 1), logits, rtol=1e-5, atol=1e-5)
    static = run_layers(model, variables, acts["resid_post"][0], 1, positions)
    np.testing.assert_allclose(unembed(model, variables, static), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(unembed(model, variables, static[:, -1:]), logits[:, -1:], rtol=1e-5, atol=1e-5)
    traced = jax.vmap(lambda resid, start: rest(resid, start))(acts["resid_pre"], jnp.arange(3))
    np.testing.assert_allclose(traced, jnp.stack([logits] * 3), rtol=1e-5, atol=1e-5)


def test_running_the_upper_layers_refuses_a_misspelt_edit() -> None:
    model, params = decoder("gpt2")
    with pytest.raises(KeyError, match='Did you mean "resid_post"'):
        run_layers(model, {"params": params, "edits": {"resid_pots": Scale(1.0)}}, jnp.zeros((1, 2, 16)))


@pytest.mark.parametrize("name", ["final_norm", "logits"])
def test_unembed_applies_edits_after_the_layers(name: str) -> None:
    model, params = decoder("gpt2")
    variables = {"params": params, "edits": at(model.sites, name, Scale(jnp.asarray(2.0)))}
    logits, acts = model.capture(variables, TOKENS, sites=("resid_post",))
    np.testing.assert_allclose(unembed(model, variables, acts["resid_post"][-1]), logits, rtol=1e-5, atol=1e-5)
