"""Attribution patching is exact patching to first order; integrated gradients add up to the whole effect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.circuits.attribution import attribution_patching
from mechlab.methods.circuits.reading import logit_difference, logits_at
from tests.models import reference
from tests.models.tiny import CONFIGS, TOKENS, decoder

SOURCE = jnp.asarray([[3, 1, 7, 1, 5], [9, 2, 0, 5, 3]])
METRIC = logit_difference(jnp.asarray([[7, 1], [0, 3]]))
READ = jnp.asarray([3, 4])


def towards(params, share):
    """Parameters whose embeddings of all tokens are drawn together: the two runs then differ by about ``share``."""
    tokens = params["embed"]["tokens"]
    return {**params, "embed": {**params["embed"], "tokens": tokens.mean(0) + share * (tokens - tokens.mean(0))}}


def exact(kind, params, name, cell):
    """The change of the metric by patching one cell, in a float64 NumPy decoder: (B,)."""
    base, acts = reference.forward(params, TOKENS, CONFIGS[kind])
    source = reference.forward(params, SOURCE, CONFIGS[kind])[1][name]
    patched = acts[name].copy()
    patched[cell] = source[cell]
    changed, _ = reference.forward(params, TOKENS, CONFIGS[kind], {(name, cell[0]): lambda _: patched[cell[0]]})
    rows = np.arange(2)
    return np.asarray(METRIC(changed[rows, READ]) - METRIC(base[rows, READ]))


ALL = slice(None)
CELLS = {
    "resid_post": (1, ALL, 2),
    "attn_z": (1, ALL, 3, 2),
    "mlp_out": (0, ALL, 2),
    "mlp_act": (2, ALL, 3, 5),
    "q": (1, ALL, 3, 0),
    "k": (1, ALL, 2, 1),
    "v": (2, ALL, 2, 0),
    "attn_pattern": (1, ALL, 1, 3),
}
"""One layer, head or unit, and position (of the query) of every site, for all prompts."""


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_is_exact_patching_to_first_order(kind):
    model, params = decoder(kind)
    run = jax.jit(lambda params: attribution_patching(model, params, TOKENS, SOURCE, METRIC, tuple(CELLS), read=READ))
    errors = []
    for share in (0.1, 0.05):
        near = towards(params, share)
        found = run(near)
        error, size = 0.0, 0.0
        for name, cell in CELLS.items():
            truth, estimate = exact(kind, near, name, cell), found[name][cell]
            estimate = estimate.sum(-1) if name == "attn_pattern" else estimate
            error += float(np.abs(truth - estimate).sum())
            size += float(np.abs(truth).sum())
        errors.append(error / size)
    # Halving the difference of the runs halves the relative error: what is missed is of second order.
    assert errors[0] < 0.25 and errors[1] < 0.7 * errors[0], errors


def test_shapes_keep_heads_units_and_positions():
    model, params = decoder("llama")

    def run(params):
        return attribution_patching(model, params, TOKENS, SOURCE, METRIC, (*CELLS, "embed"))

    shapes = {name: x.shape for name, x in jax.eval_shape(run, params).items()}
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
    run = jax.jit(lambda params, tokens: METRIC(logits_at(model, {"params": params}, tokens, READ)))
    whole = run(params, SOURCE) - run(params, TOKENS)

    def error(steps):
        found = jax.jit(
            lambda p: attribution_patching(model, p, TOKENS, SOURCE, METRIC, ("embed",), read=READ, steps=steps)
        )(params)
        return np.abs(found["embed"].sum(1) - whole).max()

    assert error(200) < 0.005 < 0.05 < error(None)


def test_equal_prompts_have_no_effect_and_later_positions_none():
    model, params = decoder("gpt2")
    run = jax.jit(
        lambda p, source: attribution_patching(model, p, TOKENS, source, METRIC, ("resid_post",), read=3)["resid_post"]
    )
    assert (run(params, TOKENS) == 0).all()
    found = run(params, SOURCE)
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
