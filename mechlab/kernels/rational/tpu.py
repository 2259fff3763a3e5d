"""The rational function on TPUs: Pallas, lowered by Mosaic.

Layout: x is (N, D) with D on the lanes, in blocks of rows. Groups are not cut apart (96 channels fill no whole vector
register); their coefficients are spread outside to rows (6, D) and (4, D) that broadcast over sublanes. A block is
worked through in strips of 16 rows, one tile of bfloat16, so that values in between stay near the registers however
large the block is.

The backward pass walks its grid in order. Sums over rows accumulate in an output (10, 8, D) that stays in VMEM because
its index never changes: rows are only folded onto 8 sublanes in there, the rest is summed outside.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mechlab.kernels.cost import Cost
from mechlab.kernels.rational.cost import backward_cost, forward_cost
from mechlab.kernels.rational.reference import DENOMINATOR, NUMERATOR, collect, gradient, shape_like, spread, value

STRIP = 16
"""Rows at a time: the sublanes of one bfloat16 tile, two float32 tiles."""

SUBLANES = 8
"""Rows of a float32 tile."""

VMEM = 8 * 2**20
"""Bytes for the blocks, each twice since the next one is fetched meanwhile: half of what a kernel may use."""

SUMS = NUMERATOR + DENOMINATOR


def refusal(shape: tuple[int, ...], dtype: Any, groups: int) -> str | None:
    """Why this kernel does not take such an x of (N, D), or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, not {dtype}"
    widest = VMEM // (2 * 3 * STRIP * dtype.itemsize)
    if shape[-1] > widest:
        return f"the TPU kernel holds whole rows of at most {widest} channels in {dtype}, not {shape[-1]}"
    return None


def forward(x: jax.Array, a: jax.Array, b: jax.Array, *, interpret: bool = False) -> jax.Array:
    """F(x) of form A for x (N, D), a (1 or G, 6), b (G, 4)."""
    n, width = x.shape
    rows = block_rows(n, width, x.dtype.itemsize, arrays=2)
    block = pl.BlockSpec((rows, width), lambda i: (i, 0))
    return pl.pallas_call(
        _forward_kernel,
        out_shape=shape_like(x, x.shape),
        grid=(pl.cdiv(n, rows),),
        in_specs=[block, _whole(NUMERATOR, width), _whole(DENOMINATOR, width)],
        out_specs=block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=_estimate(forward_cost(x.size, x.dtype.itemsize, b.shape[0])),
        interpret=interpret,
        name="rational_forward",
    )(x, *_rows_of(a, b, width))


def backward(
    x: jax.Array, a: jax.Array, b: jax.Array, upstream: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx, da, db of form A; see ``reference.backward``."""
    n, width = x.shape
    rows = block_rows(n, width, x.dtype.itemsize, arrays=3)
    block = pl.BlockSpec((rows, width), lambda i: (i, 0))
    sums = (SUMS, SUBLANES, width)
    dx, folded = pl.pallas_call(
        functools.partial(_backward_kernel, n=n),
        out_shape=(shape_like(x, x.shape), shape_like(x, sums, jnp.float32)),
        grid=(pl.cdiv(n, rows),),
        in_specs=[block, block, _whole(NUMERATOR, width), _whole(DENOMINATOR, width)],
        out_specs=(block, pl.BlockSpec(sums, lambda i: (0, 0, 0))),
        # In order: every step adds to the same sums.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=_estimate(backward_cost(x.size, x.dtype.itemsize, b.shape[0])),
        interpret=interpret,
        name="rational_backward",
    )(x, upstream, *_rows_of(a, b, width))
    return dx, *collect(folded.sum(1), a, b)


def block_rows(n: int, width: int, itemsize: int, arrays: int) -> int:
    """Rows of a block: a multiple of the strip, no more than n needs, at most 512, within the VMEM budget.

    Args:
      n, width: of x.
      itemsize: bytes of an element.
      arrays: how many arrays like x the kernel reads and writes.

    >>> block_rows(12608, 3072, 2, arrays=3)
    224
    """
    fits = VMEM // (2 * arrays * width * itemsize)
    needed = -(-n // STRIP) * STRIP
    return max(STRIP, min(fits // STRIP * STRIP, needed, 512))


def _forward_kernel(x_ref: Any, a_ref: Any, b_ref: Any, y_ref: Any) -> None:
    def strip(index: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(index * STRIP, STRIP), STRIP)
        x = x_ref[rows, :].astype(jnp.float32)
        y_ref[rows, :] = value(x, *_coefficients(a_ref, b_ref)).astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0] // STRIP, strip, None)


def _backward_kernel(x_ref: Any, g_ref: Any, a_ref: Any, b_ref: Any, dx_ref: Any, sums_ref: Any, *, n: int) -> None:
    first = pl.program_id(0) * x_ref.shape[0]

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def strip(index: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(index * STRIP, STRIP), STRIP)
        row = first + index * STRIP + jax.lax.broadcasted_iota(jnp.int32, (STRIP, x_ref.shape[1]), 0)
        # The last block reads past the end. With x = g = 0 there, every summand is 0, whatever was read.
        x, g = (jnp.where(row < n, ref[rows, :].astype(jnp.float32), 0.0) for ref in (x_ref, g_ref))
        dx, summands = gradient(x, g, *_coefficients(a_ref, b_ref))
        dx_ref[rows, :] = dx.astype(dx_ref.dtype)
        for k, summand in enumerate(summands):
            sums_ref[k] += summand.reshape(STRIP // SUBLANES, SUBLANES, -1).sum(0)

    jax.lax.fori_loop(0, x_ref.shape[0] // STRIP, strip, None)


def _coefficients(a_ref: Any, b_ref: Any) -> tuple[list[Any], list[Any]]:
    """Rows (1, D) that broadcast over a strip."""
    return [a_ref[i : i + 1, :] for i in range(NUMERATOR)], [b_ref[j : j + 1, :] for j in range(DENOMINATOR)]


def _rows_of(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    groups = b.shape[0]
    return spread(a.astype(jnp.float32), groups, width), spread(jnp.abs(b).astype(jnp.float32), groups, width)


def _whole(rows: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, width), lambda i: (0, 0))


def _estimate(cost: Cost) -> pl.CostEstimate:
    return pl.CostEstimate(flops=cost.flops, bytes_accessed=cost.bytes, transcendentals=0)
