"""The figures of the TruthPrInt experiment."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.canvas import PALETTE, canvas, house_style, label_axes, legend
from mechlab.reporting.figures import curve_band, heat_map, histogram, trade_off
from mechlab.reporting.results import Metric

NAMES = {
    "greedy": "greedy",
    "beam": "beam",
    "nucleus": "nucleus",
    "vcd": "VCD",
    "dola": "DoLa",
    "confidence": "confidence only",
    "random": "random detector",
    "immediate": "immediate",
    "sentence_start": "sentence start",
    "random_token": "random token",
    "every_token": "every token checked",
    "truthprint": "TruthPrInt",
}
PAIRS = ("cross_data", "cross_lineage", "cross_both", "unrelated")


def all_figures(metrics: Mapping[str, Metric], seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    figures = {
        "roc": roc(seen["scores"], seen["labels"]),
        "trade_off": decoders(metrics),
        "transfer": transfers(metrics),
        "spaces": spaces(seen["spaces"]),
        "pmc": histogram(
            seen["pmc"],
            xlabel="least confidence in the sentence before the word (probability)",
            ylabel="object words (count)",
            title="test pictures, all seeds",
        ),
        "depth": curve_band(
            np.arange(seen["depth"].shape[1]) + 1,
            {"detector": seen["depth"]},
            xlabel="after block",
            ylabel="AUROC on test pictures",
        ),
    }
    if seen["examples"]:
        figures["example"] = one_example(seen["examples"][0])
    return figures


@house_style
def roc(scores: list[np.ndarray], labels: list[np.ndarray]) -> Figure:
    """ROC of every seed, the false positive rate on a logarithmic axis so that its low end is large."""
    figure, axes = canvas(title="detector, one token early")
    label_axes(axes, xlabel="false positive rate (truthful words flagged)", ylabel="true positive rate")
    for seed, (score, label) in enumerate(zip(scores, labels, strict=True)):
        hit = label[np.argsort(-score)]
        false, true = np.cumsum(~hit) / (~hit).sum(), np.cumsum(hit) / hit.sum()
        axes.plot(np.maximum(false, 1e-3), true, color=PALETTE[seed % len(PALETTE)], label=f"seed {seed}")
    chance = np.geomspace(1e-3, 1, 50)
    axes.plot(chance, chance, "--", color="black", linewidth=1, label="chance")
    axes.axvline(0.05, color="black", linewidth=0.8)
    axes.set_xscale("log")
    legend(axes)
    return figure


def decoders(metrics: Mapping[str, Metric]) -> Figure:
    """CHAIR_i against recall of all decoders, and of TruthPrInt at several thresholds."""
    points = {}
    for metric in metrics:
        kind, _, name = metric.partition("/")
        if kind == "chair_i":
            label = NAMES.get(name, name.replace("fpr_", "TruthPrInt, FPR "))
            points[label] = (metrics[f"recall/{name}"].value, metrics[metric].per_seed or ())
    return trade_off(points, xlabel="recall of objects (%)", ylabel="CHAIR_i, hallucinated mentions (%)")


def transfers(metrics: Mapping[str, Metric]) -> Figure:
    """AUROC of a's detector on each target, without and with ComnHallu."""
    table = [[metrics[f"transfer/{way}/{pair}"].value for pair in PAIRS] for way in ("plain", "aligned")]
    return heat_map(
        table,
        xlabel="target",
        ylabel="features",
        row_labels=["unaligned", "ComnHallu"],
        column_labels=["data", "lineage", "both", "unrelated"],
        colour_label="AUROC",
        annotate=True,
    )


@house_style
def spaces(seen: Mapping[str, np.ndarray]) -> Figure:
    """Two leading coordinates of two captioners' states, before and after alignment."""
    figure = Figure(figsize=(9.0, 4.2), dpi=150, layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("raw", "aligned"), strict=True):
        for index, (who, points) in enumerate((("a", seen["source"]), ("b", seen[way]))):
            labels = seen["source_labels" if who == "a" else "target_labels"]
            for false, marker in ((False, "o"), (True, "x")):
                kind = "hallucinated" if false else "truthful"
                chosen = points[labels == false]
                axes.scatter(*chosen.T, s=16, marker=marker, color=PALETTE[index], alpha=0.6, label=f"{who}, {kind}")
        axes.set_title("before alignment" if way == "raw" else "after ComnHallu")
        label_axes(axes, xlabel="coordinate 1 of a's subspace", ylabel="coordinate 2")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@house_style
def one_example(found: Mapping[str, Any]) -> Figure:
    """One picture, its captions, and every rollback."""
    figure = Figure(figsize=(9.0, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    left.imshow(found["picture"], cmap="gray")
    left.set_title("what the captioner sees")
    lines = [f"on the shelves: {found['truth']}", f"greedy: {found['before']}", f"TruthPrInt: {found['after']}"]
    text = "\n\n".join(textwrap.fill(line, 52) for line in [*lines, "; ".join(found["steps"])])
    right.text(0.0, 0.98, text, va="top", fontsize=11, transform=right.transAxes)
    for axes in (left, right):
        axes.set_axis_off()
    return figure
