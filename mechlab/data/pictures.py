"""Grey images with known spectra, and a few real ones, as targets for networks that fit one image.

Every picture is (h, w, 1) float32 in [0, 1]; the row axis points down. Frequencies are in cycles per pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.data.sources import MissingData

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

PHOTOGRAPHS = ("china", "flower")
"""The photographs that come with scikit-learn (427 x 640, colour)."""


def white_picture(key: jax.Array, size: int) -> Float[Array, "h w 1"]:
    """Independent pixels, uniform in [0, 1]."""
    _require(size)
    return jax.random.uniform(key, (size, size, 1))


def band_picture(key: jax.Array, size: int, low: float, high: float) -> Float[Array, "h w 1"]:
    """White Gaussian noise of which only radial frequencies low <= |f| <= high are kept; stretched to [0, 1].

    Args:
      key: typed key.
      size: h = w, at least 4.
      low, high: 0 <= low < high <= sqrt(1/2).

    Raises:
      ValueError: a band without frequencies.
    """
    _require(size)
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    inside = (radius >= low) & (radius <= high) & (radius > 0)
    if not inside.any():
        raise ValueError(f"a picture of {size} x {size} has no frequency between {low} and {high}.")
    y = jnp.fft.ifft2(jnp.fft.fft2(jax.random.normal(key, (size, size))) * inside).real
    return ((y - y.min()) / (y.max() - y.min()))[..., None]


def zone_plate(size: int, highest: float = 0.5) -> Float[Array, "h w 1"]:
    """Rings that narrow outwards, (1 + cos(pi f r² / R)) / 2: local frequency f r / R, with f = highest at the edge."""
    _require(size)
    place = np.arange(size) - (size - 1) / 2
    squared = place[:, None] ** 2 + place**2
    rings = np.cos(np.pi * highest * squared / ((size - 1) / 2))
    return jnp.asarray((1 + rings) / 2, jnp.float32)[..., None]


def mosaic(images: Float[ArrayLike, "N h w"], size: int) -> Float[Array, "size size 1"]:
    """Images side by side, row by row, as many as fit; the rest of the picture is 0.

    Args:
      images: (N, h, w) in [0, 1].
      size: side of the picture, at least one image.
    """
    count, h, w = np.shape(images)
    rows, columns = size // h, size // w
    if rows * columns == 0 or count < rows * columns:
        raise ValueError(f"{count} images of {h} x {w} do not fill a picture of {size} x {size}.")
    tiles = np.asarray(images, np.float32)[: rows * columns].reshape(rows, columns, h, w)
    picture = np.zeros((size, size, 1), np.float32)
    picture[: rows * h, : columns * w, 0] = tiles.swapaxes(1, 2).reshape(rows * h, columns * w)
    return jnp.asarray(picture)


def photograph(name: str, size: int) -> Float[Array, "h w 1"]:
    """A photograph of scikit-learn in grey: its central square, averaged over blocks of pixels.

    Args:
      name: one of ``PHOTOGRAPHS``.
      size: h = w, 4 to 427.

    Raises:
      ValueError: unknown name or size.
      MissingData: the library that reads JPEG files is not installed.
    """
    from sklearn import datasets  # imported here: the package must load on machines without scikit-learn

    _require(size)
    if name not in PHOTOGRAPHS:
        raise ValueError(f'name: unknown photograph "{name}". Known: {", ".join(PHOTOGRAPHS)}.')
    try:
        colour = datasets.load_sample_image(f"{name}.jpg")
    except ImportError as error:
        raise MissingData(f"the photograph {name} cannot be read: {error}") from error
    grey = colour @ np.array([0.299, 0.587, 0.114]) / 255
    block = min(grey.shape) // size
    if block == 0:
        raise ValueError(f"size: the photograph has {min(grey.shape)} pixels, got {size}.")
    top, left = ((side - block * size) // 2 for side in grey.shape)
    square = grey[top : top + block * size, left : left + block * size]
    mean = square.reshape(size, block, size, block).mean((1, 3))
    return jnp.asarray(np.clip(mean, 0, 1), jnp.float32)[..., None]


def _require(size: int) -> None:
    if size < 4:
        raise ValueError(f"size must be at least 4, got {size}.")
