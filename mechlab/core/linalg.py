"""Decompositions of stacks of matrices, one matrix after another, also under ``vmap``.

jax gives LAPACK a stack in parts, and waits for them in a thread of the pool that is to work on them. Where a program
decomposes several stacks at once, every thread of a small pool can come to wait, and the program never ends (seen on
two cores with jax 0.10, in QR and in SVD). A single matrix needs no other thread, so whatever may be stacked goes
through here. Arguments and results are those of ``jax.numpy.linalg``; derivatives are jax's own, on the stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _one_by_one(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """``decompose`` of matrices (..., N, M), whose results have the leading axes of the first argument."""

    @jax.custom_jvp
    @jax.custom_batching.sequential_vmap
    def one(*matrices: jax.Array) -> Any:
        return decompose(*matrices)

    # ``sequential_vmap`` has no reverse mode.
    @one.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(decompose, primals, tangents)

    @functools.wraps(decompose)
    def stacked(*matrices: jax.Array) -> Any:
        matrices = tuple(jnp.asarray(matrix) for matrix in matrices)
        lead = matrices[0].shape[:-2]
        if not lead:
            return one(*matrices)
        flat = [matrix.reshape(-1, *matrix.shape[len(lead) :]) for matrix in matrices]
        found = jax.lax.map(lambda each: one(*each), flat)
        return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), found)

    return stacked


@_one_by_one
def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of (..., N, D): q (..., N, K) with K = min(N, D) orthonormal columns and r (..., K, D), q r = matrix."""
    q, r = jnp.linalg.qr(matrix)
    return q, r


@_one_by_one
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of (..., N, D), with K = min(N, D): u (..., N, K), s (..., K) decreasing and v (..., K, D)."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, v


@_one_by_one
def singular_values(matrix: jax.Array) -> jax.Array:
    """Of (..., N, D): (..., min(N, D)), decreasing."""
    return jnp.linalg.svd(matrix, compute_uv=False)


@_one_by_one
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of symmetric matrices (..., N, N): eigenvalues (..., N), increasing, and eigenvectors as columns (..., N, N)."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@_one_by_one
def inv(matrix: jax.Array) -> jax.Array:
    """Of (..., N, N): its inverse."""
    return jnp.linalg.inv(matrix)


@_one_by_one
def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Of (..., N, N) and (..., N, C), with the same leading axes: x (..., N, C), matrix x = right."""
    return jnp.linalg.solve(matrix, right)


def orthonormal(directions: jax.Array) -> jax.Array:
    """Orthonormal columns (D, R) that span directions (D, R), or the unit vector (D, 1) along one (D,)."""
    return qr(directions[:, None] if directions.ndim == 1 else directions)[0]
