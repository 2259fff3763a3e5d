"""The Dopamine experiment at smoke size: it runs, its identities hold, its claims are judged by their criteria."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.adaptation import _dopamine_lab as lab_module
from experiments.adaptation.dopamine import CLAIMS, PRESETS, Config, run
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_shows_the_paper_s_claims(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    for name in ("beats_frozen", "lora_more_accurate", "few_parameters", "forgetting", "causal_attribution"):
        assert status[name] == "holds", name
    assert status["limitation"] == "not_judged"


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    assert metrics["trainable/taugate"].value == 2 * (64 + 64)
    assert metrics["trainable/lora_4"].value == 4 * (64 + 64 + 64 + 64 + 64 + 10)
    assert metrics["base_changed"].value == 0
    gain = metrics["gain/mixed/taugate"]
    by_hand = np.subtract(metrics["rotated/mixed/taugate"].per_seed, metrics["rotated/mixed/frozen"].per_seed)
    np.testing.assert_allclose(gain.per_seed, by_hand, atol=1e-4)
    assert gain.ci95[0] < gain.value < gain.ci95[1]
    assert len(gain.per_seed) == 3


def test_smoke_run_draws_its_figures(result):
    assert {"accuracy_against_parameters", "gates", "firing", "class_contribution"} <= set(result.figures)


def test_sweeps_schedules_and_convolutions_run():
    tiny = dataclasses.replace(
        PRESETS["smoke"],
        network="cnn",
        hidden=(4, 4),
        seeds=2,
        arms=("taugate", "gain", "full"),
        upright_arms=("taugate",),
        angles=(45.0, 90.0),
        steps=4,
        rate_factors=(0.5, 1.0),
        sharpness_sweep=(5.0, 20.0),
        penalty_sweep=(0.0, 0.2),
        schedules=True,
    )
    result = run(jax.random.key(1), tiny, Log())
    for name in ("sharpness/hard/20", "penalty/soft/0.2", "angle/TauGate/90", "schedule/annealed/hard"):
        assert len(result.metrics[name].per_seed) == 2
    assert {"accuracy_against_sharpness", "accuracy_against_penalty", "accuracy_against_angle"} <= set(result.figures)
    assert result.metrics["rate/mixed/gain"].value in (pytest.approx(5e-3), pytest.approx(1e-2))


def test_foundation_sees_each_digit_in_one_mode_only_and_no_test_digit():
    lab = lab_module.prepare(jax.random.key(0), PRESETS["smoke"], Log())
    assert lab.digits == 1200
    for fit_rows, held_out in zip(np.asarray(lab.fit_rows), np.asarray(lab.validation_rows), strict=True):
        assert sorted([*fit_rows, *held_out]) == list(range(1200))
    # Rotated images of the same digits follow the upright ones.
    np.testing.assert_array_equal(lab.train["y"][:1200], lab.train["y"][1200:])
    assert not np.allclose(lab.train["x"][:1200], lab.train["x"][1200:])


def test_claims_fail_when_their_numbers_say_so():
    per_seed = (1.0, -0.1, 2.0)
    metrics = {
        "gain/mixed/taugate": Metric(value=1.2, per_seed=per_seed),
        "hardening/mixed/taugate": Metric(value=1.1, per_seed=per_seed),
        "trainable/taugate": Metric(value=10),
        "gate_units": Metric(value=5),
        "base_changed": Metric(value=1),
        "forgetting/mixed/taugate": Metric(value=2.0),
        "forgetting/mixed/lora_4": Metric(value=1.0),
        "over_taugate/mixed/lora_8": Metric(value=1.0, per_seed=(1.0, 1.0)),
        "over_taugate/upright/lora_8": Metric(value=2.0, per_seed=(3.0, 0.5)),
        "closing/attributed": Metric(value=1.0, per_seed=(1.0, 1.0)),
        "closing/random": Metric(value=0.5, per_seed=(0.0, 1.0)),
    }
    status = {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}
    failing = ("beats_frozen", "hardening", "few_parameters", "forgetting", "limitation", "causal_attribution")
    assert {name: status[name] for name in failing} == dict.fromkeys(failing, "fails")
    assert status["minority_active"] == "not_judged"


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="unknown arms"):
        Config(arms=("taugate", "lora_3"))
    with pytest.raises(ValueError, match='must contain "taugate"'):
        Config(arms=("gain",))
    with pytest.raises(ValueError, match="matrices"):
        Config(network="cnn")
