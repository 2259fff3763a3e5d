"""The Fast IBP experiment at smoke size: it runs, its identities hold, its claims are judged by their criteria."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.architectures import _fast_ibp_figures as figures
from experiments.architectures import _fast_ibp_lab as lab_module
from experiments.architectures.fast_ibp import CLAIMS, PRESETS, Config, run
from mechlab.core import select
from mechlab.methods.architectures.batch_norm import clean_pass, initial_running, running_targets, update_running
from mechlab.methods.architectures.piecewise import BatchNorm
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims

TINY = dataclasses.replace(
    PRESETS["smoke"], train=200, hidden=(16,) * 3, full=1, ramp=1, attacked=40, attack_steps=3, restarts=1
)


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), dataclasses.replace(PRESETS["smoke"], attacked=100), Log())


def test_smoke_run_judges_every_claim(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    for name in ("initial_bounds", "batch_norm_loosens", "sound"):
        assert status[name] == "holds", name
    # By how much needs more training than this.
    assert status["short_warm_up"] in ("holds", "fails")
    for name in ("init_and_bn", "regularisers", "long_warm_up", "crown_ibp"):
        assert status[name] == "not_judged", name


def test_smoke_run_measures_ordered_errors(result):
    for arm in ("xavier", "full"):
        verified, standard = (result.metrics[f"{kind}/0.1/{arm}"] for kind in ("verified", "standard"))
        assert verified.ci95[0] <= verified.value <= verified.ci95[1]
        assert verified.value >= standard.value
    gain = result.metrics["gain/0.1/full"]
    gap = result.metrics["verified/0.1/xavier"].value - result.metrics["verified/0.1/full"].value
    np.testing.assert_allclose(gain.value, gap, atol=1e-3)


def test_smoke_run_draws_its_figures(result):
    assert {
        "initial_bounds",
        "errors_eps0_1",
        "verified_error_eps0_1",
        "inactive_eps0_1",
        "regularisers_eps0_1",
    } <= set(result.figures)


def test_a_second_radius_and_every_arm_of_a_claim_run():
    arms = ("xavier", "init", "bn", "init_bn", "full", "xavier_long", "full_long")
    result = run(jax.random.key(1), dataclasses.replace(TINY, eps=(0.05, 0.1), arms=arms, seeds=2), Log())
    assert len(result.metrics["verified/0.05/full"].per_seed) == 2
    assert "warm_up_length" in result.figures
    assert all(claim.status != "not_judged" for claim in result.claims if claim.id != "crown_ibp")


def test_convolutions_run():
    config = dataclasses.replace(TINY, network="cnn7", width=2, arms=("crown_full",), batch=100)
    result = run(jax.random.key(2), config, Log())
    assert result.metrics["soundness/certified_but_broken"].value == 0


def test_every_arm_has_a_name_and_differs_from_the_others():
    assert set(figures.NAMES) == set(lab_module.ARMS)
    assert len(set(figures.NAMES.values())) == len(figures.NAMES)
    assert len({dataclasses.astuple(arm) for arm in lab_module.ARMS.values()}) == len(lab_module.ARMS)


def test_arms_of_a_seed_share_all_but_the_hidden_kernels():
    lab = lab_module.prepare(jax.random.key(0), TINY, Log())
    nets = [lab_module.new_network(lab, lab_module.ARMS[name], lab.keys[0]) for name in ("xavier", "init")]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *nets)
    kernels = list(select.get(same, "*/kernel").values())
    assert kernels == [False] * 3 + [True]
    assert all(select.get(same, "*/bias").values())


def test_ablations_of_batch_norm_change_every_layer():
    lab = lab_module.prepare(jax.random.key(0), TINY, Log())

    def norms(name):
        net = lab_module.new_network(lab, lab_module.ARMS[name], lab.keys[0])
        return [layer for layer in net if isinstance(layer, BatchNorm)]

    assert all(not norm.scaled and norm.centred for norm in norms("bn_mean"))
    assert all(norm.scaled and not norm.centred for norm in norms("bn_variance"))
    assert all(norm.scale is None and norm.bias is None for norm in norms("bn_plain"))
    assert len(norms("full")) == 3 and not norms("init")


def test_running_statistics_in_training_are_pytorch_s():
    """One step per epoch on all images: the batch is known but for its order."""
    config = dataclasses.replace(TINY, train=64, arms=("full",), natural=0, rate=1e-12)
    lab = lab_module.prepare(jax.random.key(0), config, Log())
    trained = lab_module.train_all(lab)["full"]
    net = lab_module.new_network(lab, lab_module.ARMS["full"], lab.keys[0])
    running = initial_running(net, lab.train["x"])
    for _ in range(lab.epochs(lab_module.ARMS["full"])):
        running = update_running(running, running_targets(clean_pass(net, lab.train["x"])))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0, 0], b, rtol=1e-3, atol=1e-5), trained.params["running"], running
    )


def made_up(full=(30.0, 32.0), **changes):
    """Metrics of two seeds at one radius under which every claim with a direction holds, but for the changes."""
    verified = {
        "xavier": (60.0, 70.0),
        "init": (50.0, 50.0),
        "bn": (60.0, 60.0),
        "init_bn": (40.0, 41.0),
        "full": full,
        "xavier_long": (40.0, 41.0),
        "full_long": (29.0, 30.0),
        "crown_full": (33.0, 33.0),
    } | {name: value for name, value in changes.items() if name in lab_module.ARMS}
    metrics = {f"verified/0.1/{name}": seeds(values) for name, values in verified.items()}
    metrics |= {"inactive/0.1/full": seeds((40.0, 50.0)), "inactive/0.1/xavier": seeds((80.0, 90.0))}
    metrics |= {"balance/0.1/full": seeds((0.4, 0.4)), "balance/0.1/xavier": seeds((0.1, 0.2))}
    for layer in range(1, 6):
        metrics |= {f"initial/ibp/{layer}": seeds((2.0, 1.5)), f"initial/xavier/{layer}": seeds((5.0**layer,) * 2)}
        metrics |= {f"initial/{name}_bn/{layer}": seeds((10.0**layer,) * 2) for name in ("ibp", "xavier")}
    metrics["soundness/certified_but_broken"] = Metric(value=changes.get("broken", 0))
    metrics["soundness/right_under_attack_only"] = Metric(value=0)
    return metrics | {name.replace("__", "/"): seeds(x) for name, x in changes.items() if "__" in name}


def seeds(values):
    return Metric(value=sum(values) / len(values), per_seed=values)


def status_of(metrics):
    return {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}


def test_claims_hold_when_their_numbers_say_so():
    assert status_of(made_up()) == {claim.id: "holds" for claim in CLAIMS} | {"crown_ibp": "not_judged"}


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("initial_bounds", {"initial__ibp__3": (4.1, 2.0)}),
        ("initial_bounds", {"initial__xavier__3": (90.0, 125.0)}),
        ("batch_norm_loosens", {"initial__ibp_bn__5": (99.0, 1e5)}),
        ("short_warm_up", {"full": (30.0, 60.1)}),
        ("init_and_bn", {"init_bn": (40.0, 50.0)}),
        ("init_and_bn", {"bn": (39.0, 60.0)}),
        ("regularisers", {"init_bn": (30.0, 41.0)}),
        ("relu_states", {"inactive__0.1__full": (40.0, 91.0)}),
        ("relu_states", {"balance__0.1__full": (0.4, 0.1)}),
        ("long_warm_up", {"xavier_long": (59.5, 41.0)}),
        ("sound", {"broken": 1}),
    ],
)
def test_claims_fail_when_their_numbers_say_so(claim, changes):
    assert status_of(made_up(**changes))[claim] == "fails"


def test_claims_without_their_numbers_are_not_judged():
    assert set(status_of({}).values()) == {"not_judged"}


def test_bad_configurations_are_refused_with_all_problems_at_once():
    with pytest.raises(ValueError, match=r"ramp must be at least 1, got 0; unknown arms \['none'\].*eps must be"):
        Config(arms=("none",), eps=(2.0,), ramp=0)
    with pytest.raises(ValueError, match="each once"):
        Config(arms=("full", "full"))
    with pytest.raises(ValueError, match="tolerance in"):
        Config(tolerance=0.0)


def test_the_soundness_count_finds_a_broken_certificate():
    from experiments.architectures.fast_ibp import soundness

    yes, no = np.ones((1, 1, 3), bool), np.zeros((1, 1, 2), bool)
    found = soundness({"a": {"verified": yes, "standard": yes, "attacked": no}})
    assert found["soundness/certified_but_broken"].value == 2
    assert jnp.isfinite(found["soundness/right_under_attack_only"].value)
