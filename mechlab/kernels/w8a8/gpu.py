"""The product of integers on Hopper GPUs: Pallas, lowered by Mosaic GPU.

The tensor cores read int8 along K only, so w is transposed to (N, K); a caller who keeps it like that passes w.T, and
the two cancel. Tiles of 128 inputs fill one row of the swizzled shared memory; copies of the next ones are under way
while the tensor cores work. With few rows of x there are few tiles of y, so the inputs are split among programs: their
int32 sums are added outside, in any order the same, and scaled there. Otherwise a program scales its own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mechlab.kernels.mosaic_gpu import PROGRAMS, STAGES, interpreter, not_hopper, split, swizzled
from mechlab.kernels.w8a8.reference import epilogue

ROWS = 64
"""Rows of a tile: those of the tensor cores' instruction."""

OUTPUTS = 128

INPUTS = 128
"""Inputs of a tile: 128 bytes, one row of the swizzle."""


def refusal(m: int, k: int, n: int, out_dtype: Any) -> str | None:
    """Why this kernel does not take such a product, or None."""
    if 0 in (m, k, n):
        return "an operand is empty"
    if out_dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernel writes float32, bfloat16 and float16, not {out_dtype}"
    if k % INPUTS or n % OUTPUTS:
        return f"the GPU kernel takes multiples of {INPUTS} inputs and {OUTPUTS} outputs, not {k} and {n}"
    return not_hopper()


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
    tiles = -(-m // ROWS)
    splits = split(k // INPUTS, tiles * (n // OUTPUTS), PROGRAMS)
    kind = jnp.dtype(out_dtype) if splits == 1 else jnp.dtype(jnp.int32)
    padding = (0, tiles * ROWS - m), (0, 0)
    y = plgpu.kernel(
        functools.partial(_kernel, steps=k // INPUTS // splits),
        out_type=jax.ShapeDtypeStruct((splits, tiles * ROWS, n), kind),
        grid=(tiles, n // OUTPUTS, splits),
        grid_names=("rows", "outputs", "inputs"),
        scratch_types={
            "y_smem": plgpu.SMEM((ROWS, OUTPUTS), kind, transforms=swizzled(128, kind.itemsize)),
            "scales_smem": [plgpu.SMEM((size,), jnp.float32) for size in (OUTPUTS, ROWS, OUTPUTS)],
            "arrived": plgpu.Barrier(num_arrivals=3),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter(interpret),
    )(jnp.pad(x, padding), w.T, w_scale[0], jnp.pad(x_scale, padding)[:, 0], bias[0])
    return y[0, :m] if splits == 1 else epilogue(y.sum(0)[:m], w_scale, x_scale, bias).astype(out_dtype)


def _kernel(
    x_gmem: Any,
    w_gmem: Any,
    w_scale_gmem: Any,
    x_scale_gmem: Any,
    bias_gmem: Any,
    y_gmem: Any,
    *,
    y_smem: Any,
    scales_smem: Any,
    arrived: Any,
    steps: int,
) -> None:
    row, output, part = (jax.lax.axis_index(name) for name in ("rows", "outputs", "inputs"))
    rows, outputs = pl.ds(row * ROWS, ROWS), pl.ds(output * OUTPUTS, OUTPUTS)
    whole = y_smem.dtype != jnp.int32
    if whole:
        places = w_scale_gmem.at[outputs], x_scale_gmem.at[rows], bias_gmem.at[outputs]
        for source, target in zip(places, scales_smem, strict=True):
            plgpu.copy_gmem_to_smem(source, target, arrived)

    def product(sum_ref: Any) -> jax.Array:
        def step(_: Any, x_smem: Any, w_smem: Any) -> None:
            plgpu.wgmma(sum_ref, x_smem, plgpu.transpose_ref(w_smem, (1, 0)))
            # The one before is done, so its tiles may be overwritten.
            plgpu.wgmma_wait(1)

        plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (ROWS, INPUTS), lambda i: (row, part * steps + i), transforms=swizzled(128, 1), delay_release=1
                ),
                plgpu.BlockSpec(
                    (OUTPUTS, INPUTS),
                    lambda i: (output, part * steps + i),
                    transforms=swizzled(128, 1),
                    delay_release=1,
                ),
            ],
            max_concurrent_steps=STAGES,
        )(x_gmem, w_gmem)
        return sum_ref[...]

    y = pl.run_scoped(product, plgpu.ACC((ROWS, OUTPUTS), jnp.int32))
    if whole:
        plgpu.barrier_wait(arrived)
        axes = zip(scales_smem, (1, 0, 1), strict=True)
        y = epilogue(y, *(jax.lax.broadcast_in_dim(ref[...], (ROWS, OUTPUTS), (axis,)) for ref, axis in axes))
    y_smem[...] = y.astype(y_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[part, rows, outputs])
    plgpu.wait_smem_to_gmem(0)
