"""Control vectors and their metrics: against the official library's numbers, scikit-learn, and their own identities."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from mechlab.analysis.margins import candidate_scores, log_odds
from mechlab.analysis.metrics import kl_divergence
from mechlab.core.edits import Add, AddRenormed
from mechlab.methods.steering import repe_reasoning as repe
from mechlab.methods.steering import vectors
from mechlab.models.transformer import llama, transformer

STORED = np.load(Path(__file__).parents[2] / "vectors" / "33-repe_reasoning.npz")
POS, NEG = STORED["pos"], STORED["neg"]
SIZES = {"vocabulary": 20, "layers": 3, "width": 10, "heads": 1, "hidden": 12, "context": 8}
MODEL = transformer(llama(**SIZES, init_std=None))
PARAMS = MODEL.init(jax.random.key(0))
TEXTS = vectors.pad([[1, 4, 2], [3, 3, 9, 7, 5], [6]])
ANSWERS = jnp.asarray([[2, 5, 7], [3, 8, 2], [9, 1, 4]])
RIGHT = jnp.asarray([0, 2, 1])


def up_to_sign(found, wanted):
    return np.asarray(found) * np.sign((np.asarray(found) * wanted).sum(-1, keepdims=True))


def test_mean_vectors_are_the_official_ones():
    np.testing.assert_allclose(repe.reading_vector(POS), STORED["dir_R"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(repe.contrast_vector(POS, NEG), STORED["dir_RC"], rtol=1e-5, atol=1e-6)


def test_principal_vectors_are_the_official_ones_up_to_sign():
    for found, name in (
        (repe.pca_contrast_vector(POS, NEG), "dir_PCAC_std"),
        (repe.pca_contrast_vector(POS, NEG, standardize=False), "dir_PCAC_unit"),
        (repe.pca_reading_vector(POS), "dir_PCAR_std"),
    ):
        np.testing.assert_allclose(up_to_sign(found, STORED[name]), STORED[name], rtol=1e-4, atol=1e-5)


def test_principal_vectors_are_scikit_learn_s_on_the_side_of_the_mean():
    found = np.asarray(repe.pca_contrast_vector(POS, NEG, standardize=False))
    for layer in range(3):
        component = PCA(1).fit(POS[:, layer] - NEG[:, layer]).components_[0]
        np.testing.assert_allclose(up_to_sign(found[layer], component), component, rtol=1e-4, atol=1e-5)
    mean = (POS - NEG).mean(0)
    assert ((found * mean).sum(-1) >= 0).all()
    cosine = (found * mean).sum(-1) / np.linalg.norm(mean, axis=-1)
    np.testing.assert_allclose(repe.component_cosine(POS, NEG), cosine, rtol=1e-4)
    lengths = np.linalg.norm(np.asarray(repe.pca_contrast_vector(POS, NEG)), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(STORED["dir_RC"], axis=-1), rtol=1e-4)


def test_every_type_is_its_function():
    for kind, wanted in (
        ("reading", repe.reading_vector(POS)),
        ("contrast", repe.contrast_vector(POS, NEG)),
        ("pca_contrast", repe.pca_contrast_vector(POS, NEG)),
        ("pca_reading", repe.pca_reading_vector(POS)),
    ):
        np.testing.assert_array_equal(repe.control_vector(kind, POS, NEG), wanted)


@pytest.mark.parametrize("alpha", ["-1.0", "0.0", "0.5"])
def test_the_edit_is_the_official_control_block(alpha):
    h, v = jnp.asarray(STORED["h"]), float(alpha) * jnp.asarray(STORED["dir_RC"][1])
    for kind, norm in ((Add, 0), (AddRenormed, 1)):
        edit = repe.control_edits(MODEL, STORED["dir_RC"], 1, float(alpha), normalize=bool(norm))["resid_post"]
        assert isinstance(edit.edit, kind)
        one_layer = kind(edit.edit.value[1])
        np.testing.assert_allclose(edit.edit.value[1], v, rtol=1e-6)
        np.testing.assert_allclose(one_layer(h, None), STORED[f"out_alpha{alpha}_norm{norm}"], rtol=1e-4, atol=1e-5)


def test_no_vector_at_alpha_zero_a_mirror_at_minus_alpha_and_lengths_kept():
    v = repe.contrast_vector(POS, NEG)
    for normalize in (False, True):
        curve = repe.alpha_sweep(MODEL, PARAMS, TEXTS, v, 1, [0.0, 0.7], normalize=normalize)
        mirror = repe.alpha_sweep(MODEL, PARAMS, TEXTS, -v, 1, [0.0, -0.7], normalize=normalize)
        plain = np.stack([MODEL.apply({"params": PARAMS}, t[None, :n])[0, -1] for t, n in zip(*TEXTS, strict=True)])
        np.testing.assert_allclose(curve[0], plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(curve, mirror, rtol=1e-5, atol=1e-6)
        assert np.abs(curve[1] - curve[0]).max() > 1e-2
    h = jnp.asarray(STORED["h"])
    moved = AddRenormed(3.0 * v[1])(h, None)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=-1), np.linalg.norm(h, axis=-1), rtol=1e-5)


def test_slopes_are_finite_differences_of_the_sweep():
    v = jnp.stack([repe.contrast_vector(POS, NEG), repe.reading_vector(POS)])
    margins, slopes = repe.margin_slopes(MODEL, PARAMS, v, [1, 2], TEXTS, ANSWERS, RIGHT)
    for row, layer in enumerate((1, 2)):
        logits = repe.alpha_sweep(MODEL, PARAMS, TEXTS, v[row], layer, [-0.01, 0.0, 0.01])
        low, middle, high = log_odds(candidate_scores(jnp.asarray(logits), ANSWERS), RIGHT)
        np.testing.assert_allclose(margins, middle, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(slopes[row], (high - low) / 0.02, rtol=2e-2, atol=2e-3)


def test_metrics_are_the_official_ones():
    ref, mod, ids = (STORED[name] for name in ("logits_ref", "logits_mod", "answer_ids"))
    y = ids[STORED["y"]]
    kl = kl_divergence(ref, mod, eps=repe.EPSILON)
    np.testing.assert_allclose(kl, STORED["kl"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([kl.mean(), kl.var()], STORED["kl_mean_popvar"], rtol=1e-4)
    np.testing.assert_allclose(repe.entropy_bits(mod), STORED["entropy_bits"], rtol=1e-4)
    correct, wrong = repe.answer_mass(mod, ids, y)
    np.testing.assert_allclose(correct, STORED["prob_correct_masked"], rtol=1e-4)
    np.testing.assert_allclose(correct + wrong, 1, rtol=1e-5)
    full = jax.nn.softmax(jnp.asarray(mod), -1)
    correct, wrong = repe.answer_mass(mod, ids, y, masked=False)
    np.testing.assert_allclose(correct, full[np.arange(6), y], rtol=1e-5)
    np.testing.assert_allclose(correct + wrong, full[:, ids].sum(-1), rtol=1e-5)
    best = ids[mod[:, ids].argmax(-1)]
    np.testing.assert_array_equal(repe.logit_accuracy(mod, ids, y), best == y)


@given(st.integers(0, 1000), st.floats(0.01, 20))
def test_bounds_of_divergence_and_entropy(seed, scale):
    # One size: a new shape would compile anew.
    ref, mod = scale * np.random.default_rng(seed).normal(size=(2, 13)).astype(np.float32)
    assert kl_divergence(ref, mod, eps=repe.EPSILON) >= -1e-6
    assert kl_divergence(ref, ref, eps=repe.EPSILON) == 0
    assert repe.entropy_bits(mod) <= np.log2(13) + 1e-4
    np.testing.assert_allclose(repe.entropy_bits(np.full(13, scale, np.float32)), np.log2(13), rtol=1e-4)


def test_they_go_through_transformations():
    ids = jnp.asarray(STORED["answer_ids"])
    y = ids[STORED["y"]]
    stacked = jnp.stack([STORED["logits_mod"], STORED["logits_ref"]])
    by_one = [repe.answer_mass(x, ids, y)[0] for x in stacked]
    np.testing.assert_allclose(jax.jit(lambda x: repe.answer_mass(x, ids, y)[0])(stacked), by_one, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(repe.pca_contrast_vector)(POS, NEG), repe.pca_contrast_vector(POS, NEG), 1e-4)
    ref = jnp.asarray(STORED["logits_ref"])
    slope = jax.grad(lambda x: kl_divergence(ref, x, eps=repe.EPSILON).sum())(ref)
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_only_correct_keeps_those_and_no_other():
    keep = np.arange(30) % 3 == 0
    np.testing.assert_array_equal(repe.only_correct(POS, keep), POS[::3])
    with pytest.raises(ValueError, match="none of the 30"):
        repe.only_correct(POS, np.zeros(30, bool))
    with pytest.raises(ValueError, match="booleans"):
        repe.only_correct(POS, keep[:-1])


def test_written_answers():
    assert repe.exact_match("so it is a WOLF.", "wolf") and not repe.exact_match("cat Passage: wolf", "wolf")
    with pytest.raises(ValueError, match="empty"):
        repe.exact_match("anything", " ")
    for text, number in (
        ("1 + 1 = 2 #### -3.5 and 9", -3.5),
        ("The answer is 7, not 8", 7.0),
        ("1 + 1 = 2 apples, 3 pears", 2.0),
        ("first 4 then 6", 6.0),
        ("#### none, but 5", 5.0),
    ):
        assert repe.final_number(text) == number
    assert repe.final_number("no number") is None


def test_bad_input_is_refused():
    flat = np.repeat(POS[:1] - NEG[:1], 4, axis=0)
    for call, match in (
        (lambda: repe.contrast_vector(POS, NEG[:-1]), "pairs of one shape"),
        (lambda: repe.pca_contrast_vector(POS[:1], NEG[:1]), "N >= 2"),
        (lambda: repe.pca_reading_vector(POS[:1]), "N >= 2"),
        (lambda: repe.reading_vector(POS[:0]), "N >= 1"),
        (lambda: repe.pca_contrast_vector(flat, np.zeros_like(flat)), r"no principal component in layers \[0, 1, 2\]"),
        (lambda: repe.control_vector("mean", POS), "known: reading, contrast, pca_contrast, pca_reading"),
        (lambda: repe.control_vector("contrast", POS), "needs h_neg"),
        (lambda: repe.control_edits(MODEL, POS[0], 3, 1.0), "0..2|layer"),
        (lambda: repe.control_edits(MODEL, POS[0], -1, 1.0), "layer"),
        (lambda: repe.control_edits(MODEL, POS[0, :, :9], 1, 1.0), "width"),
        (lambda: repe.control_edits(MODEL, POS[0], 1, float("nan")), "finite"),
        (lambda: repe.alpha_sweep(MODEL, PARAMS, TEXTS, POS[0], 1, [0.0, np.inf]), "finite"),
        (lambda: repe.logit_accuracy(np.zeros((2, 9)), [1, 2], [1, 3]), r"items \[1\] are not in the answer list"),
        (lambda: repe.answer_mass(np.zeros((2, 9)), [1, 1, 2], [1, 2]), "share their first token"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
