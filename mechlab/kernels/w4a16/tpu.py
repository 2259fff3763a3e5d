"""The product on TPUs: Pallas, lowered by Mosaic.

Codes meet x as they are, 0 to 15, which bfloat16 holds exactly; step and zero are applied to the sums of a group::

    acc += s_g (x_g @ q_g - z_g sum x_g)

so that unpacking costs a mask, a shift and a conversion a weight, and the rest one multiply-add per group and output.
The grid walks the inputs innermost; the accumulator stays in VMEM. Steps and zeros come as (K / G, 1, N), because a
block of one row of a matrix is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mechlab.kernels.w4a16.cost import ROWS, cost

SUBLANES = 16
"""M is padded to a multiple: the rows of a bfloat16 tile."""

INPUTS = 1024
"""Inputs of a block, at most."""

OUTPUTS = (2048, 1024, 512, 256, 128)
"""Outputs of a block: the first that divides N."""

GROUPS = (32, 64, 128)


def refusal(m: int, k: int, n: int, group: int, block: int, dtype: Any) -> str | None:
    """Why this kernel does not take such a product, or None."""
    if m == 0:
        return "x is empty"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, not {dtype}"
    if group not in GROUPS or block < 64:
        return f"the TPU kernel takes groups of {', '.join(map(str, GROUPS))} in blocks of at least 64, not {group}"
    if n % OUTPUTS[-1]:
        return f"the TPU kernel takes a multiple of {OUTPUTS[-1]} outputs, not {n}"
    if m > ROWS:
        return f"beyond {ROWS} rows the product is bound by arithmetic, and XLA does it after dequantising once"
    return None


def matmul(
    x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array, *, block: int, interpret: bool = False
) -> jax.Array:
    """As ``reference.matmul``; M is padded, K must be a multiple of the block."""
    m, k = x.shape
    n, group = packed.shape[1], k // len(scales)
    rows = -(-m // SUBLANES) * SUBLANES
    inputs = max(
        c * block for c in range(1, k // block + 1) if (k // block) % c == 0 and c * block <= max(block, INPUTS)
    )
    outputs = next(size for size in OUTPUTS if n % size == 0)
    groups = inputs // group
    estimate = cost(m, k, n, group, itemsize=x.dtype.itemsize, scale_bytes=4)
    step = pl.BlockSpec((groups, 1, outputs), lambda j, i: (i, 0, j))
    y = pl.pallas_call(
        functools.partial(_kernel, block=block, group=group),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        grid=(n // outputs, k // inputs),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda j, i: (0, i)),
            pl.BlockSpec((inputs // 2, outputs), lambda j, i: (i, j)),
            step,
            step,
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda j, i: (0, j)),
        scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=0),
        interpret=interpret,
        name="w4a16_matmul",
    )(
        jnp.pad(x, ((0, rows - m), (0, 0))),
        packed,
        *(array.astype(jnp.float32)[:, None] for array in (scales, zeros)),
    )
    return y[:m]


def _kernel(
    x_ref: Any, codes_ref: Any, scales_ref: Any, zeros_ref: Any, y_ref: Any, acc_ref: Any, **sizes: int
) -> None:
    block, group = sizes["block"], sizes["group"]
    half = block // 2

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def dot(x: jax.Array, codes: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jnp.dot(x, codes.astype(x.dtype), preferred_element_type=jnp.float32, precision=precision)

    for j in range(codes_ref.shape[0] // half):
        both = codes_ref[j * half : (j + 1) * half, :].astype(jnp.int32)
        parts = []
        for i, codes in enumerate((both & 15, both >> 4)):
            x = x_ref[:, j * block + i * half : j * block + (i + 1) * half]
            parts.append((dot(x, codes), x.astype(jnp.float32).sum(1, keepdims=True)))
        if group == block:
            (low, x_low), (high, x_high) = parts
            acc_ref[...] += scales_ref[j] * (low + high - zeros_ref[j] * (x_low + x_high))
        else:
            for i, (product, total) in enumerate(parts):
                acc_ref[...] += scales_ref[2 * j + i] * (product - zeros_ref[2 * j + i] * total)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        y_ref[...] = acc_ref[...]
