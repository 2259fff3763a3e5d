"""Strips and films: what is drawn where, what is written, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mechlab.reporting import figures
from mechlab.reporting.films import film, strip

FIELDS = np.stack([np.outer(np.arange(4.0), np.ones(4)) - i for i in range(3)])
TIMES = ["0", "1", "2"]


def test_a_strip_has_a_panel_for_each_frame_with_x_to_the_right():
    drawn = strip({"run": FIELDS, "other": 2 * FIELDS}, times=TIMES, colour_label="field")
    images = [axes.images[0] for axes in drawn.axes if axes.images]
    assert len(images) == 6
    np.testing.assert_array_equal(images[1].get_array(), FIELDS[1].T)
    assert {image.get_clim() for image in images} == {(-6.0, 6.0)}
    apart = strip({"run": FIELDS, "other": 2 * FIELDS}, times=TIMES, colour_label="field", shared=False)
    assert [axes.images[0].get_clim() for axes in apart.axes] == [(-3.0, 3.0)] * 3 + [(-6.0, 6.0)] * 3


def test_a_film_is_written_as_a_gif_that_moves(tmp_path):
    made = film({"a": FIELDS, "b": -FIELDS}, times=TIMES, colour_label="field", milliseconds=100)
    assert made.frames.shape[0] == 3 and made.frames.dtype == np.uint8
    assert (made.frames[0] != made.frames[2]).any()
    path = tmp_path / figures.file_name("film", made)
    figures.save(made, path)
    with Image.open(path) as stored:
        assert stored.format == "GIF" and stored.n_frames == 3 and stored.info["duration"] == 100
        assert stored.size == made.frames.shape[2:0:-1]
    with pytest.raises(FileExistsError):
        figures.save(made, path)


@pytest.mark.parametrize("draw", [strip, film])
def test_what_does_not_fit_is_refused(draw):
    with pytest.raises(ValueError, match="frames"):
        draw({"a": FIELDS}, times=["0"], colour_label="field")
    with pytest.raises(ValueError, match="colour_label"):
        draw({"a": FIELDS}, times=TIMES, colour_label=" ")
    with pytest.raises(ValueError, match="finite"):
        draw({"a": FIELDS * np.nan}, times=TIMES, colour_label="field")
