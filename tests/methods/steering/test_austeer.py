"""AUSteer: against the official ranking and masks, finite differences, its own weights, and its invariances."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.core.edits import Add
from mechlab.core.kernel_forms import QTensor
from mechlab.core.sweeps import sweep
from mechlab.methods.steering import austeer
from mechlab.methods.steering.vectors import pad
from mechlab.models.generate import generate
from mechlab.models.transformer import TransformerConfig, gpt2, llama, transformer

SIZES = {"vocabulary": 20, "layers": 3, "width": 16, "heads": 4, "hidden": 24, "context": 12, "init_std": None}
CONFIGS = {
    # Biases; grouped heads of another width than the residual stream; a norm behind the MLP.
    "gpt2": gpt2(**SIZES),
    "llama": llama(**SIZES, kv_heads=2, head_width=6, tied=False),
    "gemma": dataclasses.replace(llama(**SIZES), norm="rms_plus_one", norm_order="sandwich"),
}
TEXTS = pad([[1, 4, 2], [3, 3, 9, 7, 5], [6]])


def decoder(kind):
    """The model with no parameter at its neutral value."""
    model = transformer(CONFIGS[kind])
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params)


MODELS = {kind: decoder(kind) for kind in CONFIGS}
MODEL, PARAMS = MODELS["llama"]


def mask_for(model, site, seed=2):
    shape = austeer._shape(model, site)
    drawn = np.random.default_rng(seed).normal(size=(shape[0], int(np.prod(shape[1:]))))
    return jnp.asarray(np.where(np.abs(drawn) > 1, drawn, 0), jnp.float32)


def pairs(seed=3, shape=(9, 3, 5)):
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)


def test_scores_and_masks_are_the_official_ones(vectors):
    stored = vectors("austeer")
    momentum = austeer.au_momentum(stored["pos"], stored["neg"])
    scores = austeer.au_scores(momentum)
    np.testing.assert_allclose(scores, stored["scores"], rtol=1e-6)
    assert scores[1, 2] == 0 and (np.asarray(momentum)[:, 0, 0] == 0).sum() == 3
    for k in (1, 4, 10):
        mask = austeer.au_mask(scores, k, float(stored["alpha"]))
        np.testing.assert_allclose(mask, stored[f"mask_k{k}"], rtol=1e-6)
        y = jnp.asarray(stored["y"])
        np.testing.assert_allclose(y * (1 + mask[1]), stored[f"y_steered_k{k}_layer1"], rtol=1e-5, atol=1e-6)


def test_official_ties_are_in_the_order_of_layers_and_indices():
    scores = jnp.asarray([[0.5, -1.0, 0.0], [1.0, 1.0, -0.5]])
    np.testing.assert_array_equal(austeer.au_ranks(scores), [[3, 0, 5], [1, 2, 4]])
    layers, dims, beta = austeer.select_aus(scores, 6)
    assert list(zip(layers.tolist(), dims.tolist(), beta.tolist(), strict=True)) == [
        (0, 1, -1.0), (1, 0, 1.0), (1, 1, 1.0), (0, 0, 0.5), (1, 2, -0.5)
    ]  # fmt: skip
    assert austeer.tie_count(scores, 2) == 3 and austeer.tie_count(scores, 4) == 2
    # Our option: of equal scores the steadier unit first; scores still come first.
    steadier = jnp.asarray([[9.0, 1.0, 9.0], [2.0, 3.0, 0.0]])
    np.testing.assert_array_equal(austeer.au_ranks(scores, tie_break=steadier), [[3, 2, 5], [1, 0, 4]])


def test_a_tie_of_signs_is_positive_and_zeros_count_for_neither_side():
    m = np.asarray([[1, -1, 0, 0], [-1, 1, 0, 2], [0, 0, 0, 0], [0, 0, 0, -3]], np.float32)[:, None]
    np.testing.assert_array_equal(austeer.au_scores(m), [[0.25, 0.25, 0, 0.25]])
    np.testing.assert_allclose(austeer.au_scores(m, "mean"), m.mean(0))


def test_steadiness_is_mean_over_deviation():
    m = np.asarray([[2.0, 0.0, 3.0], [4.0, 0.0, 3.0]], np.float32)[:, None]
    np.testing.assert_allclose(austeer.au_steadiness(m), [[3.0, 0.0, 0.0]])


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(1, 15))
def test_scores_know_no_scale_no_order_and_turn_with_the_sides(seed, scale, k):
    pos, neg = pairs(seed)
    # Whole numbers give zeros and ties.
    pos, neg = np.round(pos), np.round(neg)
    scores = austeer.au_scores(austeer.au_momentum(pos, neg))
    order = np.random.default_rng(seed).permutation(len(pos))
    np.testing.assert_array_equal(scores, austeer.au_scores(austeer.au_momentum(scale * pos, scale * neg)))
    np.testing.assert_array_equal(scores, austeer.au_scores(austeer.au_momentum(pos[order], neg[order])))
    swapped = austeer.au_scores(austeer.au_momentum(neg, pos))
    m = pos - neg
    tied = (m > 0).sum(0) == (m < 0).sum(0)
    np.testing.assert_array_equal(swapped, np.where(tied, scores, -scores))
    assert np.abs(scores).max() <= 1
    mask = austeer.au_mask(scores, k, 2.0)
    assert np.count_nonzero(mask) == min(k, np.count_nonzero(scores)) == len(austeer.select_aus(scores, k)[0])


def test_a_grid_over_k_and_alpha_is_one_vmap():
    scores = austeer.au_scores(austeer.au_momentum(*pairs()))
    ks, alphas = jnp.asarray([1, 4, 15]), jnp.asarray([0.5, 2.0, -1.0])
    grid = jax.jit(jax.vmap(lambda k, alpha: austeer.au_mask(scores, k, alpha)))(ks, alphas)
    for found, k, alpha in zip(grid, (1, 4, 15), (0.5, 2.0, -1.0), strict=True):
        np.testing.assert_allclose(found, austeer.au_mask(scores, k, alpha), rtol=1e-6)


def test_states_are_read_at_last_tokens_with_heads_side_by_side():
    for site, width in (("attn", 24), ("ffn", 16), ("layer", 16)):
        states = austeer.unit_states(MODEL, {"params": PARAMS}, TEXTS, site, batch=2)
        assert states.shape == (3, 3, width)
        alone = MODEL.capture({"params": PARAMS}, TEXTS.tokens[1:2, :5], sites=(austeer.SITES[site],))[1]
        wanted = next(iter(alone.values()))[:, 0, -1].reshape(3, -1)
        np.testing.assert_allclose(states[1], wanted, rtol=1e-5, atol=1e-6)


# Compiled once for a model and a site, not once a call.
logits_of = jax.jit(austeer.steered_logits, static_argnums=0)


def steered(model, params, mask, site):
    return logits_of(model, params, austeer.au_edits(model, mask, site), TEXTS)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("site", ["attn", "ffn"])
def test_the_edit_is_the_folded_weights(kind, site):
    model, params = MODELS[kind]
    mask = mask_for(model, site)
    folded = austeer.fold_au_into_params(model, params, mask, site)
    logits = steered(model, params, mask, site)
    np.testing.assert_allclose(logits_of(model, folded, {}, TEXTS), logits, rtol=1e-5, atol=1e-5)
    plain = logits_of(model, params, {}, TEXTS)
    assert np.abs(logits - plain).max() > 1e-2
    assert jax.tree.structure(folded) == jax.tree.structure(params)


@pytest.mark.parametrize("site", austeer.SITES)
def test_no_mask_is_the_model_to_the_bit_and_edits_act_at_every_token(site):
    plain = MODEL.apply({"params": PARAMS}, TEXTS.tokens)
    mask = mask_for(MODEL, site)
    still = MODEL.apply({"params": PARAMS, "edits": austeer.au_edits(MODEL, 0 * mask, site)}, TEXTS.tokens)
    np.testing.assert_array_equal(still, plain)
    name = austeer.SITES[site]
    first = jnp.where(jnp.arange(3)[:, None] == 0, mask, 0)  # layer 0 alone, where nothing came before
    before, after = (
        MODEL.capture({"params": PARAMS, **more}, TEXTS.tokens, sites=(name,))[1][name][0].reshape(3, 5, -1)
        for more in ({}, {"edits": austeer.au_edits(MODEL, first, site)})
    )
    np.testing.assert_allclose(after, before * (1 + first[0]), rtol=1e-5, atol=1e-6)


def test_generation_is_steered_in_prompt_and_answer():
    edits = austeer.au_edits(MODEL, 3 * mask_for(MODEL, "ffn"), "ffn")
    variables = {"params": PARAMS, "edits": edits}
    written = generate(MODEL, variables, TEXTS.tokens[1:2], steps=4).tokens
    likeliest = MODEL.apply(variables, written)[0].argmax(-1)
    np.testing.assert_array_equal(likeliest[4:8], written[0, 5:9])
    plain = MODEL.apply({"params": PARAMS}, written)[0].argmax(-1)
    assert (plain[4:8] != written[0, 5:9]).any()


def test_a_sweep_over_masks_is_its_forwards():
    masks = jnp.stack([mask_for(MODEL, "attn", seed) for seed in range(3)])
    kept = jnp.asarray([[1, 2], [3, 4], [5, 6]])

    def cell(mask, params):
        return austeer.steered_logits(MODEL, params, austeer.au_edits(MODEL, mask, "attn"), TEXTS, kept)

    found = sweep(cell, masks, PARAMS, batch=2)
    for row, mask in zip(found, masks, strict=True):
        whole = steered(MODEL, PARAMS, mask, "attn")
        np.testing.assert_allclose(row, jnp.take_along_axis(whole, kept, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", austeer.SITES)
def test_the_slope_is_the_finite_difference(site):
    mask = mask_for(MODEL, site)
    slope = austeer.alpha_slope(MODEL, PARAMS, mask, site, TEXTS)
    high, low = (steered(MODEL, PARAMS, h * mask, site) for h in (1e-2, -1e-2))
    np.testing.assert_allclose(slope, (high - low) / 2e-2, rtol=1e-2, atol=1e-3)


def test_the_slope_of_one_unit_is_its_slice_through_the_jacobian():
    layer, unit, beta = 1, 13, -0.75
    mask = jnp.zeros((3, 24)).at[layer, unit].set(beta)
    slope = austeer.alpha_slope(MODEL, PARAMS, mask, "attn", TEXTS)
    z = MODEL.capture({"params": PARAMS}, TEXTS.tokens, sites=("attn_z",))[1]["attn_z"][layer].reshape(3, 5, 24)
    column = PARAMS["blocks"]["attn"]["o"]["kernel"][layer].reshape(24, 16)[unit]
    push = jnp.zeros((3, 3, 5, 16)).at[layer].set(beta * z[..., unit, None] * column)

    def logits(step):
        return austeer.steered_logits(MODEL, PARAMS, {"attn_out": Add(step * push)}, TEXTS)

    through = jax.jvp(logits, (jnp.zeros(()),), (jnp.ones(()),))[1]
    np.testing.assert_allclose(slope, through, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("site", ["attn", "ffn"])
def test_token_logits_are_what_a_unit_of_the_last_layer_writes_with_the_scale_frozen(kind, site):
    model, params = MODELS[kind]
    layer, unit = 2, 7
    table = austeer.au_token_logits(model, params, layer, site)
    width = int(np.prod(austeer._shape(model, site)[1:]))
    assert table.shape == (width, 20)
    if kind == "gemma" and site == "attn":
        return  # a second norm comes between: its scale is frozen too, which an edit cannot do
    x, acts = model.capture({"params": params}, TEXTS.tokens, sites=(austeer.SITES[site], "resid_post"))
    last = acts["resid_post"][layer]
    centred = last - last.mean(-1, keepdims=True) * (kind == "gpt2")
    scale = 1 / np.sqrt((np.asarray(centred) ** 2).mean(-1, keepdims=True) + model.module.config.norm_eps)
    activation = acts[austeer.SITES[site]][layer].reshape(3, 5, width)[..., unit, None]
    if site == "attn":
        # Attention writes into the MLP too; its direct part is what is left when the MLP's input is held.
        column = params["blocks"]["attn"]["o"]["kernel"][layer].reshape(width, 16)[unit]
    else:
        column = jnp.eye(16)[unit]
    written = activation * column * 1e-3
    held = scale * np.asarray(written - written.mean(-1, keepdims=True) * (kind == "gpt2"))
    gain = params["final_norm"]["scale"] + (kind == "gemma")
    unembed = params["unembed"]["kernel"] if kind == "llama" else params["embed"]["tokens"].T
    np.testing.assert_allclose(1e-3 * activation * scale * table[unit], (held * gain) @ unembed, rtol=1e-3, atol=1e-6)
    assert x.shape == (3, 5, 20)


def test_unlike_units_diverge_and_like_ones_do_not():
    logits = jnp.asarray([[50.0, 0.0, 0.0], [50.0, 0.0, 0.0], [0.0, 50.0, 0.0]])
    wanted = np.log(2) * np.asarray([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    np.testing.assert_allclose(austeer.au_js(logits), wanted, atol=1e-5)


def test_gradients_reach_the_mask():
    def loss(mask):
        return steered(MODEL, PARAMS, mask, "layer")[:, 3].sum()

    mask = mask_for(MODEL, "layer")
    slope = austeer.alpha_slope(MODEL, PARAMS, mask, "layer", TEXTS)[:, 3].sum()
    np.testing.assert_allclose((jax.grad(loss)(0 * mask) * mask).sum(), slope, rtol=1e-3)


def test_bad_input_is_refused():
    pos, neg = pairs()
    scores = austeer.au_scores(austeer.au_momentum(pos, neg))
    for bad in ((pos, neg[:-1]), (pos[:0], neg[:0]), (pos[0], neg[0])):
        with pytest.raises(ValueError, match="wanted pairs"):
            austeer.au_momentum(*bad)
    with pytest.raises(ValueError, match="acts_neg: values of layer 1 are not finite"):
        austeer.au_momentum(pos, np.where(np.arange(3)[:, None] == 1, np.nan, neg))
    with pytest.raises(ValueError, match='unknown kind "median"'):
        austeer.au_scores(pos, "median")
    with pytest.raises(ValueError, match="wanted momenta"):
        austeer.au_scores(pos[:0])
    for k in (0, 16):
        with pytest.raises(ValueError, match=f"wanted 1 to L D = 15 units, got {k}"):
            austeer.au_mask(scores, k, 1.0)
        with pytest.raises(ValueError, match="wanted 1 to L D"):
            austeer.select_aus(scores, k)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must be finite"):
            austeer.au_mask(scores, 1, alpha)
    with pytest.raises(ValueError, match="tie_break of the same shape"):
        austeer.au_ranks(scores, tie_break=scores[:1])
    with pytest.raises(ValueError, match='unknown site "mlp"'):
        austeer.au_edits(MODEL, scores, "mlp")
    # Heads side by side are 24 wide here, the model 16.
    with pytest.raises(ValueError, match=r"wanted \(layers, width\) = \(3, 24\) at site \"attn\", got \(3, 16\)"):
        austeer.au_edits(MODEL, jnp.zeros((3, 16)), "attn")
    with pytest.raises(ValueError, match="cannot be folded"):
        austeer.fold_au_into_params(MODEL, PARAMS, jnp.zeros((3, 16)), "layer")
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2, got 3"):
        austeer.au_token_logits(MODEL, PARAMS, 3)
    attention_only = transformer(gpt2(**SIZES | {"hidden": None}))
    with pytest.raises(KeyError, match="mlp_out"):
        austeer.au_edits(attention_only, jnp.zeros((3, 16)), "ffn")


def test_quantised_kernels_are_read_but_not_folded_into():
    model, params = MODELS["gpt2"]
    kernel = params["blocks"]["attn"]["o"]["kernel"]
    codes = jnp.round(kernel.reshape(3, 16, 16) * 100).astype(jnp.int8)
    quantised = jax.tree.map(lambda x: x, params)
    quantised["blocks"]["attn"]["o"]["kernel"] = QTensor(codes, jnp.full((3, 1, 1), 0.01), shape=(4, 4, 16))
    found = austeer.au_token_logits(model, quantised, 1, "attn")
    wanted = austeer.au_token_logits(model, params, 1, "attn")
    np.testing.assert_allclose(found, wanted, atol=0.05)
    with pytest.raises(ValueError, match="quantised kernels"):
        austeer.fold_au_into_params(model, quantised, jnp.zeros((3, 16)), "attn")


def test_a_post_norm_model_has_no_direct_logits():
    config = TransformerConfig(**SIZES, norm_order="post")
    model = transformer(config)
    with pytest.raises(ValueError, match="final norm and logits"):
        austeer.au_token_logits(model, model.init(jax.random.key(0)), 0)
