"""The rational function on NVIDIA GPUs from Ampere on: Pallas, lowered by Triton.

Triton and not Mosaic GPU, because tiles here are element-wise with masked ends: nothing to pipeline by hand.

Layout: x is (N, G, D / G). A program takes a block of rows of one group, so its ten coefficients are scalars; the block
is as wide as the next power of two, and lanes past the group's end are masked. The backward pass writes one vector of
ten partial sums per program, which XLA sums: no atomics, hence the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mechlab.kernels.cost import Cost
from mechlab.kernels.rational.cost import backward_cost, forward_cost
from mechlab.kernels.rational.reference import DENOMINATOR, NUMERATOR, collect, gradient, shape_like, value

TILE = 8192
"""Elements of a block: 32 for each of 256 threads."""

WARPS = 8

NARROWEST = 16
"""Channels of a group below which rows are read in pieces smaller than one memory transaction (32 bytes)."""

SUMS = NUMERATOR + DENOMINATOR


def refusal(shape: tuple[int, ...], dtype: Any, groups: int) -> str | None:
    """Why this kernel does not take such an x of (N, D), or None."""
    per_group = shape[-1] // groups
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernel takes float32, bfloat16 and float16, not {dtype}"
    if not NARROWEST <= per_group <= TILE:
        return f"the GPU kernel takes groups of {NARROWEST} to {TILE} channels, not {per_group}"
    if shape[0] * shape[1] >= 2**31:
        return "the GPU kernel addresses fewer than 2^31 elements"
    return None


def forward(x: jax.Array, a: jax.Array, b: jax.Array, *, interpret: bool = False) -> jax.Array:
    """F(x) of form A for x (N, D), a (1 or G, 6), b (G, 4)."""
    grouped = _grouped(x, b)
    y = pl.pallas_call(
        _forward_kernel,
        out_shape=shape_like(x, grouped.shape),
        grid=(_blocks(grouped), b.shape[0]),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        cost_estimate=_estimate(forward_cost(x.size, x.dtype.itemsize, b.shape[0])),
        interpret=interpret,
        name="rational_forward",
    )(grouped, *_tables(a, b))
    return y.reshape(x.shape)


def backward(
    x: jax.Array, a: jax.Array, b: jax.Array, upstream: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx, da, db of form A; see ``reference.backward``."""
    grouped = _grouped(x, b)
    blocks, groups = _blocks(grouped), b.shape[0]
    dx, partial = pl.pallas_call(
        _backward_kernel,
        out_shape=(
            shape_like(x, grouped.shape),
            shape_like(x, (SUMS, groups, blocks), jnp.float32),
        ),
        grid=(blocks, groups),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        cost_estimate=_estimate(backward_cost(x.size, x.dtype.itemsize, groups)),
        interpret=interpret,
        name="rational_backward",
    )(grouped, _grouped(upstream, b), *_tables(a, b))
    return dx.reshape(x.shape), *collect(partial.sum(-1), a, b)


def block_shape(per_group: int) -> tuple[int, int]:
    """(rows, lanes) of a block: lanes the next power of two, rows what is left of the tile.

    >>> block_shape(96), block_shape(384)
    ((64, 128), (16, 512))
    """
    lanes = pl.next_power_of_2(per_group)
    return TILE // lanes, lanes


def _forward_kernel(x_ref: Any, a_ref: Any, b_ref: Any, y_ref: Any) -> None:
    place, inside = _place(x_ref)
    x = triton.load(x_ref.at[place], mask=inside, other=0.0).astype(jnp.float32)
    y = value(x, *_coefficients(a_ref, b_ref))
    triton.store(y_ref.at[place], y.astype(y_ref.dtype), mask=inside)


def _backward_kernel(x_ref: Any, g_ref: Any, a_ref: Any, b_ref: Any, dx_ref: Any, partial_ref: Any) -> None:
    place, inside = _place(x_ref)
    # Outside, x = g = 0 makes every summand 0, the one of a_0 included.
    x, g = (triton.load(ref.at[place], mask=inside, other=0.0).astype(jnp.float32) for ref in (x_ref, g_ref))
    dx, summands = gradient(x, g, *_coefficients(a_ref, b_ref))
    triton.store(dx_ref.at[place], dx.astype(dx_ref.dtype), mask=inside)
    for k, summand in enumerate(summands):
        partial_ref[k, pl.program_id(1), pl.program_id(0)] = summand.sum()


def _place(x_ref: Any) -> tuple[Any, jax.Array]:
    """Where the program's block lies in (N, G, D / G), and which of it is inside the array."""
    n, _, per_group = x_ref.shape
    rows, lanes = block_shape(per_group)
    first = pl.program_id(0) * rows
    row = first + jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    # A traced zero: from jax 0.12 on a slice that is known to pass the end is refused, masked or not.
    zero = 0 * pl.program_id(1)
    return (pl.ds(first, rows), pl.program_id(1), pl.ds(zero, lanes)), (row < n) & (lane < per_group)


def _coefficients(a_ref: Any, b_ref: Any) -> tuple[list[Any], list[Any]]:
    group = pl.program_id(1)
    return [a_ref[i, group] for i in range(NUMERATOR)], [b_ref[j, group] for j in range(DENOMINATOR)]


def _tables(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a (6, G) and |b| (4, G), float32."""
    every = jnp.broadcast_to(a, (b.shape[0], NUMERATOR))
    return every.T.astype(jnp.float32), jnp.abs(b).T.astype(jnp.float32)


def _grouped(x: jax.Array, b: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], b.shape[0], -1)


def _blocks(grouped: jax.Array) -> int:
    return pl.cdiv(grouped.shape[0], block_shape(grouped.shape[2])[0])


def _estimate(cost: Cost) -> pl.CostEstimate:
    return pl.CostEstimate(flops=cost.flops, bytes_accessed=cost.bytes, transcendentals=0)
