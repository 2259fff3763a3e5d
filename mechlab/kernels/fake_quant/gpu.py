"""Fake quantisation on NVIDIA GPUs: Pallas, lowered by Triton, since tiles are element-wise with masked ends.

A program takes a block of whole rows, which must lie side by side in memory (``axis=1``): down the columns a block of
whole rows is too narrow for one memory transaction, and XLA's two passes are what there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mechlab.kernels.cost import Cost
from mechlab.kernels.fake_quant import reference
from mechlab.kernels.fake_quant.cost import backward_cost, forward_cost
from mechlab.kernels.row_blocks import WARPS, gpu_block, gpu_place, gpu_refusal, half_even


def refusal(shape: tuple[int, int], dtype: Any, axis: int, arrays: int = 2) -> str | None:
    """Why this kernel does not take such a matrix, or None."""
    del arrays
    if 0 in shape:
        return "the input is empty"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernel takes float32, bfloat16 and float16, not {dtype}"
    if axis != 1:
        return "the GPU kernel takes numbers that share a scale side by side in memory (the last axis)"
    return gpu_refusal(*shape)


def statsq(w: jax.Array, *, bits: int, axis: int, interpret: bool = False) -> jax.Array:
    """As ``reference.statsq``."""
    formula = functools.partial(reference.statsq_rows, bits=bits, axis=axis, length=w.shape[1], nearest=half_even)
    return _forward(formula, w, interpret=interpret)


def round_groups(w: jax.Array, *, bits: int, symmetric: bool, interpret: bool = False) -> jax.Array:
    """As ``reference.round_groups``."""

    def formula(block: jax.Array) -> jax.Array:
        inside = gpu_place(w.shape)[2]
        return reference.grid_rows(block, bits=bits, symmetric=symmetric, inside=inside, nearest=half_even)

    return _forward(formula, w, interpret=interpret)


def lsq(x: jax.Array, s: jax.Array, *, low: int, high: int, axis: int, interpret: bool = False) -> jax.Array:
    """As ``reference.lsq``."""
    del axis
    formula = functools.partial(reference.lsq_rows, low=low, high=high, nearest=half_even)
    return _forward(formula, x, s, interpret=interpret)


def lsq_backward(
    x: jax.Array, s: jax.Array, upstream: jax.Array, *, low: int, high: int, axis: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As ``reference.lsq_backward``."""
    formula = functools.partial(reference.lsq_gradient, low=low, high=high, axis=axis, nearest=half_even)

    def kernel(x_ref: Any, s_ref: Any, g_ref: Any, dx_ref: Any, ds_ref: Any) -> None:
        dx, ds = formula(*(_load(ref, x_ref.shape) for ref in (x_ref, s_ref, g_ref)))
        _store(dx_ref, dx, x_ref.shape)
        _store(ds_ref, ds, x_ref.shape)

    dx = jax.ShapeDtypeStruct(upstream.shape, upstream.dtype)
    ds = jax.ShapeDtypeStruct(s.shape, jnp.float32)
    estimate = backward_cost(x.size, x.dtype.itemsize, s.size)
    found: tuple[jax.Array, jax.Array] = _call(
        kernel, (x, s.astype(jnp.float32), upstream), (dx, ds), estimate, interpret
    )
    return found


def _forward(formula: Callable[..., Any], x: jax.Array, *scales: jax.Array, interpret: bool) -> jax.Array:
    def kernel(*refs: Any) -> None:
        *read, y_ref = refs
        _store(y_ref, formula(*(_load(ref, y_ref.shape) for ref in read)), y_ref.shape)

    estimate = forward_cost(x.size, x.dtype.itemsize, sum(s.size for s in scales))
    arrays = (x, *(s.astype(jnp.float32) for s in scales))
    y: jax.Array = _call(kernel, arrays, jax.ShapeDtypeStruct(x.shape, x.dtype), estimate, interpret)
    return y


def _call(kernel: Callable[..., None], arrays: Any, out_shape: Any, estimate: Cost, interpret: bool) -> Any:
    n, width = arrays[0].shape
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(pl.cdiv(n, gpu_block(width)[0]),),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=0),
        interpret=interpret,
        name="fake_quant",
    )(*arrays)


def _load(ref: Any, shape: tuple[int, ...]) -> jax.Array:
    """This program's block of an array like x, 0 outside; or of one scale a row, (rows, 1), and 1 outside."""
    rows, lanes, inside = gpu_place(shape)
    if ref.shape == shape:
        return triton.load(ref.at[rows, lanes], mask=inside, other=0.0).astype(jnp.float32)
    return triton.load(ref.at[rows, pl.ds(0 * pl.program_id(0), 1)], mask=_rows_inside(shape), other=1.0)


def _store(ref: Any, value: jax.Array, shape: tuple[int, ...]) -> None:
    rows, lanes, inside = gpu_place(shape)
    if ref.shape == shape:
        triton.store(ref.at[rows, lanes], value.astype(ref.dtype), mask=inside)
    else:
        triton.store(ref.at[rows, pl.ds(0 * pl.program_id(0), 1)], value.astype(ref.dtype), mask=_rows_inside(shape))


def _rows_inside(shape: tuple[int, ...]) -> jax.Array:
    rows = gpu_block(shape[1])[0]
    return pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < shape[0]
