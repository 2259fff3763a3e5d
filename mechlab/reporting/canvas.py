"""The house style that all figures share: the empty canvas, checked input, notes, legends and point names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import product
from typing import Any, ParamSpec, TypeVar, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "<", ">")
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.labelsize": 13,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 2.2,
}
QUIET_INK = "#555555"

_REACHES = (9, 22, 40, 60)
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_Arguments = ParamSpec("_Arguments")
_Drawn = TypeVar("_Drawn")


def house_style(plot: Callable[_Arguments, _Drawn]) -> Callable[_Arguments, _Drawn]:
    """Run ``plot`` under the house style and leave the caller's matplotlib settings as they were.

    Args:
      plot: a function that draws a figure or a film.

    Returns:
      The same function, in style.
    """

    @wraps(plot)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Drawn:
        with matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return styled


def canvas(*, title: str, width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    """An empty figure of one axes at 150 dots per inch.

    Args:
      title: heading, may be empty.
      width: width, inches.
      height: height, inches.

    Returns:
      The figure and its axes.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    return figure, axes


def label_axes(axes: Axes, **labels: str) -> None:
    """Label the axes given as ``xlabel=`` and ``ylabel=``.

    Args:
      axes: the axes.
      **labels: ``xlabel`` and/or ``ylabel``, each naming a quantity and its unit.

    Raises:
      ValueError: a label is empty.
    """
    for name, text in labels.items():
        if not text.strip():
            raise ValueError(f"{name} must name the quantity and its unit, got an empty label")
    axes.set(**labels)


def array(name: str, values: ArrayLike, ndim: int, missing: bool = False) -> NDArray[np.float64]:
    """``values`` as numbers of the dimension wanted.

    Args:
      name: what to call them in an error.
      values: array of any numeric type, on any device.
      ndim: dimensions wanted; none may be of length 0.
      missing: accept NaN, unless there is nothing else.

    Returns:
      The array, float64.

    Raises:
      ValueError: wrong dimension, empty, or a value that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != ndim or numbers.size == 0:
        raise ValueError(f"{name} must have {ndim} dimensions, none empty, got shape {numbers.shape}")
    refused = np.isinf(numbers) if missing else ~np.isfinite(numbers)
    if refused.any() or np.isnan(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise ValueError(f"{name} must be finite, got {bad} of {numbers.size} values that are not")
    return numbers


def arrays(name: str, groups: Mapping[str, ArrayLike], ndim: int) -> dict[str, NDArray[np.float64]]:
    """Every entry of a non-empty mapping as by :func:`array`.

    Args:
      name: what to call the mapping in an error.
      groups: arrays by label.
      ndim: dimensions wanted of each.

    Returns:
      The arrays by label, in the same order.

    Raises:
      ValueError: nothing given, or an entry is not as wanted.
    """
    if not groups:
        raise ValueError(f"{name} is empty: there is nothing to draw")
    return {label: array(f"{name}[{label!r}]", values, ndim) for label, values in groups.items()}


def note(figure: Figure, text: str) -> None:
    """Write under the figure what its marks mean.

    Args:
      figure: the figure.
      text: one short line.
    """
    figure.supxlabel(text, x=0.99, ha="right", fontsize=10, color=QUIET_INK)


def legend(axes: Axes) -> None:
    """Put the legend above the axes, in as many columns as fit; it covers no data, the figure grows with it.

    Args:
      axes: axes whose artists are labelled.
    """
    handles, labels = axes.get_legend_handles_labels()
    for columns in range(len(labels), 0, -1):
        rows = -(-len(labels) // columns)
        widths = [6 + max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows)]
        if sum(widths) <= 64:
            break
    above = (0.0, 1.0)
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=above, ncols=len(widths), borderaxespad=0.3)
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=10 + 17 * rows)
    figure = cast(Figure, axes.figure)
    figure.set_figheight(figure.get_figheight() + 0.24 * (rows - 1))


def name_points(axes: Axes, names: Mapping[str, tuple[float, float]], others: Sequence[tuple[float, float]]) -> None:
    """Write a name beside each point where it covers no other name and as few points as can be.

    Each name takes, in turn, the cheapest of 32 places around its point; one farther away gets a leader line.
    Names are in the colours of the palette, in order, darkened to be readable as text.

    Args:
      axes: axes whose limits and layout are final but for the names.
      names: (x, y) of the point by name, in data units.
      others: (x, y) of further points to keep clear of.
    """
    figure = cast(Figure, axes.figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    frame = axes.get_window_extent(renderer)
    spots = axes.transData.transform([*names.values(), *others])
    sizes = [24] * len(names) + [14] * len(others)
    marks = [Bbox.from_bounds(x - s / 2, y - s / 2, s, s) for (x, y), s in zip(spots, sizes, strict=True)]
    written: list[Bbox] = []
    for index, (name, point) in enumerate(names.items()):
        ink = tuple(0.7 * part for part in to_rgb(PALETTE[index % len(PALETTE)]))
        measured = axes.text(*point, name)
        size = measured.get_window_extent(renderer)
        measured.remove()
        places = []
        for reach, (right, up) in product(_REACHES, _DIRECTIONS):
            move = reach * figure.dpi / 72
            x = spots[index, 0] + right * move + (right - 1) * size.width / 2
            y = spots[index, 1] + up * move + (up - 1) * size.height / 2
            box = Bbox.from_bounds(x, y, size.width, size.height)
            outside = _area(box) - _overlap(box, [frame])
            cost = 4 * (outside + _overlap(box, marks)) + 40 * _overlap(box, written) + 10 * reach
            places.append((cost, right, up, reach, box))
        _, right, up, reach, box = min(places, key=lambda place: place[0])
        text = axes.annotate(
            name,
            point,
            (right * reach, up * reach),
            textcoords="offset points",
            ha=("right", "center", "left")[right + 1],
            va=("top", "center", "bottom")[up + 1],
            arrowprops={"arrowstyle": "-", "color": ink, "linewidth": 0.8} if reach > _REACHES[0] else None,
            color=ink,
            zorder=5,
        )
        text.set_in_layout(False)
        written.append(box)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def _overlap(box: Bbox, others: Sequence[Bbox]) -> float:
    shared = (Bbox.intersection(box, other) for other in others)
    return sum(_area(part) for part in shared if part)
