"""Ablations against a float64 NumPy decoder, part by part; fills against their definitions; limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import combine
from mechlab.methods.circuits.ablation import (
    ablation_effects,
    faithfulness,
    keep_only,
    mean_fill,
    resample_fill,
    zero_fill,
)
from mechlab.methods.circuits.reading import logit_difference
from tests.models import reference
from tests.models.tiny import CONFIGS, TOKENS, decoder

METRIC = logit_difference(jnp.asarray([[7, 1], [0, 3]]))
READ = jnp.asarray([2, 4])


def slow(kind, params, change):
    logits, _ = reference.forward(params, TOKENS, CONFIGS[kind], change)
    return np.asarray(METRIC(logits[np.arange(2), READ]))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("filled", ["zero", "mean", "mean by position", "resample"])
def test_every_head_taken_out_equals_the_slow_decoder(kind, filled):
    model, params = decoder(kind)
    z = reference.forward(params, TOKENS, CONFIGS[kind])[1]["attn_z"]
    fill, wanted_fill = {
        "zero": (zero_fill(jnp.asarray(z)), np.zeros_like(z)),
        "mean": (mean_fill(jnp.asarray(z)), z.mean((1, 2), keepdims=True)),
        "mean by position": (mean_fill(jnp.asarray(z), by_position=True), z.mean(1, keepdims=True)),
        "resample": (resample_fill(jax.random.key(0), jnp.asarray(z)), z[:, ::-1]),
    }[filled]
    found = ablation_effects(model, params, TOKENS, METRIC, "attn_z", fill, read=READ)
    assert found.shape == (3, 4, 2)
    for layer, head in ((0, 1), (1, 3), (2, 2)):

        def out(x, layer=layer, head=head):
            x = x.copy()
            x[:, :, head] = np.broadcast_to(wanted_fill, z.shape)[layer, :, :, head]
            return x

        wanted = slow(kind, params, {("attn_z", layer): out})
        np.testing.assert_allclose(found[layer, head], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "shape"), [("mlp_act", (3, 24, 2)), ("mlp_out", (3, 2))])
def test_neurons_and_whole_outputs_equal_the_slow_decoder(name, shape):
    model, params = decoder("gpt2")
    acts = reference.forward(params, TOKENS, CONFIGS["gpt2"])[1][name]
    found = ablation_effects(model, params, TOKENS, METRIC, name, mean_fill(jnp.asarray(acts)), read=READ, batch=7)
    assert found.shape == shape
    unit = 5 if name == "mlp_act" else slice(None)

    def out(x):
        x = x.copy()
        x[..., unit] = acts[1].mean((0, 1))[unit]
        return x

    cell = found[1, 5] if name == "mlp_act" else found[1]
    np.testing.assert_allclose(cell, slow("gpt2", params, {(name, 1): out}), rtol=1e-3, atol=1e-3)


def test_keep_only_fills_the_rest_and_nothing_when_all_is_kept():
    model, params = decoder("llama")
    _, acts = model.capture({"params": params}, TOKENS, sites=("attn_z", "mlp_act", "mlp_out"))
    keep = np.zeros((3, 4), bool)
    keep[0, 2] = keep[2, 1] = True
    edits = combine(
        keep_only(model.sites, "attn_z", keep, mean_fill(acts["attn_z"])),
        keep_only(model.sites, "mlp_out", jnp.asarray([True, False, True]), zero_fill(acts["mlp_out"])),
    )
    _, kept = model.capture({"params": params, "edits": edits}, TOKENS, sites=("attn_z", "mlp_out"))
    z = np.asarray(kept["attn_z"])
    means = np.asarray(acts["attn_z"]).mean((1, 2))
    np.testing.assert_allclose(z[0, :, :, 2], acts["attn_z"][0, :, :, 2], rtol=1e-5)
    np.testing.assert_allclose(z[0, 1, 3, 0], means[0, 0], rtol=1e-5)
    assert (kept["mlp_out"][1] == 0).all() and (kept["mlp_out"][2] != 0).any()
    everything = keep_only(model.sites, "mlp_act", np.ones((3, 24), bool), zero_fill(acts["mlp_act"]))
    plain = model.apply({"params": params}, TOKENS)
    assert (model.apply({"params": params, "edits": everything}, TOKENS) == plain).all()


def test_means_leave_masked_tokens_out():
    acts = jnp.arange(12.0).reshape(1, 2, 3, 2)
    mask = np.asarray([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(mean_fill(acts, mask), [np.mean([[0, 1], [2, 3], [6, 7]], 0)], rtol=1e-6)
    np.testing.assert_allclose(mean_fill(acts, mask, by_position=True), [[[3, 4], [2, 3], [0, 0]]], rtol=1e-6)


def test_resampling_moves_every_prompt():
    acts = jnp.arange(7.0)[None, :, None]
    for seed in range(5):
        moved = np.asarray(resample_fill(jax.random.key(seed), acts))[0, :, 0]
        assert sorted(moved) == list(range(7)) and (moved != np.arange(7)).all()


def test_bad_input_is_refused():
    model, _ = decoder("gpt2")
    with pytest.raises(ValueError, match="keep: wanted shape"):
        keep_only(model.sites, "attn_z", np.ones((4, 3), bool), jnp.zeros(3))
    with pytest.raises(KeyError, match="attn_z"):
        keep_only(model.sites, "attn_y", np.ones((3, 4), bool), jnp.zeros(3))
    with pytest.raises(ValueError, match="not stacked"):
        ablation_effects(model, {}, TOKENS, METRIC, "embed", jnp.zeros(3))
    with pytest.raises(ValueError, match="mask: wanted"):
        mean_fill(jnp.zeros((3, 2, 5, 4)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        resample_fill(jax.random.key(0), jnp.zeros((3, 1, 5, 4)))
    np.testing.assert_allclose(faithfulness([1.0, 3.0], 3.0, 1.0), [0, 1])
