"""The ZeroQuant-V2 experiment at smoke size: it runs, its identities hold, claims are judged by their criteria."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.compression import _zeroquant_v2_lab as lab
from experiments.compression.zeroquant_v2 import CLAIMS, PRESETS, Config, run
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_judges_every_claim_that_one_small_decoder_can_judge(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    for name in (
        "eight_bit_weights",
        "gptq_beats_rtn",
        "global_beats_rtn",
        "lorc_on_every_method",
        "lorc_as_predicted",
    ):
        assert status[name] == "holds", name
    assert status["small_models_suffer_less"] == status["finer_groups"] == "not_judged"


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    # The ladder's rounding to nearest and the studied decoder's are the same, by two ways.
    for cell, study in (("W4A16 asym", "rtn/row/A16/r0"), ("W4A8 asym", "rtn/row/A8/r0")):
        first, second = (metrics[f"kl/tales-S/{name}"].per_seed for name in (cell, study))
        np.testing.assert_allclose(first, second, rtol=1e-3)
    # A planted decoder is the same function.
    np.testing.assert_allclose(
        metrics["perplexity/tales-S x32"].per_seed, metrics["perplexity/tales-S"].per_seed, rtol=1e-3
    )
    increase, relative = (metrics[f"{kind}/tales-S/W4A16 sym"].per_seed for kind in ("increase", "relative"))
    np.testing.assert_allclose(relative, 100 * np.divide(increase, metrics["perplexity/tales-S"].per_seed), rtol=1e-4)
    gain = metrics["gain/tales-S/rtn/row/A16"]
    by_hand = np.subtract(*(metrics[f"kl/tales-S/rtn/row/A16/r{rank}"].per_seed for rank in (0, 8)))
    np.testing.assert_allclose(gain.per_seed, by_hand, rtol=1e-3)
    assert gain.ci95[0] < gain.value < gain.ci95[1] and gain.n == 16
    shares = [metrics[f"rate/tales-S/global/row/{rate}"].value for rate in ("0", "0.01")]
    assert sum(shares) == pytest.approx(100)


def test_smoke_run_draws_its_figures(result):
    wanted = {
        "sensitivity",
        "sensitivity_planted",
        "methods_w4a16_tales-S",
        "lorc_rank_tales-S",
        "error_spectra_tales-S",
    }
    assert wanted <= set(result.figures)


def metric(*per_seed):
    return Metric(value=float(np.mean(per_seed)), per_seed=per_seed)


def made_up(scale):
    """Numbers that make every claim hold, or, with -1, fail; perplexity 10 throughout."""
    numbers = {}
    sizes = {"tales-S": 1, "tales-M": 2, "tales-L": 3, "tales-L x32": 4}
    for model, size in sizes.items():
        numbers[f"perplexity/{model}"] = metric(10.0, 10.0)
        cells = {"W8A16 sym": 0.01, "W8A16 asym": 0.01, "W4A16 sym": 0.5, "W4A16 asym": 0.4, "W16A8 sym": 0.3 * size}
        for name, x in (cells | {"W16A8 asym": 0.2 * size}).items():
            x = x if scale > 0 else 1.0 - x
            numbers[f"increase/{model}/{name}"] = metric(x, x)
            numbers[f"relative/{model}/{name}"] = metric(10 * x, 10 * x)
    kl = {"rtn": 0.4, "gptq": 0.2, "local": 0.3, "global": 0.3}
    for method, x in kl.items():
        for act in ("A16", "A8"):
            for grid, share in {"row": 1.0, "g128": 0.9, "g64": 0.8, "g32": 0.7}.items():
                for rank, kept in (("r0", 1.0), ("r8", 0.5)):
                    value = x * share * kept if scale > 0 else 1 - x * share * kept
                    if method == "gptq" and act == "A8":
                        value += 0.2
                    numbers[f"kl/tales-L/{method}/{grid}/{act}/{rank}"] = metric(value, value)
                    relative = 100 * value if scale > 0 else 0.1
                    numbers[f"relative/tales-L/{method}/{grid}/{act}/{rank}"] = metric(relative, relative)
            numbers[f"gain/tales-L/{method}/row/{act}"] = metric(scale * x, scale * x)
            numbers[f"gain/tales-L/{method}/g32/{act}"] = metric(scale * x / 2, scale * x / 2)
    off = 1e-6 if scale > 0 else 1e-2
    return numbers | {"prediction/tales-L/rtn/row/A16/r8": metric(off, off)}


@pytest.mark.parametrize(("scale", "wanted"), [(1, "holds"), (-1, "fails")])
def test_every_claim_holds_and_fails_when_its_numbers_say_so(scale, wanted):
    status = {claim.id: claim.status for claim in judge_claims(CLAIMS, made_up(scale))}
    assert status == dict.fromkeys(status, wanted)


def test_every_seed_counts_where_the_rule_says_so():
    numbers = made_up(1)
    numbers["kl/tales-L/gptq/row/A16/r0"] = metric(0.0, 0.5)
    numbers["increase/tales-M/W8A16 sym"] = metric(0.0, 0.11)
    status = {claim.id: claim.status for claim in judge_claims(CLAIMS, numbers)}
    assert status["gptq_beats_rtn"] == status["eight_bit_weights"] == "fails"


def test_a_decoder_that_is_not_here_is_left_out(monkeypatch, tmp_path):
    from mechlab.data.sources import MissingData

    def missing(**options):
        raise MissingData("no stories")

    monkeypatch.setattr(lab, "load_stories260k", missing)
    config = dataclasses.replace(PRESETS["smoke"], ladder=("stories260K",), planted=(), studied=())
    assert lab.make_subjects(jax.random.key(0), config, Log()) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": (32, 64)}, "largest first"),
        ({"ladder": ()}, "name a decoder"),
        ({"seeds": 0}, "must be positive"),
        ({"batch": 99}, "at most the 24"),
        ({"ranks": (1, 2)}, "0 must be among"),
        ({"rates": (0.0,)}, "rates must be positive"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)
