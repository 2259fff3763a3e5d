"""The LIFT experiment at smoke size: it runs, its identities hold, its claims are judged by their criteria."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.adaptation import _lift_lab as work
from experiments.adaptation import _lift_measures as measures
from experiments.adaptation import _lift_subjects as subjects
from experiments.adaptation.lift import CLAIMS, PRESETS, Config, run
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_shows_what_does_not_depend_on_size(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    assert status["small_state"] == status["untouched"] == "holds"
    for name in ("beats_smallest", "retains_more_than_lora"):
        assert status[name] == "not_judged"


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    # 5 % of 32 x 48 and of 48 x 8, two floats and an index each, and the number of steps.
    assert metrics["state_bytes/lift"].value == 12 * (77 + 20) + 4
    assert metrics["source_score/base"].value == pytest.approx(100)
    for arm in ("lift", "weight_mag", "random", "full"):
        assert metrics[f"target/{arm}"].value < metrics["target/base"].value
        assert len(metrics[f"target/{arm}"].per_seed) == 3
        np.testing.assert_allclose(
            metrics[f"retention/{arm}"].per_seed, metrics[f"source_score/{arm}"].per_seed, rtol=1e-4
        )
    assert metrics["kept/lift_once"].value == 1 > metrics["kept/lift"].value
    assert metrics["rank/full"].value > 90
    # Two float32 moments of 6.5 billion kernel numbers, and three words for every twentieth.
    assert metrics["llama_2_7b/dense"].value == pytest.approx(51.8, abs=0.1)
    assert metrics["llama_2_7b/lift"].value == pytest.approx(51.8 * 0.075, rel=1e-3)


def test_smoke_run_draws_its_figures(result):
    wanted = {"target_loss", "retention", "sweep", "perturbation", "masks", "mask_overlap", "update_spectrum"}
    assert wanted | {"update_sizes", "optimiser_bytes", "ablations"} == set(result.figures)


def spelled(row):
    return "".join(".0123456789+-=.abcdefghijklmnop"[token] for token in np.asarray(row).tolist())


def number(digits):
    return int(digits[::-1])


def test_sums_are_right_and_only_they_are_to_be_predicted():
    tokens, answered = subjects.additions(jax.random.key(0), 20)
    for row, mask in zip(tokens, answered, strict=True):
        for half in (slice(0, 10), slice(10, 20)):
            text = spelled(row[half])
            assert number(text[:2]) + number(text[3:5]) == number(text[6:9])
            assert (text[2], text[5], text[9]) == ("+", "=", ".")
            assert np.asarray(mask[half]).tolist() == [False] * 6 + [True] * 4


def test_chains_are_right_distinct_and_never_negative():
    rows = subjects.subtractions(jax.random.key(0), 200)
    texts = [spelled(row) for row in rows.tokens]
    assert len(set(texts)) == 200
    for text, mask in zip(texts, rows.mask, strict=True):
        a, b, c, d, again, e = (number(text[i : i + 2]) for i in (0, 3, 6, 9, 12, 15))
        assert (d, again, e) == (a - b, c, d - c) and min(a, b, c, d, e) >= 0
        assert np.flatnonzero(mask).tolist() == list(range(9, 18))
    assert np.mean([text[3:5] == "00" for text in texts]) < 0.2


def test_strings_follow_their_transitions():
    transitions = jnp.full((17, 17), -1e9).at[jnp.arange(17), (jnp.arange(17) + 1) % 17].set(0.0)
    for text in map(spelled, subjects.strings(jax.random.key(0), transitions, 8)):
        ring = "abcdefghijklmnop-"
        assert all(ring[(ring.index(a) + 1) % 17] == b for a, b in itertools.pairwise(text))


@pytest.mark.slow
def test_every_arm_and_ablation_runs_on_the_decoder():
    sizes = {"width": 8, "hidden": 12, "source_steps": 2, "source_batch": 4, "examples": 24, "held_out": 4, "batch": 4}
    few = {"steps": 5, "refresh": 3, "seeds": 2, "bases": 2, "draws": 1, "sigmas": (1.0,), "rate_factors": (1.0, 2.0)}
    ranks = {"filter_rank": 2, "lora_rank": 1, "filter_ranks": (1,), "refreshes": (2,), "densities": (0.2,)}
    every = dataclasses.replace(PRESETS["accel"], subject="decoder", **sizes, **few, **ranks)
    result = run(jax.random.key(0), every, Log())
    assert {f"target/{name}" for name in (*every.rules, *every.adapters, "full")} <= set(result.metrics)
    for name in ("lift_rank_1", "lift_bottom", "lift_mlp_only", "lift_every_2", "lift_rank_1_density_0.2"):
        assert result.metrics[f"outside/{name}"].value == 0
    assert "rank_and_density" in result.figures


def test_a_checkpoint_writes_its_own_source(data_dir):
    config = dataclasses.replace(PRESETS["accel"], length=24, examples=8, held_out=4, seeds=2)
    subject = subjects.checkpoint(jax.random.key(0), config, Log())
    assert subject.train.tokens.shape == (8, 24)
    one = jax.tree.map(lambda leaf: leaf[0], subject.bases)
    found = jax.jit(subject.held_out)(one)
    # It predicts what it wrote better than problems, and writes as it predicts.
    assert found["source"] < 3 < found["target"]
    assert found["source_score"] > found["score"]


def test_a_period_goes_on_where_the_last_one_ended():
    # Without a refresh, cutting a training into periods must change nothing but the batches' order.
    lab = work.prepare(jax.random.key(0), dataclasses.replace(PRESETS["smoke"], steps=4, batch=400), Log())
    lift = work.rule_arm(lab, work.RULES["weight_mag"], refresh=None)
    rates = jnp.asarray([0.01])
    whole = work.train_sparse(lab, {"a": lift}, rates, "whole")["a"]
    both = {"a": lift, "b": dataclasses.replace(lift, refresh=3)}
    cut = work.train_sparse(lab, both, rates, "cut")["a"]
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(cut.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_schedule_warms_up_and_ends_at_zero():
    lab = work.Lab(dataclasses.replace(PRESETS["smoke"], steps=100), Log(), None, None)
    rate = np.asarray([float(work.schedule(lab, 2.0)(count)) for count in range(101)])
    assert rate.argmax() in (2, 3) and rate.max() <= 2
    assert rate[0] == pytest.approx(2 / 3) and rate[100] == 0 and (np.diff(rate[3:]) < 0).all()


def trained(target, retention):
    held_out = {"target": np.asarray(target), "retention": np.asarray(retention)}
    return work.Trained({}, 0, held_out=held_out)


def test_retention_is_compared_at_equal_target_loss():
    # Ours keeps 10 points more at every loss that both reach; the second seed's sweeps do not overlap.
    ours = trained([[1.0, 1.0], [3.0, 2.0]], [[50.0, 0.0], [70.0, 0.0]])
    theirs = trained([[2.0, 3.0], [4.0, 4.0]], [[50.0, 0.0], [70.0, 0.0]])
    assert measures.equal_target_gap(ours, theirs) == pytest.approx([10.0])


def test_claims_fail_when_their_numbers_say_so():
    def metric(*per_seed):
        return Metric(value=float(np.mean(per_seed)), per_seed=per_seed)

    metrics = {f"target/{name}": metric(1.0, 2.0) for name in ("weight_mag", "random", "full")}
    metrics |= {"target/lift": metric(1.2, 2.0), "target/smallest": metric(1.3, 2.0)}
    metrics |= {f"retention_gap/{name}": metric(-1.0, 0.5) for name in ("full", "lora")}
    metrics |= {"perturbation/lift": metric(1.0, 3.0), "perturbation/random": metric(0.5, 3.0)}
    metrics |= {"perturbation/weight_mag": metric(2.0, 2.0), "density/lift": metric(5.0)}
    metrics |= {"state_share/lift": metric(8.1), "outside/lift": metric(0.0), "outside/lift_once": metric(1.0)}
    status = {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}
    assert set(status.values()) == {"fails"}, status
    better = metrics | {
        "target/lift": metric(1.04, 1.9),
        "state_share/lift": metric(8.0),
        "outside/lift_once": metric(0.0),
    }
    better |= {f"retention_gap/{name}": metric(-1.0, 1.5) for name in ("full", "lora")}
    better |= {"perturbation/lift": metric(1.0, 3.1)}
    status = {claim.id: claim.status for claim in judge_claims(CLAIMS, better)}
    assert set(status.values()) == {"holds"}, status


def test_bad_configurations_are_refused():
    for wrong, message in (
        ({"rules": ("weight_mag",)}, 'must contain "lift"'),
        ({"rules": ("lift", "largest")}, "unknown rule 'largest'"),
        ({"adapters": ("olora",)}, "unknown adapter 'olora'"),
        ({"parts": ("top",)}, "unknown part 'top'"),
        ({"seeds": 0}, "at least 1"),
        ({"refresh": 1}, "refresh must be at least 2"),
        ({"rate_factors": ()}, "rate_factors must be positive"),
        ({"subject": "planted", "mlp_only": True}, "leave out mlp_only"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**wrong)
