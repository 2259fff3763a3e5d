"""Figures of what happens where in a model, in the style of ``figures``: over heads, and over depth.

Axis letters: L layers, H heads, N items.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from mechlab.reporting.canvas import DASHES, MARKERS, PALETTE, arrays, canvas, house_style, label_axes, legend, note


@house_style
def head_maps(maps: Mapping[str, ArrayLike], *, colour_label: str, title: str = "", diverging: bool = False) -> Figure:
    """Layer by head as colours, one panel a map, all with the same colours: first layer at the bottom.

    Args:
      maps: (L, H) values by label, all of one shape.
      colour_label: what the colours are, with their unit.
      title: heading.
      diverging: colours symmetric about zero, which is white.

    Returns:
      The figure; the largest magnitude of every panel is marked by its value.

    Raises:
      ValueError: shapes differ, a value is not finite, or a label is empty.
    """
    tables = arrays("maps", maps, 2)
    if len({table.shape for table in tables.values()}) != 1:
        raise ValueError(f"maps must be of one shape, got {[table.shape for table in tables.values()]}")
    if not colour_label.strip():
        raise ValueError("colour_label must say what the colours are, got an empty one")
    layers, heads = next(iter(tables.values())).shape
    panel = max(1.9, 0.3 * heads + 0.5)
    size = (1.6 + panel * len(tables), max(3.0, 1.3 + 0.3 * layers))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    largest = max(float(np.abs(table).max()) for table in tables.values())
    low = -largest if diverging else min(0.0, *(float(table.min()) for table in tables.values()))
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (label, table) in zip(panels, tables.items(), strict=True):
        colours = "RdBu_r" if diverging else "viridis"
        image = axes.imshow(table, cmap=colours, aspect="auto", origin="lower", vmin=low, vmax=largest)
        axes.set_title(label, fontsize=12)
        axes.set_xlabel("head")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        layer, head = np.unravel_index(np.abs(table).argmax(), table.shape)
        brightness = np.dot((0.299, 0.587, 0.114), image.to_rgba(table)[layer, head, :3])
        ink = "black" if brightness > 0.5 else "white"
        axes.text(head, layer, f"{table[layer, head]:.2g}", ha="center", va="center", color=ink, fontsize=9)
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(panels), label=textwrap.fill(colour_label, int(10 * (size[1] - 0.8))))
    bar.outline.set_visible(False)
    return figure


@house_style
def depth_curves(
    curves: Mapping[str, ArrayLike], *, ylabel: str, xlabel: str = "depth", title: str = "", items: str = "prompts"
) -> Figure:
    """What is read from the residual stream at every depth: the median over items, with a band of the quartiles.

    Args:
      curves: (N, L + 1) values by label: N items, at the embedding and after each of the L layers; N may be 1.
      ylabel: label of the values, with their unit.
      xlabel: label of the depth axis.
      title: heading.
      items: what the N items are, in plural, for the note.

    Returns:
      The figure.

    Raises:
      ValueError: depths differ, a value is not finite, or a label is empty.
    """
    read = arrays("curves", curves, 2)
    depths = {values.shape[1] for values in read.values()}
    if len(depths) != 1:
        raise ValueError(f"curves must have one number of depths, got {sorted(depths)}")
    figure, axes = canvas(title=title)
    label_axes(axes, xlabel=xlabel, ylabel=ylabel)
    x = np.arange(depths.pop())
    for index, (label, values) in enumerate(read.items()):
        colour, dash = PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]
        axes.plot(x, np.median(values, 0), dash, color=colour, marker=MARKERS[index % len(MARKERS)], label=label)
        if len(values) > 1:
            low, high = np.quantile(values, (0.25, 0.75), axis=0)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    every = max(1, len(x) // 12)
    axes.set_xticks(x[::every], ["embed", *(f"layer {i}" if len(x) < 8 else f"{i}" for i in x[:-1])][::every])
    axes.margins(x=0.02)
    legend(axes)
    sizes = {len(values) for values in read.values()}
    if max(sizes) > 1:
        note(figure, f"line: median of {' or '.join(map(str, sorted(sizes)))} {items}; band: quartiles")
    return figure
