"""The figures of the experiment: curves over alpha, the lengths of vectors, and layer by alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.canvas import PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import curve_band, heat_map

ALPHA = "strength α of the vector"
LENGTHS = {"reading": "R", "contrast": "R-C, PCA-C (equally long)"}


def all_figures(alphas: Sequence[float], curves: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Every figure by file name; ``curves`` has for each task its runs, one a seed, and its layers."""
    figures = {"kl": divergence(alphas, curves), "entropy": entropy(alphas, curves)}
    for task, found in curves.items():
        runs = found["runs"]
        stacked = {name: np.stack([run["curves"][name] for run in runs]) for name in runs[0]["curves"]}
        offset = 100 * float(np.mean([run["hits"]["offset"].mean() for run in runs]))
        figures[f"accuracy_{task}"] = accuracy(
            alphas, 100 * stacked["accuracy"], 100 * stacked["random"].reshape(-1, len(alphas)), offset, task
        )
        figures[f"mass_{task}"] = masses(
            alphas, stacked["correct"].mean((0, 2)), stacked["incorrect"].mean((0, 2)), task
        )
        figures[f"heat_{task}"] = heat_map(
            100 * stacked["dev"].mean(0),
            xlabel=ALPHA,
            ylabel="layer",
            colour_label="dev accuracy (%)",
            title=f"{task}: type chosen in each seed",
            row_labels=[str(layer) for layer in found["layers"]],
            column_labels=[f"{alpha:g}" for alpha in alphas],
            annotate=len(alphas) <= 12,
        )
        norms = {label: np.stack([run["norms"][kind] for run in runs]) for kind, label in LENGTHS.items()}
        figure = curve_band(
            np.arange(len(norms["R"][0])), norms, xlabel="layer", ylabel="length of the vector", title=task
        )
        figure.axes[0].set_xticks(np.arange(len(norms["R"][0])))
        figures[f"norms_{task}"] = figure
    return figures


@house_style
def accuracy(alphas: Sequence[float], chosen: np.ndarray, random: np.ndarray, offset: float, task: str) -> Figure:
    """The paper's figure: test accuracy (S, A) of the chosen vector, in %, with the band of random vectors (R, A)."""
    figure, axes = canvas(title=task)
    label_axes(axes, xlabel=ALPHA, ylabel="test accuracy within the list (%)")
    axes.fill_between(alphas, random.min(0), random.max(0), color="0.6", alpha=0.3, linewidth=0, label="random vectors")
    axes.plot(alphas, random.mean(0), color="0.4", linestyle=":")
    axes.plot(alphas, chosen.mean(0), color=PALETTE[0], label="chosen vector")
    axes.plot(alphas, chosen.T, color=PALETTE[0], alpha=0.3, linewidth=1)
    axes.axhline(offset, color=PALETTE[1], linestyle="--", label="offsets alone")
    axes.margins(x=0.02)
    legend(axes)
    note(figure, "thick: mean over seeds; thin: one seed; dotted, band: mean and range of random vectors")
    return figure


@house_style
def divergence(alphas: Sequence[float], curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean KL over items, with a band of one standard deviation over items."""
    figure, axes = canvas(title="")
    label_axes(axes, xlabel=ALPHA, ylabel="KL from α = 0 (nats)")
    for index, (task, found) in enumerate(curves.items()):
        mean, spread = (np.mean([run["curves"][name] for run in found["runs"]], 0) for name in ("kl", "kl_sd"))
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(alphas, mean, color=colour, label=task)
        axes.fill_between(alphas, np.maximum(mean - spread, 0), mean + spread, color=colour, alpha=0.15, linewidth=0)
    legend(axes)
    note(figure, "line: mean over items and seeds; band: one standard deviation over items, cut at 0")
    return figure


def entropy(alphas: Sequence[float], curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean entropy of the next token, every seed."""
    runs = {task: np.stack([run["curves"]["entropy"] for run in found["runs"]]) for task, found in curves.items()}
    return curve_band(alphas, runs, xlabel=ALPHA, ylabel="entropy of the next token (bits)")


@house_style
def masses(alphas: Sequence[float], correct: np.ndarray, incorrect: np.ndarray, task: str) -> Figure:
    """Probability on the right answer and on all wrong ones, within the list, stacked."""
    figure, axes = canvas(title=task)
    label_axes(axes, xlabel=ALPHA, ylabel="probability within the list")
    areas = [correct, incorrect]
    axes.stackplot(alphas, areas, labels=["right answer", "wrong answers"], colors=[PALETTE[0], PALETTE[1]], alpha=0.6)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    legend(axes)
    note(figure, "mean over items and seeds")
    return figure
