"""The norm that emits integers on TPUs: Pallas, lowered by Mosaic. A block is whole rows, so x is read once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mechlab.kernels.norm_int8.cost import cost
from mechlab.kernels.norm_int8.reference import codes
from mechlab.kernels.row_blocks import tpu_block, tpu_refusal


def refusal(n: int, width: int, dtype: Any) -> str | None:
    """Why this kernel does not take such an x of (N, C), or None."""
    if n == 0:
        return "x is empty"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, not {dtype}"
    return tpu_refusal(_row_bytes(width, dtype))


def norm(
    x: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
    *,
    bits: int,
    centred: bool,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.norm``."""
    n, width = x.shape
    rows = tpu_block(n, _row_bytes(width, x.dtype))
    block, whole = pl.BlockSpec((rows, width), lambda i: (i, 0)), pl.BlockSpec((1, width), lambda i: (0, 0))
    estimate = cost(n, width, x.dtype.itemsize)
    y: jax.Array = pl.pallas_call(
        functools.partial(_kernel, bits=bits, centred=centred, eps=eps),
        out_shape=jax.ShapeDtypeStruct((n, width), jnp.int8),
        grid=(pl.cdiv(n, rows),),
        in_specs=[block, whole, whole],
        out_specs=block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=n),
        interpret=interpret,
        name="norm_int8",
    )(x, *(array.astype(jnp.float32)[None] for array in (gain, bias)))
    return y


def _row_bytes(width: int, dtype: Any) -> int:
    # The float32 copy of the row is counted once, though it is not fetched ahead.
    return width * (jnp.dtype(dtype).itemsize + 1 + 2)


def _kernel(x_ref: Any, gain_ref: Any, bias_ref: Any, y_ref: Any, *, bits: int, centred: bool, eps: float) -> None:
    y = codes(
        x_ref[...].astype(jnp.float32),
        gain_ref[...],
        bias_ref[...],
        width=x_ref.shape[1],
        bits=bits,
        centred=centred,
        eps=eps,
    )
    # By way of int32: float32 to int8 is not one step on every TPU.
    y_ref[...] = y.astype(jnp.int32).astype(jnp.int8)
