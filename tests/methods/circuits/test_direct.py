"""The parts of a logit difference add up to it, and each equals the same part computed in float64 by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.circuits.direct import direct_attribution
from mechlab.methods.circuits.reading import logit_difference, logits_at
from mechlab.models.transformer import gpt2, llama, transformer
from tests.models import reference
from tests.models.tiny import SIZES, TOKENS, scrambled

ANSWERS = jnp.asarray([[7, 1], [0, 3]])
READ = jnp.asarray([2, 4])

KINDS = {
    "gpt2": gpt2(**SIZES),
    "llama": llama(**SIZES, kv_heads=2, tied=False),
    "attention only": gpt2(**SIZES | {"hidden": None}),
    "parallel": gpt2(**SIZES, parallel=True),
    "sandwich": llama(**SIZES, norm_order="sandwich"),
    "sandwich, layer norm": gpt2(**SIZES, norm_order="sandwich"),
    "gemma": dataclasses.replace(llama(**SIZES), norm="rms_plus_one", norm_order="sandwich", embed_scale=4.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_add_up_to_the_logit_difference(kind):
    model = transformer(KINDS[kind])
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    parts = jax.jit(lambda p: direct_attribution(model, p, TOKENS, ANSWERS, read=READ))(params)
    wanted = logit_difference(ANSWERS)(logits_at(model, {"params": params}, TOKENS, READ))
    np.testing.assert_allclose(parts.total(), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(parts.by_depth().sum(0), wanted, rtol=1e-4, atol=1e-4)
    assert parts.heads.shape == (3, 4, 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_part_equals_the_one_computed_by_hand(kind):
    config = KINDS[kind]
    model = transformer(config)
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    parts = direct_attribution(model, params, TOKENS, ANSWERS, read=READ)
    _, acts = reference.forward(params, TOKENS, config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    columns = p["embed"]["tokens"].T if config.tied else p["unembed"]["kernel"]
    for b in range(2):
        t = int(READ[b])
        resid = acts["resid_post"][-1, b, t]
        variance = resid.var() if config.norm == "layer" else np.mean(resid**2)
        read = columns[:, ANSWERS[b, 0]] - columns[:, ANSWERS[b, 1]]

        def part(x, read=read, variance=variance):
            x = x - x.mean() if config.norm == "layer" else x
            return x / np.sqrt(variance + config.norm_eps) * p["final_norm"]["scale"] @ read

        np.testing.assert_allclose(parts.embed[b], part(acts["embed"][b, t]), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(parts.norm_bias[b], p["final_norm"].get("bias", 0 * read) @ read, atol=1e-5)
        for layer in range(3):
            o = p["blocks"]["attn"]["o"]
            np.testing.assert_allclose(parts.mlps[layer, b], part(acts["mlp_out"][layer, b, t]), rtol=1e-3, atol=1e-4)
            bias = part(o["bias"][layer]) if "bias" in o else 0.0
            np.testing.assert_allclose(parts.attn_bias[layer, b], bias, rtol=1e-3, atol=1e-4)
            for head in range(4):
                wanted = part(acts["attn_z"][layer, b, t, head] @ o["kernel"][layer, head])
                np.testing.assert_allclose(parts.heads[layer, head, b], wanted, rtol=1e-3, atol=1e-4)


def test_models_whose_stream_is_no_sum_and_wrong_answers_are_refused():
    post = transformer(gpt2(**SIZES, norm_order="post"))
    with pytest.raises(ValueError, match="plain sum"):
        direct_attribution(post, {}, TOKENS, ANSWERS)
    with pytest.raises(ValueError, match="answers: wanted tokens"):
        direct_attribution(transformer(KINDS["gpt2"]), {}, TOKENS, jnp.zeros((3, 2), int))
