"""The Bone experiment at smoke size: it runs, its numbers are what it says, its claims are judged by their criteria."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.adaptation import _bone_figures, _bone_tasks
from experiments.adaptation._bone_lab import matched_rank
from experiments.adaptation.bone import CLAIMS, PRESETS, Config, compared_with_bone, resolve, run
from mechlab.data.sources import MissingData
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_shows_what_it_can(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    for name in ("matched", "beats_lora", "fewer_steps", "exact_start"):
        assert status[name] == "holds", name
    assert status["beats_variants"] == status["guide_helps"] == "not_judged"
    assert {"loss_teacher", "final_teacher", "gradient_teacher", "start_up_teacher"} <= set(result.figures)


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    # 32-64-16, r = 4: out * r numbers; LoRA of rank 2: r (in + out).
    assert metrics["trained/teacher/bone_col"].value == 4 * (64 + 16) == metrics["trained/teacher/miss"].value
    assert metrics["trained/teacher/lora"].value == 2 * (32 + 64 + 64 + 16) == metrics["trained/teacher/pissa"].value
    margin = np.subtract(metrics["final/teacher/lora"].per_seed, metrics["final/teacher/bone_col"].per_seed)
    np.testing.assert_allclose(metrics["over_bone/teacher/lora"].per_seed, margin, rtol=1e-5)
    # A held-out loss of another kind than the training loss would not be near it.
    assert metrics["held_out/teacher/lora"].value == pytest.approx(metrics["final/teacher/lora"].value, rel=0.3)


def test_every_arm_and_form_runs_and_is_tuned():
    tiny = dataclasses.replace(
        PRESETS["smoke"],
        arms=("bone_col", "lora", "loraplus", "olora", "lora_ga", "dora", "full"),
        forms=("guide_only", "bone_row", "bone_ab", "bone_free"),
        blocks=(2,),
        seeds=1,
        steps=3,
        batch=8,
        train_rows=64,
        rate_factors=(0.5, 1.0),
    )
    metrics = run(jax.random.key(1), tiny, Log()).metrics
    assert metrics["rate/teacher/lora"].value in (pytest.approx(5e-3), pytest.approx(1e-2))
    assert metrics["rate/teacher/bone_free"].value == metrics["rate/teacher/bone_col"].value
    scores = {name: metric.value for name, metric in metrics.items() if name.startswith("validation/teacher/lora/")}
    assert min(scores, key=scores.get).endswith(f"{metrics['rate/teacher/lora'].value:.2g}")
    assert metrics["trained/teacher/full"].value == 32 * 64 + 64 + 64 * 16 + 16
    assert metrics["trained/teacher/bone_col_2"].value == 2 * (64 + 16)
    assert all(metric.value <= 1e-5 for name, metric in metrics.items() if name.startswith("start/"))


def test_problems_are_cut_at_the_right_ends(monkeypatch):
    pairs = [("what is 1+1", "1+1=2\n#### 2"), ("and", "#### 3")] * 4
    monkeypatch.setattr(_bone_tasks, "load_problems", lambda: (pairs, pairs))
    model = transformer(llama(vocabulary=128, layers=1, width=8, heads=2, hidden=8, context=32))
    params = jax.eval_shape(model.init, jax.random.key(0))
    base = _bone_tasks.Base(model, params, lambda s: list(s.encode()), lambda ids: bytes(ids).decode())
    sizes = {"train_rows": 4, "validation_rows": 2, "test_rows": 2}
    cut = _bone_tasks.gsm8k(base, Config(length=12, prompt=4, **sizes), Log())
    assert bytes(cut.train.tokens[0].tolist()) == b"1+1\n1+1=2\n##"
    assert cut.train.mask[0].tolist() == [0] * 4 + [1] * 8
    assert (
        bytes(cut.train.tokens[1, :10].tolist()) == b"and\n#### 3" and int(cut.train.tokens[1, 10]) == _bone_tasks.END
    )
    assert cut.model is None
    whole = _bone_tasks.gsm8k(base, Config(length=32, prompt=12, **sizes), Log())
    assert whole.model is model
    assert whole.read(list(b"1+1=2\n#### 2")) == "2" != whole.read(list(b"1+1=2\n#### 12"))
    assert [len(part.tokens) for part in (cut.train, cut.validation, cut.test)] == [4, 2, 2]
    assert matched_rank(whole, 4) == round(4 * (4 * 8 + 3 * 8) / (7 * 16))


def test_sums_are_read_whole_and_split_apart():
    model = transformer(llama(vocabulary=128, layers=1, width=8, heads=2, hidden=8, context=64))
    base = _bone_tasks.Base(model, {}, lambda s: list(s.encode()), lambda ids: bytes(ids).decode())
    config = Config(tasks=("sums",), length=48, train_rows=20, validation_rows=5, test_rows=6)
    task = _bone_tasks.sums(jax.random.key(0), base, config)
    parts = [
        {tuple(row) for row in np.asarray(part.tokens).tolist()} for part in (task.train, task.validation, task.test)
    ]
    assert [len(part) for part in parts] == [20, 5, 6]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert task.model is model


def test_steps_to_lora_s_loss_are_counted_on_smoothed_curves():
    falling = np.linspace(2.0, 1.0, 20)[None]
    fast = np.maximum(np.linspace(2.0, 0.0, 20), 0.5)[None]
    metrics = compared_with_bone({"bone_col": fast, "lora": falling}, "t", "nats", window=2)
    final = falling[0, -2:].mean()
    first = next(i for i in range(2, 21) if fast[0, i - 2 : i].mean() <= final)
    assert metrics["steps_to_lora/t"].value == pytest.approx(100 * first / 20)
    never = compared_with_bone({"bone_col": falling + 1, "lora": falling}, "t", "nats", window=2)
    assert never["steps_to_lora/t"].value == 100
    assert never["over_bone/t/lora"].value == pytest.approx(-1)
    np.testing.assert_allclose(_bone_figures.smoothed(np.asarray([[1.0, 2, 3, 6]]), 2), [[1.5, 2.5, 4.5]])


def numbers(**changes):
    metrics = {
        "final/t/bone_col": 1.0,
        "final/t/miss": 1.1,
        "final/t/guide_only": 1.2,
        "trained/t/bone_col": 100,
        "trained/t/lora": 95,
        "trained/t/pissa": 109,
        "over_bone/t/lora": (0.2, 0.1),
        **{f"over_bone/t/{name}": 0.1 for name in ("loraplus", "olora", "pissa", "lora_ga")},
        "steps_to_lora/t": 70,
        "start/t/pissa": 1e-5,
        "start_up/t/bone_col": 1.5,
        "start_up/t/lora": 1.0,
        "start_up/t/pissa": 1.6,
        "start_up/t/lora_ga": 1.6,
    }
    return {
        name: Metric(value=float(np.mean(x)), per_seed=x if isinstance(x, tuple) else None)
        for name, x in (metrics | changes).items()
    }


def judged(metrics):
    return {claim.id: claim.status for claim in judge_claims(CLAIMS, metrics)}


def test_claims_hold_at_their_bounds():
    assert set(judged(numbers()).values()) == {"holds"}


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("matched", {"trained/t/pissa": 111}),
        ("beats_lora", {"over_bone/t/lora": (0.5, -0.01)}),
        ("beats_variants", {"over_bone/t/lora_ga": -0.01}),
        ("fewer_steps", {"steps_to_lora/t": 71}),
        ("guide_helps", {"final/t/miss": 0.9}),
        ("guide_helps", {"final/t/guide_only": 0.9}),
        ("exact_start", {"start/t/pissa": 2e-5}),
        ("start_up", {"start_up/t/lora": 0.9}),
        ("start_up", {"start_up/t/lora_ga": 1.4}),
    ],
)
def test_each_claim_fails_by_its_own_number(claim, changes):
    status = judged(numbers(**changes))
    assert status.pop(claim) == "fails"
    assert set(status.values()) == {"holds"}


def test_bad_configurations_are_refused(monkeypatch, tmp_path):
    for changes, words in (
        ({"arms": ("bone_col",)}, '"bone_col" and "lora"'),
        ({"arms": ("bone_col", "lora", "lorra")}, "unknown.*lorra"),
        ({"tasks": ("teacher", "gsm8k")}, "stands alone"),
        ({"prompt": 64}, "prompt in 1"),
        ({"rate_factors": ()}, "there must be a factor"),
        ({"block": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Config(**changes)
    monkeypatch.setenv("MECHLAB_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingData, match="gsm8k, stories260k"):
        resolve(Config())
    assert resolve(PRESETS["smoke"]) is PRESETS["smoke"]


def test_the_recurrent_task_adapts_the_recurrent_net(data_dir):
    config = Config(
        tasks=("recurrent",),
        width=16,
        length=16,
        prompt=4,
        train_rows=8,
        validation_rows=4,
        test_rows=4,
        pretrain_steps=2,
    )
    (task,) = _bone_tasks.make_tasks(jax.random.key(0), config, Log()).values()
    assert task.apply(task.params, task.train.tokens[:1]).shape == (1, 16, 512)
    assert matched_rank(task, 4) == round(4 * (7 * 16 + 48) / (6 * 32 + 2 * 64))
    assert float(jnp.isfinite(task.loss(task.apply, task.params, task.test)))
