"""The figures of the KAT experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.canvas import DASHES, PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import arm_bars, curve_band, trade_off
from mechlab.reporting.results import Metric

NAMES = {
    "vit": "ViT, GELU",
    "vit_swish": "ViT, Swish",
    "kat": "KAT",
    "no_s3": "KAT without S3",
    "channel": "KAT, per channel",
    "spline": "B-spline KAN",
}


def all_figures(metrics: Mapping[str, Metric], seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure by file name; ``seen`` holds the curves."""
    figures = {
        "accuracy_against_parameters": accuracy_against_parameters(metrics),
        "step_time": step_time(metrics),
        "variance_by_depth": variance_by_depth(seen["variance"]),
        "training_loss": training_loss(seen["losses"], seen["steps"]),
        "learned_first": learned(seen["x"], seen["first"], np.asarray(seen["x"]), "F_1 (at the start: identity)"),
        "learned_second": learned(seen["x"], seen["second"], _swish(seen["x"]), "F_2 (at the start: Swish)"),
    }
    if "accuracy/channel" in metrics:
        figures["groups"] = groups(metrics)
    return figures


def accuracy_against_parameters(metrics: Mapping[str, Metric]) -> Figure:
    """Every arm that was trained."""
    points = {
        label: (metrics[f"parameters/{name}"].value / 1000, metrics[f"accuracy/{name}"].per_seed or ())
        for name, label in NAMES.items()
        if f"accuracy/{name}" in metrics
    }
    return trade_off(points, xlabel="parameters (thousands)", ylabel="test accuracy (%)")


def step_time(metrics: Mapping[str, Metric]) -> Figure:
    """Forward and backward pass of one batch, by kind of MLP."""
    names = {"vit": "MLP, GELU", "kat": "GR-KAN", "spline": "B-spline KAN"}
    times = {
        label: metrics[f"step/{name}"].per_seed or () for name, label in names.items() if f"step/{name}" in metrics
    }
    figure = arm_bars(times, ylabel="forward and backward (ms per batch)")
    note(figure, "bar and number: mean; dot: one timing")
    return figure


def variance_by_depth(variance: Mapping[str, np.ndarray]) -> Figure:
    """Variance of what the MLP adds to the stream, on random images, before training; logarithms of it."""
    layers = np.arange(next(iter(variance.values())).shape[1])
    return curve_band(
        layers,
        {NAMES[name]: np.log10(values) for name, values in variance.items()},
        xlabel="layer",
        ylabel="log10 of variance of the branch output",
        title="at initialisation",
    )


def training_loss(losses: Mapping[str, np.ndarray], steps: np.ndarray) -> Figure:
    """Training loss, averaged over stretches of steps."""
    curves = {NAMES[name]: values for name, values in losses.items() if name in NAMES}
    return curve_band(steps, curves, xlabel="training step", ylabel="training loss (nats)")


def groups(metrics: Mapping[str, Metric]) -> Figure:
    """Accuracy by the number of groups."""
    swept = sorted(int(name.split("/g")[1]) for name in metrics if name.startswith("accuracy/g"))
    arms = {f"G = {g}": metrics[f"accuracy/g{g}"].per_seed or () for g in swept}
    arms["per channel"] = metrics["accuracy/channel"].per_seed or ()
    return arm_bars(arms, ylabel="test accuracy (%)")


@house_style
def learned(x: np.ndarray, curves: np.ndarray, start: np.ndarray, ylabel: str) -> Figure:
    """The functions (layers, groups, N) that one KAT learned, one line a group, and what they started as."""
    figure, axes = canvas(title="learned functions, seed 0")
    label_axes(axes, xlabel="input x", ylabel=ylabel)
    for layer, functions in enumerate(curves):
        for group, values in enumerate(functions):
            label = f"layer {layer}" if group == 0 else None
            axes.plot(x, values, DASHES[0], color=PALETTE[layer % 6], linewidth=1.1, alpha=0.8, label=label)
    axes.plot(x, start, DASHES[1], color="black", linewidth=1.6, label="at the start")
    axes.margins(x=0.02)
    legend(axes)
    note(figure, "one line: one group")
    return figure


def _swish(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x / (1 + np.exp(-x))
