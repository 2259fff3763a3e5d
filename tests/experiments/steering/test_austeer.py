"""The AUSteer experiment at smoke size: it runs, its identities hold, its claims are judged by their rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.steering import _austeer_lab as lab
from experiments.steering import _tales_tasks as tasks
from experiments.steering.austeer import CLAIMS, PRESETS, Config, run
from mechlab.methods.steering import austeer
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


@pytest.fixture(scope="module")
def subject():
    return lab.planted_subject(jax.random.key(3))


@pytest.fixture(scope="module")
def reading(subject):
    return lab.read(jax.random.key(0), subject, subject.tasks["planted"], 2, 20)


def test_all_planted_units_are_found_with_their_signs_and_help(result):
    metrics = result.metrics
    assert metrics["planted/found"].per_seed == metrics["planted/signs"].per_seed == (8, 8)
    assert metrics["gain/planted/austeer"].value > 20 and metrics["auroc_gain/planted/austeer"].value > 0.2
    assert metrics["over_random/planted"].value > 0
    status = {claim.id: claim.status for claim in result.claims}
    assert status["ranking"] == "holds" and status["selection_matters"] == status["unit_beats_block"] == "not_judged"


def test_metrics_are_what_they_say(result):
    metrics = result.metrics
    for arm in ("austeer", "caa", "iti", "sadi", "block", "mean", "steady", "inverse"):
        difference = metrics[f"accuracy/planted/{arm}"].value - metrics["accuracy/planted/none"].value
        np.testing.assert_allclose(metrics[f"gain/planted/{arm}"].value, difference, atol=1e-3)
        low, high = metrics[f"auroc/planted/{arm}"].ci95
        assert (
            low <= metrics[f"auroc/planted/{arm}"].value + 1e-6 and high >= metrics[f"auroc/planted/{arm}"].value - 1e-6
        )
    assert metrics["choice/planted/austeer/dims"].value <= metrics["choice/planted/austeer/k"].value
    assert {"methods", "grid", "where", "units_attn", "units_ffn", "divergence"} == set(result.figures)
    assert metrics["scan/planted/ffn/helpful"].n == 64


def test_arms_of_zeros_are_the_model_and_each_array_acts(subject):
    items = subject.tasks["planted"](jax.random.key(0), 50, "dev")
    none = lab.arms_of(subject.model)
    some = [lab.arms_of(subject.model, **{name: 1 + getattr(none, name)}) for name in lab.Arm._fields]
    arms = jax.tree.map(lambda *x: jnp.stack(x), none, *some)
    logits = lab.scores_of(subject, tasks.stacked([items]), arms, np.zeros(5, int))
    plain = austeer.steered_logits(subject.model, subject.params, {}, items.texts, items.answers)
    np.testing.assert_allclose(logits[0], plain, rtol=1e-5, atol=1e-6)
    assert (np.abs(logits[1:] - logits[:1]).max((1, 2)) > 1e-4).all()


def test_methods_get_about_as_many_dev_evaluations_as_austeer(subject, reading):
    found = lab.tuned_arms(subject.model, reading, (1, 4, 16), (1.0, 5.0, 20.0))
    sizes = {name: x.arms.attn.shape[1] for name, x in found.items()}
    assert sizes["austeer"] == sizes["sadi"] == 18 and all(12 <= size <= 18 for size in sizes.values())
    for name, x in found.items():
        assert {np.shape(values)[-1] for values in x.settings.values()} == {sizes[name]}
    ours = found["austeer"]
    np.testing.assert_array_equal(ours.settings["dims"], np.broadcast_to(ours.settings["k"], (2, 18)))
    for i in range(18):
        site, k, alpha = (ours.settings[name][i] for name in ("site", "k", "alpha"))
        wanted = austeer.au_mask(reading.scores[lab.SITES[site]][1], int(k), float(alpha))
        np.testing.assert_allclose(ours.arms[site][1, i], wanted, rtol=1e-6)
        assert not ours.arms[1 - site][1, i].any()


def test_lots_are_the_consistency_of_chance(reading):
    top, by_lot = lab.consistency(jax.random.split(jax.random.key(0), 2), reading)
    np.testing.assert_array_equal(top, 1)
    # The largest |beta| of 128 fair coins thrown 20 times: high, but below that of a planted unit.
    assert ((by_lot > 0.7) & (by_lot < 1)).all()


def test_controls_steer_as_strongly_as_austeer(subject, reading):
    ours = {"site": np.asarray([1, 0]), "k": np.asarray([6, 3]), "alpha": np.asarray([3.0, 2.0])}
    names, arms = lab.control_arms(jax.random.key(1), subject.model, reading, ours, 2)
    assert names == ["mean", "steady", "inverse", "random 0", "random 1"]
    for seed, (masks, other, site, k, alpha) in enumerate(
        ((arms.ffn[0], arms.attn[0], "ffn", 6, 3.0), (arms.attn[1], arms.ffn[1], "attn", 3, 2.0))
    ):
        strength = float(jnp.abs(austeer.au_mask(reading.scores[site][seed], k, alpha)).sum())
        np.testing.assert_allclose(jnp.abs(masks).sum((1, 2)), strength, rtol=1e-5)
        assert not other.any()
        assert (np.abs(masks[3] - masks[4]) > 0).any()


def test_claims_fail_and_hold_by_their_numbers():
    def measured(**numbers):
        n = {
            "over_random": 0.1,
            "lower": 0.02,
            "gain": -0.5,
            "lead": 0.05,
            "harmful": 3,
            "versus": 0.5,
            "found": 8,
        } | numbers
        metrics = {
            "planted/found": Metric(value=n["found"], n=3),
            "planted/signs": Metric(value=8, n=3),
            "gain/planted/austeer": Metric(value=30, ci95=(20, 40)),
            "scan/recall/band": Metric(value=0.02),
        }
        for site in ("attn", "ffn"):
            for part, value in (("lead", n["lead"]), ("helpful", 2), ("harmful", n["harmful"])):
                metrics[f"scan/recall/{site}/{part}"] = Metric(value=value, n=64)
            for part in ("best_unit", "block", "layer"):
                metrics[f"scan/recall/{site}/{part}"] = Metric(value=1.0)
        for i, task in enumerate(("recall", "mood", "agree")):
            metrics[f"over_random/{task}"] = Metric(value=n["over_random"] if i else -0.1)
            metrics[f"auroc_gain/{task}/austeer"] = Metric(value=0.1, ci95=(n["lower"], 0.3))
            metrics[f"gain/{task}/austeer"] = Metric(value=n["gain"])
            metrics[f"over_offset/{task}"] = Metric(value=1.0)
        for rival in ("caa", "iti", "sadi"):
            metrics[f"versus/all/{rival}"] = Metric(value=1.0, ci95=(n["versus"], 2.0))
        return {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}

    good = measured()
    assert good.pop("over_offset") == "not_judged" and set(good.values()) == {"holds"}
    for claim, numbers in (
        ("ranking", {"found": 7}),
        ("unit_beats_block", {"lead": -0.01}),
        ("unit_beats_block", {"harmful": 0}),
        ("selection_matters", {"over_random": -0.01}),
        ("selection_matters", {"lower": -0.01}),
        ("no_loss", {"gain": -1.1}),
        ("beats_baselines", {"versus": -0.1}),
    ):
        assert measured(**numbers)[claim] == "fails", claim


def test_bad_configurations_are_refused():
    for bad, match in (
        ({"tasks": ("recall", "riddles")}, "riddles"),
        ({"scan_task": "ioi"}, "not one of the tasks"),
        ({"ks": (0, 1)}, "at least 1"),
        ({"alphas": (1.0, float("nan"))}, "finite"),
        ({"alphas": (-1.0,)}, "positive"),
        ({"seeds": 0}, "at least 1"),
        ({"test": 2}, "at least 4"),
    ):
        with pytest.raises(ValueError, match=match):
            Config(**bad)
