"""The figures of the Dopamine experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.figures import arm_bars, curve_band, heat_map, histogram, trade_off
from mechlab.reporting.results import Metric

NAMES = {
    "frozen": "frozen",
    "taugate": "TauGate",
    "sparse": "TauGate sparse",
    "gain": "gain only",
    "threshold": "threshold only",
    "bias": "bias",
    "lora_1": "LoRA r=1",
    "lora_4": "LoRA r=4",
    "lora_8": "LoRA r=8",
    "full": "full",
}
SWEEPS = {
    "sharpness": ("sharpness s of the gates", True),
    "penalty": ("gate penalty λ_g", False),
    "angle": ("rotation of the target mode (degrees)", False),
}


def all_figures(
    metrics: Mapping[str, Metric], seen: Mapping[str, np.ndarray], curves: Mapping[str, Mapping[str, Any]]
) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    figures = {"accuracy_against_parameters": accuracy_against_parameters(metrics), "gates": gate_histogram(seen)}
    figures["firing"] = firing_map(seen["firing"])
    if any(name.startswith("gain/upright/") for name in metrics):
        figures["limitation"] = limitation(metrics)
    if "contribution" in seen:
        figures["class_contribution"] = contribution_map(seen["contribution"])
    for name, curve in curves.items():
        xlabel, logx = SWEEPS[name]
        figures[f"accuracy_against_{name}"] = curve_band(
            curve["x"], curve["curves"], xlabel=xlabel, ylabel="accuracy on the rotated mode (%)", logx=logx
        )
    return figures


def accuracy_against_parameters(metrics: Mapping[str, Metric]) -> Figure:
    """The paper's headline comparison."""
    points = {}
    for name, label in NAMES.items():
        if f"trainable/{name}" in metrics and f"rotated/mixed/{name}" in metrics:
            points[label] = (metrics[f"trainable/{name}"].value, metrics[f"rotated/mixed/{name}"].per_seed or ())
    frozen = metrics["rotated/mixed/frozen"].value
    return trade_off(
        points,
        xlabel="trained numbers",
        ylabel="accuracy on the rotated mode (%)",
        title=f"frozen base: {frozen:.1f} %",
        logx=True,
    )


def gate_histogram(seen: Mapping[str, np.ndarray]) -> Figure:
    """Soft gates over rotated test images and units."""
    groups = {NAMES[name]: seen[f"gates/{name}"] for name in ("taugate", "sparse") if f"gates/{name}" in seen}
    lines = {"half open": 0.5, "strongly open": 0.9}
    return histogram(groups, xlabel="soft gate g", ylabel="(sample, unit) pairs (count)", lines=lines)


def firing_map(frequency: np.ndarray) -> Figure:
    """Units of the last gated layer, sorted by how much more they fire on the rotated mode."""
    order = np.argsort(frequency[:, 1] - frequency[:, 0])
    return heat_map(
        frequency[order].T,
        xlabel="unit of the last hidden layer, sorted by selectivity",
        ylabel="mode",
        row_labels=["upright", "rotated"],
        colour_label="share of images",
        title="share of test images that open a unit's gate (seed 0)",
    )


def limitation(metrics: Mapping[str, Metric]) -> Figure:
    """Gain over the frozen base, with and without the target mode's features in it."""
    arms = {}
    for base, words in (("mixed", "mixed base"), ("upright", "upright-only base")):
        for name in ("taugate", "lora_8"):
            if f"gain/{base}/{name}" in metrics:
                arms[f"{NAMES[name]}, {words}"] = metrics[f"gain/{base}/{name}"].per_seed or ()
    return arm_bars(arms, ylabel="rotated accuracy over frozen (points)")


def contribution_map(contribution: np.ndarray) -> Figure:
    """What each unit of the last hidden layer adds to each class, units grouped by the class they favour."""
    order = np.lexsort((-np.abs(contribution).max(1), contribution.argmax(1)))
    return heat_map(
        contribution[order].T,
        xlabel="unit of the last hidden layer, grouped by favoured class",
        ylabel="class",
        row_labels=[str(c) for c in range(contribution.shape[1])],
        colour_label="mean contribution to the logit",
        diverging=True,
        title="seed 0, rotated test images",
    )
