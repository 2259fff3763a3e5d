"""Attribution patching is exact patching to first order; integrated gradients add up to the whole effect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Replace, at
from mechlab.methods.circuits.attribution import attribution_patching
from mechlab.methods.circuits.reading import logit_difference, logits_at
from tests.models.tiny import TOKENS, decoder

SOURCE = jnp.asarray([[3, 1, 7, 1, 5], [9, 2, 0, 5, 3]])
METRIC = logit_difference(jnp.asarray([[7, 1], [0, 3]]))
SITES = ("resid_post", "attn_z", "mlp_out", "mlp_act", "q", "k", "v", "attn_pattern")
READ = jnp.asarray([3, 4])


def towards(params, share):
    """Parameters whose embeddings of all tokens are drawn together: the two runs then differ by about ``share``."""
    tokens = params["embed"]["tokens"]
    return {**params, "embed": {**params["embed"], "tokens": tokens.mean(0) + share * (tokens - tokens.mean(0))}}


def exact(model, params, name, index):
    """The change of the metric by patching one cell, by an edit: (B,)."""
    captured = model.capture({"params": params}, SOURCE, sites=(name,))[1][name]
    base = model.capture({"params": params}, TOKENS, sites=(name,))[1][name]
    patched = base.at[index].set(captured[index])
    edits = at(model.sites, name, Replace(patched), layer=index[0], stacked=True)
    run = lambda edits: METRIC(logits_at(model, {"params": params, "edits": edits}, TOKENS, READ))
    return run(edits) - run({})


# Unstacked indices of one cell, all prompts: how to cut it out of the activation, and out of the estimate.
CELLS = {
    "resid_post": [((1, slice(None), 2), (1, slice(None), 2)), ((0, slice(None), 0), (0, slice(None), 0))],
    "attn_z": [((1, slice(None), 3, 2), (1, slice(None), 3, 2)), ((0, slice(None), 2, 1), (0, slice(None), 2, 1))],
    "mlp_out": [((0, slice(None), 2), (0, slice(None), 2))],
    "mlp_act": [((2, slice(None), 3, 5), (2, slice(None), 3, 5))],
    "q": [((1, slice(None), 3, 0), (1, slice(None), 3, 0))],
    "k": [((1, slice(None), 2, 1), (1, slice(None), 2, 1))],
    "v": [((2, slice(None), 2, 0), (2, slice(None), 2, 0))],
    "attn_pattern": [((1, slice(None), 1, 3), (1, slice(None), 1, 3))],
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_is_exact_patching_to_first_order(kind):
    model, params = decoder(kind)
    run = jax.jit(lambda params: attribution_patching(model, params, TOKENS, SOURCE, METRIC, SITES, read=READ))
    errors = []
    for share in (0.1, 0.05):
        near = towards(params, share)
        found = run(near)
        error, size = 0.0, 0.0
        for name in SITES:
            for cell, place in CELLS[name]:
                truth, estimate = exact(model, near, name, cell), found[name][place]
                if name == "attn_pattern":
                    estimate = estimate.sum(-1)
                error += float(np.abs(truth - estimate).sum())
                size += float(np.abs(truth).sum())
        errors.append(error / size)
    # Halving the difference of the runs halves the relative error: what is missed is of second order.
    assert errors[0] < 0.25 and errors[1] < 0.7 * errors[0], errors


def test_shapes_keep_heads_units_and_positions():
    model, params = decoder("llama")
    found = attribution_patching(model, params, TOKENS, SOURCE, METRIC, (*SITES, "embed"))
    shapes = {name: x.shape for name, x in found.items()}
    assert shapes == {
        "resid_post": (3, 2, 5),
        "attn_z": (3, 2, 5, 4),
        "mlp_out": (3, 2, 5),
        "mlp_act": (3, 2, 5, 24),
        "q": (3, 2, 5, 4),
        "k": (3, 2, 5, 2),
        "v": (3, 2, 5, 2),
        "attn_pattern": (3, 2, 4, 5, 5),
        "embed": (2, 5),
    }


def test_integrated_gradients_of_the_embedding_add_up_to_the_effect_of_the_whole_source():
    model, params = decoder("gpt2")
    run = lambda tokens: METRIC(logits_at(model, {"params": params}, tokens, READ))
    whole = run(SOURCE) - run(TOKENS)
    found = attribution_patching(model, params, TOKENS, SOURCE, METRIC, ("embed",), read=READ, steps=200)
    np.testing.assert_allclose(found["embed"].sum(1), whole, rtol=0.01, atol=0.01)
    plain = attribution_patching(model, params, TOKENS, SOURCE, METRIC, ("embed",), read=READ)
    assert np.abs(plain["embed"].sum(1) - whole).max() > 0.05


def test_equal_prompts_have_no_effect_and_later_positions_none():
    model, params = decoder("gpt2")
    same = attribution_patching(model, params, TOKENS, TOKENS, METRIC, ("resid_post",))
    assert (same["resid_post"] == 0).all()
    found = attribution_patching(model, params, TOKENS, SOURCE, METRIC, ("resid_post",), read=3)["resid_post"]
    assert (found[:, :, 4] == 0).all() and (found[:, :, :2] == 0).all() and (found[:, :, 2] != 0).any()


def test_bad_input_is_refused():
    model, params = decoder("gpt2")
    with pytest.raises(ValueError, match="one shape"):
        attribution_patching(model, params, TOKENS, SOURCE[:, :4], METRIC, ("resid_post",))
    with pytest.raises(ValueError, match="at least one site"):
        attribution_patching(model, params, TOKENS, SOURCE, METRIC, "resid_post")
    with pytest.raises(ValueError, match="steps"):
        attribution_patching(model, params, TOKENS, SOURCE, METRIC, ("resid_post",), steps=0)
    with pytest.raises(ValueError, match="one number per prompt"):
        attribution_patching(model, params, TOKENS, SOURCE, lambda x: x.sum(), ("resid_post",))
    with pytest.raises(KeyError, match="resid_post"):
        attribution_patching(model, params, TOKENS, SOURCE, METRIC, ("resid_pots",))
