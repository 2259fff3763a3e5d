"""The AWQ experiment at smoke size: it runs, its numbers fit together, claims follow their rules."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from experiments.compression.awq import CLAIMS, PRESETS, run
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_measures_every_arm(result):
    metrics = result.metrics
    for arm in ("rtn", "awq_scale", "awq", "gptq", "kept_act_low", "kept_weight_low", "kept_random_low"):
        assert metrics[f"kl/3/{arm}"].value > 0
        assert metrics[f"perplexity/3/{arm}"].value > 1
    assert metrics["kl/3/kept_act_low"].value < metrics["kl/3/rtn"].value
    assert metrics["sweep_kl/1"].value == pytest.approx(metrics["kl/3/rtn"].value, rel=1e-4)
    assert {"methods_3", "salient_3", "sweep", "search_3"} == set(result.figures)


def test_the_search_is_never_worse_than_rounding(result):
    assert result.metrics["search/worst_ratio"].value <= 1
    status = {claim.id: claim.status for claim in result.claims}
    assert status["search_is_safe"] == "holds" and status["less_overfitting"] == "not_judged"


def numbers(good):
    better, worse = (0.1, 0.2) if good else (0.2, 0.1)

    def metric(value):
        return Metric(value=value, per_seed=(value, value))

    return {
        **{f"kl/3/{arm}": metric(better) for arm in ("kept_act_low", "awq")},
        **{f"kl/3/{arm}": metric(worse) for arm in ("kept_weight_low", "kept_random_low", "rtn", "awq_scale")},
        "kl/4/awq": metric(better),
        "kl/4/rtn": metric(worse),
        "sweep_kl/1": metric(worse),
        "sweep_kl/2": metric(better),
        "search/worst_ratio": metric(1.0 if good else 1.01),
        "search/mean_ratio": metric(0.9),
        "shift_rise/3/awq": metric(better),
        "shift_rise/3/gptq": metric(worse),
    }


@pytest.mark.parametrize(("good", "status"), [(True, "holds"), (False, "fails")])
def test_claims_follow_their_rules(good, status):
    judged = {claim.id: claim.status for claim in judge_claims(CLAIMS, numbers(good))}
    assert judged == dict.fromkeys((claim.id for claim in CLAIMS), status)


def test_bad_configurations_are_refused():
    smoke = PRESETS["smoke"]
    for change, message in (
        ({"factors": (2.0,)}, "contain 1"),
        ({"genres": ("story",)}, "wanted two"),
        ({"seeds": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(smoke, **change)
