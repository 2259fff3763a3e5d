"""The figures of the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from experiments.steering._austeer_measures import Outcome
from experiments.steering._austeer_units import Scan, Words
from mechlab.reporting.canvas import MARKERS, PALETTE, house_style, note
from mechlab.reporting.figures import heat_map, histogram
from mechlab.reporting.results import Metric

LABELS = {
    "austeer": "AUSteer",
    "random": "random units",
    "inverse": "least consistent units",
    "block": "whole block",
    "sadi": "SADI",
    "caa": "CAA",
    "iti": "ITI",
}
SITE_LABELS = {"attn": "attention (attn_z)", "ffn": "MLP output (mlp_out)"}


def all_figures(
    outcomes: Mapping[str, Outcome],
    metrics: Mapping[str, Metric],
    ks: Mapping[str, Sequence[int]],
    alphas: Mapping[str, Sequence[float]],
    scanned: Scan | None,
    spelled: Words | None,
) -> dict[str, Figure]:
    """Every figure by file name."""
    # The planted task is a check of the method; it is drawn where there is nothing else.
    shown = {task: found for task, found in outcomes.items() if task != "planted"} or outcomes
    figures = {
        "methods": methods(list(shown), metrics),
        "grid": grid_curves(shown, ks, alphas),
        "where": where(shown),
    }
    if scanned is not None:
        for site in scanned.units:
            figures[f"units_{site}"] = unit_effects(scanned, site)
    if spelled is not None:
        figures["divergence"] = heat_map(
            spelled.divergence,
            xlabel="unit (layer.dimension, sign of β), in the order of choice",
            ylabel="unit",
            colour_label="Jensen-Shannon divergence (nats)",
            row_labels=spelled.names,
            column_labels=spelled.names,
        )
    return figures


@house_style
def methods(tasks: Sequence[str], metrics: Mapping[str, Metric]) -> Figure:
    """Test AUROC and accuracy of every method against the number of dimensions that it touches."""
    figure = Figure(figsize=(2.9 * len(tasks) + 1.2, 7.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for axes, quantity in zip(panels[:, column], ("auroc", "accuracy"), strict=True):
            none = metrics[f"{quantity}/{task}/none"].value
            axes.axhline(none, color="black", linewidth=1.2, label="no steering")
            if quantity == "accuracy":
                offset = metrics[f"accuracy/{task}/offset"].value
                axes.axhline(offset, color="black", linestyle=":", linewidth=1.6, label="constant offset")
            for index, (arm, label) in enumerate(LABELS.items()):
                own = arm not in ("random", "inverse")
                metric = metrics[f"{quantity}/{task}/{arm}"]
                dims = metrics[f"choice/{task}/{arm if own else 'austeer'}/dims"].value
                # Controls touch as many dimensions as AUSteer; they stand a little aside to be seen.
                x = dims * {"random": 1.35, "inverse": 1 / 1.35}.get(arm, 1)
                if arm == "random" and quantity == "auroc":
                    low, high = metrics[f"random_low/{task}"].value, metrics[f"random_high/{task}"].value
                else:
                    low, high = metric.ci95 or (metric.value, metric.value)
                colour = PALETTE[index % len(PALETTE)]
                spread = [[max(0, metric.value - low)], [max(0, high - metric.value)]]
                marker = MARKERS[index % len(MARKERS)]
                axes.errorbar(x, metric.value, spread, color=colour, marker=marker, markersize=8, linewidth=1.4,
                              linestyle="none", label=label)  # fmt: skip
            axes.set_xscale("log")
        panels[1, column].set_xlabel("dimensions touched")
        panels[0, column].set_title(task.replace("_", ": "), loc="left")
    panels[0, 0].set_ylabel("test AUROC")
    panels[1, 0].set_ylabel("test accuracy (%)")
    handles = {
        label: handle for axes in panels[:, 0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(handles), 2 + 2 * len(tasks))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)
    note(figure, "bars: 95 % over items, for random units lowest to highest AUROC; dimensions: mean over seeds")
    return figure


@house_style
def grid_curves(
    outcomes: Mapping[str, Outcome], ks: Mapping[str, Sequence[int]], alphas: Mapping[str, Sequence[float]]
) -> Figure:
    """Dev AUROC and accuracy of AUSteer against k and against alpha, the other one and the site as chosen."""
    figure = Figure(figsize=(9.6, 7.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    for index, (task, found) in enumerate(outcomes.items()):
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        for row, values in enumerate((found.dev_auroc, 100 * found.dev_hits)):
            curves: list[list[np.ndarray]] = [[], []]
            ours = found.choices["austeer"]
            for seed, (site, k, alpha) in enumerate(zip(ours["site"], ours["k"], ours["alpha"], strict=True)):
                place = list(ks[task]).index(int(k)), int(np.abs(np.asarray(alphas[task]) - alpha).argmin())
                curves[0].append(values[seed, site, :, place[1]])
                curves[1].append(values[seed, site, place[0]])
            for column, x in enumerate((ks[task], alphas[task])):
                axes = panels[row, column]
                mean = np.mean(curves[column], 0)
                label = task.replace("_", ": ")
                axes.plot(x, mean, color=colour, marker=marker, markersize=6, label=label)
                low, high = np.min(curves[column], 0), np.max(curves[column], 0)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.set_xscale("log")
    panels[0, 0].set_ylabel("dev AUROC")
    panels[1, 0].set_ylabel("dev accuracy (%)")
    panels[1, 0].set_xlabel("k, number of units")
    panels[1, 1].set_xlabel("α, strength")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    note(figure, "line: mean over seeds; band: lowest to highest seed")
    return figure


def where(outcomes: Mapping[str, Outcome]) -> Figure:
    """In which layers the chosen units sit, by their place in the order, all tasks and seeds together."""
    bins = (0, 1, 4, 16, 64, 100)
    layers = 1 + max(int(one[:, 0].max()) for found in outcomes.values() for one in found.ranks)
    table = np.zeros((layers, len(bins) - 1))
    for found in outcomes.values():
        for one in found.ranks:
            counts, _, _ = np.histogram2d(one[:, 0], one[:, 1], (np.arange(layers + 1) - 0.5, np.asarray(bins) - 0.5))
            table += counts / np.maximum(counts.sum(0), 1)
    seeds = sum(len(found.ranks) for found in outcomes.values())
    return heat_map(
        100 * table / seeds,
        xlabel="place in the order of choice",
        ylabel="layer",
        colour_label="share of the units (%), mean over tasks and seeds",
        column_labels=[f"{low + 1}" if low + 1 == high else f"{low + 1}-{high}" for low, high in pairwise(bins)],
        annotate=True,
    )


def unit_effects(found: Scan, site: str) -> Figure:
    """What single units do, against the blocks that they are part of."""
    blocks, units = found.blocks[site], found.units[site]
    figure = histogram(
        {f"single units of {SITE_LABELS[site]}": units.ravel()},
        xlabel="dev AUROC gained over no steering",
        ylabel="units (count, log scale)",
        lines={"best block": float(blocks.max()), "worst block": float(blocks.min())},
    )
    axes = figure.axes[0]
    axes.set_yscale("log")
    axes.axvspan(-found.band, found.band, color="0.5", alpha=0.15, linewidth=0)
    note(figure, "grey: 95 % bootstrap band of no effect, for all units at once")
    return figure
