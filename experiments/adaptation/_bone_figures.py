"""The figures of the Bone experiment."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from mechlab.reporting.figures import arm_bars, curve_band
from mechlab.reporting.results import Metric

NAMES = {
    "bone_col": "Bone-col",
    "lora": "LoRA",
    "loraplus": "LoRA+",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "lora_ga": "LoRA-GA",
    "dora": "DoRA",
    "miss": "no guide (MiSS)",
    "guide_only": "guide only",
    "bone_row": "Bone-row",
    "bone_ab": "Bone-AB",
    "bone_free": "Bone-free",
    "full": "full",
}
MAIN = ("bone_col", "lora", "loraplus", "pissa", "olora", "lora_ga", "dora", "miss", "full")
FORMS = ("bone_col", "miss", "guide_only", "bone_row", "bone_ab", "bone_free")


def all_figures(
    metrics: Mapping[str, Metric], losses: Mapping[str, Mapping[str, np.ndarray]], units: Mapping[str, str], window: int
) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name.

    Args:
      metrics: of the run.
      losses: task to arm to (S, steps).
      units: of the loss, by task.
      window: steps over which curves are averaged.
    """
    figures = {}
    for task, by_arm in losses.items():
        unit = units[task]
        figures[f"loss_{task}"] = curves(by_arm, unit, window)
        figures[f"final_{task}"] = bars(metrics, f"final/{task}", MAIN, f"final training loss ({unit})")
        if f"held_out/{task}/bone_col" in metrics:
            figures[f"held_out_{task}"] = bars(metrics, f"held_out/{task}", MAIN, f"held-out loss ({unit})")
        figures[f"forms_{task}"] = bars(metrics, f"final/{task}", FORMS, f"final training loss ({unit})")
        figures[f"gradient_{task}"] = bars(metrics, f"gradient/{task}", MAIN, "norm of the first gradient")
        figures[f"start_up_{task}"] = bars(metrics, f"start_up/{task}", MAIN, "time to make the state (ms)")
        sizes = sorted(int(x.rsplit("_", 1)[1]) for x in metrics if x.startswith(f"final/{task}/bone_col_"))
        if sizes:
            runs = np.stack([metrics[f"final/{task}/bone_col_{size}"].per_seed or () for size in sizes], 1)
            ylabel = f"final training loss ({unit})"
            figures[f"blocks_{task}"] = curve_band(
                sizes, {"Bone-col": runs}, xlabel="block size r", ylabel=ylabel, logx=True
            )
    return figures


def curves(by_arm: Mapping[str, np.ndarray], unit: str, window: int) -> Figure:
    """The paper's convergence figure."""
    shown = {NAMES[arm]: smoothed(by_arm[arm], window) for arm in MAIN if arm in by_arm}
    steps = window + np.arange(next(iter(shown.values())).shape[1])
    ylabel = f"training loss ({unit}), mean of {window} steps"
    return curve_band(steps, shown, xlabel="step", ylabel=ylabel)


def bars(metrics: Mapping[str, Metric], prefix: str, arms: tuple[str, ...], ylabel: str) -> Figure:
    """One number of every arm, every seed as a dot."""
    found = {NAMES[arm]: metrics[f"{prefix}/{arm}"] for arm in arms if f"{prefix}/{arm}" in metrics}
    return arm_bars({name: metric.per_seed or (metric.value,) for name, metric in found.items()}, ylabel=ylabel)


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """Running means over the last ``window`` steps, (S, steps - window + 1)."""
    sums = np.cumsum(np.pad(losses, ((0, 0), (1, 0))), axis=1)
    return (sums[:, window:] - sums[:, :-window]) / window
