"""The experiment on emotion probes at smoke size: it runs, measures what it says, judges claims by their criteria."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest

from experiments.steering import _emotion_probes_lab as lab
from experiments.steering import _emotion_probes_subjects as subjects
from experiments.steering._emotion_probes_measures import peak
from experiments.steering.emotion_probes import CLAIMS, PRESETS, Config, run, study
from mechlab.data.sources import EMOTIONS, STORIES260K, available
from mechlab.models.transformer import transformer
from mechlab.models.transformer_config import TransformerConfig
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), dataclasses.replace(PRESETS["smoke"], sampled=16), Log())


def test_smoke_run_judges_what_it_measured(result):
    status = {claim.id: claim.status for claim in result.claims}
    assert set(status) == {claim.id for claim in CLAIMS}
    for name in ("scenarios", "not_in_the_embedding", "peaks_before_the_end", "beats_prompting", "scale", "selective"):
        assert status[name] == "not_judged", name
    for name in ("not_in_the_embedding_tales", "beats_prompting_tales", "malleable", "persistent"):
        assert status[name] in ("holds", "fails"), name


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    probe, embed = metrics["accuracy/tales/probe"], metrics["accuracy/tales/embed"]
    np.testing.assert_allclose(metrics["over_embed/tales"].value, probe.value - embed.value, atol=1e-3)
    assert len(probe.per_seed) == 2 and probe.n == 84
    depth = int(metrics["depth/tales"].value)
    np.testing.assert_allclose(metrics[f"by_depth/tales/{depth}"].value, probe.value, atol=1e-3)
    np.testing.assert_allclose(metrics["scale/accuracy/S"].value, probe.value, atol=1e-3)
    # Seven classes, balanced.
    np.testing.assert_allclose(metrics["accuracy/tales/majority"].value, 100 / 7, atol=1e-3)
    # The last token is always a full stop: its embedding says nothing, and one class is all that can be read.
    np.testing.assert_allclose(embed.value, 100 / 7, atol=1e-3)
    assert metrics["accuracy/tales/ungrouped"].value > probe.value
    assert metrics["persistence/tales/offset"].value == 32
    # Behind nothing, the later question is the question.
    assert metrics["persistence/tales/asked/0"].n == 21 and "persistence/tales/asked/32" in metrics


def test_smoke_run_draws_its_figures(result):
    names = {f"{name}_tales" for name in ("depth", "arms", "confusion", "map", "prompts", "persistence", "sampled")}
    assert set(result.figures) == names


def test_scenarios_are_studied_where_they_are_on_this_machine():
    if not available(EMOTIONS) or not available(STORIES260K):
        pytest.skip("MECHLAB_DATA has no emotions/ and stories260k/: this test needs real data")
    subject = subjects.scenario_subject(jax.random.key(0), "stories260K", 2, 240, Log())
    assert subject is not None
    train, dev, test = (set(x.tolist()) for x in (subject.folds.train[0], subject.folds.dev[0], subject.folds.test))
    assert not train & dev and len(test) == 240
    for fold in range(2):
        tested = set(np.flatnonzero(subject.folds.of_item == fold).tolist())
        groups = [set(subject.groups[list(rows)].tolist()) for rows in (tested, subject.folds.train[fold])]
        assert not tested & set(subject.folds.train[fold].tolist()) and not groups[0] & groups[1]
    assert len(subject.answers()) == 6 and subject.ask(0).endswith("You feel very")
    words = lab.read_words(lab.count_words(subject.texts), subject.labels, subject.folds, 6)
    assert words.mean() > 0.25


def test_an_encoder_is_read_but_not_asked(monkeypatch):
    if not available(EMOTIONS):
        pytest.skip("MECHLAB_DATA has no emotions/: this test needs real data")
    encoder = transformer(
        TransformerConfig(
            vocabulary=128, layers=1, width=16, heads=2, hidden=32, context=128, causal=False, unembed=False
        )
    )
    letters = types.SimpleNamespace(encode=lambda text: [ord(letter) % 128 for letter in text[:100]])
    monkeypatch.setattr(subjects.hub, "load", lambda _: (encoder, encoder.init(jax.random.key(0)), letters))
    subject = subjects.scenario_subject(jax.random.key(0), "a/bert", 2, 120, Log())
    metrics = {}
    config = dataclasses.replace(PRESETS["smoke"], seeds=1, hidden=8, epochs=1)
    study(jax.random.key(1), jax.random.key(2)[None], subject, config, metrics, Log())
    assert not subject.writes and metrics["accuracy/emotions/probe"].n == 120
    assert not any("shot" in name or "calibrated" in name for name in metrics)


def test_missing_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MECHLAB_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    log = Log()
    monkeypatch.setattr(log, "say", said.append)
    assert subjects.scenario_subject(jax.random.key(0), "stories260K", 2, None, log) is None
    assert 'data set "emotions" was not found' in said[0] and "not judged" in said[0]


def test_scenarios_that_share_words_are_one_group():
    texts = ["A dog bites you.", "A dog bites me", "You win a prize.", "A cat bites me"]
    assert subjects.alike(texts).tolist() == [0, 0, 2, 0]
    assert subjects.alike(texts, share=0.9).tolist() == [0, 1, 2, 3]


def test_the_peak_is_where_most_is_right_and_its_interval_holds_it():
    hits = np.zeros((2, 4, 50), bool)
    hits[:, 2, :40] = True
    hits[:, 1, :20] = True
    found = peak(jax.random.key(0), hits)
    assert found.value == pytest.approx(2 / 3)
    assert found.ci95 == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_shuffled_pairs_are_the_mean_over_all_other_texts():
    labels = np.array([0, 0, 1, 2, 1])
    read = np.array([[0, 1, 1, 2, 0], [2, 2, 2, 2, 2]])
    others = [[np.delete(labels, i) for i in range(5)]] * 2
    expected = [
        [(other == guess).mean() for other, guess in zip(*row, strict=True)] for row in zip(others, read, strict=True)
    ]
    np.testing.assert_allclose(lab.behind_others(read, labels), expected)


def made_up(good: bool) -> dict[str, Metric]:
    """Numbers under which every claim holds, or none does."""
    metrics: dict[str, Metric] = {}
    for name in ("emotions", "tales"):
        metrics |= {
            f"accuracy/{name}/probe": Metric(value=50 if good else 41),
            f"accuracy/{name}/words": Metric(value=78),
            f"accuracy/{name}/few_shot": Metric(value=20),
            f"selectivity/{name}": Metric(value=30 if good else 9),
            f"depth/{name}": Metric(value=3 if good else 0),
            f"layers/{name}": Metric(value=5),
            f"peak/{name}": Metric(value=0.6, ci95=(0.4, 0.8 if good else 1.0)),
        }
        for arm in ("embed", "random", "zero_shot", "calibrated"):
            metrics[f"over_{arm}/{name}"] = Metric(value=20 if good else 5)
    for size, value in (("S", 1.0), ("L", 2.0 if good else 0.5)):
        metrics |= {f"scale/{name}/{size}": Metric(value=value) for name in ("accuracy", "fisher")}
    for k, mood in enumerate(("anger", "disgust", "fear", "joy", "sadness", "surprise")):
        metrics[f"shift/tales/{mood}"] = Metric(value=0.1 if good or k > 1 else -0.1)
    metrics["persistence/tales/over_shuffled"] = Metric(value=4, ci95=(1 if good else -1, 7))
    metrics["persistence/tales/early_probe"] = Metric(value=20)
    metrics["persistence/tales/offset"] = Metric(value=100)
    metrics |= {f"accuracy/tales/{name}": Metric(value=90) for name in ("ungrouped", "ungrouped_control")}
    return metrics


@pytest.mark.parametrize(("good", "status"), [(True, "holds"), (False, "fails")])
def test_claims_hold_and_fail_by_their_numbers(good, status):
    assert {claim.id: claim.status for claim in judge_claims(CLAIMS, made_up(good))} == dict.fromkeys(
        (claim.id for claim in CLAIMS), status
    )


def test_bad_configurations_are_refused():
    smoke = PRESETS["smoke"]
    with pytest.raises(ValueError, match=r"unknown \['XXL'\]"):
        dataclasses.replace(smoke, sizes=("XXL",))
    with pytest.raises(ValueError, match="multiples of 21"):
        dataclasses.replace(smoke, texts=(100, 42, 84))
    with pytest.raises(ValueError, match="rising numbers from 0"):
        dataclasses.replace(smoke, offsets=(1, 8))
    with pytest.raises(ValueError, match="folds at least 2"):
        dataclasses.replace(smoke, folds=1)
    with pytest.raises(ValueError, match="at most the 84 test texts"):
        Config(texts=(168, 42, 84), utterances=100)
