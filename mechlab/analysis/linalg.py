"""Singular vectors, low rank and principal components, with signs that do not depend on the platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core import linalg

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Components(NamedTuple):
    """Principal components.

    Attributes:
      mean: (..., D) mean of the rows.
      directions: (..., R, D) orthonormal rows, largest variance first, signs by ``fix_signs``.
      variances: (..., R) variance of the rows along each direction, ddof 0, in the square of their unit.
    """

    mean: Float[Array, "... D"]
    directions: Float[Array, "... R D"]
    variances: Float[Array, "... R"]


def fix_signs(vectors: Float[Array, "... R D"]) -> Float[Array, "... R D"]:
    """Rows with their sign chosen so that the entry of the largest magnitude (the first of several) is positive.

    >>> fix_signs(jnp.array([[1.0, -2.0], [3.0, 1.0]])).tolist()
    [[-1.0, 2.0], [3.0, 1.0]]
    """
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-1, keepdims=True), axis=-1)
    return jnp.where(largest < 0, -vectors, vectors)


def truncated_svd(
    matrix: Float[Array, "... N D"], rank: int
) -> tuple[Float[Array, "... N R"], Float[Array, "... R"], Float[Array, "... R D"]]:
    """The best approximation of a rank, ``(u * s) @ v``, uncentred, with the signs of the rows of v fixed.

    Args:
      matrix: (..., N, D).
      rank: R, 1..min(N, D).

    Returns:
      u (..., N, R), s (..., R) decreasing, v (..., R, D).

    Raises:
      ValueError: a rank out of range.
    """
    most = min(np.shape(matrix)[-2:])
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be 1..{most} for a matrix of shape {np.shape(matrix)}, got {rank}.")
    u, s, v = linalg.svd(matrix)
    u, s, v = u[..., :rank], s[..., :rank], v[..., :rank, :]
    fixed = fix_signs(v)
    return u * jnp.where((fixed == v).all(-1), 1, -1)[..., None, :], s, fixed


def randomised_svd(
    key: jax.Array, matrix: Float[Array, "... N D"], rank: int, *, iterations: int = 4, oversample: int = 0
) -> tuple[Float[Array, "... N R"], Float[Array, "... R"], Float[Array, "... R D"]]:
    """``truncated_svd`` by a random projection and power iterations (Halko et al. 2011, arXiv 0909.4061, alg. 4.4).

    The matrix is multiplied 2 (iterations + 1) times by rank + oversample columns; exact up to rounding for a matrix
    whose rank is no larger, else the nearer the faster the singular values fall.

    Args:
      key: typed key, for the projection; shared by leading axes.
      matrix: (..., N, D).
      rank: R, 1..min(N, D).
      iterations: q >= 0, each with an orthonormalisation on both sides.
      oversample: further columns of the projection; at most min(N, D) are taken in all.

    Returns:
      As ``truncated_svd``.

    Raises:
      ValueError: a rank out of range, or a negative count.
    """
    most = min(np.shape(matrix)[-2:])
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be 1..{most} for a matrix of shape {np.shape(matrix)}, got {rank}.")
    if iterations < 0 or oversample < 0:
        raise ValueError(f"iterations and oversample cannot be negative, got {iterations} and {oversample}.")
    columns = min(most, rank + oversample)
    transposed = jnp.swapaxes(matrix, -1, -2)
    found = linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[-1], columns), matrix.dtype))[0]
    for _ in range(iterations):
        found = linalg.qr(matrix @ linalg.qr(transposed @ found)[0])[0]
    u, s, v = truncated_svd(jnp.swapaxes(found, -1, -2) @ matrix, rank)
    return found @ u, s, v


def low_rank(matrix: Float[Array, "... N D"], rank: int) -> Float[Array, "... N D"]:
    """The nearest matrix of a rank, in the Frobenius norm: the first R singular triples (Eckart and Young).

    Args:
      matrix: (..., N, D).
      rank: R, 1..min(N, D).

    Raises:
      ValueError: a rank out of range.

    >>> low_rank(jnp.diag(jnp.array([1.0, 3.0])), 1).round(4).tolist()
    [[0.0, 0.0], [0.0, 3.0]]
    """
    return product(*truncated_svd(matrix, rank))


def product(
    u: Float[Array, "... N R"], s: Float[Array, "... R"], v: Float[Array, "... R D"]
) -> Float[Array, "... N D"]:
    """The matrix of singular triples, (u s) v."""
    return jnp.matmul(u * s[..., None, :], v, precision=jax.lax.Precision.HIGHEST)


def numerical_rank(singular_values: Float[Array, "... R"], size: int) -> Int[Array, "..."]:
    """How many singular values exceed the largest times ``size`` times machine epsilon: the default of NumPy.

    Args:
      singular_values: of a matrix, any order.
      size: its larger dimension.
    """
    tolerance = size * jnp.finfo(singular_values.dtype).eps * singular_values.max(-1, keepdims=True)
    return (singular_values > tolerance).sum(-1)


def pca(x: Float[Array, "... N D"], rank: int) -> Components:
    """Principal components of the rows, after their mean is taken off.

    Args:
      x: (..., N, D); leading axes (depths, layers) are separate sets of rows.
      rank: R, 1..min(N, D).

    Raises:
      ValueError: a rank out of range.
    """
    x = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    mean = x.mean(-2)
    _, s, directions = truncated_svd(x - mean[..., None, :], rank)
    return Components(mean, directions, jnp.square(s) / x.shape[-2])


def unit(vectors: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors of length 1 in the same direction; a zero vector stays zero."""
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(length == 0, jnp.ones((), length.dtype), length)


def project(x: Float[Array, "... N D"], components: Components) -> Float[Array, "... N R"]:
    """Coordinates of rows along principal components: ``(x - mean) . directions``."""
    return jax.numpy.einsum("...nd,...rd->...nr", x - components.mean[..., None, :], components.directions)
