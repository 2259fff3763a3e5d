"""The figures of the experiment on emotion probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.canvas import DASHES, MARKERS, PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import arm_bars, curve_band, heat_map
from mechlab.reporting.results import Metric

ARMS = {
    "probe": "probe",
    "linear": "linear probe",
    "mean_pool": "probe, mean of tokens",
    "embed": "probe, embedding",
    "random": "probe, random weights",
    "shuffled": "probe, shuffled weights",
    "control": "control task",
    "words": "TF-IDF of words",
    "zero_shot": "zero-shot",
    "zero_shot_normalised": "zero-shot, per token",
    "calibrated": "zero-shot, calibrated",
    "few_shot": "few-shot",
    "majority": "largest class",
}
LINES = {"words": "TF-IDF of words", "calibrated": "calibrated zero-shot", "majority": "largest class"}
READERS = {"emotions": "scenarios", "tales": "tales"}


def all_figures(metrics: Mapping[str, Metric], drawn: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    figures: dict[str, Figure] = {}
    for name, of_subject in drawn.items():
        if name == "scale":
            continue
        figures[f"depth_{name}"] = depth(of_subject["curves"], metrics, name)
        arms = {
            label: metrics[f"accuracy/{name}/{arm}"].per_seed or (metrics[f"accuracy/{name}/{arm}"].value,)
            for arm, label in ARMS.items()
            if f"accuracy/{name}/{arm}" in metrics
        }
        figures[f"arms_{name}"] = arm_bars(arms, ylabel="test accuracy (%)", title=f"{READERS[name]}, depth from dev")
        figures[f"confusion_{name}"] = heat_map(
            100 * of_subject["confusion"],
            xlabel="read",
            ylabel="true class",
            colour_label="share of the class (%)",
            row_labels=of_subject["names"],
            column_labels=of_subject["names"],
            annotate=True,
            title=f"{READERS[name]}: probe at the depth from dev",
        )
        figures[f"map_{name}"] = maps(of_subject["maps"], of_subject["labels"], of_subject["names"], READERS[name])
        if "malleability" in of_subject:
            figures[f"prompts_{name}"] = prompts(of_subject["malleability"], of_subject["names"], READERS[name])
        for kind, word in (("persistence", "neutral sentences"), ("sampled", "the model's own text")):
            if kind in of_subject:
                figures[f"{kind}_{name}"] = persistence(of_subject[kind], f"{READERS[name]}, then {word}")
    if len(drawn["scale"]["sizes"]) > 1:
        figures["scale"] = scale(drawn["scale"])
    return figures


@house_style
def depth(curves: Mapping[str, np.ndarray], metrics: Mapping[str, Metric], name: str) -> Figure:
    """The paper's layer figure: accuracy (S, L + 1) in % of each model against relative depth, baselines as lines."""
    figure, axes = canvas(title=READERS[name], height=4.8)
    label_axes(axes, xlabel="depth (share of the layers; 0 is the embedding)", ylabel="test accuracy (%)")
    for index, (label, values) in enumerate(curves.items()):
        x = np.linspace(0, 1, values.shape[1])
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(x, values.mean(0), color=colour, marker=MARKERS[index % len(MARKERS)], label=label)
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    for index, (arm, label) in enumerate(LINES.items()):
        if f"accuracy/{name}/{arm}" in metrics:
            height = metrics[f"accuracy/{name}/{arm}"].value
            axes.axhline(height, color="0.4", linestyle=DASHES[1 + index % 3], linewidth=1.4, label=label)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    legend(axes)
    note(figure, "line: mean of probe seeds; band: smallest to largest; states before the final norm")
    return figure


@house_style
def maps(points: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Test texts (M, 2) on the first two principal components, one panel per depth."""
    figure = Figure(figsize=(4.0 * len(points), 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, (depth_name, places) in zip(panels, points.items(), strict=True):
        for label, name in enumerate(names):
            mine = places[labels == label]
            axes.scatter(
                mine[:, 0], mine[:, 1], s=12, color=PALETTE[label % len(PALETTE)], alpha=0.6, linewidth=0, label=name
            )
        axes.set_title(f"{title}, {depth_name}", loc="left", fontsize=12)
        axes.set_xlabel("component 1")
    panels[0].set_ylabel("component 2")
    handles, words = panels[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=len(names), markerscale=2)
    return figure


def prompts(found: Any, names: Sequence[str], title: str) -> Figure:
    """The paper's system-prompt figure: how far each instruction moves the mean probability of each class."""
    rows = [i for i, prompt in enumerate(found.prompts) if prompt != "none"]
    return heat_map(
        100 * found.shift.mean(0)[rows],
        xlabel="emotion that is read",
        ylabel="instruction",
        colour_label="change of the mean probability (points)",
        diverging=True,
        row_labels=[found.prompts[i] for i in rows],
        column_labels=names,
        annotate=True,
        title=f"{title}: neutral texts behind instructions",
    )


def persistence(found: Any, title: str) -> Figure:
    """Accuracy against tokens behind the text, with shuffled pairs."""
    curves = {"probe of the text's end": found.early, "the same, shuffled pairs": found.shuffled}
    if found.late is not None:
        curves |= {"probe trained behind texts": found.late, "that, shuffled pairs": found.late_shuffled}
    return curve_band(
        found.offsets,
        {label: 100 * hits.mean(-1) for label, hits in curves.items()},
        xlabel="tokens behind the emotional text",
        ylabel="test accuracy (%)",
        title=title,
    )


@house_style
def scale(found: Mapping[str, Any]) -> Figure:
    """Accuracy of every probe seed, and geometry, at each size's depth."""
    figure = Figure(figsize=(9.0, 4.0), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.arange(len(found["sizes"]))
    for at, seeds in zip(x, found["accuracy"], strict=True):
        left.scatter(np.full(len(seeds), at), seeds, color=PALETTE[0], alpha=0.4, s=30, linewidth=0)
    left.plot(x, [np.mean(seeds) for seeds in found["accuracy"]], color=PALETTE[0], marker="o")
    left.set_ylabel("test accuracy (%)")
    right.plot(x, found["fisher"], color=PALETTE[1], marker="s", label="Fisher ratio")
    right.plot(x, found["silhouette"], DASHES[1], color=PALETTE[2], marker="^", label="silhouette")
    right.set_ylabel("separation of classes (no unit)")
    right.legend()
    for axes in (left, right):
        axes.set_xticks(x, [f"tales-{size}" for size in found["sizes"]])
        axes.set_xlabel("model")
    note(figure, "left: dots are probe seeds, the line their mean")
    return figure
