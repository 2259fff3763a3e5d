"""The product on Hopper GPUs: Pallas, lowered by Mosaic GPU.

As on TPUs codes meet x as they are, 0 to 15, and the step of a group is applied to its sum; the zeros' share,
``sum_g s_g z_g sum x_g``, is a small product of its own, left to XLA. A program unpacks a tile of bytes in registers,
writes it to shared memory as the tensor cores read it, and multiplies, while the next bytes are under way. There are
two such tiles, so that one is written while another warp may still be reading the other. The inputs are split among
programs, whose sums are added outside in a fixed order: no atomics, hence the same bits in every run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mechlab.kernels.mosaic_gpu import PROGRAMS, STAGES, interpreter, not_hopper, split, swizzled
from mechlab.kernels.w4a16.cost import ROWS

OUTPUTS, INPUTS, BYTES = 128, 128, 64
"""Outputs, inputs and rows of bytes of a tile."""

GROUPS = (32, 64, 128)


def refusal(m: int, k: int, n: int, group: int, block: int, dtype: Any) -> str | None:
    """Why this kernel does not take such a product, or None."""
    if m == 0:
        return "x is empty"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the GPU kernel takes bfloat16 and float16, whose products are exact in float32, not {dtype}"
    if group not in GROUPS or block not in (64, 128):
        return f"the GPU kernel takes groups of {', '.join(map(str, GROUPS))} in blocks of 64 or 128, not {group}"
    if k % INPUTS or n % OUTPUTS:
        return f"the GPU kernel takes multiples of {INPUTS} inputs and {OUTPUTS} outputs, not {k} and {n}"
    if m > ROWS:
        return f"beyond {ROWS} rows the product is bound by arithmetic, and XLA does it after dequantising once"
    return not_hopper()


def matmul(
    x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array, *, block: int, interpret: bool = False
) -> jax.Array:
    """As ``reference.matmul``."""
    (m, k), n = x.shape, packed.shape[1]
    scales, zeros = scales.astype(jnp.float32), zeros.astype(jnp.float32)
    group = k // len(scales)
    splits = split(k // INPUTS, n // OUTPUTS, PROGRAMS)
    # A tile is unpacked into all low halves, then all high ones; x lies in the same order.
    ordered = x.reshape(m, k // INPUTS, INPUTS // block, 2, block // 2).swapaxes(2, 3).reshape(m, k)
    products = plgpu.kernel(
        functools.partial(_kernel, steps=k // INPUTS // splits, block=block, group=group),
        out_type=jax.ShapeDtypeStruct((splits, ROWS, n), jnp.float32),
        grid=(n // OUTPUTS, splits),
        grid_names=("outputs", "inputs"),
        scratch_types={
            "w_smem": plgpu.SMEM((2, INPUTS, OUTPUTS), x.dtype, transforms=swizzled(block, 2)),
            "y_smem": plgpu.SMEM((ROWS, OUTPUTS), jnp.float32),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter(interpret),
    )(jnp.pad(ordered, ((0, ROWS - m), (0, 0))), packed, scales)
    sums = x.astype(jnp.float32).reshape(m, -1, group).sum(-1)
    return products.sum(0)[:m] - jnp.matmul(sums, scales * zeros, precision="highest")


def _kernel(
    x_gmem: Any,
    bytes_gmem: Any,
    scales_gmem: Any,
    y_gmem: Any,
    *,
    w_smem: Any,
    y_smem: Any,
    steps: int,
    block: int,
    group: int,
) -> None:
    output, part = jax.lax.axis_index("outputs"), jax.lax.axis_index("inputs")

    def step(indices: Any, x_smem: Any, bytes_smem: Any, scales_smem: Any, total: jax.Array) -> jax.Array:
        tile = w_smem.at[jax.lax.rem(indices[0], 2)]
        both = bytes_smem[...]
        tile[:BYTES] = (both & 15).astype(w_smem.dtype)
        # Bytes have no shift here; 16 code is exact too, and so is its sixteenth.
        tile[BYTES:] = (both & 240).astype(w_smem.dtype) * (1 / 16)
        plgpu.commit_smem()
        for g in range(INPUTS // group):

            def product(sum_ref: Any, g: int = g) -> jax.Array:
                for rows in _rows_of(g, block, group):
                    plgpu.wgmma(sum_ref, x_smem.at[:, rows], tile.at[rows])
                return sum_ref[...]

            scale = jax.lax.broadcast_in_dim(scales_smem[g], (ROWS, OUTPUTS), (1,))
            total = total + scale * pl.run_scoped(product, plgpu.ACC((ROWS, OUTPUTS), jnp.float32))
        return total

    total = plgpu.emit_pipeline(
        step,
        grid=(steps,),
        in_specs=[
            plgpu.BlockSpec((ROWS, INPUTS), lambda i: (0, part * steps + i), transforms=swizzled(block, 2)),
            plgpu.BlockSpec((BYTES, OUTPUTS), lambda i: (part * steps + i, output)),
            plgpu.BlockSpec((INPUTS // group, OUTPUTS), lambda i: (part * steps + i, output)),
        ],
        max_concurrent_steps=STAGES,
        init_carry=jnp.zeros((ROWS, OUTPUTS), jnp.float32),
    )(x_gmem, bytes_gmem, scales_gmem)
    y_smem[...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[part, :, pl.ds(output * OUTPUTS, OUTPUTS)])
    plgpu.wait_smem_to_gmem(0)


def _rows_of(g: int, block: int, group: int) -> list[Any]:
    """Where the codes of a group lie in an unpacked tile: in pieces of half a packing block."""
    half = block // 2
    return [
        pl.ds(high * BYTES + j * half, half)
        for j in range(INPUTS // block)
        for high in range(2)
        if (j * block + high * half) // group == g
    ]
