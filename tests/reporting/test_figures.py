"""Figures: what they draw, what they refuse, and that nothing global is touched."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from mechlab.reporting.canvas import PALETTE
from mechlab.reporting.figures import arm_bars, curve_band, heat_map, histogram, save, trade_off

RANDOM = np.random.default_rng(0)
LABELS = {"xlabel": "step", "ylabel": "loss (nats)"}


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def curve(seeds, points=20):
    return RANDOM.standard_normal((seeds, points))


def test_curve_is_the_mean_with_a_95_percent_band():
    values = curve(5)
    figure = curve_band(np.arange(20), {"a": values}, **LABELS)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), values.mean(0))
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    half = 1.96 * values.std(0, ddof=1) / np.sqrt(5)
    assert edge.max() == pytest.approx((values.mean(0) + half).max())
    assert edge.min() == pytest.approx((values.mean(0) - half).min())
    assert any("5 seeds" in text and "1.96 s.e." in text for text in texts(figure))


def test_band_of_two_seeds_is_their_range_and_says_so():
    values = curve(2)
    figure = curve_band(np.arange(20), {"a": values}, **LABELS)
    edge = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (edge.min(), edge.max()) == pytest.approx((values.min(), values.max()))
    assert any("2 seeds" in text and "smallest to largest" in text for text in texts(figure))


def test_one_seed_promises_no_band():
    figure = curve_band(np.arange(20), {"a": curve(1)}, **LABELS)
    assert "one seed" in texts(figure)
    assert not any("band" in text for text in texts(figure))


def test_many_curves_stay_distinct():
    figure = curve_band(np.arange(20), {f"arm {index}": curve(3) for index in range(12)}, **LABELS)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12


def test_legend_is_as_wide_as_the_figure_at_most():
    names = {f"an arm with a name of length {index}": curve(3) for index in range(9)}
    figure = curve_band(np.arange(20), names, title="Nine arms", **LABELS)
    figure.draw_without_rendering()
    box = figure.axes[0].get_legend().get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
    assert not box.overlaps(figure.axes[0].bbox.padded(-2))


@pytest.mark.parametrize("names", [["a", "b"], [f"an arm of long name {index}" for index in range(8)]])
def test_bars_show_every_seed_and_the_mean(names):
    arms = {name: RANDOM.standard_normal(4) + 3 for name in names}
    (axes,) = arm_bars(arms, ylabel="accuracy (fraction)").axes
    flat = len(names) > 2
    for bar, dots, values in zip(axes.patches, axes.collections, arms.values(), strict=True):
        assert (bar.get_width() if flat else bar.get_height()) == pytest.approx(values.mean())
        np.testing.assert_allclose(dots.get_offsets()[:, 0 if flat else 1], values)
    assert (axes.get_xlabel() if flat else axes.get_ylabel()) == "accuracy (fraction)"
    assert all(f"{values.mean():.3g}" in texts(axes) for values in arms.values())


def test_negative_bars_carry_their_number_on_the_far_side():
    (axes,) = arm_bars({"a": [-1.0, -2.0], "b": [1.0, 2.0]}, ylabel="change").axes
    below, above = (text for text in axes.texts)
    assert below.xy[1] == -2.0
    assert above.xy[1] == 2.0


def test_trade_off_names_do_not_cover_each_other():
    points = {f"crowded arm {i}": (1 + 0.02 * i, 0.5 + 0.003 * i + 0.005 * curve(1, 3)[0]) for i in range(8)}
    figure = trade_off(points, **LABELS)
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text() in points]
    boxes = [Text.get_window_extent(text) for text in names]  # without the leader line
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_trade_off_shows_means_and_seeds():
    (axes,) = trade_off({"a": (2.0, [1.0, 3.0])}, logx=True, **LABELS).axes
    seeds, mean = axes.collections
    np.testing.assert_allclose(seeds.get_offsets(), [[2, 1], [2, 3]])
    np.testing.assert_allclose(mean.get_offsets(), [[2, 2]])
    assert axes.get_xscale() == "log"


def test_heat_map_puts_the_first_row_on_top_and_leaves_gaps_grey():
    values = np.array([[1.0, np.nan], [3.0, -4.0]])
    figure = heat_map(values, xlabel="head", ylabel="layer", colour_label="change (nats)", diverging=True)
    axes = figure.axes[0]
    (image,) = axes.images
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert (image.norm.vmin, image.norm.vmax) == (-4.0, 4.0)
    assert to_hex(image.to_rgba(np.ma.masked_invalid(values))[0, 1]) == "#d9d9d9"


def test_heat_map_annotations_are_readable_on_their_cells():
    labels = {"xlabel": "x", "ylabel": "y", "colour_label": "c"}
    figure = heat_map([[0.0, 1.0]], annotate=True, row_labels=["row"], **labels)
    dark, light = figure.axes[0].texts
    assert (dark.get_text(), dark.get_color()) == ("0", "white")
    assert (light.get_text(), light.get_color()) == ("1", "black")
    assert "row" in texts(figure)


def test_histogram_counts_all_in_common_bins_and_names_its_lines():
    groups = {"before": RANDOM.standard_normal(300), "after": RANDOM.standard_normal(200) + 5}
    lines = {"threshold": 0.7}
    figure = histogram(groups, xlabel="activation", ylabel="neurons (count)", lines=lines, bins=10)
    axes = figure.axes[0]
    assert sum(patch.get_height() for container in axes.containers for patch in container) == 500
    assert "threshold (0.7)" in texts(figure)


REFUSED = {
    "x of another length": (lambda: curve_band(np.arange(3), {"a": curve(2)}, **LABELS), r"\(S, 3\)"),
    "curve of one dimension": (lambda: curve_band([0, 1], {"a": np.ones(2)}, **LABELS), r"curves\['a'\]"),
    "no curve": (lambda: curve_band(np.arange(3), {}, **LABELS), "curves is empty"),
    "nan": (lambda: curve_band([0, 1], {"a": [[1, np.nan]]}, **LABELS), "1 of 2"),
    "no unit": (lambda: curve_band([0, 1], {"a": [[1, 2]]}, xlabel=" ", ylabel="y"), "xlabel"),
    "no seeds": (lambda: arm_bars({"a": []}, ylabel="y"), r"arms\['a'\]"),
    "no arms": (lambda: arm_bars({}, ylabel="y"), "arms is empty"),
    "no label": (lambda: arm_bars({"a": [1]}, ylabel=""), "ylabel"),
    "zero on a log axis": (lambda: trade_off({"a": (0.0, [1.0])}, logx=True, **LABELS), "positive"),
    "no points": (lambda: trade_off({}, **LABELS), "points is empty"),
    "seeds of two dimensions": (lambda: trade_off({"a": (1.0, [[1.0]])}, **LABELS), r"points\['a'\]"),
    "row labels": (
        lambda: heat_map(np.ones((2, 2)), xlabel="x", ylabel="y", colour_label="c", row_labels=["a"]),
        "row_labels must name all 2",
    ),
    "all nan": (lambda: heat_map([[np.nan]], xlabel="x", ylabel="y", colour_label="c"), "finite"),
    "infinite": (lambda: heat_map([[np.inf, 1]], xlabel="x", ylabel="y", colour_label="c"), "finite"),
    "no colour label": (lambda: heat_map([[1.0]], xlabel="x", ylabel="y", colour_label=""), "colour_label"),
    "no groups": (lambda: histogram({}, xlabel="x", ylabel="y"), "groups is empty"),
    "line at nan": (lambda: histogram({"a": [1]}, lines={"t": np.nan}, **LABELS), r"lines\['t'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    draw, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        draw()


def test_saving_makes_the_folder_and_never_overwrites_unasked(tmp_path):
    path = tmp_path / "figures" / "bars.png"
    save(arm_bars({"a": [1.0]}, ylabel="y"), path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match=r"bars\.png"):
        save(arm_bars({"b": [2.0]}, ylabel="y"), path)
    assert path.read_bytes() == first
    save(arm_bars({"b": [2.0]}, ylabel="y"), path, overwrite=True)
    assert path.read_bytes() != first
    assert [file.name for file in path.parent.iterdir()] == ["bars.png"]


def test_settings_of_the_caller_are_left_alone():
    with matplotlib.rc_context({"font.size": 7, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        figure = arm_bars({"a": [1.0]}, ylabel="y")
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].xaxis.label.get_size() > 7


def test_pyplot_is_not_used():
    code = (
        "import sys; from mechlab.reporting.figures import arm_bars; arm_bars({'a': [1.0]}, ylabel='y');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_palette_is_that_of_okabe_and_ito():
    assert set(PALETTE) <= set("#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split())
