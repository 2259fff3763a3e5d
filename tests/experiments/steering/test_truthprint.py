"""The TruthPrInt experiment at smoke size: it runs, its identities hold, its claims are judged by their rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.steering import _truthprint_lab as lab_module
from experiments.steering._truthprint_measures import (
    first_mentions,
    match_rate,
    preceding_minimum,
    within_word,
    word_prior,
)
from experiments.steering.truthprint import CLAIMS, PRESETS, Config, run
from mechlab.data.worlds import shelves as world
from mechlab.models.captioner import captioner, look
from mechlab.models.transformer import llama
from mechlab.models.vit import ViTConfig
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    assert metrics["rollbacks/greedy"].value == 0 and metrics["cost/greedy"].value == pytest.approx(1)
    for name in PRESETS["smoke"].decoders:
        assert metrics[f"unfinished/{name}"].value == 0
    assert 0 <= metrics["detector/auroc"].value <= 1
    assert metrics["drop/truthprint"].value == pytest.approx(
        100 * (1 - metrics["chair_i/truthprint"].value / metrics["chair_i/greedy"].value), abs=1e-3
    )
    assert {claim.id: claim.status for claim in result.claims}["beats_controls"] == "not_judged"
    # Aligning with itself changes nothing but the coordinates, and the rank is one of the model.
    assert 1 <= metrics["transfer/k"].value <= PRESETS["smoke"].width
    assert {"roc", "trade_off", "transfer", "spaces", "pmc", "depth"} <= set(result.figures)


def tiny():
    image = ViTConfig(image=(42, 42), patch=14, channels=1, layers=1, width=16, heads=1, hidden=16, init_std=None)
    text = llama(vocabulary=lab_module.V, layers=2, width=16, heads=1, hidden=16, context=64, init_std=None)
    model = captioner(image, text)
    return model, model.init(jax.random.key(0))


def test_reading_token_by_token_gives_the_states_of_a_whole_forward_also_after_going_back():
    model, params = tiny()
    seen = jax.random.normal(jax.random.key(1), (2, 42, 42, 1))
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, lab_module.V)
    read = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=lab_module.BOS)

    @jax.jit
    def whole(seen, read):
        prefix = look(model, params["vision"], seen)
        return model.prefixed.capture({"params": params["text"]}, prefix, read, sites=("resid_post",))

    logits, acts = whole(seen, read)
    step = jax.jit(lab_module.text_step(model, params))
    cache = jax.jit(lambda seen: lab_module.image_cache(model, params, seen))(seen)
    for t in (0, 1, 2, 3, 1, 2):
        # The second visit reads the same tokens again over what was there.
        out, hidden, cache = step(cache, read[:, t], jnp.full(2, t - 1))
        np.testing.assert_allclose(out, logits[:, t], atol=1e-4)
        np.testing.assert_allclose(hidden.swapaxes(0, 1), acts["resid_post"][:, :, model.prefix + t], atol=1e-4)
    idle = step(cache, read[:, 0], jnp.full(2, lab_module.IDLE))[2]
    np.testing.assert_array_equal(idle.k, cache.k)


def test_states_come_one_token_early_and_do_not_know_the_word():
    model, params = tiny()
    read = lab_module.state_reader(lab_module.Lab(PRESETS["smoke"], model, None, {}))
    seen = jax.random.normal(jax.random.key(3), (1, 42, 42, 1))
    tokens = np.full((1, lab_module.T), 4)
    other = tokens.copy()
    other[0, 6] = 9
    before, after = (np.asarray(read(params, seen, jnp.asarray(text))) for text in (tokens, other))
    # What predicts token 6 is the same; what has read it is not.
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7] - after[:, 7]).max() > 1e-4


def test_images_of_another_size_are_refused():
    model, params = tiny()
    with pytest.raises(ValueError, match=r"\(B, 42, 42, 1\), got float32\(2, 28, 28, 1\)"):
        look(model, params["vision"], jnp.zeros((2, 28, 28, 1)))


def test_captions_name_what_is_there_and_sometimes_what_is_not():
    from mechlab.data.images import load_digits

    bank = world.banks(load_digits())[0]
    for invent, wanted in ((0.0, 0), (1.0, 1)):
        drawn = world.shelves(jax.random.key(0), bank, 50, domain=1, invent=invent)
        classes = world.CLASS_OF[drawn.captions]
        for row in range(50):
            named = set(classes[row][classes[row] >= 0])
            there = set(np.flatnonzero(drawn.truth[row]))
            assert there <= named and len(named - there) <= wanted
            assert set(drawn.cells[row][drawn.cells[row] >= 0]) == there
            dark = drawn.pixels[row, ..., 0].reshape(3, 14, 3, 14).swapaxes(1, 2).reshape(9, 196).mean(1)
            assert (dark[drawn.cells[row] < 0] < 0.06).all()
    assert drawn.captions.shape[1] >= (drawn.captions > 0).sum(1).max()


def test_word_priors_and_auroc_within_words():
    words, labels = np.array([8, 8, 9, 9]), np.array([True, False, True, False])
    assert word_prior(words, labels)[8] == pytest.approx(0.5)
    assert within_word(np.array([1.0, 0.0, 5.0, 9.0]), labels, words) == pytest.approx(0.5)
    assert within_word(np.ones(2), np.array([True, True]), np.array([8, 8])) is None


def test_mentions_are_cut_to_the_shortest_seed_and_know_what_precedes_them():
    three, seven, end = (world.tokenizer.ids[word] for word in ("three", "seven", "."))
    tokens = np.array([[three, 4, seven, end], [three, three, end, seven]])
    confidence = np.array([[0.9, 0.2, 0.8, 0.7], [0.5, 0.6, 0.1, 0.4]])
    truth = np.zeros((2, 10), bool)
    truth[0, 3] = truth[1, 7] = True
    captions = lab_module.Captions(tokens, confidence, np.arange(2 * 4 * 2 * 3).reshape(2, 4, 2, 3), truth)
    one = first_mentions(captions, 1)
    assert one.words.tolist() == [[three, seven, three, seven]] and one.false.tolist() == [[False, True, True, False]]
    assert one.at.tolist() == [[0, 2, 0, 3]] and one.rows.tolist() == [[0, 0, 1, 1]]
    np.testing.assert_array_equal(one.states[0, 1], captions.states[0, 2])
    np.testing.assert_array_equal(preceding_minimum(captions, one), [[np.nan, 0.2, np.nan, np.nan]])
    two = first_mentions(captions, 2)
    assert two.rows.tolist() == [[0, 0], [1, 1]]
    captions = captions._replace(tokens=np.array([[three, 4, 4, end], [three, three, end, seven]]))
    assert first_mentions(captions, 2).words.tolist() == [[three], [three]]


def test_a_rate_is_found_that_gives_the_wanted_rollbacks():
    assert match_rate(lambda rate: 4 * rate**1.2, 0.05, 0.5, 6) == pytest.approx((0.5 / 4) ** (1 / 1.2), rel=0.05)
    assert match_rate(lambda rate: 2 * rate, 0.1, 0.3, 1) == 0.1
    assert match_rate(lambda rate: 0.0, 0.3, 0.0, 2) == 0.3


def test_claims_hold_and_fail_by_their_numbers():
    def status(**change):
        good = {
            "detector/auroc": 0.8,
            "detector/tpr_5": 0.3,
            "detector/auroc_confidence": 0.6,
            "detector/auroc_word": 0.6,
            "drop/truthprint": 25.0,
            "recall_lost/truthprint": 2.0,
            "transfer/gain": 0.1,
            "transfer/aligned/unrelated": 0.5,
            "pmc/hallucinated": 0.1,
            "pmc/truthful": 0.2,
            "over/random": 1.0,
            "over/confidence": 1.0,
            "over/immediate": 1.0,
            "gate/recall": 70.0,
            "gate/chair_i": 15.0,
        }
        numbers = good | {name.replace("__", "/"): value for name, value in change.items()}
        metrics = {name: Metric(value=v, ci95=(v - 0.5, v + 0.5)) for name, v in numbers.items()}
        return {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}

    assert set(status().values()) == {"holds"}
    for name, change in (
        ("sees_early", {"detector__auroc_word": 0.9}),
        ("sees_early", {"detector__tpr_5": 0.1}),
        ("lowers_hallucination", {"recall_lost__truthprint": 4.0}),
        ("beats_controls", {"over__random": 0.4}),
        ("early_beats_immediate", {"over__immediate": -1.0}),
        ("comnhallu_transfers", {"transfer__gain": -0.1}),
        ("low_confidence_before", {"pmc__truthful": 0.05}),
    ):
        assert status(**change)[name] == "fails", (name, change)
    for change in ({"gate__recall": 50.0}, {"gate__chair_i": 5.0}, {"gate__chair_i": 40.0}):
        assert set(status(**change).values()) == {"not_judged"}, change


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="decoders"):
        Config(decoders=("greedy",))
    with pytest.raises(ValueError, match="multiples of 16"):
        Config(width=50)
    with pytest.raises(ValueError, match="multiples of chunk=300"):
        Config(test=50)
