"""The baselines of steering: against the official routines of ITI, closed forms, and each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.methods.steering import austeer, baselines
from mechlab.methods.steering.vectors import pad
from mechlab.models.transformer import llama, transformer

SIZES = {"vocabulary": 20, "layers": 3, "width": 16, "heads": 4, "hidden": 24, "context": 12, "init_std": None}
MODEL = transformer(llama(**SIZES, kv_heads=2, head_width=6))
PARAMS = MODEL.init(jax.random.key(0))
TEXTS = pad([[1, 4, 2], [3, 3, 9, 7, 5], [6]])


def planted(n=80, seed=0):
    """Heads (0, 1) and (2, 3) tell the classes apart, the second of them badly; items 2 i and 2 i + 1 are a pair."""
    rng = np.random.default_rng(seed)
    acts = rng.normal(size=(n, 3, 4, 6)).astype(np.float32)
    labels = np.arange(n) % 2
    acts[:, 0, 1, 2] += 6 * labels
    acts[:, 2, 3, 0] -= 2 * labels
    return acts, labels


def test_caa_adds_the_mean_difference_in_one_layer():
    pos, neg = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    shift = baselines.caa_shift(baselines.caa_vector(pos, neg), 1, 0.5)
    edits = baselines.caa_edits(MODEL, shift)
    plain, moved = (
        MODEL.capture({"params": PARAMS, **more}, TEXTS.tokens, sites=("resid_post",))[1]["resid_post"]
        for more in ({}, {"edits": edits})
    )
    np.testing.assert_array_equal(moved[0], plain[0])
    np.testing.assert_allclose(moved[1] - plain[1], np.tile(0.5 * (pos - neg).mean(0)[1], (3, 5, 1)), atol=1e-5)


def test_directions_and_spreads_are_the_official_ones(vectors):
    stored = vectors("self_feedback")
    acts, labels = stored["iti_acts"], stored["iti_labels"].astype(int)
    half = len(acts) // 2
    fit = baselines.iti_fit(acts, labels, np.arange(half), np.arange(half, len(acts)))
    com = stored["iti_com"].reshape(fit.shift.shape)
    theta = com / np.linalg.norm(com, axis=-1, keepdims=True)
    sigma = np.einsum("nlhk,lhk->nlh", acts, theta).std(0)
    np.testing.assert_allclose(fit.shift, sigma[..., None] * theta, rtol=1e-4, atol=1e-5)
    top = stored["iti_top"].reshape(-1, 2)
    for layer, head in top:
        official = stored["iti_sigma_theta"].reshape(fit.shift.shape)[layer, head]
        np.testing.assert_allclose(fit.shift[layer, head], official, rtol=1e-4, atol=1e-5)


def test_heads_are_ranked_by_held_out_accuracy():
    acts, labels = planted()
    fit = baselines.iti_fit(acts, labels, np.arange(60), np.arange(60, 80))
    assert fit.ranks[0, 1] == 0 and fit.accuracy[0, 1] == 1 and fit.ranks[2, 3] == 1
    shift = baselines.iti_shift(fit, 1, 2.0)
    assert np.count_nonzero(np.abs(shift).sum(-1)) == 1
    seen = acts[:, 0, 1]
    difference = seen[labels == 1].mean(0) - seen[labels == 0].mean(0)
    theta = difference / np.linalg.norm(difference)
    np.testing.assert_allclose(shift[0, 1], 2 * (seen @ theta).std() * theta, rtol=1e-4)


def test_items_outside_both_parts_are_not_looked_at():
    acts, labels = planted()
    spoilt = np.where(np.arange(80)[:, None, None, None] >= 70, 1e3, acts)
    parts = np.arange(50), np.arange(50, 70)
    kept, other = (baselines.iti_fit(x, labels, *parts) for x in (acts, spoilt))
    for field in ("shift", "accuracy", "ranks"):
        np.testing.assert_allclose(getattr(kept, field), getattr(other, field), rtol=1e-6)


def test_two_folds_fit_on_one_half_of_the_groups_and_test_on_the_other():
    acts, labels = planted()
    groups = np.arange(80) // 2
    (first, test_first), (second, test_second) = baselines.iti_two_folds(jax.random.key(0), acts, labels, groups)
    assert sorted([*test_first, *test_second]) == list(range(80))
    assert not set(groups[test_first]) & set(groups[test_second])
    # What is spoilt in the test half does not move the fit.
    spoilt = acts.copy()
    spoilt[test_first] = 1e3
    again = baselines.iti_two_folds(jax.random.key(0), spoilt, labels, groups)[0][0]
    np.testing.assert_array_equal(again.shift, first.shift)
    assert np.abs(second.shift - first.shift).max() > 1e-3
    with pytest.raises(ValueError, match="at least four groups"):
        baselines.iti_two_folds(jax.random.key(0), acts, labels, groups % 3)


def test_shifts_act_from_start_on_before_the_output_projection():
    acts, labels = planted()
    shift = baselines.iti_shift(baselines.iti_fit(acts, labels, np.arange(60), np.arange(60, 80)), 2, 3.0)
    inside = np.arange(5) >= np.asarray(TEXTS.lengths)[:, None] - 1
    for start, where in ((None, np.ones((3, 5), bool)), (TEXTS.lengths - 1, inside)):
        first = jnp.where(jnp.arange(3)[:, None, None] == 0, shift, 0)
        edits = baselines.iti_edits(MODEL, first, start)
        plain, moved = (
            MODEL.capture({"params": PARAMS, **more}, TEXTS.tokens, sites=("attn_z",))[1]["attn_z"][0]
            for more in ({}, {"edits": edits})
        )
        np.testing.assert_allclose(moved - plain, where[..., None, None] * np.asarray(first[0]), atol=1e-5)
    still = baselines.iti_edits(MODEL, 0 * shift)
    plain = MODEL.apply({"params": PARAMS}, TEXTS.tokens)
    np.testing.assert_array_equal(MODEL.apply({"params": PARAMS, "edits": still}, TEXTS.tokens), plain)


def test_a_shift_at_all_positions_is_a_bias_of_the_output_projection():
    shift = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 6)), jnp.float32)
    edited = MODEL.apply({"params": PARAMS, "edits": baselines.iti_edits(MODEL, shift)}, TEXTS.tokens)
    biased = transformer(llama(**SIZES, kv_heads=2, head_width=6, bias_o=True))
    params = jax.tree.map(lambda x: x, PARAMS)
    params["blocks"]["attn"]["o"]["bias"] = jnp.einsum("lhk,lhkd->ld", shift, params["blocks"]["attn"]["o"]["kernel"])
    np.testing.assert_allclose(biased.apply({"params": params}, TEXTS.tokens), edited, rtol=1e-4, atol=1e-5)


def test_sadi_scales_the_largest_mean_differences():
    momentum = jnp.asarray([[[3.0, -5.0, 1.0]], [[1.0, -3.0, 0.0]]])
    np.testing.assert_array_equal(baselines.sadi_mask(momentum, 2, 7.0), [[7.0, 7.0, 0.0]])
    np.testing.assert_array_equal(baselines.sadi_mask(momentum, 1, -2.0), [[0.0, -2.0, 0.0]])


@given(st.integers(0, 1000), st.integers(1, 12))
def test_matched_masks_have_austeers_strengths_on_other_units(seed, k):
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(np.where(rng.random((3, 4)) < 0.5, -1, 1) * rng.integers(1, 9, (3, 4)) / 8, jnp.float32)
    np.testing.assert_allclose(
        baselines.matched_mask(scores, austeer.au_ranks(scores), k, 2.0), austeer.au_mask(scores, k, 2.0)
    )
    for ranks in (baselines.random_ranks(jax.random.key(seed), (3, 4)), baselines.inverse_ranks(scores)):
        assert sorted(np.asarray(ranks).ravel()) == list(range(12))
        mask = baselines.matched_mask(scores, ranks, k, 2.0)
        sizes = np.sort(np.abs(np.asarray(mask)).ravel())[::-1][:k]
        np.testing.assert_allclose(sizes, 2 * np.sort(np.abs(np.asarray(scores)).ravel())[::-1][:k])
        assert ((np.asarray(mask) * np.asarray(scores)) >= 0).all() and np.count_nonzero(mask) == k
    inverse = np.asarray(baselines.inverse_ranks(scores))
    assert np.abs(scores).ravel()[inverse.ravel() == 0] == np.abs(scores).min()


def test_a_whole_block_is_every_unit_of_its_layer():
    scores = jnp.asarray([[0.5, -1.0], [1.0, 0.25]])
    np.testing.assert_array_equal(baselines.whole_block(scores, 1, 4.0), [[0, 0], [4, 1]])


def test_bad_input_is_refused():
    acts, labels = planted()
    with pytest.raises(ValueError, match="share 1 items"):
        baselines.iti_fit(acts, labels, np.arange(11), np.arange(10, 20))
    with pytest.raises(ValueError, match="every class"):
        baselines.iti_fit(acts, 0 * labels, np.arange(10), np.arange(10, 20))
    with pytest.raises(ValueError, match=r"wanted acts \(N, L, H, K\)"):
        baselines.iti_fit(acts[:, 0], labels, np.arange(10), np.arange(10, 20))
    fit = baselines.iti_fit(acts, labels, np.arange(60), np.arange(60, 80))
    with pytest.raises(ValueError, match="wanted 1 to L D = 12 units, got 13"):
        baselines.iti_shift(fit, 13, 1.0)
    with pytest.raises(ValueError, match="alpha must be finite"):
        baselines.iti_shift(fit, 1, float("inf"))
    with pytest.raises(ValueError, match=r"shift: wanted shape \(3, 4, 6\) at .attn_z., got"):
        baselines.iti_edits(MODEL, fit.shift[..., :4])
    with pytest.raises(ValueError, match="wanted one shape"):
        baselines.matched_mask(np.ones((2, 3)), np.zeros((3, 2), int), 1, 1.0)
