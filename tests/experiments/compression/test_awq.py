"""The AWQ experiment at smoke size: its numbers fit together, claims follow their rules; a decoder is written."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.compression._awq_subjects import load_subject
from experiments.compression.awq import CLAIMS, PRESETS, Config, run
from mechlab.core.errors import UserError
from mechlab.kernels.w4a16 import Packed4
from mechlab.models import hub
from mechlab.models.quantised_io import load_quantised
from mechlab.models.transformer import gpt2, llama, transformer
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer:UserWarning")


@pytest.fixture(scope="module")
def result():
    smoke = dataclasses.replace(PRESETS["smoke"], sizes=(2,), shares=(0.1,), planted=(8.0,))
    return run(jax.random.key(0), smoke, Log())


def test_smoke_run_measures_every_arm(result):
    metrics = result.metrics
    kept = [f"kept_{by}_{share}" for by in ("act", "weight", "random") for share in ("low", "0.1")]
    for arm in ("rtn", "awq_scale", "awq", "gptq", *kept):
        assert metrics[f"kl/3/{arm}"].value > 0
        assert metrics[f"perplexity/3/{arm}"].value > metrics["perplexity/none"].value
    assert metrics["kl/3/kept_act_0.1"].value < metrics["kl/3/kept_act_low"].value < metrics["kl/3/rtn"].value
    assert metrics["kl/3/gptq"].value < metrics["kl/3/rtn"].value
    assert metrics["texts_kl/awq/2"].value > 0 and metrics["planted_kl/8/rtn"].value > metrics["planted_kl/8/awq"].value
    assert {"methods_3", "salient_3", "sweep", "steps", "texts", "search_3", "search_units"} == set(result.figures)


def test_a_factor_of_one_is_plain_rounding(result):
    metrics = result.metrics
    assert metrics["sweep_kl/1"].value == pytest.approx(metrics["kl/3/rtn"].value, rel=1e-4)
    assert metrics["steps_changed/1"].value == 0 and metrics["steps_ratio/1"].value == 1
    assert metrics["steps_changed/2"].value > 0
    assert metrics["steps_error/2"].value == pytest.approx(metrics["steps_ratio/2"].value / 2)
    assert 0.5 <= metrics["steps_error/2"].value < 1


def test_the_search_is_never_worse_than_rounding(result):
    assert result.metrics["search/worst_ratio"].value <= 1
    status = {claim.id: claim.status for claim in result.claims}
    assert status["search_is_safe"] == "holds" and status["less_overfitting"] == "not_judged"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama as the hub has it, without a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = transformer(llama(vocabulary=40, layers=2, width=32, heads=2, hidden=64, context=24, init_std=None))
    hub.export(path, model, model.init(jax.random.key(0)))
    return path


@pytest.fixture(scope="module")
def shipped(folder):
    out = folder / "out"
    config = Config(model=str(folder), out=str(out), group=16, texts=4, length=16, held_out=4, held_length=16, sizes=())
    return config, run(jax.random.key(0), config, Log())


def test_a_checkpoint_is_quantised_written_and_writes_with_packed_kernels(folder, shipped):
    config, result = shipped
    metrics = result.metrics
    assert metrics["written/same_as_made_whole"].value == 100
    assert metrics["written/same_as_made_whole"].n == 4 * 16
    assert 0 < metrics["kl/awq"].value < metrics["kl/rounding"].value
    # 4 bits a weight, and of 16 weights a scale and a zero of 32 each.
    assert metrics["memory/bits_per_weight"].value == 8
    assert metrics["memory/kernels_after"].value == metrics["memory/kernels_before"].value / 4
    whole = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(hub.load_model(folder)[1])) * 4
    assert metrics["memory/before"].value == whole / 2**20
    assert metrics["memory/after"].value < metrics["memory/file"].value < metrics["memory/before"].value
    assert {claim.id: claim.status for claim in result.claims}["search_is_safe"] == "holds"
    model, params, _, card = load_quantised(config.out)
    assert isinstance(params["blocks"]["mlp"]["up"]["kernel"], Packed4) and "groups of 16" in card["method"]
    assert model.apply({"params": params}, np.ones((1, 4), np.int32)).shape == (1, 4, 40)


def test_nothing_is_overwritten_and_wrong_folders_are_refused_in_a_line(folder, shipped, tmp_path, capsys):
    config, _ = shipped
    before = sorted(path.name for path in (folder / "out").iterdir())

    number = itertools.count()

    def refused(*assignments):
        runs = str(tmp_path / f"runs{next(number)}")
        arguments = ["run", "awq", "--preset", "smoke", "--out", runs, "--set", *assignments]
        assert main(arguments) == 2
        return capsys.readouterr().err

    assert "exists; remove it or choose another folder" in refused(f"model={folder}", f"out={config.out}")
    assert sorted(path.name for path in (folder / "out").iterdir()) == before
    new = f"out={tmp_path / 'new'}"
    assert "there is no folder or file" in refused(f"model={tmp_path / 'nowhere'}", new)
    assert "holds quantised kernels" in refused(f"model={config.out}", new)
    assert "tales come as tales-S" in refused("model=tales-Q", new)
    assert "reads 24 tokens at most" in refused(f"model={folder}", new)
    assert "group 24 does not divide the 32 inputs of attn/q" in refused(
        f"model={folder}", new, "group=24", "length=8", "held_length=8"
    )
    assert not (tmp_path / "new").exists()


def test_models_that_do_not_write_are_refused(tmp_path):
    sizes = {"vocabulary": 40, "layers": 2, "width": 32, "heads": 2, "hidden": 64, "context": 24}
    reader = transformer(
        gpt2(**sizes, norm_order="post", embed_norm=True, token_types=2, causal=False, unembed=False, activation="gelu")
    )
    hub.export(tmp_path, reader, reader.init(jax.random.key(0)))
    with pytest.raises(UserError, match="wanted a decoder"):
        load_subject(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(UserError, match="model_type"):
        load_subject(str(tmp_path))


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
        "shift_rise/awq": metric(better),
        "shift_rise/gptq": metric(worse),
    }


@pytest.mark.parametrize(("good", "status"), [(True, "holds"), (False, "fails")])
def test_claims_follow_their_rules(good, status):
    judged = {claim.id: claim.status for claim in judge_claims(CLAIMS, numbers(good))}
    assert judged == dict.fromkeys((claim.id for claim in CLAIMS), status)


def test_one_seed_that_is_not_better_is_enough_to_fail():
    metrics = numbers(True)
    metrics["kl/3/kept_act_low"] = Metric(value=0.15, per_seed=(0.1, 0.2))
    metrics["kl/3/awq"] = Metric(value=0.15, per_seed=(0.1, 0.185))
    judged = {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}
    assert judged["salient_by_activation"] == judged["beats_rounding"] == "fails"


def test_bad_configurations_are_refused():
    smoke = PRESETS["smoke"]
    for change, message in (
        ({"factors": (2.0,)}, "contain 1"),
        ({"shares": (0.0,)}, "be in"),
        ({"sizes": (4,)}, "fewer than texts"),
        ({"bits": (9,)}, r"in 2\.\.8"),
        ({"group": 0}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
        ({"held_length": 1}, "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(smoke, **change)
