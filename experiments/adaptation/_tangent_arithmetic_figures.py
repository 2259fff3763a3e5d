"""The figures of the tangent-arithmetic experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mechlab.methods.adaptation.tangent_arithmetic import ALPHAS
from mechlab.reporting.canvas import MARKERS, PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import arm_bars, curve_band
from mechlab.reporting.results import Metric

NAMES = {
    "standard": "standard",
    "posthoc": "post-hoc",
    "linear": "linear",
    "crossed": "linear τ in f",
}
MODES = ("standard", "posthoc", "linear")
"""The paper's. Linear vectors in f spoil its single tasks, so that their normalised accuracy says little."""
KINDS = {"pretrained": "pre-trained", "random": "random"}
Metrics = Mapping[str, Metric]


def all_figures(metrics: Metrics, seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    figures = {
        "disentanglement": error_maps({NAMES[mode]: seen["xi"][mode] for mode in MODES}, seen["grid"]),
        "disentanglement_pretraining": error_maps(
            {
                f"{NAMES[mode]}, {KINDS[kind]}": seen[prefix][mode]
                for kind, prefix in (("random", "xi_random"), ("pretrained", "xi"))
                for mode in ("standard", "linear")
            },
            seen["grid"],
        ),
        "single_tasks": single_scatter(seen["single"], seen["tasks"]),
        "addition_curves": curve_band(
            ALPHAS,
            {NAMES[mode]: curve for mode, curve in seen["addition"].items()},
            xlabel="multiple α of the sum of all task vectors",
            ylabel="test accuracy, mean over tasks (%)",
        ),
        "addition": addition_bars(metrics),
        "negation": negation_bars(metrics),
    }
    rates = sorted({float(name.split("/")[1]) for name in metrics if name.startswith("rates/")})
    if len(rates) > 1:
        figures["rates"] = curve_band(
            rates,
            {
                NAMES[mode]: np.transpose([metrics[f"rates/{rate:g}/{mode}/normalised"].per_seed for rate in rates])
                for mode in MODES
            },
            xlabel="AdamW's peak learning rate",
            ylabel="normalised accuracy after adding (%)",
            logx=True,
        )
    if "ntk" in seen:
        figures["local_energy"] = energies(seen["ntk"])
    return figures


@house_style
def error_maps(maps: Mapping[str, np.ndarray], grid: np.ndarray) -> Figure:
    """xi(a_1, a_2), a panel an arm, in one scale; the square [-1, 1]² is where arithmetic is normally done."""
    figure = Figure(figsize=(3.1 * len(maps) + 1.4, 3.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    half = (grid[1] - grid[0]) / 2
    extent = (grid[0] - half, grid[-1] + half, grid[0] - half, grid[-1] + half)
    largest = max(float(values.max()) for values in maps.values())
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(values.T, origin="lower", extent=extent, cmap="viridis", vmin=0, vmax=largest)
        axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="#D55E00", linewidth=2))
        axes.grid(visible=False)
        axes.set_title(name, loc="left", fontsize=12)
        axes.set_xlabel("α of the first task")
    panels[0].set_ylabel("α of the second task")
    figure.colorbar(image, ax=panels, label="disentanglement error ξ (0 to 2)")
    note(figure, "mean over seeds and pairs of tasks; the square is [-1, 1]²")
    return figure


@house_style
def single_scatter(single: Mapping[str, np.ndarray], tasks: tuple[str, ...]) -> Figure:
    """Every task's own model: fine-tuned as f, across; fine-tuned as f_lin, or only evaluated as f_lin, up."""
    figure, axes = canvas(title="")
    label_axes(axes, xlabel="f fine-tuned (%)", ylabel="f_lin evaluated (%)")
    low = min(float(single[mode].min()) for mode in MODES)
    axes.plot((low, 100), (low, 100), color="#888888", linewidth=1.2, linestyle="--")
    for i, task in enumerate(tasks):
        marker = MARKERS[i % len(MARKERS)]
        for mode, colour in (("linear", PALETTE[0]), ("posthoc", PALETTE[1])):
            face = colour if i < len(MARKERS) else "white"
            axes.scatter(
                single["standard"][:, i], single[mode][:, i], s=55, marker=marker, facecolor=face, edgecolor=colour
            )
        axes.scatter([], [], s=55, marker=marker, color="#555555", label=task)
    axes.plot([], [], color=PALETTE[0], linewidth=6, label="f_lin fine-tuned")
    axes.plot([], [], color=PALETTE[1], linewidth=6, label="f fine-tuned (post-hoc)")
    legend(axes)
    note(figure, "test accuracy on the single task; one mark a seed; dashed: equal")
    return figure


def addition_bars(metrics: Metrics) -> Figure:
    """The addition table: normalised accuracy of every mode, and standard from a random trunk."""
    arms = {NAMES[mode]: metrics[f"addition/{mode}/normalised"].per_seed or () for mode in MODES}
    for mode in ("standard", "linear"):
        arms[f"{NAMES[mode]}, random trunk"] = metrics[f"random/{mode}/normalised"].per_seed or ()
    return arm_bars(arms, ylabel="normalised accuracy after adding all tasks (%)")


def negation_bars(metrics: Metrics) -> Figure:
    """The negation table: accuracy on the task taken away, and on the control task."""
    arms = {}
    for name, words in (("target", "target"), ("control", "control")):
        for mode in ("before", "standard", "posthoc", "linear"):
            label = NAMES.get(mode, "pre-trained")
            arms[f"{words}, {label}"] = metrics[f"negation/{mode}/{name}"].per_seed or ()
    return arm_bars(arms, ylabel="test accuracy after subtracting (%)")


@house_style
def energies(seen: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Local energy of every item of one pair, for the eigenvectors that carry the first and the second task."""
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(seen), sharey=True, squeeze=False)[0]
    for axes, (kind, one) in zip(panels, seen.items(), strict=True):
        n = one["energies"].shape[1] // 2
        for colour, task, energy in zip(PALETTE, one["names"], one["energies"], strict=False):
            # Within a task the order of items means nothing: sorted, the two groups are easy to compare.
            values = np.concatenate([np.sort(energy[:n])[::-1], np.sort(energy[n:])[::-1]])
            axes.plot(values, "o", color=colour, markersize=3, label=f"eigenvectors of {task}")
        axes.axvline(n - 0.5, color="black", linewidth=1)
        axes.set_title(f"{KINDS[kind]} trunk", loc="left")
        axes.set_xlabel(f"items of {one['names'][0]}, then of {one['names'][1]}")
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel("local energy of an item")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, markerscale=2.5)
    note(figure, "one pair of tasks, seed 0; items sorted within their task")
    return figure
