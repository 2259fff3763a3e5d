"""The experiment on control vectors at smoke size: it runs, identities hold, claims are judged by their rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.steering import _repe_reasoning_tasks as tasks
from experiments.steering._tales_tasks import listed
from experiments.steering.repe_reasoning import CLAIMS, PRESETS, Config, list_auroc, run
from mechlab.analysis.metrics import auroc
from mechlab.data.worlds import reasoning
from mechlab.methods.steering.vectors import Texts
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    assert metrics["kl_zero/deduce"].value <= 1e-6
    for arm in ("chosen", "contrast", "shuffled", "unrelated", "offset"):
        gain = metrics[f"gain/deduce/{arm}"].value
        difference = metrics[f"accuracy/deduce/{arm}"].value - metrics["accuracy/deduce/zero"].value
        np.testing.assert_allclose(gain, difference, atol=1e-3)
    assert abs(metrics["choice/deduce/alpha"].value) == 1
    assert 0 <= metrics["cosine/deduce"].value <= 1
    assert {claim.id: claim.status for claim in result.claims}["improves_ioi"] == "not_judged"


def test_smoke_run_draws_its_figures(result):
    assert {"accuracy_deduce", "kl", "entropy", "mass_deduce", "norms_deduce", "heat_deduce"} == set(result.figures)


@pytest.mark.parametrize("scrambled", [True, False])
def test_negatives_keep_lengths_and_answer_nothing(scrambled):
    items = tasks.deduce_task(1, 3)(jax.random.key(1), 50, "train")
    vocabulary = len(reasoning.question_tokenizer)
    wrong = tasks.negatives(jax.random.key(2), items, vocabulary, scrambled)
    right = items.solved
    np.testing.assert_array_equal(wrong.lengths, right.lengths)
    changed = np.asarray(wrong.tokens != right.tokens)
    listed = (np.asarray(right.tokens)[..., None] == np.asarray(items.answers[0])).any(-1)
    assert not changed[:, 0].any() and changed.any(1).mean() > 0.9
    assert (changed <= listed).all() if scrambled else changed.mean() > 0.7
    assert not np.asarray(wrong.tokens)[np.arange(wrong.tokens.shape[1]) >= np.asarray(wrong.lengths)[:, None]].any()


def test_an_example_stands_before_the_prompt():
    prompts = Texts(jnp.asarray([[1, 5, 6, 0]]), jnp.asarray([3]))
    items = listed(prompts, jnp.asarray([[7, 8]]), jnp.asarray([1]))
    shot = tasks.few_shot(items, items, end=2)
    assert shot.tokens[0, : int(shot.lengths[0])].tolist() == [1, 5, 6, 8, 2, 5, 6]


def test_auroc_of_lists_knows_no_offsets_and_is_that_of_the_difference_for_two():
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    with_offsets = list_auroc(scores + np.asarray([2.0, -1.0, 0.5]), right)
    np.testing.assert_allclose(list_auroc(scores, right), with_offsets, rtol=1e-5)
    scores[np.arange(40), right] += 10
    assert list_auroc(scores, right) == 1 and list_auroc(-scores, right) == 0
    two = rng.integers(0, 2, 40)
    wanted = float(auroc(scores[:, 0] - scores[:, 1], two == 0))
    np.testing.assert_allclose(list_auroc(scores, two), wanted, rtol=1e-5)


def test_claims_fail_and_hold_by_their_numbers():
    def measured(low, over, rank, slope):
        return {
            "gain/deduce/chosen": Metric(value=5.0, ci95=(low, 9.0)),
            "margin_gain/deduce/chosen": Metric(value=1.0, ci95=(0.5, 2.0)),
            "gain/deduce/offset": Metric(value=1.0),
            "over_random/deduce": Metric(value=over),
            "margin_over_random/deduce": Metric(value=0.1),
            "kl_rank/deduce": Metric(value=rank),
            "kl_zero/deduce": Metric(value=0.0, per_seed=(0.0,)),
            "control/deduce/rank": Metric(value=1.0, per_seed=(0.95,)),
            "control/deduce/up": Metric(value=1.0, per_seed=(0.1,)),
            "control/deduce/down": Metric(value=1.0, per_seed=(-0.1,)),
            "control/deduce/slope": Metric(value=1.0, per_seed=(slope,)),
            "control/deduce/moved": Metric(value=1.0, per_seed=(2.0,)),
            "control/deduce/random_moved": Metric(value=1.0, per_seed=(1.0,)),
        }

    def status(**numbers):
        good = {"low": 1.0, "over": 1.0, "rank": 0.99, "slope": 1.0}
        judged = {claim.id: claim.status for claim in judge_claims(CLAIMS, measured(**(good | numbers)))}
        return judged["improves_deduce"], judged["kl_grows"], judged["control_exists"]

    assert status() == ("holds", "holds", "holds")
    assert status(low=-0.1)[0] == status(over=-1.0)[0] == status(over=0.0)[0] == "fails"
    assert status(rank=0.9)[1] == "fails" and status(slope=-1.0)[2] == "fails"


def test_bad_configurations_are_refused():
    for bad, match in (
        ({"tasks": ("ioi", "riddles")}, "riddles"),
        ({"alphas": (-1.0, 1.0)}, "with 0"),
        ({"alphas": (1.0, 0.0)}, "rising"),
        ({"alphas": (0.0, float("inf"))}, "finite"),
        ({"seeds": 0}, "at least 1"),
        ({"width": 40}, "multiple of 16"),
    ):
        with pytest.raises(ValueError, match=match):
            Config(**bad)
