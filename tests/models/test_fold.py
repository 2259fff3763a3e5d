"""Factors that are moved leave the function as it was, and sit where they should."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.models.fold import READERS, readers, scalable, scale_inputs
from mechlab.models.transformer import gpt2, transformer
from tests.models.test_transformer_kinds import TOKENS, build
from tests.models.tiny import SIZES, scrambled


def factors(config, site, seed=0):
    shape = {"attn_z": (config.heads, config.d_head), "mlp_act": (config.hidden,)}.get(site, (config.width,))
    return jnp.exp(jax.random.normal(jax.random.key(seed), (config.layers, *shape)))


@pytest.mark.parametrize("kind", ["neox", "mistral", "gemma2", "llama3"])
def test_the_function_stays_and_the_sites_are_divided(kind):
    model, params = build(kind)
    config = model.module.config
    sites = tuple(site for site in READERS if scalable(config, site))
    assert set(sites) >= {"attn_in", "mlp_in"}
    wanted, acts = model.capture({"params": params}, TOKENS, sites=sites)
    folded = params
    for site in sites:
        folded = scale_inputs(config, folded, site, factors(config, site))
    got, moved = model.capture({"params": folded}, TOKENS, sites=sites)
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    for site in sites:
        s = factors(config, site)[:, None, None]
        np.testing.assert_allclose(moved[site], acts[site] / s, rtol=2e-3, atol=2e-4)


def test_a_plain_mlp_takes_a_factor_behind_relu_only():
    relu = gpt2(**SIZES, activation="relu")
    assert scalable(relu, "mlp_act") and not scalable(dataclasses.replace(relu, activation="gelu"), "mlp_act")
    model = transformer(relu)
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    folded = scale_inputs(relu, params, "mlp_act", factors(relu, "mlp_act"))
    wanted, got = (model.apply({"params": tree}, TOKENS) for tree in (params, folded))
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    assert readers(relu, "mlp_in") == ("mlp/up",)


def test_what_cannot_be_folded_is_refused():
    grouped, bert, attention = (build(kind)[0].module.config for kind in ("mistral", "bert", "attention-only"))
    for config, site, message in (
        (grouped, "attn_z", "cannot take up"),
        (bert, "attn_in", "cannot take up"),
        (attention, "mlp_in", "no MLP"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_inputs(config, {}, site, jnp.ones((3, 16)))
    with pytest.raises(ValueError, match=r"wanted factors \(3, 16\), got \(3, 4\)"):
        scale_inputs(grouped, {}, "attn_in", jnp.ones((3, 4)))
    with pytest.raises(KeyError, match="attn_on"):
        readers(grouped, "attn_on")
