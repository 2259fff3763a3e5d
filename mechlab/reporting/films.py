"""Fields that change in time: a strip of frames as a figure, and a film (GIF), in the style of ``figures``.

Both show rows or panels of a scalar field on a square grid, all in the same colours, symmetric about zero where asked.

Axis letters: T frames, X and Y grid; the picture shows x to the right and y upwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from mechlab.reporting.canvas import arrays, house_style, note


@dataclass(frozen=True)
class Film:
    """An animation.

    Attributes:
      frames: (T, height, width, 3) uint8, red, green, blue.
      milliseconds: each frame is shown; the last one five times as long.
    """

    frames: NDArray[np.uint8]
    milliseconds: int = 150

    def savefig(self, path: str | os.PathLike[str]) -> None:
        """Write it as a GIF that repeats, with one palette for all frames."""
        from PIL import Image

        # Median cut, the default, would spend its colours on what is common, and merge the rare extremes.
        palette = Image.fromarray(np.concatenate(list(self.frames))).quantize(256, Image.Quantize.MAXCOVERAGE)
        first, *rest = [
            Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames
        ]
        durations = [self.milliseconds] * len(rest) + [5 * self.milliseconds]
        first.save(Path(path), format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


@house_style
def strip(
    rows: Mapping[str, ArrayLike],
    *,
    times: Sequence[str],
    colour_label: str,
    title: str = "",
    diverging: bool = True,
    shared: bool = True,
) -> Figure:
    """Frames side by side, one row a run.

    Args:
      rows: (T, X, Y) fields by label.
      times: T names of the columns.
      colour_label: what the colours are, with their unit.
      title: heading.
      diverging: colours symmetric about zero.
      shared: one scale for all rows; else one for each row, and ``colour_label`` in words under the figure.

    Raises:
      ValueError: shapes differ, a value is not finite, or a label is empty.
    """
    read = _fields("rows", rows, colour_label)
    frames = {len(values) for values in read.values()}
    if frames != {len(times)}:
        raise ValueError(f"rows must have {len(times)} frames, one for each of times, got {sorted(frames)}")
    size = (1.5 + 1.15 * len(times), 0.75 + 1.15 * len(read))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels = figure.subplots(len(read), len(times), squeeze=False)
    limits = _limits(list(read.values()), diverging)
    for row, (label, values) in zip(panels, read.items(), strict=True):
        low, high = limits if shared else _limits([values], diverging)
        for axes, field in zip(row, values, strict=True):
            image = _show(axes, field, low, high, diverging)
        row[0].set_ylabel(label, fontsize=11)
    for axes, name in zip(panels[0], times, strict=True):
        axes.set_title(name, fontsize=11)
    if shared:
        figure.colorbar(image, ax=list(panels.ravel()), label=colour_label, shrink=0.8).outline.set_visible(False)
    else:
        note(figure, colour_label)
    return figure


@house_style
def film(
    panels: Mapping[str, ArrayLike],
    *,
    times: Sequence[str],
    colour_label: str,
    diverging: bool = True,
    milliseconds: int = 150,
) -> Film:
    """Runs side by side, moving.

    Args:
      panels: (T, X, Y) fields by label.
      times: T names, shown with the frames.
      colour_label: what the colours are, with their unit.
      diverging: colours symmetric about zero.
      milliseconds: see ``Film``.

    Raises:
      ValueError: as ``strip``.
    """
    read = _fields("panels", panels, colour_label)
    if {len(values) for values in read.values()} != {len(times)}:
        raise ValueError(f"panels must have {len(times)} frames, one for each of times")
    figure = Figure(figsize=(0.9 + 1.6 * len(read), 2.1), dpi=100, layout="constrained")
    low, high = _limits(list(read.values()), diverging)
    row = figure.subplots(1, len(read), squeeze=False)[0]
    images = [_show(axes, values[0], low, high, diverging) for axes, values in zip(row, read.values(), strict=True)]
    for axes, label in zip(row, read, strict=True):
        axes.set_title(label, fontsize=9)
    figure.colorbar(images[-1], ax=list(row), shrink=0.8).set_label(colour_label, fontsize=9)
    clock = figure.supxlabel(times[0], fontsize=9)
    canvas = FigureCanvasAgg(figure)
    drawn = []
    for t, name in enumerate(times):
        clock.set_text(name)
        for image, values in zip(images, read.values(), strict=True):
            image.set_data(values[t].T)
        canvas.draw()
        drawn.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        figure.set_layout_engine("none")  # laid out once: panels must not move
    return Film(np.stack(drawn), milliseconds)


def _fields(name: str, groups: Mapping[str, ArrayLike], colour_label: str) -> dict[str, NDArray[np.float64]]:
    if not colour_label.strip():
        raise ValueError("colour_label must say what the colours are, got an empty one")
    return arrays(name, groups, 3)


def _limits(fields: Sequence[NDArray[np.float64]], diverging: bool) -> tuple[float, float]:
    largest = max(float(np.abs(values).max()) for values in fields)
    if diverging:
        return -largest, largest
    return min(float(values.min()) for values in fields), max(float(values.max()) for values in fields)


def _show(axes: Axes, field: NDArray[np.float64], low: float, high: float, diverging: bool) -> Any:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    colours = "RdBu_r" if diverging else "viridis"
    return axes.imshow(field.T, cmap=colours, origin="lower", vmin=low, vmax=high, interpolation="nearest")
