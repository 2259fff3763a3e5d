"""The sparse product on NVIDIA GPUs: Pallas, lowered by Triton, for its masked loads: a row that is off moves no bytes.

As TEAL's kernel (arXiv 2408.14690), but without atomics: a program multiplies a tile of inputs by outputs and writes
its partial sums, which XLA adds, hence the same bits in every run. The threshold is applied inside, since finding the k
largest of 4,096 takes longer than the dense product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mechlab.kernels.sparse_matvec.cost import cost

INPUTS, OUTPUTS = 32, 256
"""Inputs and outputs of a program's tile: a row's piece is 512 bytes of bfloat16, several memory transactions."""

WARPS = 4


def refusal(m: int, w_shape: tuple[int, ...], dtype: Any) -> str | None:
    """Why this kernel does not take such a product, or None."""
    if m != 1:
        return f"the kernels take one vector, not {m}: the union of several masks is nearly everything"
    if 0 in w_shape:
        return "w is empty"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernel takes float32, bfloat16 and float16, not {dtype}"
    return None


def matvec(x: jax.Array, threshold: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """As ``reference.matvec``."""
    w = w.reshape(w.shape[0], -1)
    k, n = w.shape
    estimate = cost(k, k, n, itemsize=w.dtype.itemsize)
    partial = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((pl.cdiv(k, INPUTS), n), jnp.float32),
        grid=(pl.cdiv(k, INPUTS), pl.cdiv(n, OUTPUTS)),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=0),
        interpret=interpret,
        name="sparse_matvec",
    )(x[0], threshold, w)
    return partial.sum(0, keepdims=True)


def _kernel(x_ref: Any, threshold_ref: Any, w_ref: Any, y_ref: Any) -> None:
    k, n = w_ref.shape
    rows = pl.ds(pl.program_id(0) * INPUTS, INPUTS)
    columns = pl.ds(pl.program_id(1) * OUTPUTS, OUTPUTS)
    row = pl.program_id(0) * INPUTS + jax.lax.broadcasted_iota(jnp.int32, (INPUTS,), 0)
    column = pl.program_id(1) * OUTPUTS + jax.lax.broadcasted_iota(jnp.int32, (OUTPUTS,), 0)
    x = triton.load(x_ref.at[rows], mask=row < k, other=0.0).astype(jnp.float32)
    threshold = triton.load(threshold_ref.at[rows], mask=row < k, other=jnp.inf)
    on, inside = jnp.abs(x) > threshold, column < n
    w = triton.load(w_ref.at[rows, columns], mask=on[:, None] & inside[None], other=0.0).astype(jnp.float32)
    y = (jnp.where(on, x, 0.0)[:, None] * w).sum(0)
    triton.store(y_ref.at[pl.program_id(0), columns], y, mask=inside)
