"""The figures of the experiment: who is refused, what strength does, what the controllers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.canvas import PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import arm_bars, curve_band, heat_map, histogram
from mechlab.reporting.results import Metric

NAMES = {
    "none": "no steering",
    "uniform": "uniform",
    "single": "single layer",
    "cast": "CAST",
    "released_early": "released, S early",
    "released_two_pass": "released, two pass",
    "released_last": "released, S last",
    "released_middle": "released, S middle",
    "released_embedding": "released, embedding r",
    "end_early": "end to end, S early",
    "end_two_pass": "end to end, two pass",
    "end_last": "end to end, S last",
    "end_middle": "end to end, S middle",
    "half_weights": "all w = 1/2",
    "constant_s": "s constant",
    "centred_s": "s with its zero in the middle",
    "released_mixed": "batches in mixed order",
    "target_only": "target prompts only",
}
ABLATIONS = (
    "released_early",
    "half_weights",
    "constant_s",
    "centred_s",
    "released_mixed",
    "target_only",
    "released_embedding",
    "released_last",
)


def all_figures(metrics: Mapping[str, Metric], seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure by file name."""
    arms = [arm for arm in NAMES if f"refusal_plain/{arm}" in metrics]
    figures = {
        "methods": methods(metrics, arms),
        "scalar": histogram(
            seen["scalar"],
            xlabel="scalar s (logit)",
            ylabel="prompts (count, all seeds)",
            title="released loss, S early",
            lines={"no push": 0.0},
        ),
        "weights": heat_map(
            np.round(np.stack(list(seen["weights"].values())), 2),
            xlabel="layer",
            ylabel="loss and prompts",
            colour_label="mean weight w",
            row_labels=list(seen["weights"]),
            annotate=True,
        ),
        "ablations": arm_bars(
            {NAMES[arm]: metrics[f"score/{arm}"].per_seed for arm in ABLATIONS if arm in arms},  # type: ignore[misc]
            ylabel="refusal minus over-refusal (points)",
            title="ablations, S early unless named",
        ),
    }
    if "curves" in seen:
        figures |= {f"strength_{kind}": strength(seen["scales"], seen["curves"], kind) for kind in ("refused", "kl")}
    return figures


def strength(scales: Sequence[float], curves: Mapping[str, Mapping[str, np.ndarray]], kind: str) -> Figure:
    """Refusal of both kinds of prompts, or KL on benign ones, against the strength; (S, C) by method."""
    if kind == "kl":
        lines = {name: found["kl"] for name, found in curves.items()}
        ylabel = "KL on other topics (nats per token)"
    else:
        labels = {"refusal": "target", "over": "others"}
        lines = {f"{name}, {labels[k]}": 100 * found[k] for name, found in curves.items() for k in labels}
        ylabel = "prompts refused (%)"
    return curve_band(scales, lines, xlabel="strength c / median |h|", ylabel=ylabel, logx=True)


@house_style
def methods(metrics: Mapping[str, Metric], arms: Sequence[str]) -> Figure:
    """Refusal of the target, plain and wrapped, and of other topics: bars with 95 % intervals over prompts."""
    figure, axes = canvas(title="", width=7.2, height=1.4 + 0.55 * len(arms))
    label_axes(axes, xlabel="prompts refused (%)")
    kinds = {"refusal_plain": "target", "refusal_wrapped": "target, wrapped", "over": "other topics"}
    for k, (kind, label) in enumerate(kinds.items()):
        found = [metrics[f"{kind}/{arm}"] for arm in arms]
        values = np.asarray([metric.value for metric in found])
        ends = np.asarray([metric.ci95 or (metric.value, metric.value) for metric in found]).T
        places = np.arange(len(arms)) + 0.26 * (k - 1)
        errors = np.maximum(np.stack([values - ends[0], ends[1] - values]), 0)
        bars: dict[str, Any] = {"height": 0.25, "color": PALETTE[(0, 5, 1)[k]], "label": label, "ecolor": "0.25"}
        axes.barh(places, values, xerr=errors, error_kw={"linewidth": 1}, **bars)
    axes.set_yticks(np.arange(len(arms)), [NAMES[arm] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    legend(axes)
    note(figure, "bars: mean over seeds; lines: 95 % bootstrap over prompts")
    return figure
