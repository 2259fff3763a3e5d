"""How far two subspaces agree: principal angles, and the overlap of the leading singular subspaces of two matrices.

For orthonormal bases A and B (rows), the singular values of A Bᵀ are the cosines of the principal angles between the
spaces they span (Björck and Golub 1973): 1 for a shared direction, 0 for one that is orthogonal to the whole other
space. Between a fixed space of dimension R and a random one of dimension J in D dimensions, cos² sums to R J / D in
mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.linalg import truncated_svd
from mechlab.core import linalg

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Overlap(NamedTuple):
    """cos² of the principal angles, largest first, each in [0, 1].

    Attributes:
      left: (..., J) between the spaces of left singular vectors.
      right: (..., J) between those of right singular vectors.
    """

    left: Float[Array, "... J"]
    right: Float[Array, "... J"]


def principal_cosines(a: Float[Array, "... R D"], b: Float[Array, "... J D"]) -> Float[Array, "... K"]:
    """Cosines of the principal angles between the row spaces of two orthonormal bases.

    Args:
      a: (..., R, D) orthonormal rows.
      b: (..., J, D) orthonormal rows.

    Returns:
      (..., min(R, J)) decreasing, in [0, 1].

    Raises:
      ValueError: bases of different widths.

    >>> principal_cosines(jnp.eye(3)[:2], jnp.eye(3)[1:]).tolist()
    [1.0, 0.0]
    """
    if np.ndim(a) < 2 or np.ndim(b) < 2 or np.shape(a)[-1] != np.shape(b)[-1]:
        raise ValueError(f"wanted bases (..., R, D) and (..., J, D), got {np.shape(a)} and {np.shape(b)}.")
    inner = jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=jax.lax.Precision.HIGHEST)
    return jnp.minimum(linalg.singular_values(inner), 1)


def subspace_overlap(before: Float[Array, "... N D"], after: Float[Array, "... N D"], leading: int) -> Overlap:
    """Do two matrices have the same leading singular subspaces?

    Args:
      before: (..., N, D).
      after: (..., N, D).
      leading: J, how many singular vectors span the spaces, 1..min(N, D).

    Raises:
      ValueError: different shapes, or J out of range.
    """
    if np.shape(before) != np.shape(after):
        raise ValueError(f"wanted two matrices of one shape, got {np.shape(before)} and {np.shape(after)}.")
    (u0, _, v0), (u1, _, v1) = (truncated_svd(matrix, leading) for matrix in (before, after))
    left = principal_cosines(jnp.swapaxes(u0, -1, -2), jnp.swapaxes(u1, -1, -2))
    return Overlap(jnp.square(left), jnp.square(principal_cosines(v0, v1)))


def energy_inside(
    change: Float[Array, "... N D"], matrix: Float[Array, "... N D"], leading: int
) -> Float[Array, "..."]:
    """The share of a change that lies in a matrix's leading singular subspaces, on both sides: ‖U_Jᵀ C V_J‖² / ‖C‖².

    A random change has J² / (N D) of its energy there in mean.

    Args:
      change: C, (..., N, D); of zeros, the share is 0.
      matrix: (..., N, D).
      leading: J, 1..min(N, D).

    Raises:
      ValueError: different shapes, or J out of range.
    """
    if np.shape(change) != np.shape(matrix):
        raise ValueError(f"wanted two matrices of one shape, got {np.shape(change)} and {np.shape(matrix)}.")
    u, _, v = truncated_svd(matrix, leading)
    inside = jnp.einsum("...nj,...nd,...kd->...jk", u, change, v, precision=jax.lax.Precision.HIGHEST)
    total = jnp.square(change).sum((-2, -1))
    return jnp.square(inside).sum((-2, -1)) / jnp.where(total == 0, 1, total)
