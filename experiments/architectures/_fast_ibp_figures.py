"""The figures of the Fast IBP experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from experiments.architectures._fast_ibp_lab import Trained
from mechlab.reporting.figures import arm_bars, curve_band
from mechlab.reporting.results import Metric

if TYPE_CHECKING:
    from experiments.architectures.fast_ibp import Config

NAMES = {
    "xavier": "Xavier",
    "init": "init",
    "bn": "BN",
    "reg": "reg",
    "init_bn": "init+BN",
    "init_reg": "init+reg",
    "bn_reg": "BN+reg",
    "full": "full",
    "crown_xavier": "CROWN-IBP",
    "crown_full": "CROWN-IBP full",
    "xavier_long": "Xavier, long ramp",
    "full_long": "full, long ramp",
    "kaiming": "Kaiming",
    "orthogonal": "orthogonal",
    "tight_only": "init+BN+tight",
    "relu_only": "init+BN+relu",
    "bn_mean": "full, BN mean",
    "bn_variance": "full, BN variance",
    "bn_plain": "full, BN no affine",
}
INITS = {
    "ibp": "IBP",
    "xavier": "Xavier",
    "kaiming": "Kaiming",
    "orthogonal": "orthogonal",
    "ibp_bn": "IBP, BN",
    "xavier_bn": "Xavier, BN",
}
CURVES = ("xavier", "init", "bn", "init_reg", "init_bn", "full")
"""Arms of the curves over epochs: the ablation of the three improvements."""
REGULARISED = ("xavier", "init_bn", "full")
"""Arms whose regularisers are drawn: without any improvement, without the terms in the loss, with all."""


def all_figures(
    config: Config,
    per_epoch: int,
    ratios: Mapping[str, np.ndarray],
    trained: Mapping[str, Trained],
    metrics: Mapping[str, Metric],
) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    figures = {"initial_bounds": initial_bounds(ratios)}
    for i, eps in enumerate(config.eps):
        title = f"ε = {eps:g}"
        name = f"eps{eps:g}".replace(".", "_")
        figures[f"errors_{name}"] = error_bars(metrics, trained, eps, title)
        if not trained.keys().isdisjoint(CURVES):
            figures[f"verified_error_{name}"] = over_epochs(
                trained, i, "verified_error", "verified error (%)", title, config
            )
            for state in ("inactive", "active"):
                label = f"{state} ReLUs, mean over layers (%)"
                figures[f"{state}_{name}"] = over_epochs(trained, i, state, label, title, config)
        if not trained.keys().isdisjoint(REGULARISED):
            figures[f"regularisers_{name}"] = regularisers(trained, i, per_epoch, title)
    if {"xavier", "full", "xavier_long", "full_long"} <= set(trained):
        figures["warm_up_length"] = warm_up_length(config, metrics)
    return figures


def initial_bounds(ratios: Mapping[str, np.ndarray]) -> Figure:
    """The paper's first figure: the size of the bounds before each ReLU of an untrained network."""
    layers = np.arange(1, next(iter(ratios.values())).shape[1] + 1)
    return curve_band(
        layers,
        {INITS[name]: np.log10(values) for name, values in ratios.items()},
        xlabel="hidden layer",
        ylabel="log10 of mean radius over the input's",
        title="bounds at initialisation",
    )


def error_bars(metrics: Mapping[str, Metric], trained: Mapping[str, Trained], eps: float, title: str) -> Figure:
    """Final verified error of every arm."""
    arms = {NAMES[name]: metrics[f"verified/{eps:g}/{name}"].per_seed or () for name in trained}
    return arm_bars(arms, ylabel="verified error, last epoch (%)", title=title)


def over_epochs(
    trained: Mapping[str, Trained], radius: int, what: str, label: str, title: str, config: Config
) -> Figure:
    """A record after every epoch, mean over layers, in percent."""
    curves = {}
    for name in CURVES:
        if name in trained:
            values = 100 * np.asarray(trained[name].records[radius][what][radius])
            curves[NAMES[name]] = values.reshape(*values.shape[:2], -1).mean(-1)
    epochs = np.arange(config.natural + config.ramp + config.full + 1)
    ramp = f"ramp of ε: epochs {config.natural + 1} to {config.natural + config.ramp}"
    return curve_band(epochs, curves, xlabel=f"epoch ({ramp})", ylabel=label, title=title)


def regularisers(trained: Mapping[str, Trained], radius: int, per_epoch: int, title: str) -> Figure:
    """Both terms by epoch, with them in the loss (full) and without."""
    curves = {}
    for name in REGULARISED:
        if name not in trained:
            continue
        for term, words in (("tightness", "tight"), ("relu", "relu")):
            steps = trained[name].losses[term][radius]
            curves[f"{words}, {NAMES[name]}"] = steps.reshape(len(steps), -1, per_epoch).mean(-1)
    epochs = np.arange(1, next(iter(curves.values())).shape[1] + 1)
    return curve_band(epochs, curves, xlabel="epoch", ylabel="regulariser, without λ (mean of epoch)", title=title)


def warm_up_length(config: Config, metrics: Mapping[str, Metric]) -> Figure:
    """Verified error against the length of the ramp."""
    curves = {}
    for eps in config.eps:
        for name in ("xavier", "full"):
            pair = [metrics[f"verified/{eps:g}/{name}{suffix}"].per_seed or () for suffix in ("", "_long")]
            curves[f"{NAMES[name]}, ε = {eps:g}"] = np.asarray(pair).T
    ramps = (config.ramp, config.ramp * config.longer)
    return curve_band(ramps, curves, xlabel="epochs of the ramp", ylabel="verified error, last epoch (%)")
