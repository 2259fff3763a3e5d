"""Kernels of a model as stacks of matrices (..., in, out), for methods in weight space.

Layouts, as in ``models/``: (in, out); stacked over layers (L, in, out); q, k, v of attention (L, D, H, K), heads and
channels being outputs; o of attention (L, H, K, D), heads and channels being inputs. Papers write W (out, in): theirs
is the transpose of ours.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from mechlab.core import select
from mechlab.core.kernel_forms import LowRank

Params = Any


def get_matrices(params: Params, pattern: str) -> dict[str, jax.Array]:
    """The kernels whose path matches, as matrices.

    Args:
      params: parameters of a model.
      pattern: glob over parameter paths (``core/select.py``).

    Returns:
      ``{path: (in, out) or (L, in, out)}``.

    Raises:
      KeyError: nothing matches.
      ValueError: a leaf that is no matrix, with its path and shape.
    """
    return {path: _matrices(path, kernel) for path, kernel in select.get(params, pattern).items()}


def put_matrices(params: Params, matrices: dict[str, jax.Array]) -> Params:
    """A copy of the parameters with these matrices in the place, shape and dtype of the kernels.

    Raises:
      KeyError: for a path that the parameters do not have.
    """
    kernels = {path: select.get(params, path)[path] for path in matrices}
    return select.put(
        params,
        {path: matrix.reshape(kernels[path].shape).astype(kernels[path].dtype) for path, matrix in matrices.items()},
    )


def add_to_matrices(params: Params, changes: dict[str, jax.Array]) -> Params:
    """W + change at every path, added in float32 (or wider) and cast back to the kernel's dtype."""
    kernels = {path: _matrices(path, select.get(params, path)[path]) for path in changes}
    # bfloat16 + float32 promotes to float32: a small change is not lost before it is added.
    return put_matrices(params, {path: kernels[path] + change for path, change in changes.items()})


def put_beside(params: Params, factors: dict[str, tuple[jax.Array, jax.Array]]) -> Params:
    """A copy of the parameters in which these kernels have a change A (..., in, r), B (..., r, out) beside them.

    Raises:
      KeyError: for a path that the parameters do not have.
    """

    def place(path: str, kernel: jax.Array) -> LowRank:
        a, b = factors[path]
        stacked, inputs = a.ndim - 2, _inputs(path, kernel)
        into, out = kernel.shape[stacked : stacked + inputs], kernel.shape[stacked + inputs :]
        return LowRank(
            kernel, a.reshape(*kernel.shape[:stacked], *into, -1), b.reshape(*kernel.shape[:stacked], -1, *out)
        )

    for path in factors:
        params = select.map_at(params, path, functools.partial(place, path))
    return params


def _inputs(path: str, kernel: jax.Array) -> int:
    return 2 if kernel.ndim == 4 and path.endswith("o/kernel") else 1


def _matrices(path: str, kernel: jax.Array) -> jax.Array:
    if kernel.ndim in (2, 3):
        return kernel
    if kernel.ndim != 4:
        raise ValueError(
            f'"{path}" must be a kernel (in, out) or (L, in, out), or of attention (L, D, H, K) or (L, H, K, D), '
            f"got shape {kernel.shape}."
        )
    return jax.vmap(functools.partial(select.as_matrix, inputs=_inputs(path, kernel)))(kernel)
