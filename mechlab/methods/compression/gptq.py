"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding one input after another, the error made good by those to come.

With the Hessian of the output error over N calibration tokens, and U upper triangular::

    H = 2/N sum_n x_n x_n^T  +  damp mean(diag H) 1,        H^-1 = U^T U

for i = 0, 1, ... in turn, row i of the kernel (in, out) is rounded, and all rows behind it take up the error::

    q_i = Q(w_i),        e = (w_i - q_i) / U_ii,        w_k <- w_k - U_ik e   for k >= i

An input that is never active (H_ii = 0) gets H_ii = 1 and weights 0. Which grid Q has is a choice:

- dynamic groups (arXiv 2303.08302): at the start of each group of inputs, from the rows as they are by then;
- static groups: from the kernel as it was, which lets inputs go in the order of falling H_ii (``act_order``);
- groups along the outputs, ``axis="ic"`` (arXiv 2309.15531): from row i as it is by then. The order is free.

Rows go in blocks, and what a block changes behind it is one matrix product; both loops are scans, so that compile time
does not depend on the width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.kernel_forms import QTensor
from mechlab.methods.compression.rounding import (
    Grid,
    as_qtensor,
    find_grid,
    in_groups,
    require_bits,
    require_group,
    require_matrix,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

BLOCK = 128
"""Rows whose errors are applied behind them at once, at most."""


def hessian(x: Float[ArrayLike, "... I"]) -> Float[Array, "I I"]:
    """``2/N sum x x^T`` over all N leading positions, float32."""
    rows = jnp.asarray(x, jnp.float32).reshape(-1, np.shape(x)[-1])
    return 2 / len(rows) * jnp.matmul(rows.T, rows, precision="highest")


def gptq(
    kernel: jax.Array,
    hessian: Float[ArrayLike, "I I"],
    *,
    bits: int,
    group: int | None = None,
    axis: str = "oc",
    symmetric: bool = False,
    include_zero: bool | None = None,
    static_groups: bool = False,
    act_order: bool = False,
    damp: float = 0.01,
    inputs: int = 1,
) -> QTensor:
    """A kernel rounded by GPTQ.

    Args:
      kernel: input axes first, then output axes.
      hessian: (in, in), of the inputs on calibration tokens; known values, it is factored on the host in float64.
      bits, group, axis, symmetric, inputs: as in ``rounding.quantise``.
      include_zero: as there; by default for "oc" and not for "ic", as in the papers' codes.
      static_groups: see the module; for "oc".
      act_order: inputs in the order of falling diagonal, ties by their number; with "oc", needs static groups.
      damp: added to the diagonal, as a share of its mean.

    Returns:
      Codes (in, out) in the kernel's own order, with scales as from ``rounding.quantise``.

    Raises:
      ValueError: a Hessian of another size, that is not symmetric or finite, or not positive definite with this damp;
        ``act_order`` with dynamic groups; otherwise as ``rounding.quantise``.
      TypeError: a kernel of integers.
    """
    matrix = require_matrix(kernel, inputs)
    require_bits(bits)
    group = require_group(matrix.shape, group, axis)
    if act_order and axis == "oc" and not static_groups:
        raise ValueError(
            "gptq: act_order needs static_groups=True, since a group's inputs no longer follow each other."
        )
    order, factor, dead = _factor(hessian, matrix.shape[0], damp, act_order)
    static = axis == "oc" and (static_groups or group == len(matrix))
    options: dict[str, Any] = {
        "bits": bits,
        "symmetric": symmetric,
        "include_zero": axis == "oc" if include_zero is None else include_zero,
    }
    return _solve(
        matrix,
        order,
        jnp.asarray(factor, jnp.float32),
        dead,
        group=group,
        axis=axis,
        static=static,
        block=group if axis == "oc" and not static else _block(len(matrix)),
        shape=kernel.shape,
        options=tuple(sorted(options.items())),
    )


@functools.partial(jax.jit, static_argnames=("group", "axis", "static", "block", "shape", "options"))
def _solve(
    matrix: jax.Array,
    order: jax.Array,
    factor: jax.Array,
    dead: jax.Array,
    *,
    group: int,
    axis: str,
    static: bool,
    block: int,
    shape: tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
) -> QTensor:
    """The kernel rounded in an order of its inputs; the factor is that of the Hessian in the same order."""
    matrix = jnp.where(dead[:, None], 0, matrix)
    cut, along = in_groups(matrix, group, axis)
    back = jnp.argsort(order)
    if static:
        grid = find_grid(cut, axis=along, **dict(options))
        spread = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, cut.shape).reshape(matrix.shape)[order], grid)
        codes, _ = _rows(matrix[order], factor, spread, group=None, axis=axis, block=block, options=options)
    else:
        codes, grid = _rows(matrix[order], factor, None, group=group, axis=axis, block=block, options=options)
        if axis == "ic":
            grid = jax.tree.map(lambda leaf: leaf[back], grid)
    return as_qtensor(codes[back], grid, along, shape)


def _rows(
    matrix: jax.Array,
    factor: jax.Array,
    known: Grid | None,
    *,
    group: int | None,
    axis: str,
    block: int,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, Any]:
    """Codes (I, O) and, where they were not ``known`` by row, the grids: (I / G, 1, O), or (I, O / G, 1) for "ic"."""
    fan_in, fan_out = matrix.shape
    find: Callable[..., Grid] = functools.partial(find_grid, **dict(options))

    def one_block(matrix: jax.Array, now: Any) -> Any:
        first, rows_of_factor, of_block = now
        mine = jax.lax.dynamic_slice_in_dim(matrix, first, block)
        here = jax.lax.dynamic_slice_in_dim(rows_of_factor, first, block, axis=1)
        shared = jax.tree.map(lambda leaf: leaf[0], find(mine, axis=0)) if known is None and axis == "oc" else None

        def one_row(mine: jax.Array, now: Any) -> Any:
            i, of_row = now
            w, grid = mine[i], of_row if shared is None else shared
            if axis == "ic":
                w = w.reshape(-1, group)
                grid = find(w, axis=1)
            codes = grid.encode(w)
            error = (mine[i] - grid.decode(codes).ravel()) / here[i, i]
            kept = grid if axis == "ic" else None
            return mine - here[i][:, None] * error, (codes.ravel(), error, kept)

        _, (codes, errors, grids) = jax.lax.scan(one_row, mine, (jnp.arange(block), of_block))
        # The factor is 0 below its diagonal: rows in front do not change.
        return matrix - rows_of_factor.T @ errors, (codes, grids if axis == "ic" else shared)

    by_block = None if known is None else jax.tree.map(lambda leaf: leaf.reshape(-1, block, fan_out), known)
    starts = jnp.arange(0, fan_in, block)
    _, (codes, grids) = jax.lax.scan(one_block, matrix, (starts, factor.reshape(-1, block, fan_in), by_block))
    if axis == "ic":
        grids = jax.tree.map(lambda leaf: leaf.reshape(fan_in, *leaf.shape[2:]), grids)
    elif known is None:
        grids = jax.tree.map(lambda leaf: leaf[:, None], grids)
    return codes.reshape(fan_in, fan_out), grids


def _factor(hessian: Any, size: int, damp: float, act_order: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of inputs, U of the permuted and damped Hessian, and which inputs are never active."""
    h = np.array(hessian, np.float64)
    if h.shape != (size, size):
        raise ValueError(f"gptq: wanted a Hessian ({size}, {size}) for {size} inputs, got {h.shape}.")
    if not np.isfinite(h).all() or not np.allclose(h, h.T, rtol=1e-4, atol=1e-6 * np.abs(h).max()):
        raise ValueError("gptq: the Hessian is not finite, or not symmetric.")
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(size)
    h = h[np.ix_(order, order)]
    h[np.diag_indices(size)] += damp * np.diag(h).mean()
    try:
        # H = L L^T, so H^-1 = L^-T L^-1, and U is the transpose of its lower factor.
        lower = np.linalg.inv(np.linalg.cholesky(h))
        factor = np.linalg.cholesky(lower.T @ lower).T
    except np.linalg.LinAlgError as error:
        raise ValueError(f"gptq: the Hessian is not positive definite with damp={damp}; take a larger one.") from error
    return order, factor, dead


def _block(size: int) -> int:
    """The largest divisor of the number of inputs that is at most ``BLOCK``."""
    return max(n for n in range(1, min(size, BLOCK) + 1) if size % n == 0)
