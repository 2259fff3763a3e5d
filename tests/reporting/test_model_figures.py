"""Figures over heads and depth: what they draw and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.text import Text

from mechlab.reporting.model_figures import depth_curves, head_maps

RANDOM = np.random.default_rng(0)


def test_head_maps_share_their_colours_and_mark_the_largest_head_of_each():
    first, second = RANDOM.uniform(-1, 1, (3, 4)), np.zeros((3, 4))
    first[2, 1], second[0, 3] = -4.25, 2.0
    figure = head_maps({"a": first, "b": second}, colour_label="effect (nats)", diverging=True)
    images = [axes.images[0] for axes in figure.axes if axes.images][:2]
    assert {image.get_clim() for image in images} == {(-4.25, 4.25)}
    np.testing.assert_array_equal(images[1].get_array(), second)
    marks = [text for axes in figure.axes[:2] for text in axes.texts]
    assert [(mark.get_position(), mark.get_text()) for mark in marks] == [((1, 2), "-4.2"), ((3, 0), "2")]
    with pytest.raises(ValueError, match="one shape"):
        head_maps({"a": first, "b": second[:2]}, colour_label="effect")
    with pytest.raises(ValueError, match="colour_label"):
        head_maps({"a": first}, colour_label=" ")


def test_depth_curves_are_medians_with_quartiles_and_name_the_embedding():
    values = RANDOM.standard_normal((9, 5))
    figure = depth_curves({"logit lens": values, "one": values[:1]}, ylabel="logit difference (nats)")
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.median(values, 0))
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    quartiles = np.quantile(values, (0.25, 0.75), axis=0)
    assert (edge.min(), edge.max()) == pytest.approx((quartiles.min(), quartiles.max()))
    assert len(axes.collections) == 1
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["embed", "layer 0"]
    assert "line: median of 1 or 9 prompts; band: quartiles" in [text.get_text() for text in figure.findobj(Text)]
    with pytest.raises(ValueError, match="one number of depths"):
        depth_curves({"a": values, "b": values[:, :3]}, ylabel="y")
