"""The figures of the ZeroQuant-V2 experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments.compression._zeroquant_v2_claims import finest, repaired_rank
from experiments.measures import by_seed
from mechlab.reporting.canvas import PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import arm_bars, curve_band
from mechlab.reporting.results import Metric

NAMES = {"rtn": "RTN", "gptq": "GPTQ", "local": "ZQ-Local", "global": "ZQ-Global", "in turn": "ZQ-Global in turn"}
Metrics = Mapping[str, Metric]


def all_figures(metrics: Metrics, seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    models = [name.split("/", 1)[1] for name in metrics if name.startswith("perplexity/")]
    plain, planted = ([name for name in models if (" x" in name) == wanted] for wanted in (False, True))
    figures = {"sensitivity": sensitivity(metrics, plain)}
    if planted:
        figures["sensitivity_planted"] = sensitivity(metrics, planted)
    for model, spectra in seen.get("spectra", {}).items():
        short = model.replace("/", "_")
        for act in ("A16", "A8"):
            figures[f"methods_w4{act.lower()}_{short}"] = methods(metrics, model, act)
        figures[f"lorc_gain_{short}"] = lorc_gain(metrics, model)
        figures[f"lorc_rank_{short}"] = lorc_rank(metrics, model)
        figures[f"error_spectra_{short}"] = error_spectra(spectra, model)
        curves = group_curves(metrics, model)
        if len(curves["x"]) > 1:
            xlabel = "inputs that share a step (G)"
            figures[f"groups_{short}"] = curve_band(
                curves["x"],
                curves["curves"],
                xlabel=xlabel,
                ylabel="KL (nats a token)",
                title=f"{model}, W4A16",
                logx=True,
            )
    return figures


@house_style
def sensitivity(metrics: Metrics, models: list[str]) -> Figure:
    """T1: colour is the KL, which is never negative; the number is the rise of perplexity in percent."""
    cells = [name.split("/", 2)[2] for name in metrics if name.startswith(f"kl/{models[0]}/W")]
    cells = [cell for cell in cells if all(f"kl/{model}/{cell}" in metrics for model in models)]
    kl = np.array([[metrics[f"kl/{model}/{cell}"].value for cell in cells] for model in models])
    figure, axes = canvas(title="", width=9.6, height=2.1 + 0.5 * len(models))
    colours = matplotlib.colormaps["viridis"]
    scale = LogNorm(max(kl.min(), 1e-6), kl.max())
    image = axes.imshow(kl, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    for row, model in enumerate(models):
        for column, cell in enumerate(cells):
            value = metrics[f"relative/{model}/{cell}"].value
            bright = np.dot((0.299, 0.587, 0.114), image.to_rgba(kl[row, column])[:3]) > 0.5
            words = f"{value:+.2f}" if abs(value) < 10 else f"{value:+.0f}"
            axes.text(column, row, words, ha="center", va="center", fontsize=11, color="black" if bright else "white")
    axes.set_xticks(range(len(cells)), [cell.replace(" ", "\n") for cell in cells])
    axes.set_yticks(
        range(len(models)), [f"{model}\nPPL {metrics[f'perplexity/{model}'].value:.2f}" for model in models]
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    label_axes(axes, xlabel="what is rounded, and how")
    figure.colorbar(image, ax=axes, label="KL (nats a token)").outline.set_visible(False)
    note(figure, "number: rise of perplexity in %; means over seeds")
    return figure


def methods(metrics: Metrics, model: str, act: str) -> Figure:
    """T2 to T4: every method, per row and in groups, without and with LoRC."""
    arms = {}
    for grid in ("row", finest(metrics, model)):
        for method, name in NAMES.items():
            for rank in ("r0", f"r{repaired_rank(metrics, model)}"):
                metric = metrics.get(f"kl/{model}/{method}/{grid}/{act}/{rank}")
                if metric is not None:
                    label = f"{name}, {'per row' if grid == 'row' else grid}{'' if rank == 'r0' else ' + LoRC'}"
                    arms[label] = metric.per_seed or ()
    return arm_bars(arms, ylabel="KL (nats a token)", title=f"{model}, W4{act}")


def lorc_gain(metrics: Metrics, model: str) -> Figure:
    """T4: how much of the KL LoRC takes away."""
    arms = {}
    for name in metrics:
        if name.startswith(f"gain/{model}/"):
            method, grid, act = name.removeprefix(f"gain/{model}/").split("/")
            before = np.asarray(metrics[f"kl/{model}/{method}/{grid}/{act}/r0"].per_seed)
            arms[f"{NAMES[method]}, {grid}, {act}"] = 100 * np.asarray(metrics[name].per_seed) / before
    return arm_bars(arms, ylabel=f"KL removed by LoRC, rank {repaired_rank(metrics, model)} (%)", title=model)


def lorc_rank(metrics: Metrics, model: str) -> Figure:
    """T5: KL against the rank."""
    curves: dict[str, Any] = {}
    ranks: list[int] = []
    for method in ("rtn", "gptq"):
        start = f"kl/{model}/{method}/row/A16/r"
        names = [name for name in metrics if name.startswith(start) and " " not in name]
        found = {int(name.removeprefix(start)): name for name in names}
        ranks = sorted(found)
        curves[NAMES[method]] = np.stack([by_seed(metrics[found[rank]]) for rank in ranks], 1)
    title = f"{model}, W4A16 per row"
    return curve_band(ranks, curves, xlabel="rank of LoRC", ylabel="KL (nats a token)", title=title)


def group_curves(metrics: Metrics, model: str) -> dict[str, Any]:
    """T3: KL of RTN and GPTQ against the group size, by seed."""
    start = f"kl/{model}/rtn/g"
    groups = sorted(int(name.removeprefix(start).split("/")[0]) for name in metrics if _is_group(name, start))
    curves: dict[str, Any] = {
        NAMES[method]: np.stack([by_seed(metrics[f"kl/{model}/{method}/g{group}/A16/r0"]) for group in groups], 1)
        for method in ("rtn", "gptq")
    }
    return {"x": groups, "curves": curves}


@house_style
def error_spectra(spectra: Mapping[str, np.ndarray], model: str) -> Figure:
    """Singular values of the errors of q and o in every layer, as shares of each error's length; (kernels, R) each."""
    figure, axes = canvas(title=f"{model}, W4")
    for index, (cell, values) in enumerate(spectra.items()):
        method, grid, _ = cell.split("/")
        shares = values / np.linalg.norm(values, axis=1, keepdims=True)
        places = np.arange(1, shares.shape[1] + 1)
        axes.plot(places, shares.mean(0), color=PALETTE[index], label=f"{NAMES[method]}, {grid}")
        axes.fill_between(places, shares.min(0), shares.max(0), color=PALETTE[index], alpha=0.15, linewidth=0)
    axes.set_ylim(0)
    label_axes(axes, xlabel="number of the singular value", ylabel="singular value / |E|")
    legend(axes)
    note(figure, f"mean over {len(values)} kernels; band: smallest to largest; first seed")
    return figure


def _is_group(name: str, start: str) -> bool:
    return name.startswith(start) and name.endswith("/A16/r0")
