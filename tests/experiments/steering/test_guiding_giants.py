"""The experiment on controllers at smoke size: it runs, its numbers fit together, claims are judged by their rules."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments.steering import _guiding_giants_lab as lab
from experiments.steering import _guiding_giants_measures as measures
from experiments.steering.guiding_giants import CLAIMS, PRESETS, Config, run
from mechlab.data.worlds import requests as world
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    assert metrics["kl/none"].value == 0
    for arm in ("released_early", "released_two_pass", "uniform", "single", "cast", "main"):
        refused = [metrics[f"{group}/{arm}"].value for group in ("refusal_plain", "refusal_wrapped", "over")]
        np.testing.assert_allclose(metrics[f"score/{arm}"].value, (refused[0] + refused[1]) / 2 - refused[2], atol=1e-3)
        assert metrics[f"kl/{arm}"].value >= 0
    gain = metrics["refusal_plain/main"].value - metrics["refusal_plain/none"].value
    np.testing.assert_allclose(metrics["gain/main"].value, gain, atol=1e-3)
    status = {claim.id: claim.status for claim in result.claims}
    assert status["end_to_end_better"] == status["uniform_spills"] == "not_judged"
    assert {"methods", "scalar", "weights", "ablations"} == set(result.figures)


def test_panels_are_what_they_are_called():
    panel = lab.draw_panel(jax.random.key(0), 20, "test", True)
    garden = np.isin(panel.tokens, [world.tokenizer.id(noun) for noun in world.NOUNS[world.TARGET]]).any(1)
    np.testing.assert_array_equal(garden, panel.target)
    longer = np.asarray(panel.lengths)
    assert longer[panel.wrapped].mean() > longer[~panel.wrapped].mean() and len(panel.target) == 80


def test_matching_is_linear_between_strengths():
    curve = {"refusal": np.asarray([0.2, 0.6]), "over": np.asarray([0.1, 0.5])}
    assert measures.match(0.4, curve)["over"] == pytest.approx(0.3)
    assert measures.match(0.1, curve)["over"] == pytest.approx(0.05)
    assert measures.match(0.9, curve) == {"refusal": 0.6, "over": 0.5}
    assert measures.match(0.0, curve)["over"] == 0


def test_scores_count_target_and_others():
    target = np.asarray([True, True, False, False])
    panel = lab.Panel(None, None, target, target, None)  # type: ignore[arg-type]
    answers = np.zeros((1, 4, len(world.REFUSAL)), int)
    answers[0, [0, 1, 2]] = world.REFUSAL
    assert measures.scores_of(lab.Outcome(answers, np.zeros((1, 4))), panel) == pytest.approx([0.5])


def metrics_of(**values):
    return {
        name.replace("__", "/"): Metric(value=float(np.mean(x)), per_seed=tuple(np.atleast_1d(x).astype(float)))
        for name, x in values.items()
    }


@pytest.mark.parametrize(("gain", "over", "status"), [(40, 4, "holds"), (29, 0, "fails"), (60, 6, "fails")])
def test_the_steering_claim_follows_its_rule(gain, over, status):
    judged = judge_claims(CLAIMS, metrics_of(gain__main=gain, over_gain__main=over))
    assert {claim.id: claim.status for claim in judged}["steers"] == status


@pytest.mark.parametrize(
    ("offset", "spread", "status"), [(0.05, 0.3, "holds"), (0.2, 0.3, "fails"), (0.05, 0.1, "fails")]
)
def test_the_weights_claim_follows_its_rule(offset, spread, status):
    judged = judge_claims(CLAIMS, metrics_of(weight_offset__released_early=offset, weight_spread__end_early=spread))
    assert {claim.id: claim.status for claim in judged}["weights_without_signal"] == status


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"places": ("last",)}, "early"),
        ({"places": ("early", "top")}, "top"),
        ({"direction_layer": 4}, "direction_layer"),
        ({"scales": (1.0, 0.5)}, "scales"),
        ({"scales": ()}, "scales"),
        ({"width": 40}, "width"),
        ({"seeds": 0}, "at least 1"),
        ({"end_prompts": 4}, "end_prompts"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
