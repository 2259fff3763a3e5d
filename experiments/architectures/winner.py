"""WINNER (arXiv 2509.09719): does noise on a SIREN's first weights open the spectral bottleneck?

    python -m experiments run winner                    # about 5 minutes on two cores
    python -m experiments run winner --preset smoke     # one signal, seconds

Networks y = f(x) are fitted to one signal or image each by full-batch Adam, all with the same depth, width, steps and
learning rate (the paper's). Peak PSNR over training is what the paper reports; it rewards oscillation, so the last
value is in the metrics too. SIREN is tried with omega_1 = 30, with the paper's 3000 for audio, and with 3000 scaled to
the length of the signal; WINNER with the paper's scales and with scales for the length. Nothing is tuned. Seeds and
arms are lanes of one program; every seed draws its own generated targets.

The paper gives sums over sound files that are not at hand. Our numbers are on docs/papers/winner.md.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.architectures import _winner_figures as draw
from experiments.architectures._winner_claims import CLAIMS
from experiments.architectures._winner_denoise import denoise
from experiments.architectures._winner_lab import (
    EDGES,
    PICTURE_DECAY,
    PICTURES,
    SIGNAL_DECAY,
    SIREN_OMEGA,
    Lab,
    Target,
    Trained,
    banded_error,
    make_arms,
    make_pictures,
    make_signals,
    make_sounds,
    siren_with_omega,
    train,
    train_lanes,
)
from experiments.measures import per_seed
from mechlab.analysis.spectra import band_power
from mechlab.analysis.tangent import empirical_ntk, kernel_alignment
from mechlab.core.errors import UserError, did_you_mean
from mechlab.core.rng import stream
from mechlab.methods.architectures import winner
from mechlab.models import implicit
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

ALL_ARMS = tuple(make_arms((1, 1), (4,)))
ALL_SIGNALS = ("high", "mid", "low", "pink", "white", "chirp", "impulses", "recording")
Metrics = dict[str, Metric]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. A part whose tuple of names is empty is left out.

    Attributes:
      seeds: starts, and draws of every generated target.
      hidden: hidden widths of every network.
      rate: Adam's learning rate, times 0.99 (signals) or 0.998 (pictures) every 20 steps.
      signals, samples, steps, arms: signals to fit, their length, updates, and the networks that fit them.
      sounds: a folder of .wav files to fit as well, of at least as many samples; below $MECHLAB_DATA if relative.
      pictures, picture_size, picture_steps, picture_arms: likewise; "photograph" and "mnist" are real.
      ntk_points: points of the tangent kernels, of a signal like "high"; 0 leaves them out.
      ntk_s0, ntk_s1: noise scales at which kernels are looked at, beside those of the rule.
      grid_signal, grid_samples, grid_steps, grid_s0, grid_s1: PSNR over noise scales, one seed.
      denoise_signals, denoise_pictures, denoise_arms, denoise_samples, denoise_steps: what is fitted under noise.
      noise_db: signal-to-noise ratio of what is denoised, dB.
      lanes_at_once: networks trained together.
    """

    seeds: int = 2
    hidden: tuple[int, ...] = (96, 96, 96, 96)
    rate: float = 1e-4
    signals: tuple[str, ...] = ("high", "mid", "pink", "low")
    sounds: str = ""
    samples: int = 2048
    steps: int = 190
    arms: tuple[str, ...] = ("siren", "siren_scaled", "siren_3000", "winner", "winner_scaled", "finerpp", "rff")
    pictures: tuple[str, ...] = ("noise", "photograph")
    picture_size: int = 48
    picture_steps: int = 130
    picture_arms: tuple[str, ...] = ("siren", "winner", "finerpp", "rff")
    ntk_points: int = 128
    ntk_s0: tuple[float, ...] = (0.0, 10.0, 100.0)
    ntk_s1: tuple[float, ...] = (0.0, 0.1, 0.5)
    grid_signal: str = "high"
    grid_samples: int = 1024
    grid_steps: int = 100
    grid_s0: tuple[float, ...] = (0.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
    grid_s1: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0)
    denoise_signals: tuple[str, ...] = ("recording",)
    denoise_pictures: tuple[str, ...] = ("photograph",)
    denoise_arms: tuple[str, ...] = ("siren", "siren_3000", "winner", "winner_scaled")
    denoise_samples: int = 2048
    denoise_steps: int = 130
    noise_db: float = 10.0
    lanes_at_once: int = 16

    def __post_init__(self) -> None:
        problems = []
        for field, known in (
            ("arms", ALL_ARMS),
            ("picture_arms", ALL_ARMS),
            ("denoise_arms", ALL_ARMS),
            ("signals", ALL_SIGNALS),
            ("denoise_signals", ALL_SIGNALS),
            ("pictures", PICTURES),
            ("denoise_pictures", PICTURES),
        ):
            for name in getattr(self, field):
                if name not in known:
                    near = did_you_mean(name, known) or f" Known: {', '.join(known)}."
                    problems.append(f'{field}: unknown "{name}".{near}')
        if not {"siren", "winner"} <= set(self.arms) or not self.signals:
            problems.append('arms must contain "siren" and "winner", and there must be a signal')
        counts = (self.seeds, self.steps, self.picture_steps, self.grid_steps, self.denoise_steps, self.lanes_at_once)
        if min(counts) < 1 or self.rate <= 0:
            problems.append("seeds, steps, lanes_at_once and rate must be positive")
        if problems:
            raise ValueError("; ".join(problems))


PRESETS: dict[str, Config] = {
    "smoke": Config(
        hidden=(64, 64, 64),
        signals=("high",),
        samples=1024,
        steps=150,
        arms=("siren", "siren_scaled", "winner"),
        pictures=(),
        ntk_points=64,
        grid_s0=(),
        denoise_signals=(),
        denoise_pictures=(),
    ),
    "cpu": Config(),
    "accel": Config(
        seeds=3,
        hidden=(222, 222, 222, 222),
        signals=ALL_SIGNALS,
        samples=150_000,
        steps=400,
        arms=ALL_ARMS,
        pictures=PICTURES,
        picture_size=256,
        picture_steps=100,
        picture_arms=("siren", "winner", "finer", "finerpp", "gauss", "wire", "relu", "rff"),
        ntk_points=1000,
        grid_samples=16_384,
        grid_steps=300,
        grid_s0=(0.0, 30.0, 100.0, 300.0, 1000.0, 2000.0, 3500.0, 7000.0),
        grid_s1=(0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 3.0),
        denoise_signals=("recording", "pink"),
        denoise_samples=16_384,
        denoise_steps=300,
        lanes_at_once=4,
    ),
}
PRESETS["paper"] = dataclasses.replace(
    PRESETS["accel"], seeds=5, sounds="sounds", steps=1000, picture_size=427, picture_steps=100
)


def resolve(config: Config) -> Config:
    """The same configuration with the folder of sounds found.

    Raises:
      UserError: it is asked for and not here: the paper's twelve recordings do not come with this package.
    """
    if not config.sounds:
        return config
    folder = Path(os.environ.get("MECHLAB_DATA", "")) / config.sounds
    if not any(folder.glob("*.wav")):
        raise UserError(f"no .wav files in {folder}: put recordings there, or leave them out by --set sounds=")
    return dataclasses.replace(config, sounds=str(folder))


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: signals, images, tangent kernels, noise scales, denoising, claims and figures."""
    lab = Lab(config, log, jax.vmap(lambda seed: stream(key, seed))(jnp.arange(config.seeds)), stream(key, 0))
    metrics: Metrics = {}
    seen: dict[str, Any] = {}
    fit_signals(lab, metrics, seen)
    fit_pictures(lab, metrics, seen)
    if config.ntk_points:
        tangent_kernels(lab, metrics, seen)
    if config.grid_s0 and config.grid_s1:
        noise_grid(lab, metrics, seen)
    denoise(lab, metrics, seen)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(seen))


def fit_signals(lab: Lab, metrics: Metrics, seen: dict[str, Any]) -> None:
    """Every arm on every signal, and what the units of the first signal's networks carry before training."""
    config = lab.config
    targets = make_signals(lab, config.signals, config.samples)
    if config.sounds:
        targets |= make_sounds(lab, Path(config.sounds), config.samples)
    arms = {name: arm for name, arm in make_arms(config.hidden, (config.samples,)).items() if name in config.arms}
    trained = train(lab, "signals", arms, targets, steps=config.steps, decay=SIGNAL_DECAY, judge=banded_error)
    seen["curves"] = measure(lab, "signals", targets, trained, metrics)
    seen["signals"] = {
        cell: {
            "y": np.asarray(targets[cell[0]].y[0, :, 0]),
            "output": one.output[0, :, 0],
            "bands": one.kept["bands"][0] / np.asarray(band_power(targets[cell[0]].y[0, :, 0], EDGES) + 1e-12),
        }
        for cell, one in trained.items()
        if "bands" in one.kept
    }
    first, target = next(iter(targets.items()))
    x, key = implicit.coordinates(target.shape), stream(lab.first, "start")
    spectra = {}
    for name in ("siren", "winner"):
        params = arms[name].init(key, target.y[0])
        layers = implicit.siren_preactivations(params, x, omega_first=SIREN_OMEGA)
        spectra[name] = np.asarray(winner.activation_spectra(layers))
    seen["preactivations"] = {"target": first, "y": np.asarray(target.y[0, :, 0]), **spectra}


def fit_pictures(lab: Lab, metrics: Metrics, seen: dict[str, Any]) -> None:
    """Every arm on every picture."""
    config = lab.config
    targets = make_pictures(lab, config.pictures, config.picture_size)
    if not targets:
        return
    shape = next(iter(targets.values())).shape
    arms = {name: arm for name, arm in make_arms(config.hidden, shape).items() if name in config.picture_arms}
    trained = train(lab, "pictures", arms, targets, steps=config.picture_steps, decay=PICTURE_DECAY)
    measure(lab, "pictures", targets, trained, metrics)
    seen["pictures"] = {
        target: {"y": np.asarray(targets[target].y[0]).reshape(shape)}
        | {arm: trained[target, arm].output[0].reshape(shape) for arm in arms if arm in ("siren", "winner")}
        for target in targets
    }


def measure(
    lab: Lab, part: str, targets: Mapping[str, Target], trained: Mapping[tuple[str, str], Trained], metrics: Metrics
) -> dict[tuple[str, str], np.ndarray]:
    """Peak and last PSNR, size of the output, and where WINNER is not the best. Returns PSNR curves (S, steps + 1)."""
    curves = {}
    for (name, arm), one in trained.items():
        target = targets[name]
        last = np.square(one.output - np.asarray(target.y)).mean((1, 2))
        curve = np.asarray(winner.psnr(np.c_[one.losses, last], target.value_range))
        curves[name, arm] = curve
        metrics[f"{part}/{name}/peak/{arm}"] = per_seed(curve.max(1), "dB")
        metrics[f"{part}/{name}/last/{arm}"] = per_seed(curve[:, -1], "dB")
        power = np.square(one.output).mean((1, 2)) / np.square(np.asarray(target.y)).mean((1, 2))
        metrics[f"{part}/{name}/output/{arm}"] = per_seed(100 * np.sqrt(power), "% of the target's rms")
    arms = list(dict.fromkeys(arm for _, arm in trained))
    for name, target in targets.items():
        zero = winner.psnr(np.square(np.asarray(target.y)).mean((1, 2)), target.value_range)
        metrics[f"{part}/{name}/zero"] = per_seed(zero, "dB")
        best = max(arms, key=lambda arm: metrics[f"{part}/{name}/peak/{arm}"].value)
        if not best.startswith("winner"):
            numbers = ", ".join(f"{arm} {metrics[f'{part}/{name}/peak/{arm}'].value:.1f}" for arm in (best, "winner"))
            lab.log.say(f"WINNER is not the best on {name}: peak PSNR {numbers} dB")
    for arm in arms:
        each = [np.asarray(metrics[f"{part}/{name}/peak/{arm}"].per_seed) for name in targets]
        mean = np.mean(each, axis=0)
        metrics[f"{part}/mean/peak/{arm}"] = per_seed(mean, "dB")
    return curves


def tangent_kernels(lab: Lab, metrics: Metrics, seen: dict[str, Any]) -> None:
    """Kernels of SIREN and of WINNER over its noise scales at the start, and of both after training."""
    config = lab.config
    samples = config.ntk_points
    target = make_signals(lab, ("high",), samples)["high"]
    x, widths = implicit.coordinates((samples,)), (1, *config.hidden, 1)

    def kernel(params: Any) -> jax.Array:
        return empirical_ntk(implicit.siren_apply, params, x, contract=True)

    def one(key: jax.Array, y: jax.Array) -> Any:
        start = stream(key, "start")  # the same start as in ``make_arms``
        params = implicit.siren_init(stream(start, "siren"), widths)
        noise = winner.draw_noise(stream(start, "noise"), params)
        rule = winner.winner_scales(winner.spectral_centroid(y), 1)
        s0 = jnp.stack([jnp.zeros(()), *config.ntk_s0, *[rule[0]] * len(config.ntk_s1), rule[0]])
        s1 = jnp.stack([jnp.zeros(()), *[rule[1]] * len(config.ntk_s0), *config.ntk_s1, rule[1]])

        def at(scales: tuple[jax.Array, jax.Array]) -> Any:
            found = winner.ntk_spectrum(kernel(winner.add_noise(params, noise, s0=scales[0], s1=scales[1])), y)
            return {name: getattr(found, name) for name in ("eigenvalues", "centroids", "energy")}

        return jax.lax.map(at, (s0, s1))

    found = jax.device_get(jax.jit(jax.vmap(one))(lab.keys, target.y))
    names = ["siren", *(f"s0={x:g}" for x in config.ntk_s0), *(f"s1={x:g}" for x in config.ntk_s1), "winner"]
    top = max(1, samples // 10)
    for i, name in enumerate(names):
        metrics[f"ntk/energy/{name}"] = per_seed(100 * found["energy"][:, i, top - 1], "%")
        modes = winner.effective_modes(found["eigenvalues"][:, i])
        metrics[f"ntk/modes/{name}"] = per_seed(modes, "modes")
    seen["ntk"] = {name: {what: x[0, i] for what, x in found.items()} for i, name in enumerate(names)}

    arms = {name: arm for name, arm in make_arms(config.hidden, (samples,)).items() if name in ("siren", "winner")}
    for name, arm in arms.items():
        params = jax.vmap(lambda k, y, arm=arm: arm.init(stream(k, "start"), y))(lab.keys, target.y)
        lanes = {"params": params, "omega": jnp.full(config.seeds, SIREN_OMEGA), "data": {"y": target.y}}
        after = train_lanes(lab, f"ntk-{name}", siren_with_omega, lanes, x, config.steps, SIGNAL_DECAY).params
        kernels = [jax.jit(jax.vmap(kernel))(p) for p in (params, after)]
        metrics[f"ntk/alignment/{name}"] = per_seed(kernel_alignment(*kernels), "")
        energy = jax.vmap(winner.ntk_spectrum)(kernels[1], target.y).energy
        metrics[f"ntk/energy_trained/{name}"] = per_seed(100 * energy[:, top - 1], "%")


def noise_grid(lab: Lab, metrics: Metrics, seen: dict[str, Any]) -> None:
    """Peak PSNR over the two noise scales, seed 0."""
    config = lab.config
    alone = dataclasses.replace(lab, keys=lab.first[None])
    target = make_signals(alone, (config.grid_signal,), config.grid_samples)[config.grid_signal]
    y, key = target.y[0], stream(lab.first, "start")
    widths = (1, *config.hidden, 1)
    params = implicit.siren_init(stream(key, "siren"), widths)
    noise = winner.draw_noise(stream(key, "noise"), params)
    s0, s1 = (jnp.asarray(grid).ravel() for grid in np.meshgrid(config.grid_s0, config.grid_s1, indexing="ij"))
    starts = jax.vmap(lambda s0, s1: winner.add_noise(params, noise, s0=s0, s1=s1))(s0, s1)
    lanes = {
        "params": starts,
        "omega": jnp.full(len(s0), SIREN_OMEGA),
        "data": {"y": jnp.broadcast_to(y, (len(s0), *y.shape))},
    }
    x = implicit.coordinates(target.shape)
    fit = train_lanes(alone, "grid", siren_with_omega, lanes, x, config.grid_steps, SIGNAL_DECAY)
    peak = np.asarray(winner.psnr(fit.losses.min(1), target.value_range))
    table = peak.reshape(len(config.grid_s0), len(config.grid_s1))
    for (i, j), value in np.ndenumerate(table):
        metrics[f"grid/s0={config.grid_s0[i]:g}/s1={config.grid_s1[j]:g}"] = Metric(value=value, unit="dB")
    rule = winner.winner_scales(winner.spectral_centroid(y), 1)
    seen["grid"] = {"table": table, "rule": [float(scale) for scale in rule], "config": config}
