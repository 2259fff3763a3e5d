"""Denoising with networks that fit one signal: they learn first what their start makes easy, and stop in time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.architectures._winner_lab import (
    PICTURE_DECAY,
    SIGNAL_DECAY,
    Arm,
    Lab,
    Target,
    make_arms,
    make_pictures,
    make_signals,
    noisy_error,
    train,
)
from experiments.measures import per_seed
from mechlab.core.rng import stream
from mechlab.methods.architectures import winner
from mechlab.reporting.results import Metric


def denoise(lab: Lab, metrics: dict[str, Metric], seen: dict[str, Any]) -> None:
    """Fit noisy targets, stop where held-out samples say, compare with the clean ones."""
    config = lab.config
    side = round(config.denoise_samples**0.5)
    for clean in (
        make_signals(lab, config.denoise_signals, config.denoise_samples),
        make_pictures(lab, config.denoise_pictures, side),
    ):
        if clean:
            denoise_alike(lab, clean, metrics, seen)


def denoise_alike(lab: Lab, clean: dict[str, Target], metrics: dict[str, Metric], seen: dict[str, Any]) -> None:
    """As ``denoise``, for targets of one shape."""
    config = lab.config
    shape = next(iter(clean.values())).shape
    ratio = 10 ** (config.noise_db / 10)
    arms = {name: arm for name, arm in make_arms(config.hidden, shape).items() if name in config.denoise_arms}
    if len(shape) > 1:  # what is made for lengths of audio has no counterpart in images
        arms = {name: arms[name] for name in arms if name in ("siren", "winner")}

    def under_noise(arm: Arm, rule: winner.ScaleRule) -> Arm:
        def init(key: jax.Array, noisy: jax.Array) -> Any:
            psi = winner.centroid_under_noise(noisy, noisy.std() / jnp.sqrt(1 + ratio))
            scales = winner.winner_scales(psi, 1, rule)
            return winner.winner_init(key, (len(shape), *config.hidden, 1), noisy, scales=scales)

        return arm._replace(init=init)

    rule = winner.RULES[len(shape)]
    for name, its_rule in (("winner", rule), ("winner_scaled", rule.for_length(shape[0]))):
        if name in arms:
            arms[name] = under_noise(arms[name], its_rule)

    def with_noise(name: str, target: Target) -> Target:
        eta = jax.vmap(lambda k: jax.random.normal(stream(k, "noise", name), target.y.shape[1:]))(lab.keys)
        return target._replace(y=target.y + target.y.std(axis=(1, 2), keepdims=True) / ratio**0.5 * eta)

    noisy = {name: with_noise(name, target) for name, target in clean.items()}
    samples = int(np.prod(shape))
    held = jax.vmap(lambda k: winner.held_out(stream(k, "held out"), samples))(lab.keys)
    trained = train(
        lab,
        f"denoise{len(shape)}d",
        arms,
        noisy,
        steps=config.denoise_steps,
        decay=SIGNAL_DECAY if len(shape) == 1 else PICTURE_DECAY,
        judge=noisy_error,
        extra={"held": held},
    )
    for (name, arm), one in trained.items():
        output = one.kept["output"]  # (S, steps, N)
        error = np.square(output - np.asarray(noisy[name].y)[:, None, :, 0])
        held_error = np.where(np.asarray(held)[:, None], error, 0).sum(-1)
        stop = np.asarray(winner.stopping_step(held_error))
        against = np.square(output - np.asarray(clean[name].y)[:, None, :, 0]).mean(-1)
        curve = np.asarray(winner.psnr(against, clean[name].value_range))
        metrics[f"denoise/{name}/stopped/{arm}"] = per_seed(np.take_along_axis(curve, stop[:, None], 1)[:, 0], "dB")
        metrics[f"denoise/{name}/last/{arm}"] = per_seed(curve[:, -1], "dB")
        metrics[f"denoise/{name}/step/{arm}"] = per_seed(stop, "steps")
        seen.setdefault("denoise", {}).setdefault(name, {"shape": shape})[arm] = {
            "curve": curve,
            "stop": int(stop[0]),
            "output": output[0, stop[0]],
        }
    for name, target in noisy.items():
        given = np.square(np.asarray(target.y - clean[name].y)).mean((1, 2))
        metrics[f"denoise/{name}/noisy"] = per_seed(winner.psnr(given, target.value_range), "dB")
        seen["denoise"][name] |= {"clean": np.asarray(clean[name].y[0, :, 0]), "noisy": np.asarray(target.y[0, :, 0])}
    for arm in arms:
        stopped = [metrics[f"denoise/{name}/stopped/{arm}"].value for name in clean]
        lab.log.say(f"denoised by {arm}: {', '.join(f'{x:.1f} dB' for x in stopped)}")
