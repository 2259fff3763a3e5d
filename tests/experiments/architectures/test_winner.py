"""The WINNER experiment at smoke size: it runs, its identities hold, its claims are judged by their criteria."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.io import wavfile

from experiments.architectures import _winner_lab as lab_module
from experiments.architectures.winner import CLAIMS, PRESETS, Config, resolve, run
from mechlab.core.errors import UserError
from mechlab.data.sources import MissingData
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims

TINY = Config(
    seeds=2,
    hidden=(8, 8),
    signals=("high", "low"),
    samples=128,  # the lowest band holds one frequency
    steps=3,
    arms=("siren", "siren_scaled", "winner", "winner_scaled", "gauss"),
    pictures=("noise", "photograph"),
    picture_size=8,
    picture_steps=2,
    picture_arms=("siren", "winner", "finerpp"),
    ntk_points=16,
    grid_samples=32,
    grid_steps=2,
    grid_s0=(0.0, 10.0),
    grid_s1=(0.0, 0.5, 1.0),
    denoise_samples=64,
    denoise_steps=4,
    lanes_at_once=3,
)


@pytest.fixture(scope="module")
def tiny():
    return run(jax.random.key(0), TINY, Log())


def test_every_part_measures_and_draws(tiny):
    metrics = tiny.metrics
    assert {claim.id for claim in tiny.claims} == {claim.id for claim in CLAIMS}
    for name in ("signals/low/peak/gauss", "pictures/photograph/last/finerpp", "ntk/energy/s0=100", "ntk/modes/winner"):
        assert len(metrics[name].per_seed) == 2, name
    assert metrics["grid/s0=10/s1=0.5"].unit == "dB"
    for name in ("recording", "photograph"):
        assert metrics[f"denoise/{name}/stopped/winner"].unit == "dB"
        assert 0 <= metrics[f"denoise/{name}/step/siren"].value < 4
    assert set(tiny.figures) == {
        *("bottleneck", "preactivation_spectra", "psnr_over_epochs", "psnr_mean", "psnr_table", "error_over_epochs"),
        *("tangent_kernel", "noise_scales", "image_errors", "denoising_recording", "denoising_photograph"),
    }


def test_peak_is_at_least_the_last_and_the_mean_is_over_signals(tiny):
    metrics = tiny.metrics
    for arm in TINY.arms:
        peaks = [metrics[f"signals/{name}/peak/{arm}"].per_seed for name in TINY.signals]
        lasts = [metrics[f"signals/{name}/last/{arm}"].per_seed for name in TINY.signals]
        assert (np.asarray(peaks) >= np.asarray(lasts) - 1e-6).all()
        np.testing.assert_allclose(metrics[f"signals/mean/peak/{arm}"].per_seed, np.mean(peaks, 0), rtol=1e-6)
    noisy = metrics["denoise/recording/noisy"].value
    clean_power = noisy - 10  # PSNR of noise at 10 dB is 10 dB above that of predicting the mean
    assert 0 < clean_power < 30


def test_how_many_lanes_run_together_changes_nothing(tiny):
    wide = run(
        jax.random.key(0), dataclasses.replace(TINY, lanes_at_once=50, pictures=(), ntk_points=0, grid_s0=()), Log()
    )
    for arm in TINY.arms:
        name = f"signals/high/peak/{arm}"
        np.testing.assert_allclose(wide.metrics[name].per_seed, tiny.metrics[name].per_seed, rtol=1e-4)
    status = {claim.id: claim.status for claim in wide.claims}
    assert status["ntk"] == status["natural_image"] == "not_judged"


def test_smoke_run_shows_the_bottleneck():
    result = run(jax.random.key(0), PRESETS["smoke"], Log())
    outputs = {arm: result.metrics[f"signals/high/output/{arm}"].per_seed for arm in PRESETS["smoke"].arms}
    assert max(outputs["siren"]) < 5 < 50 < min(outputs["winner"])
    status = {claim.id: claim.status for claim in result.claims}
    assert status["ntk"] == "holds"
    assert status["mid_and_pink"] == status["denoising"] == "not_judged"


def lab(config=TINY):
    return lab_module.Lab(config, Log(), jax.random.split(jax.random.key(1), config.seeds), jax.random.key(2))


def test_siren_and_winner_of_a_seed_start_alike_but_for_the_noise():
    arms = lab_module.make_arms((8, 8), (64,))
    target = lab_module.make_signals(lab(), ("mid",), 64)["mid"].y[0]
    start = {name: arms[name].init(jax.random.key(2), target) for name in ("siren", "siren_3000", "winner")}
    jax.tree.map(np.testing.assert_array_equal, start["siren"], start["siren_3000"])
    jax.tree.map(np.testing.assert_array_equal, start["siren"]["layer_2"], start["winner"]["layer_2"])
    added = start["winner"]["layer_0"]["kernel"] - start["siren"]["layer_0"]["kernel"]
    assert float(jnp.abs(added).max()) > 10
    assert arms["siren_3000"].omega == 3000 and arms["siren_scaled"].omega == pytest.approx(1.28)


def test_networks_of_small_batches_see_parts_above_the_limit(monkeypatch):
    monkeypatch.setattr(lab_module, "BATCH_LIMIT", 10)
    here = lab()
    targets = lab_module.make_signals(here, ("low",), 128)
    every = lab_module.make_arms((8, 8), (128,))
    arms = {name: every[name] for name in ("siren", "gauss")}
    trained = lab_module.train(here, "parts", arms, targets, steps=3, decay=0.99, judge=lab_module.banded_error)
    assert trained["low", "siren"].kept["bands"].shape == (2, 3, 16)
    assert trained["low", "gauss"].kept == {}
    whole = np.square(0 - np.asarray(targets["low"].y)).mean()
    assert trained["low", "siren"].losses[:, 0].mean() == pytest.approx(whole, rel=0.5)


def test_noise_is_fitted_without_the_samples_held_out():
    batch = {"y": jnp.asarray([[1.0], [3.0], [5.0]]), "held": jnp.asarray([False, True, False])}
    loss, kept = lab_module.noisy_error(jnp.zeros((3, 1)), batch)
    assert float(loss) == 13
    assert kept["output"].shape == (3,)


def test_a_picture_that_cannot_be_read_is_left_out(monkeypatch):
    def missing(name, size):
        raise MissingData("no reader")

    monkeypatch.setattr(lab_module.pictures, "photograph", missing)
    assert list(lab_module.make_pictures(lab(), ("photograph", "rings"), 8)) == ["rings"]


def test_sounds_are_asked_for_by_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_DATA", str(tmp_path))
    assert resolve(TINY) is TINY
    with pytest.raises(UserError, match=r"no \.wav files in .*sounds"):
        resolve(PRESETS["paper"])
    (tmp_path / "sounds").mkdir()
    wavfile.write(tmp_path / "sounds" / "bell.wav", 8000, np.arange(100, dtype=np.int16))
    assert resolve(PRESETS["paper"]).sounds == str(tmp_path / "sounds")
    assert lab_module.make_sounds(lab(), tmp_path / "sounds", 64)["bell"].y.shape == (2, 64, 1)


def metric(*per_seed):
    return Metric(value=float(np.mean(per_seed)), per_seed=per_seed)


GOOD = {
    "signals/high/zero": metric(16.0, 16.0),
    "signals/high/output/siren": metric(0.1, 0.2),
    "signals/high/output/siren_scaled": metric(0.1, 0.2),
    "signals/high/peak/siren": metric(16.1, 16.2),
    "signals/high/peak/siren_scaled": metric(16.1, 16.2),
    "signals/high/peak/winner": metric(40.0, 50.0),
    "signals/mid/peak/siren": metric(20.0, 20.0),
    "signals/mid/peak/siren_scaled": metric(21.0, 19.0),
    "signals/mid/peak/winner": metric(30.0, 30.0),
    "signals/pink/peak/siren": metric(20.0, 20.0),
    "signals/pink/peak/siren_scaled": metric(20.0, 20.0),
    "signals/pink/peak/winner": metric(30.0, 30.0),
    "signals/low/peak/siren": metric(60.0, 60.0),
    "signals/low/peak/winner": metric(57.0, 57.0),
    "signals/mean/peak/winner": metric(50.0),
    "signals/mean/peak/siren": metric(20.0),
    "signals/mean/peak/finerpp": metric(45.0),
    "signals/mean/peak/rff": metric(49.0),
    "ntk/energy/siren": metric(1.0, 1.0),
    "ntk/energy/s0=0": metric(2.0),
    "ntk/energy/s0=10": metric(3.0),
    "ntk/energy/s0=100": metric(4.0),
    "ntk/energy/winner": metric(5.0, 6.0),
    "ntk/modes/siren": metric(1.0, 1.0),
    "ntk/modes/s0=0": metric(2.0),
    "ntk/modes/s0=10": metric(3.0),
    "ntk/modes/s0=100": metric(4.0),
    "ntk/modes/winner": metric(5.0, 6.0),
    "pictures/noise/peak/siren": metric(20.0),
    "pictures/noise/peak/winner": metric(24.0),
    "pictures/photograph/peak/siren": metric(30.0),
    "pictures/photograph/peak/winner": metric(30.0),
    "denoise/a/noisy": metric(10.0),
    "denoise/a/stopped/siren": metric(15.0),
    "denoise/a/stopped/winner": metric(16.0),
    "denoise/a/last/siren": metric(15.0),
    "denoise/a/last/winner": metric(10.0),
}


def test_claims_hold_on_numbers_that_say_so():
    assert {claim.id: claim.status for claim in judge_claims(CLAIMS, GOOD)} == {claim.id: "holds" for claim in CLAIMS}


@pytest.mark.parametrize(
    ("claim", "name", "value"),
    [
        ("bottleneck", "signals/high/output/siren", metric(0.1, 6.0)),
        ("bottleneck", "signals/high/peak/siren_scaled", metric(16.1, 16.4)),
        ("bottleneck", "signals/high/peak/winner", metric(36.0, 60.0)),
        ("mid_and_pink", "signals/pink/peak/winner", metric(19.9, 40.0)),
        ("mid_and_pink", "signals/mid/peak/winner", metric(25.0, 24.0)),
        ("best_in_mean", "signals/mean/peak/rff", metric(50.0)),
        ("low", "signals/low/peak/winner", metric(54.0, 55.9)),
        ("ntk", "ntk/modes/winner", metric(5.0, 1.0)),
        ("ntk_monotone", "ntk/energy/s0=100", metric(5.6)),
        ("noise_image", "pictures/noise/peak/winner", metric(22.9)),
        ("natural_image", "pictures/photograph/peak/winner", metric(29.9)),
        ("denoising", "denoise/a/stopped/winner", metric(14.9)),
    ],
)
def test_claims_fail_on_numbers_that_say_so(claim, name, value):
    status = {one.id: one.status for one in judge_claims(CLAIMS, GOOD | {name: value})}
    assert status[claim] == "fails"


def test_bad_configurations_are_refused_together():
    with pytest.raises(ValueError, match=r'arms: unknown "sirens". Did you mean "siren".*pictures: unknown "cat"'):
        Config(arms=("sirens", "winner"), pictures=("cat",))
    with pytest.raises(ValueError, match='arms must contain "siren" and "winner"'):
        Config(arms=("winner",))
    with pytest.raises(ValueError, match="must be positive"):
        Config(rate=0.0)
