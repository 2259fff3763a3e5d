"""The norm that emits integers on NVIDIA GPUs: Pallas, lowered by Triton, as other kernels on tiles of whole rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mechlab.kernels.norm_int8.cost import cost
from mechlab.kernels.norm_int8.reference import codes
from mechlab.kernels.row_blocks import WARPS, gpu_block, gpu_place, gpu_refusal, half_even


def refusal(n: int, width: int, dtype: Any) -> str | None:
    """Why this kernel does not take such an x of (N, C), or None."""
    if n == 0:
        return "x is empty"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernel takes float32, bfloat16 and float16, not {dtype}"
    return gpu_refusal(n, width)


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
    estimate = cost(n, width, x.dtype.itemsize)
    y: jax.Array = pl.pallas_call(
        functools.partial(_kernel, bits=bits, centred=centred, eps=eps),
        out_shape=jax.ShapeDtypeStruct((n, width), jnp.int8),
        grid=(pl.cdiv(n, gpu_block(width)[0]),),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=n),
        interpret=interpret,
        name="norm_int8",
    )(x, *(array.astype(jnp.float32)[None] for array in (gain, bias)))
    return y


def _kernel(x_ref: Any, gain_ref: Any, bias_ref: Any, y_ref: Any, *, bits: int, centred: bool, eps: float) -> None:
    rows, lanes, inside = gpu_place(x_ref.shape)
    width = x_ref.shape[1]
    in_row = jax.lax.broadcasted_iota(jnp.int32, (1, inside.shape[1]), 1) < width
    x = triton.load(x_ref.at[rows, lanes], mask=inside, other=0.0).astype(jnp.float32)
    gain, bias = (
        triton.load(ref.at[pl.ds(0 * pl.program_id(0), 1), lanes], mask=in_row, other=0.0)
        for ref in (gain_ref, bias_ref)
    )
    y = codes(x, gain, bias, width=width, bits=bits, centred=centred, eps=eps, inside=inside, nearest=half_even)
    triton.store(y_ref.at[rows, lanes], y.astype(jnp.int8), mask=inside)
