"""Families of small grey images, each with ten classes of its own: tasks without a common label set, made from a key.

Every image is (size, size) float32 in [0, 1], drawn on the square [-1, 1]², row axis down, with its own noise. Within
a class place, size, phase and contrast vary a little, so that a class is a set of images and not one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.errors import did_you_mean
from mechlab.core.rng import stream
from mechlab.data.images import load_digits

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

CLASSES = 10
NOISE = 0.08
"""Standard deviation of the pixel noise."""

Draw = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""``draw(key, label, right, down) -> (size, size)``; right and down are the coordinates of the pixels."""


class LabelledImages(NamedTuple):
    """Images and their classes.

    Attributes:
      x: (N, size, size) float32 in [0, 1].
      y: (N,) int32 in [0, 10).
    """

    x: Float[Array, "N size size"]
    y: Int[Array, " N"]


def family_images(key: jax.Array, name: str, count: int, *, size: int = 28) -> LabelledImages:
    """Images of one family, classes drawn evenly.

    Args:
      key: typed key.
      name: one of ``FAMILIES``.
      count: N >= 1.
      size: side of an image, at least 8.

    Raises:
      ValueError: an unknown family, no images, or too small ones.

    >>> family_images(jax.random.key(0), "rings", 3).x.shape
    (3, 28, 28)
    """
    if name not in FAMILIES:
        raise ValueError(f'name: unknown family "{name}".{did_you_mean(name, FAMILIES)} Known: {", ".join(FAMILIES)}.')
    if count < 1 or size < 8:
        raise ValueError(f"wanted at least 1 image of at least 8 x 8 pixels, got {count} of {size} x {size}.")
    return _drawn(key, name, count, size)


def blurred_digits(key: jax.Array, *, size: int = 28) -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's digits enlarged, blurred by that, and inverted: dark ink on white, with noise.

    Args:
      key: typed key, for the noise.
      size: side of an image, at least 8.

    Returns:
      The fixed training and test parts of ``load_digits`` (1,200 and 597 images).
    """
    if size < 8:
        raise ValueError(f"size must be at least 8, got {size}.")
    digits = load_digits()

    def enlarged(name: str, x: np.ndarray) -> jax.Array:
        smooth = jax.image.resize(jnp.asarray(x), (len(x), size, size), "linear")
        noise = NOISE * jax.random.normal(stream(key, name), smooth.shape)
        return jnp.clip(1 - smooth + noise, 0, 1).astype(jnp.float32)

    return (
        LabelledImages(enlarged("train", digits.train_x), jnp.asarray(digits.train_y)),
        LabelledImages(enlarged("test", digits.test_x), jnp.asarray(digits.test_y)),
    )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key: jax.Array, name: str, count: int, size: int) -> LabelledImages:
    down, right = jnp.meshgrid(*[(2 * jnp.arange(size) + 1) / size - 1] * 2, indexing="ij")
    y = jax.random.randint(stream(key, "labels"), (count,), 0, CLASSES, jnp.int32)

    def one(key: jax.Array, label: jax.Array) -> jax.Array:
        image = FAMILIES[name](stream(key, "shape"), label, right, down)
        contrast = _uniform(stream(key, "contrast"), 0.7, 1.0)
        noisy = contrast * image + NOISE * jax.random.normal(stream(key, "noise"), image.shape)
        return jnp.clip(noisy, 0, 1).astype(jnp.float32)

    keys = jax.vmap(lambda i: stream(key, "images", i))(jnp.arange(count))
    return LabelledImages(jax.vmap(one)(keys, y), y)


def _gratings(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """Waves in ten orientations, 18 degrees apart."""
    angle = jnp.pi * (label + _uniform(stream(key, "angle"), -0.3, 0.3)) / CLASSES
    frequency = _uniform(stream(key, "frequency"), 0.75, 1.5)  # cycles per unit; the picture is two units wide
    phase = _uniform(stream(key, "phase"), 0, 2 * jnp.pi)
    along = right * jnp.cos(angle) + down * jnp.sin(angle)
    return (1 + jnp.cos(2 * jnp.pi * frequency * along + phase)) / 2


def _stars(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """Stars of 3 to 12 corners."""
    corners = 3 + label
    radius, turn = _polar(stream(key, "place"), right, down, 0.1)
    turn = turn + _uniform(stream(key, "rotation"), -0.15, 0.15) * 2 * jnp.pi / corners
    tooth = jnp.abs((turn * corners / (2 * jnp.pi)) % 1 * 2 - 1)  # 0 between two corners, 1 at one
    edge = _uniform(stream(key, "size"), 0.75, 0.95) * (0.45 + 0.55 * tooth)
    return jax.nn.sigmoid((edge - radius) / 0.03)


def _blobs(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """One to ten blobs on a jittered 4 x 4 grid."""
    cells = jax.random.permutation(stream(key, "cells"), 16)
    places = jnp.stack([cells % 4, cells // 4], -1) * 0.5 - 0.75
    places = places + _uniform(stream(key, "jitter"), -0.08, 0.08, (16, 2))
    squared = jnp.square(right - places[:, 0, None, None]) + jnp.square(down - places[:, 1, None, None])
    shown = jnp.arange(16) <= label
    return (jnp.exp(-squared / (2 * 0.11**2)) * shown[:, None, None]).sum(0)


def _rings(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """Rings of ten radii."""
    radius, _ = _polar(stream(key, "place"), right, down, 0.08)
    wanted = 0.12 + 0.08 * (label + _uniform(stream(key, "radius"), -0.2, 0.2))
    return jnp.exp(-jnp.square((radius - wanted) / 0.07))


def _checkers(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """Checkerboards of ten pitches."""
    pitch = 0.28 * 1.13 ** (label + _uniform(stream(key, "pitch"), -0.25, 0.25))
    shift = _uniform(stream(key, "shift"), 0, 2, (2,))
    wave = jnp.sin(jnp.pi * (right / pitch + shift[0])) * jnp.sin(jnp.pi * (down / pitch + shift[1]))
    return jax.nn.sigmoid(wave / 0.1)


def _glyphs(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """Ten letters of an invented alphabet, each a line through five random points."""
    points = jnp.asarray(_ALPHABET)[label] + _uniform(stream(key, "points"), -0.08, 0.08, (5, 2))
    points = points + _uniform(stream(key, "place"), -0.1, 0.1, (2,))
    start, end = points[:-1, :, None, None], points[1:, :, None, None]
    step = end - start
    pixel = jnp.stack([right, down])
    share = jnp.clip(((pixel - start) * step).sum(1) / jnp.square(step).sum(1), 0, 1)
    distance = jnp.square(pixel - start - share[:, None] * step).sum(1).min(0)
    return jnp.exp(-distance / 0.07**2)


def _gaps(key: jax.Array, label: jax.Array, right: jax.Array, down: jax.Array) -> jax.Array:
    """Rings with a gap in one of ten directions (Landolt's C)."""
    radius, turn = _polar(stream(key, "place"), right, down, 0.1)
    wanted = _uniform(stream(key, "radius"), 0.5, 0.7)
    middle = 2 * jnp.pi * (label + _uniform(stream(key, "direction"), -0.25, 0.25)) / CLASSES
    away = jnp.abs((turn - middle + jnp.pi) % (2 * jnp.pi) - jnp.pi)
    return jnp.exp(-jnp.square((radius - wanted) / 0.1)) * jax.nn.sigmoid((away - 0.45) / 0.05)


FAMILIES: Mapping[str, Draw] = {
    "gratings": _gratings,
    "stars": _stars,
    "blobs": _blobs,
    "rings": _rings,
    "checkers": _checkers,
    "glyphs": _glyphs,
    "gaps": _gaps,
}
"""By name: orientation of waves, corners, number of blobs, radius, pitch, letters, direction of a gap."""

# NumPy, because importing this module must not start jax's backend.
_ALPHABET = np.random.default_rng(2305).uniform(-0.75, 0.75, (CLASSES, 5, 2)).astype(np.float32)


def _uniform(key: jax.Array, low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def _polar(key: jax.Array, right: jax.Array, down: jax.Array, jitter: float) -> tuple[jax.Array, jax.Array]:
    """Radius and angle about a centre that is off the middle by at most ``jitter`` in each direction."""
    centre = _uniform(key, -jitter, jitter, (2,))
    return jnp.hypot(right - centre[0], down - centre[1]), jnp.arctan2(down - centre[1], right - centre[0])
