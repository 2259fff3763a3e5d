"""The figures of the LIFT experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from experiments.adaptation._lift_lab import Trained
from mechlab.reporting.figures import arm_bars, curve_band, heat_map, histogram, trade_off
from mechlab.reporting.results import Metric

if TYPE_CHECKING:
    from experiments.adaptation.lift import Config

NAMES = {
    "lift": "LIFT",
    "lift_once": "LIFT, never refreshed",
    "weight_mag": "|W|",
    "random": "random",
    "smallest": "smallest |W_r|",
    "bottom_rank": "|W − W_r|",
    "grad_mag": "|G|",
    "movement": "movement",
    "momentum": "momentum",
    "s2ft": "S2FT",
    "lora": "LoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "full": "full",
}
Metrics = Mapping[str, Metric]


def all_figures(
    config: Config,
    metrics: Metrics,
    arms: Mapping[str, Trained],
    rises: Mapping[str, np.ndarray],
    shapes: Mapping[str, Mapping[str, np.ndarray]],
    chosen: Mapping[str, Any],
) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    unit = metrics["target/lift"].unit
    figures = {
        "target_loss": arm_bars(
            {NAMES[name]: metrics[f"target/{name}"].per_seed or () for name in NAMES if name in arms},
            ylabel=f"held-out loss on the target ({unit})",
        ),
        "retention": retention(arms, unit),
        "sweep": sweep(arms, unit),
        "perturbation": curve_band(
            config.sigmas,
            {NAMES[name]: rise for name, rise in rises.items()},
            xlabel="noise on the chosen entries (root mean square of the kernels)",
            ylabel=f"rise of the base's loss ({unit})",
            logx=True,
        ),
        "mask_overlap": heat_map(
            chosen["overlap"],
            xlabel="rule",
            ylabel="rule",
            row_labels=[NAMES[name] for name in chosen["names"]],
            column_labels=[NAMES[name] for name in chosen["names"]],
            colour_label="Jaccard index",
            annotate=True,
        ),
        "update_spectrum": curve_band(
            1 + np.arange(shapes["lift"]["spectrum"].shape[1]),
            {NAMES[name]: found["spectrum"] for name, found in shapes.items()},
            xlabel="singular value of one kernel's change, by rank",
            ylabel="size relative to the largest",
        ),
        "update_sizes": histogram(
            {NAMES[name]: np.log10(found["sizes"]) for name, found in shapes.items()},
            xlabel="log10 of the change of a weight, weights that changed",
            ylabel="weights of one kernel (count)",
        ),
        "optimiser_bytes": arm_bars(
            {NAMES[name]: [trained.state_bytes / 1e3] for name, trained in arms.items()},
            ylabel="optimiser state (kB)",
        ),
    }
    if "weight_mag" in chosen:
        figures["masks"] = mask_map(chosen)
    ablated = {name.split("/")[1]: metric for name, metric in metrics.items() if name.startswith("target/lift_")}
    shown = {"LIFT": metrics["target/lift"].per_seed or ()}
    shown |= {_ablation(name): x.per_seed or () for name, x in ablated.items() if "density" not in name}
    figures["ablations"] = arm_bars(shown, ylabel=f"held-out loss on the target ({unit})")
    if config.densities:
        figures["rank_and_density"] = rank_and_density(config, metrics, unit)
    return figures


def retention(arms: Mapping[str, Trained], unit: str) -> Figure:
    """What is kept of the source against what is learned of the target, every arm at its best rate."""
    points = {}
    for name, trained in arms.items():
        best = trained.best()
        points[NAMES[name]] = float(trained.held_out["target"][best].mean()), trained.held_out["retention"][best]
    return trade_off(
        points, xlabel=f"held-out loss on the target ({unit})", ylabel="source score kept (% of the base's)"
    )


def sweep(arms: Mapping[str, Trained], unit: str) -> Figure:
    """The same for every learning rate of the arms that claims compare."""
    points = {}
    for name in ("lift", "lora", "full"):
        if name not in arms:
            continue
        scores = arms[name].held_out
        for rate in range(len(scores["target"])):
            words = f"{NAMES[name]}, rate {rate + 1}"
            points[words] = float(scores["target"][rate].mean()), scores["retention"][rate]
    return trade_off(
        points, xlabel=f"held-out loss on the target ({unit})", ylabel="source score kept (% of the base's)"
    )


def mask_map(chosen: Mapping[str, Any]) -> Figure:
    """Entries of one kernel: chosen by magnitude alone, after rank reduction, or both."""
    plain, reduced = chosen["weight_mag"], chosen["lift"]
    kind = np.where(plain & reduced, 3, np.where(reduced, 2, np.where(plain, 1, 0))).astype(float)
    figure = heat_map(
        np.where(kind == 0, np.nan, kind),
        xlabel="output",
        ylabel="input",
        colour_label="chosen by magnitude",
        title="entries of one kernel (grey: not chosen)",
    )
    figure.axes[-1].set_yticks([1, 2, 3], ["of W", "of W_r", "of both"])
    figure.set_size_inches(8, 5)
    return figure


def rank_and_density(config: Config, metrics: Metrics, unit: str) -> Figure:
    """Target loss over filter rank and density."""
    ranks = sorted({config.filter_rank, *config.filter_ranks})
    shares = sorted({config.density, *config.densities})

    def loss(rank: int, share: float) -> float:
        name = "lift" if rank == config.filter_rank else f"lift_rank_{rank}"
        if share != config.density:
            name = f"lift_rank_{rank}_density_{share:g}"
        return metrics[f"target/{name}"].value

    return heat_map(
        [[loss(rank, share) for share in shares] for rank in ranks],
        xlabel="share of entries trained (%)",
        ylabel="filter rank r",
        row_labels=[str(rank) for rank in ranks],
        column_labels=[f"{100 * share:g}" for share in shares],
        colour_label=f"held-out loss on the target ({unit})",
        annotate=True,
    )


def _ablation(name: str) -> str:
    words = {"once": "never refreshed", "mlp_only": "MLP only", "mixed": "mixed part", "bottom": "bottom part"}
    rest = name.removeprefix("lift_")
    if rest == "random":
        return "random part"
    return words.get(rest, rest.replace("rank_", "filter rank ").replace("every_", "refreshed every "))
