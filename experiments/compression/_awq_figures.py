"""Figures of the AWQ experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.figures import arm_bars, curve_band
from mechlab.reporting.results import Metric

NAMES = {
    "rtn": "rounding",
    "awq_scale": "AWQ, scales",
    "awq": "AWQ, scales and clip",
    "gptq": "GPTQ",
}


def all_figures(metrics: Mapping[str, Metric], seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure by file name."""
    figures: dict[str, Figure] = {}
    bits = sorted({name.split("/")[1] for name in metrics if name.startswith("kl/")})
    for b in bits:
        arms = {label: metrics[f"kl/{b}/{arm}"].per_seed for arm, label in NAMES.items() if f"kl/{b}/{arm}" in metrics}
        figures[f"methods_{b}"] = arm_bars(arms, ylabel="KL (nats per token)", title=f"{b} bits, groups of 32")  # type: ignore[arg-type]
        kept = {
            name.split("kept_")[1].replace("_", ", ").replace("low", "1 %"): metric.per_seed
            for name, metric in metrics.items()
            if name.startswith(f"kl/{b}/kept_")
        }
        rounding = {"none": metrics[f"kl/{b}/rtn"].per_seed}
        figures[f"salient_{b}"] = arm_bars(
            rounding | kept,  # type: ignore[arg-type]
            ylabel="KL (nats per token)",
            title=f"channels left unrounded, {b} bits",
        )
    sweep = {float(name.rpartition("/")[2]): metric for name, metric in metrics.items() if name.startswith("sweep_kl/")}
    if len(sweep) > 1:
        figures["sweep"] = curve_band(
            tuple(sweep),
            {"3 bits": np.asarray([metric.per_seed for metric in sweep.values()]).T},
            xlabel="factor s of the most active channel in a hundred",
            ylabel="KL (nats per token)",
        )
    for b, losses in seen.get("losses", {}).items():
        figures[f"search_{b}"] = curve_band(
            [i / 20 for i in range(20)],
            losses,
            xlabel="exponent α",
            ylabel="loss over that of α = 0",
            title=f"{b} bits, mean over layers, last seed",
        )
    return figures
