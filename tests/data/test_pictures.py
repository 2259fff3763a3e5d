"""Pictures: range, spectra, real ones where they can be read."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mechlab.data import pictures
from mechlab.data.sources import MissingData


def test_generated_pictures_are_grey_and_in_range():
    for picture in (
        pictures.white_picture(jax.random.key(0), 16),
        pictures.band_picture(jax.random.key(1), 16, 0.1, 0.3),
        pictures.zone_plate(16),
        pictures.mosaic(np.ones((4, 8, 8)), 16),
        pictures.photograph("flower", 16),
    ):
        assert picture.shape == (16, 16, 1) and picture.dtype == np.float32
        assert float(picture.min()) >= 0 and float(picture.max()) <= 1


def test_a_band_picture_has_its_frequencies_only():
    picture = np.asarray(pictures.band_picture(jax.random.key(1), 64, 0.1, 0.2), np.float64)[..., 0]
    power = np.abs(np.fft.fft2(picture - picture.mean())) ** 2
    radius = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    assert power[(radius >= 0.1) & (radius <= 0.2)].sum() > 0.9999 * power.sum()


def test_rings_narrow_to_the_highest_frequency_at_the_edge():
    row = np.asarray(pictures.zone_plate(401, highest=0.25))[200, :, 0]
    np.testing.assert_allclose(row[200], 1)
    np.testing.assert_allclose(row, row[::-1], atol=1e-6)
    edge = np.abs(np.fft.rfft(row[-33:] - row[-33:].mean()))
    np.testing.assert_allclose(edge.argmax() / 33, 0.25, atol=0.04)


def test_a_mosaic_is_read_row_by_row():
    tiles = np.arange(1, 5)[:, None, None] / 4 * np.ones((4, 3, 3))
    picture = np.asarray(pictures.mosaic(tiles, 7))[..., 0]
    np.testing.assert_allclose([picture[0, 0], picture[0, 5], picture[5, 0], picture[5, 5]], [0.25, 0.5, 0.75, 1])
    assert (picture[6] == 0).all() and (picture[:, 6] == 0).all()


def test_a_photograph_is_averaged_over_blocks():
    small, large = (np.asarray(pictures.photograph("china", size))[..., 0] for size in (53, 106))
    np.testing.assert_allclose(small, large.reshape(53, 2, 53, 2).mean((1, 3)), atol=1e-5)
    assert small.std() > 0.1


def test_bad_input_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="size must be at least 4"):
        pictures.zone_plate(3)
    with pytest.raises(ValueError, match="no frequency between"):
        pictures.band_picture(jax.random.key(2), 16, 0.01, 0.02)
    with pytest.raises(ValueError, match="do not fill"):
        pictures.mosaic(np.ones((3, 8, 8)), 16)
    with pytest.raises(ValueError, match='unknown photograph "cat"'):
        pictures.photograph("cat", 16)
    with pytest.raises(ValueError, match="has 427 pixels"):
        pictures.photograph("china", 500)

    def no_reader(name):
        raise ImportError("no image library")

    monkeypatch.setattr("sklearn.datasets.load_sample_image", no_reader)
    with pytest.raises(MissingData, match="china cannot be read: no image library"):
        pictures.photograph("china", 16)
