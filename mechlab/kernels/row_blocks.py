"""Kernels that work on whole rows: how many rows make a block, and where a block lies in the array.

On a TPU a block is rows of full width. On a GPU Triton wants powers of two, so a block is as wide as the next one, and
what lies past the array's ends is masked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

VMEM = 8 * 2**20
"""Bytes for the blocks of a TPU kernel, each twice since the next is fetched meanwhile: half of what it may use."""

SUBLANES = 32
"""Rows of a TPU block are a multiple: the sublanes of a tile of int8, two of bfloat16, four of float32."""

LANES = 128
"""Columns of a TPU block that is not of full width are a multiple."""

TILE = 8192
"""Elements of a GPU block: 32 for each of 256 threads."""

WARPS = 8


def tpu_block(n: int, row_bytes: int, multiple: int = SUBLANES) -> int:
    """Rows of a TPU block: a multiple, no more than n needs, at most 512, within the budget.

    Args:
      n: rows of the array.
      row_bytes: of one row in all blocks together.
      multiple: of the rows.

    >>> tpu_block(12608, 3072 * (2 + 1))
    448
    """
    fits = VMEM // (2 * row_bytes)
    needed = -(-n // multiple) * multiple
    return max(multiple, min(fits // multiple * multiple, needed, 512))


def tpu_refusal(row_bytes: int, multiple: int = SUBLANES) -> str | None:
    """Why rows are too long for a TPU block, or None."""
    most = VMEM // (2 * multiple)
    return f"the TPU kernel holds whole rows of at most {most} bytes, not {row_bytes}" if row_bytes > most else None


def gpu_block(width: int) -> tuple[int, int]:
    """(rows, lanes) of a GPU block: lanes the next power of two, rows what is left of the tile.

    >>> gpu_block(96), gpu_block(3072)
    ((64, 128), (2, 4096))
    """
    lanes = pl.next_power_of_2(width)
    return TILE // lanes, lanes


def gpu_refusal(n: int, width: int) -> str | None:
    """Why a GPU kernel does not take an array of (n, width), or None."""
    if width > TILE:
        return f"the GPU kernel holds whole rows of at most {TILE} numbers, not {width}"
    if n * width >= 2**31:
        return "the GPU kernel addresses fewer than 2^31 elements"
    return None


def gpu_place(shape: tuple[int, ...]) -> tuple[Any, Any, jax.Array]:
    """Where this program's block lies in an array: its rows, its lanes, and which of it is inside."""
    n, width = shape
    rows, lanes = gpu_block(width)
    first = pl.program_id(0) * rows
    row = first + jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    # A traced zero: from jax 0.12 on a slice that is known to pass the end is refused, masked or not.
    return pl.ds(first, rows), pl.ds(0 * pl.program_id(0), lanes), (row < n) & (lane < width)


def half_even(x: Any) -> Any:
    """``jnp.round``, which Triton does not have. Adding and subtracting 3 2^22 is no way: XLA simplifies it away."""
    below = jnp.floor(x)
    rest, half = x - below, 0.5 * below
    odd = jnp.floor(half) != half
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)
