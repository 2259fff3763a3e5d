"""Small image sets with one fixed split each (MNIST, scikit-learn's digits), and rotation.

Pixels are float32 in [0, 1], with no mean or standard deviation taken out. Images are not flattened,
``(N, h, w)``; the row axis points down.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from mechlab.core.errors import did_you_mean
from mechlab.data.sources import MNIST_TEST, MNIST_TRAIN, MissingData, available, locate
from mechlab.data.splits import split_indices

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

#: Seed of the fixed splits. A different one is a different data set: results are not comparable across it.
SPLIT_SEED = 0

_DIGITS_SIZES = (1_200, 597)
_MNIST_TEST_SIZES = (8_000, 2_000)


class Images(NamedTuple):
    """Images with labels, split once and for all.

    Attributes:
      train_x: (N, h, w) float32 in [0, 1].
      train_y: (N,) int32, classes from 0.
      test_x: (M, h, w) float32 in [0, 1].
      test_y: (M,) int32.
      name: ``"mnist"`` or ``"digits"``.
      note: which images these are and how they were split, for the results.
    """

    train_x: Float[np.ndarray, "N h w"]
    train_y: Int[np.ndarray, " N"]
    test_x: Float[np.ndarray, "M h w"]
    test_y: Int[np.ndarray, " M"]
    name: str
    note: str


def load_images(name: str = "auto") -> Images:
    """A set by name; ``"auto"`` takes what is at hand and never downloads.

    Args:
      name: ``"mnist"`` (downloaded if it is not here), ``"digits"``, or ``"auto"``: MNIST where it is on this
        machine, else digits. The result's ``name`` and ``note`` say which.

    Returns:
      The images.

    Raises:
      ValueError: for another name.
      MissingData, CorruptData: as ``load_mnist``.
    """
    known = ("auto", "mnist", "digits")
    if name not in known:
        near = did_you_mean(name, known)
        raise ValueError(f'name: unknown image set "{name}".{near} Known: {", ".join(known)}.')
    if name == "auto":
        name = "mnist" if available(MNIST_TEST) else "digits"
    return load_mnist() if name == "mnist" else load_digits()


def load_digits() -> Images:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, divided by 16, split 1,200 / 597. Nothing to download.

    Returns:
      The images; labels 0 to 9, not stratified.

    >>> load_digits().train_x.shape
    (1200, 8, 8)
    """
    from sklearn import datasets  # imported here: the package must load on machines without scikit-learn

    x, y = datasets.load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8) / 16).astype(np.float32)
    what = "scikit-learn digits, 1,797 images of 8x8"
    return _fixed_split(x, y.astype(np.int32), _DIGITS_SIZES, "digits", what)


def load_mnist(*, download: bool = True) -> Images:
    """MNIST, 28 x 28: the published 60,000 / 10,000 where the training files are here, else 8,000 / 2,000.

    The smaller split divides the 10,000 test images by ``SPLIT_SEED``. If only the test files are on this
    machine nothing is downloaded; ``locate(MNIST_TRAIN)`` fetches the training files for good.

    Args:
      download: if no MNIST is on this machine, download all four files. ``False`` touches no network.

    Returns:
      The images; ``note`` says which split it is.

    Raises:
      MissingData: if it is not here and was not downloaded.
      CorruptData: if a file is not the published one.
    """
    try:
        train_folder = locate(MNIST_TRAIN, download=False)
    except MissingData:
        if available(MNIST_TEST):
            x, y = _read_mnist(locate(MNIST_TEST, download=False), "t10k")
            return _fixed_split(x, y, _MNIST_TEST_SIZES, "mnist", "the 10,000 MNIST test images")
        train_folder = locate(MNIST_TRAIN, download=download)
    train_x, train_y = _read_mnist(train_folder, "train")
    test_x, test_y = _read_mnist(locate(MNIST_TEST, download=download), "t10k")
    note = "MNIST as published, 60,000 training and 10,000 test images"
    return Images(train_x, train_y, test_x, test_y, "mnist", note)


def rotate_images(x: Float[ArrayLike, "... h w"], degrees: float | jax.Array) -> Float[Array, "... h w"]:
    """Rotates images counter-clockwise, as displayed, about their centre.

    Output pixel (r, c) is read, bilinearly, at

        r' = r0 + sin(a) (c - c0) + cos(a) (r - r0),   c' = c0 + cos(a) (c - c0) - sin(a) (r - r0)

    with (r0, c0) = ((h-1)/2, (w-1)/2); outside the image there is 0. Size and pixel range are kept. Survives
    jit, vmap and grad, with respect to both arguments.

    Args:
      x: (..., h, w), floating point, in [0, 1].
      degrees: scalar angle a in degrees; may be traced.

    Returns:
      (..., h, w), dtype of ``x``, in [0, 1].

    Raises:
      ValueError: if ``x`` is not an image or a stack of them, not floating point, or, where its values are
        known (not under jit), outside [0, 1]; or if ``degrees`` is not a scalar.

    >>> image = jnp.zeros((3, 3)).at[0, 1].set(1.0)
    >>> rotate_images(image, 90).round().tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if np.ndim(x) < 2 or 0 in np.shape(x):
        raise ValueError(f"x: wanted images of shape (..., h, w), not empty, got shape {np.shape(x)}.")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x: wanted floating-point pixels in [0, 1], got dtype {jnp.result_type(x)}.")
    if not isinstance(x, jax.core.Tracer):
        # NumPy, because under jit even an operation on a constant is traced.
        low, high = float(np.asarray(x).min()), float(np.asarray(x).max())
        # Bilinear weights sum to one only up to rounding; also refuses NaN.
        if not (low >= -1e-5 and high <= 1 + 1e-5):
            raise ValueError(f"x: wanted pixels in [0, 1], got values from {low} to {high}.")
    if jnp.ndim(degrees) != 0:
        raise ValueError(f"degrees: wanted one angle, got shape {jnp.shape(degrees)}.")
    return _rotate(jnp.asarray(x), jnp.asarray(degrees, jnp.float32))


@jax.jit
def _rotate(x: jax.Array, degrees: jax.Array) -> jax.Array:
    height, width = x.shape[-2:]
    down, right = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )
    angle = jnp.deg2rad(degrees)
    rows = jnp.sin(angle) * right + jnp.cos(angle) * down + (height - 1) / 2
    columns = jnp.cos(angle) * right - jnp.sin(angle) * down + (width - 1) / 2
    read = partial(map_coordinates, coordinates=[rows, columns], order=1, mode="constant", cval=0.0)
    return jax.vmap(read)(x.reshape(-1, height, width)).reshape(x.shape).astype(x.dtype)


def _fixed_split(x: np.ndarray, y: np.ndarray, sizes: tuple[int, int], name: str, what: str) -> Images:
    # The generator is named, so that a user's default (say "rbg" on a TPU) does not change the split.
    key = jax.random.key(SPLIT_SEED, impl="threefry2x32")
    train, test = (np.asarray(part) for part in split_indices(key, len(x), sizes))
    note = f"{what}, split {sizes[0]:,}/{sizes[1]:,} by seed {SPLIT_SEED}"
    return Images(x[train], y[train], x[test], y[test], name, note)


def _read_mnist(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", axes=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", axes=1)
    return images.astype(np.float32) / 255, labels.astype(np.int32)


def _read_idx(path: Path, *, axes: int) -> np.ndarray:
    """A gzipped IDX file of bytes: 0, 0, type 8, number of axes; each length as a big-endian int32; data."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}).") from error
    wanted = bytes((0, 0, 8, axes))
    if raw[:4] != wanted:
        kind = f"an IDX file of bytes with {axes} axes, magic {wanted.hex()}"
        raise ValueError(f"{path}: wanted {kind}, got {raw[:4].hex()}.")
    header = 4 + 4 * axes
    if len(raw) < header:
        raise ValueError(f"{path}: the IDX header is truncated: {len(raw)} of {header} bytes.")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) != header + size:
        raise ValueError(f"{path}: shape {shape} needs {header + size} bytes, the file holds {len(raw)}.")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
