"""Fake quantisation on TPUs: Pallas, lowered by Mosaic.

A block holds whole rows, so that finding the scale and rounding share one load. Where rows run down the matrix
(``axis=0``, the inputs of an output of our kernels) a block is whole columns, a multiple of 128 of them. What a last
block reads past the end stays in rows of its own, which are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mechlab.kernels.cost import Cost
from mechlab.kernels.fake_quant import reference
from mechlab.kernels.fake_quant.cost import backward_cost, forward_cost
from mechlab.kernels.row_blocks import LANES, SUBLANES, tpu_block, tpu_refusal


def refusal(shape: tuple[int, int], dtype: Any, axis: int, arrays: int = 2) -> str | None:
    """Why this kernel does not take such a matrix, or None; ``arrays`` like it are read and written."""
    if 0 in shape:
        return "the input is empty"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, not {dtype}"
    return tpu_refusal(_row_bytes(shape[axis], dtype, arrays), _multiple(axis))


def statsq(w: jax.Array, *, bits: int, axis: int, interpret: bool = False) -> jax.Array:
    """As ``reference.statsq``."""
    formula = functools.partial(reference.statsq_rows, bits=bits, axis=axis, length=w.shape[axis])
    return _forward(formula, w, axis=axis, interpret=interpret)


def round_groups(w: jax.Array, *, bits: int, symmetric: bool, interpret: bool = False) -> jax.Array:
    """As ``reference.round_groups``."""
    formula = functools.partial(reference.grid_rows, bits=bits, symmetric=symmetric)
    return _forward(formula, w, axis=1, interpret=interpret)


def lsq(x: jax.Array, s: jax.Array, *, low: int, high: int, axis: int, interpret: bool = False) -> jax.Array:
    """As ``reference.lsq``."""
    return _forward(functools.partial(reference.lsq_rows, low=low, high=high), x, s, axis=axis, interpret=interpret)


def lsq_backward(
    x: jax.Array, s: jax.Array, upstream: jax.Array, *, low: int, high: int, axis: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As ``reference.lsq_backward``."""
    formula = functools.partial(reference.lsq_gradient, low=low, high=high, axis=axis)

    def kernel(x_ref: Any, s_ref: Any, g_ref: Any, dx_ref: Any, ds_ref: Any) -> None:
        dx, ds_ref[...] = formula(*(ref[...].astype(jnp.float32) for ref in (x_ref, s_ref, g_ref)))
        dx_ref[...] = dx.astype(dx_ref.dtype)

    dx = jax.ShapeDtypeStruct(upstream.shape, upstream.dtype)
    ds = jax.ShapeDtypeStruct(s.shape, jnp.float32)
    estimate = backward_cost(x.size, x.dtype.itemsize, s.size)
    found: tuple[jax.Array, jax.Array] = _call(
        kernel, (x, s.astype(jnp.float32), upstream), (dx, ds), estimate, axis=axis, interpret=interpret
    )
    return found


def _forward(formula: Callable[..., Any], x: jax.Array, *scales: jax.Array, axis: int, interpret: bool) -> jax.Array:
    def kernel(*refs: Any) -> None:
        *read, y_ref = refs
        y_ref[...] = formula(*(ref[...].astype(jnp.float32) for ref in read)).astype(y_ref.dtype)

    estimate = forward_cost(x.size, x.dtype.itemsize, sum(s.size for s in scales))
    arrays = (x, *(s.astype(jnp.float32) for s in scales))
    y: jax.Array = _call(
        kernel, arrays, jax.ShapeDtypeStruct(x.shape, x.dtype), estimate, axis=axis, interpret=interpret
    )
    return y


def _call(
    kernel: Callable[..., None], arrays: Any, out_shape: Any, estimate: Cost, *, axis: int, interpret: bool
) -> Any:
    shape = arrays[0].shape
    n = shape[1 - axis]
    like = sum(array.shape == shape for array in jax.tree.leaves((arrays, out_shape)))
    size = tpu_block(n, _row_bytes(shape[axis], arrays[0].dtype, like), _multiple(axis))

    def spec(array: Any) -> pl.BlockSpec:
        if axis == 1:
            return pl.BlockSpec((size, array.shape[1]), lambda i: (i, 0))
        return pl.BlockSpec((array.shape[0], size), lambda i: (0, i))

    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(pl.cdiv(n, size),),
        in_specs=[spec(array) for array in arrays],
        out_specs=jax.tree.map(spec, out_shape),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=0),
        interpret=interpret,
        name="fake_quant",
    )(*arrays)


def _row_bytes(length: int, dtype: Any, arrays: int) -> int:
    # One float32 copy for intermediate values, beside the blocks.
    return length * (arrays * jnp.dtype(dtype).itemsize + 2)


def _multiple(axis: int) -> int:
    return SUBLANES if axis == 1 else LANES
