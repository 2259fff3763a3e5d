"""Figures in one house style: made to be read at half size, by the colour-blind, with every seed in sight.

Every function takes plain arrays and returns a ``matplotlib.figure.Figure``; pyplot and its global state are
not used, so no display is needed. Axis labels are required: name the quantity and, where it has one, its unit
in brackets, such as ``"time (s)"``. Colours are those of Okabe and Ito.

Axis letters: S seeds, N points of a curve, R rows, C columns.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from mechlab.reporting.canvas import (
    DASHES,
    MARKERS,
    PALETTE,
    array,
    arrays,
    canvas,
    house_style,
    label_axes,
    legend,
    name_points,
    note,
)
from mechlab.reporting.films import Film


@house_style
def curve_band(
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    logx: bool = False,
) -> Figure:
    """Mean curves over seeds, each with its band; the note under the figure says what line and band are.

    The band is the mean ± 1.96 standard errors, or smallest to largest for a curve of two seeds.

    Args:
      x: (N,) positions.
      curves: (S, N) values by label; S may differ between curves.
      xlabel: label of the x axis, with its unit.
      ylabel: label of the y axis, with its unit.
      title: heading.
      logx: logarithmic x axis.

    Returns:
      The figure.

    Raises:
      ValueError: a shape does not fit, a value is not finite, or a label is empty.
    """
    positions = array("x", x, 1)
    figure, axes = canvas(title=title)
    label_axes(axes, xlabel=xlabel, ylabel=ylabel)
    runs = arrays("curves", curves, 2)
    for index, (label, values) in enumerate(runs.items()):
        if values.shape[1] != positions.size:
            raise ValueError(f"curves[{label!r}] must be (S, {positions.size}) to fit x, got {values.shape}")
        colour, dash = PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]
        axes.plot(positions, values.mean(0), dash, color=colour, label=label)
        low, high = _band(values)
        axes.fill_between(positions, low, high, color=colour, alpha=0.18, linewidth=0)
    if logx:
        axes.set_xscale("log")
        if positions.size <= 8:
            axes.set_xticks(positions, [f"{x:g}" for x in positions])
            axes.minorticks_off()
    axes.margins(x=0.02)
    legend(axes)
    note(figure, _band_note({len(values) for values in runs.values()}))
    return figure


@house_style
def arm_bars(arms: Mapping[str, ArrayLike], *, ylabel: str, title: str = "") -> Figure:
    """One bar an arm up to its mean, which is written beside it, with every seed as a dot.

    Bars lie flat where their labels are too long or too many to stand side by side.

    Args:
      arms: (S,) value of every seed by label; S may differ.
      ylabel: label of the values, with their unit.
      title: heading.

    Returns:
      The figure.

    Raises:
      ValueError: a shape does not fit, a value is not finite, or a label is empty.
    """
    seeds = arrays("arms", arms, 1)
    flat = len(seeds) > 6 or max(map(len, seeds)) > 54 // len(seeds)
    figure, axes = canvas(title=title, height=max(3.2, 1.5 + 0.5 * len(seeds)) if flat else 4.2)
    label_axes(axes, **{"xlabel" if flat else "ylabel": ylabel})
    for place, values in enumerate(seeds.values()):
        colour, mean = PALETTE[place % len(PALETTE)], values.mean()
        (axes.barh if flat else axes.bar)(place, mean, 0.62, color=colour, alpha=0.4)
        axes.plot(*_turn(flat, place + np.array([-0.31, 0.31]), np.full(2, mean)), color=colour)
        across = place + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1]
        dots = _turn(flat, across, values)
        axes.scatter(*dots, s=30, color=colour, edgecolor="white", linewidth=0.7, zorder=3)
        side = 1 if mean >= 0 else -1
        axes.annotate(
            f"{mean:.3g}",
            _turn(flat, place, side * max(side * values.max(), side * values.min(), side * mean)),
            _turn(flat, 0, 7 * side),
            textcoords="offset points",
            ha=("left" if side > 0 else "right") if flat else "center",
            va="center" if flat else ("bottom" if side > 0 else "top"),
        )
    (axes.set_yticks if flat else axes.set_xticks)(range(len(seeds)), list(seeds))
    axes.grid(visible=False, axis="y" if flat else "x")
    (axes.axvline if flat else axes.axhline)(0, color="black", linewidth=0.8)
    if flat:
        axes.margins(x=0.25)
        axes.invert_yaxis()
    else:
        axes.margins(y=0.14)
    note(figure, "bar and number: mean; dot: one seed")
    return figure


@house_style
def trade_off(
    points: Mapping[str, tuple[float, ArrayLike]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    logx: bool = False,
) -> Figure:
    """Two quantities against each other: the mean of every arm strong and named, its seeds faint.

    Args:
      points: label to (x, (S,) y of every seed).
      xlabel: label of the x axis, with its unit.
      ylabel: label of the y axis, with its unit.
      title: heading.
      logx: logarithmic x axis; every x must be positive.

    Returns:
      The figure; names are set beside their points so that they do not cover each other.

    Raises:
      ValueError: a shape does not fit, a value is not finite, an x is not positive under ``logx``, or a label
        is empty.
    """
    if not points:
        raise ValueError("points is empty: there is nothing to draw")
    figure, axes = canvas(title=title)
    label_axes(axes, xlabel=xlabel, ylabel=ylabel)
    means: dict[str, tuple[float, float]] = {}
    dots: list[tuple[float, float]] = []
    for index, (label, (x, values)) in enumerate(points.items()):
        place = float(array(f"x of points[{label!r}]", x, 0))
        if logx and place <= 0:
            raise ValueError(f"x of points[{label!r}] must be positive on a logarithmic axis, got {place}")
        seeds = array(f"points[{label!r}]", values, 1)
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        across = np.full(seeds.size, place)
        axes.scatter(across, seeds, s=30, color=colour, marker=marker, alpha=0.3, linewidth=0)
        axes.scatter(place, seeds.mean(), s=100, color=colour, marker=marker, edgecolor="white", zorder=3)
        means[label] = place, float(seeds.mean())
        dots += [(place, float(value)) for value in seeds]
    if logx:
        axes.set_xscale("log")
    axes.margins(0.12)
    note(figure, "large: mean; faint: one seed")
    name_points(axes, means, dots)
    return figure


@house_style
def heat_map(
    values: ArrayLike,
    *,
    xlabel: str,
    ylabel: str,
    colour_label: str,
    title: str = "",
    diverging: bool = False,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    annotate: bool = False,
) -> Figure:
    """A table of values as colours, first row on top. NaN means "no value here" and is left grey.

    Args:
      values: (R, C) values.
      xlabel: what the columns are.
      ylabel: what the rows are.
      colour_label: what the colours are, with their unit.
      title: heading.
      diverging: colours symmetric about zero, which is white.
      row_labels: R names; None to number them from 0.
      column_labels: C names; None to number them from 0.
      annotate: write every value into its cell.

    Returns:
      The figure.

    Raises:
      ValueError: a shape does not fit, a value is infinite, nothing is a number, or a label is empty.
    """
    table = array("values", values, 2, missing=True)
    rows, columns = table.shape
    for name, labels, wanted in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels is not None and len(labels) != wanted:
            raise ValueError(f"{name} must name all {wanted}, got {len(labels)}")
    if not colour_label.strip():
        raise ValueError("colour_label must say what the colours are, got an empty one")
    height = min(9.0, max(3.2, 1.4 + 0.36 * rows))
    width = max(5.0, min(12.0, 2.4 + 0.66 * columns) if annotate else min(8.0, 2.4 + 0.36 * columns))
    figure, axes = canvas(title=title, width=width, height=height)
    label_axes(axes, xlabel=xlabel, ylabel=ylabel)
    largest = float(np.nanmax(np.abs(table)))
    colours = matplotlib.colormaps["RdBu_r" if diverging else "viridis"].with_extremes(bad="#d9d9d9")
    low, high = (-largest, largest) if diverging else (None, None)
    image = axes.imshow(table, cmap=colours, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if row_labels is not None:
        axes.set_yticks(range(rows), list(row_labels))
    if column_labels is not None:
        axes.set_xticks(range(columns), list(column_labels))
        if max(map(len, column_labels)) > 5:
            axes.tick_params(axis="x", labelrotation=45)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
    lines = textwrap.fill(colour_label, int(10 * (height - 0.8)))
    bar = figure.colorbar(image, ax=axes, label=lines)
    bar.outline.set_visible(False)
    if annotate:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                brightness = np.dot((0.299, 0.587, 0.114), image.to_rgba(np.asarray(value))[:3])
                ink = "black" if brightness > 0.5 else "white"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=ink, fontsize=10)
    return figure


@house_style
def histogram(
    groups: Mapping[str, ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    lines: Mapping[str, float] | None = None,
    bins: int = 30,
) -> Figure:
    """How often each value occurs, the groups over one another in the same bins.

    Args:
      groups: (n,) values by label; n may differ.
      xlabel: label of the values, with their unit.
      ylabel: label of the counts, such as ``"neurons (count)"``.
      title: heading.
      lines: positions to mark by a named vertical line, such as a threshold.
      bins: number of bins between the smallest and the largest value.

    Returns:
      The figure.

    Raises:
      ValueError: a shape does not fit, a value is not finite, or a label is empty.
    """
    samples = arrays("groups", groups, 1)
    marks = {label: float(array(f"lines[{label!r}]", x, 0)) for label, x in (lines or {}).items()}
    edges = np.histogram_bin_edges(np.concatenate(list(samples.values())), bins).tolist()
    figure, axes = canvas(title=title)
    label_axes(axes, xlabel=xlabel, ylabel=ylabel)
    for index, (label, values) in enumerate(samples.items()):
        colour = PALETTE[index % len(PALETTE)]
        axes.hist(values, edges, color=colour, alpha=0.3, label=label)
        axes.hist(values, edges, color=colour, histtype="step", linewidth=1.8)
    for index, (label, x) in enumerate(marks.items()):
        dash = DASHES[1 + index % 3]
        axes.axvline(x, color="black", linestyle=dash, linewidth=1.6, label=f"{label} ({x:.3g})")
    legend(axes)
    return figure


def file_name(name: str, figure: Figure | Film) -> str:
    """The file that a figure is kept in: PNG, or GIF for a film."""
    return f"{name}.gif" if isinstance(figure, Film) else f"{name}.png"


def save(figure: Figure | Film, path: Path, overwrite: bool = False) -> None:
    """Write a figure as an image, at 150 dots per inch, or a film as an animation.

    Args:
      figure: the figure.
      path: the file; its folder is made, its suffix says the format.
      overwrite: replace an existing file, as when a run that did not finish left it.

    Raises:
      FileExistsError: the file exists and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; remove it or save the figure under another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _band(runs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high edge (N,) of the band of (S, N) curves; the two coincide for one seed."""
    if len(runs) < 3:
        return runs.min(0), runs.max(0)
    half = 1.96 * runs.std(0, ddof=1) / np.sqrt(len(runs))
    return runs.mean(0) - half, runs.mean(0) + half


def _band_note(seeds: set[int]) -> str:
    counts = " or ".join(map(str, sorted(seeds)))
    if seeds == {1}:
        return "one seed"
    if max(seeds) < 3:
        return f"line: mean of {counts} seeds; band: smallest to largest"
    if min(seeds) >= 3:
        return f"line: mean of {counts} seeds; band: 95 % (mean ± 1.96 s.e.)"
    return f"line: mean of {counts} seeds; band: 95 % (± 1.96 s.e.), below 3 seeds smallest to largest"


def _turn(flat: bool, across: Any, along: Any) -> tuple[Any, Any]:
    """(x, y) of a place across the bars and a value along them."""
    return (along, across) if flat else (across, along)
