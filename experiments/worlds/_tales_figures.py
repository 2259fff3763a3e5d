"""The figures of the tales experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechlab.data.worlds import tales
from mechlab.reporting.canvas import DASHES, PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.results import Metric


def all_figures(metrics: Mapping[str, Metric], curves: Mapping[str, Any], config: Any) -> dict[str, Figure]:
    """Learning curves, and accuracy on items against distractors, by size."""
    figures = {
        "loss": learning(curves, ("loss", "loss of what follows"), ylabel="cross-entropy (nats a token)"),
        f"learning_{config.sizes[0]}": learning(
            {config.sizes[0]: curves[config.sizes[0]]}, tales.ITEM_KINDS, ylabel="items answered (share)", chance=0.5
        ),
    }
    if len(config.distractors) > 1:
        figures["distractors"] = against_distractors(metrics, config)
    return figures


@house_style
def learning(
    curves: Mapping[str, Mapping[str, np.ndarray]], names: tuple[str, ...], *, ylabel: str, chance: float | None = None
) -> Figure:
    """Measures on held-out texts against tokens seen."""
    figure, axes = canvas(title="")
    label_axes(axes, xlabel="tokens seen in training (millions)", ylabel=ylabel)
    for i, (size, curve) in enumerate(curves.items()):
        for j, name in enumerate(names):
            several = len(curves) > 1
            colour, dash = PALETTE[i if several else j], DASHES[j if several else 0]
            axes.plot(curve["tokens"] / 1e6, curve[name], dash, color=colour, label=f"{size}, {name}")
    if chance is not None:
        axes.axhline(chance, color="0.5", linewidth=0.8, linestyle=":", label="chance")
    legend(axes)
    note(figure, "one training run a size")
    return figure


@house_style
def against_distractors(metrics: Mapping[str, Metric], config: Any) -> Figure:
    """Accuracy by kind of item and size, with Wilson's 95 % intervals."""
    figure, axes = canvas(title="")
    label_axes(axes, xlabel="distractor sentences", ylabel="items answered (%)")
    for i, kind in enumerate(tales.ITEM_KINDS):
        for j, size in enumerate(config.sizes):
            counts = [count for count in config.distractors if f"{size}/{kind}/{count}" in metrics]
            found = [metrics[f"{size}/{kind}/{count}"] for count in counts]
            low, high = np.asarray([metric.ci95 for metric in found]).T
            value = np.asarray([metric.value for metric in found])
            dash = DASHES[(len(config.sizes) - 1 - j) % len(DASHES)]
            axes.plot(counts, value, dash, color=PALETTE[i], label=f"{kind}, {size}")
            axes.fill_between(counts, low, high, color=PALETTE[i], alpha=0.12, linewidth=0)
    axes.axhline(50, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_xticks(config.distractors)
    legend(axes)
    note(figure, f"bands: 95 % intervals over {config.items} items; dotted: chance")
    return figure
