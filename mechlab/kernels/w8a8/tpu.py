"""The product of integers on TPUs: Pallas, lowered by Mosaic.

The grid walks the inputs innermost; the int32 sum stays in VMEM, and the last step scales and writes it. M is padded to
whole tiles of int8, which have 32 rows. Blocks divide K and N, so that w is never padded, which would copy it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mechlab.kernels.w8a8.cost import cost
from mechlab.kernels.w8a8.reference import epilogue

SUBLANES = 32
"""M is padded to a multiple: the rows of an int8 tile."""

ROWS = 256
"""Rows of a block, at most."""

INPUTS = 1024
"""Inputs of a block, at most."""

OUTPUTS = (512, 256, 128)
"""Outputs of a block: the first that divides N."""

LANES = 128


def refusal(m: int, k: int, n: int, out_dtype: Any) -> str | None:
    """Why this kernel does not take such a product, or None."""
    if 0 in (m, k, n):
        return "an operand is empty"
    if out_dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel writes float32 and bfloat16, not {out_dtype}"
    if k % LANES or n % LANES:
        return f"the TPU kernel takes multiples of {LANES} inputs and outputs, not {k} and {n}"
    return None


def matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    x_scale: jax.Array,
    bias: jax.Array,
    *,
    out_dtype: Any,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.matmul``."""
    (m, k), n = x.shape, w.shape[1]
    padded, rows = row_blocks(m)
    inputs = max(c * LANES for c in range(1, INPUTS // LANES + 1) if k % (c * LANES) == 0)
    outputs = next(size for size in OUTPUTS if n % size == 0)
    estimate = cost(m, k, n, out_bytes=jnp.dtype(out_dtype).itemsize)
    per_output = pl.BlockSpec((1, outputs), lambda i, j, k: (0, j))
    y = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((padded, n), out_dtype),
        grid=(padded // rows, n // outputs, k // inputs),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda i, j, k: (i, k)),
            pl.BlockSpec((inputs, outputs), lambda i, j, k: (k, j)),
            per_output,
            pl.BlockSpec((rows, 1), lambda i, j, k: (i, 0)),
            per_output,
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=0),
        interpret=interpret,
        name="w8a8_matmul",
    )(jnp.pad(x, ((0, padded - m), (0, 0))), w, w_scale, jnp.pad(x_scale, ((0, padded - m), (0, 0))), bias)
    return y[:m]


def row_blocks(m: int) -> tuple[int, int]:
    """M padded, and rows of a block.

    >>> row_blocks(1), row_blocks(300), row_blocks(2048)
    ((32, 32), (320, 160), (2048, 256))
    """
    blocks = -(-m // ROWS)
    rows = -(-m // (blocks * SUBLANES)) * SUBLANES
    return blocks * rows, rows


def _kernel(
    x_ref: Any, w_ref: Any, w_scale_ref: Any, x_scale_ref: Any, bias_ref: Any, y_ref: Any, sum_ref: Any
) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        y = epilogue(sum_ref[...], w_scale_ref[...], x_scale_ref[...], bias_ref[...])
        y_ref[...] = y.astype(y_ref.dtype)
