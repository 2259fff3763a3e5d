"""The sparse product on TPUs: Pallas, lowered by Mosaic.

TPUs have no masked loads, so XLA compacts the indices of the inputs that are on, and the kernel copies those rows only,
many at a time: while one set of rows is multiplied, the next is under way. How many sets there are is an argument, so
nothing is truncated whatever the mask. A row must be one contiguous piece of memory, which in a matrix (K, N) it is
not: w is kept in slabs (K, N / 128, 128), see ``as_slabs``, whose (N / 128, 128) are whole tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mechlab.kernels.sparse_matvec.cost import cost
from mechlab.kernels.sparse_matvec.reference import gated

ROWS = 32
"""Rows under way at a time, at most: enough to hide the latency of their copies."""

LANES = 128

VMEM = 8 * 2**20
"""Bytes for the two sets of rows."""


def refusal(m: int, w_shape: tuple[int, ...], dtype: Any) -> str | None:
    """Why this kernel does not take such a product, or None."""
    if m != 1:
        return f"the kernels take one vector, not {m}: the union of several masks is nearly everything"
    if 0 in w_shape:
        return "w is empty"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, not {dtype}"
    tile = 32 // jnp.dtype(dtype).itemsize
    if len(w_shape) != 3 or w_shape[1] % tile or w_shape[2] != LANES:
        return (
            f"the TPU kernel takes w in slabs (K, N / {LANES}, {LANES}) with N a multiple of {tile * LANES} in {dtype}"
        )
    if _rows(w_shape, dtype) < 8:
        return f"the TPU kernel holds several rows at once, and those of {w_shape} are too long"
    return None


def matvec(x: jax.Array, threshold: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """As ``reference.matvec``, for w in slabs."""
    k, slabs, _ = w.shape
    rows = _rows(w.shape, w.dtype)
    on = gated(x[0], threshold).astype(jnp.float32)
    padded = -(-k // rows) * rows
    # What is filled up is row 0, times 0.
    index = jnp.nonzero(on, size=padded, fill_value=k)[0].astype(jnp.int32)
    values = jnp.where(index < k, on[jnp.minimum(index, k - 1)], 0.0)
    sets = -(-jnp.count_nonzero(on) // rows)
    estimate = cost(k, k, slabs * LANES, itemsize=w.dtype.itemsize)
    y = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((slabs, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((slabs, LANES), lambda *_: (0, 0)),
            scratch_shapes=[pltpu.VMEM((2, rows, slabs, LANES), w.dtype), pltpu.SemaphoreType.DMA((2,))],
        ),
        cost_estimate=pl.CostEstimate(flops=estimate.flops, bytes_accessed=estimate.bytes, transcendentals=0),
        interpret=interpret,
        name="sparse_matvec",
    )(sets.astype(jnp.int32)[None], jnp.where(index < k, index, 0), values, w)
    return y.reshape(1, -1)


def _rows(w_shape: tuple[int, ...], dtype: Any) -> int:
    return min(ROWS, VMEM // (2 * w_shape[1] * w_shape[2] * jnp.dtype(dtype).itemsize))


def _kernel(
    sets_ref: Any, index_ref: Any, values_ref: Any, w_ref: Any, y_ref: Any, buffer_ref: Any, arrived_ref: Any
) -> None:
    rows = buffer_ref.shape[1]

    def copy(number: jax.Array, row: jax.Array) -> Any:
        slot = jax.lax.rem(number, 2)
        return pltpu.make_async_copy(
            w_ref.at[index_ref[number * rows + row]], buffer_ref.at[slot, row], arrived_ref.at[slot]
        )

    def fetch(number: jax.Array) -> None:
        jax.lax.fori_loop(0, rows, lambda row, _: copy(number, row).start(), None)

    def multiply(number: jax.Array, nothing: None) -> None:
        @pl.when(number + 1 < sets_ref[0])
        def _() -> None:
            fetch(number + 1)

        jax.lax.fori_loop(0, rows, lambda row, _: copy(number, row).wait(), None)

        def add(row: jax.Array, total: jax.Array) -> jax.Array:
            slab = buffer_ref[jax.lax.rem(number, 2), row].astype(jnp.float32)
            return total + values_ref[number * rows + row] * slab

        y_ref[...] += jax.lax.fori_loop(0, rows, add, jnp.zeros(y_ref.shape, jnp.float32))

    y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(sets_ref[0] > 0)
    def _() -> None:
        fetch(jnp.int32(0))

    jax.lax.fori_loop(0, sets_ref[0], multiply, None)
