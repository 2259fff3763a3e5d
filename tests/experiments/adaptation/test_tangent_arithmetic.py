"""The tangent-arithmetic experiment at smoke size: it runs, its identities hold, its claims are judged both ways."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.adaptation import _tangent_arithmetic_lab as lab_module
from experiments.adaptation.tangent_arithmetic import CLAIMS, PRESETS, Config, inner, over_width, run
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), SMOKE, Log())


def test_smoke_run_judges_every_claim(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    assert "not_judged" not in status.values()
    for name in ("posthoc_adds", "advantage", "negation"):
        assert status[name] == "holds", name


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    assert 50 <= metrics["pretrain/accuracy"].value < 65
    # Each mode is normalised by its own single tasks.
    for mode in ("standard", "posthoc", "linear"):
        assert metrics[f"addition/{mode}/single"].value > metrics[f"addition/{mode}/before"].value
        assert metrics[f"addition/{mode}/normalised"].value == metrics[f"rates/0.0003/{mode}/normalised"].value
        assert metrics[f"negation/{mode}/target"].value < metrics["negation/before/target"].value
        mean = np.mean([metrics[f"single/{mode}/{task}"].value for task in SMOKE.tasks])
        np.testing.assert_allclose(metrics[f"addition/{mode}/single"].value, mean, atol=1e-3)
    assert metrics["xi_matched/linear/factor"].value <= 1
    assert 0 < metrics["xi/standard"].value < 2
    assert {"disentanglement", "addition", "negation", "local_energy"} <= set(result.figures)


def test_tasks_do_not_share_images_and_seeds_do_not_share_networks():
    config = dataclasses.replace(SMOKE, seeds=2, pretrain_steps=2)
    lab = lab_module.prepare(jax.random.key(0), config, Log())
    assert lab.data["train"]["x"].shape == (3, 400, 8, 8)
    assert set(np.asarray(lab.data["train"]["y"][0])) == set(range(5))
    assert set(np.asarray(lab.data["test"]["y"][1])) == set(range(5, 10))
    assert list(lab.classes) == [5, 5]
    flat = np.concatenate([np.asarray(lab.data[part]["x"][0]).reshape(-1, 64) for part in lab_module.PARTS])
    assert len(np.unique(flat, axis=0)) == len(flat)
    start = lab_module.pretrain(lab)
    for trunk in start.trunks.values():
        kernel = trunk["layer_0"]["kernel"]
        assert not np.allclose(kernel[0], kernel[1])
    assert "layer_2" not in start.trunks["random"]


TINY = dataclasses.replace(SMOKE, train=64, validation=20, test=20, pretrain_steps=2, steps=2, batch=16, xi_points=3)


def test_a_vision_transformer_is_pre_trained_and_linearised_below_its_head():
    config = dataclasses.replace(TINY, tasks=("gratings", "digits"), control="gaps", network="vit", width=8, depth=1)
    lab = lab_module.prepare(jax.random.key(1), config, Log())
    start = lab_module.pretrain(lab)
    assert start.heads["kernel"].shape == (1, 3, 8, 10) and "head" not in start.trunks["pretrained"]
    run = ("pretrained", 1e-2)
    vectors = lab_module.fine_tune(lab, start, [run], "vit", linear=True)[run]
    assert vectors["embed"]["patch"]["kernel"].shape == (1, 2, 2, 2, 1, 8)
    assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(vectors["blocks"]["mlp"]))


def test_another_width_is_measured():
    # Enough training that no task is at 0 %, and a grid with points inside [-1, 1]²: neither could be averaged over.
    config = dataclasses.replace(TINY, test=100, validation=100, pretrain_steps=20, steps=20, xi_points=7)
    lab = lab_module.prepare(jax.random.key(1), config, Log())
    metrics: dict[str, Metric] = {}
    over_width(jax.random.key(1), lab, 32, metrics)
    assert {"width/32/pretrain", "width/32/linear/normalised", "width/32/xi/posthoc"} <= set(metrics)


def test_the_mean_error_leaves_the_axes_and_the_outside_out():
    config = dataclasses.replace(SMOKE, xi_points=7)
    lab = lab_module.Lab(config, Log(), None, None, "", {})
    np.testing.assert_allclose(lab_module.xi_grid(config), np.arange(-3, 4))
    maps = np.full((1, 1, 7, 7), 9.0)
    maps[0, 0, [2, 2, 4, 4], [2, 4, 2, 4]] = [1, 2, 3, 4]
    np.testing.assert_allclose(inner(lab, maps), [2.5])
    np.testing.assert_allclose(inner(lab, maps, lowest=0.0), [4])


def numbers(good: bool) -> dict[str, Metric]:
    """Metrics under which every claim holds, or fails."""
    low, high = (1.0, 2.0) if good else (2.0, 1.0)
    three = lambda value: Metric(value=value, per_seed=(value,) * 3)  # noqa: E731
    added = {"standard": 70.0, "posthoc": 71.0 if good else 70.9, "linear": 72.0 if good else 70.8}
    return {
        **{f"addition/{mode}/normalised": three(x) for mode, x in added.items()},
        **{f"addition/{mode}/absolute": three(x if good else 50.0) for mode, x in added.items()},
        **{f"negation/{mode}/control": three(60.0) for mode in ("before", "standard", "posthoc", "linear")},
        **{f"negation/{mode}/target": three(5.0) for mode in ("before", "standard", "posthoc")},
        "negation/linear/target": Metric(value=4, per_seed=(4.0, 4.0, 6.0) if good else (4.0, 5.0, 6.0)),
        **{
            f"{xi}/{mode}": three(x) for xi in ("xi", "xi_matched") for mode, x in (("linear", low), ("standard", high))
        },
        "advantage": three(0.0 if good else -0.1),
        "posthoc_drop/a": three(-1.0),
        "posthoc_drop/b": three(5.0 if good else 4.9),
        "random/standard/normalised": three(55.0 if good else 55.1),
        "ntk/pretrained/ratio": three(1.5 if good else 0.9),
        "ntk/random/ratio": three(1.4 if good else 0.8),
    }


@pytest.mark.parametrize(("good", "status"), [(True, "holds"), (False, "fails")])
def test_claims_follow_their_numbers(good, status):
    assert {claim.id: claim.status for claim in judge_claims(CLAIMS, numbers(good))} == {
        claim.id: status for claim in CLAIMS
    }


def test_bad_configurations_are_refused():
    for bad, message in (
        ({"tasks": ("mnist", "grating")}, r'unknown "grating".*"gratings"'),
        ({"tasks": ("mnist",)}, "at least two"),
        ({"control": "rings"}, "control must be"),
        ({"xi_points": 4}, "must be odd"),
        ({"rates": ()}, "rates must be positive"),
        ({"seeds": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**bad)
    with pytest.raises(ValueError, match="low_digits has"):
        lab_module.prepare(jax.random.key(0), dataclasses.replace(SMOKE, train=4000), Log())
