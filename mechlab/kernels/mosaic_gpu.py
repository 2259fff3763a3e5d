"""What the kernels lowered by Mosaic GPU share: how tiles lie in shared memory, and how many programs they want."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

PROGRAMS = 2 * 132
"""Programs that keep an H100 busy: two on each of its multiprocessors."""

STAGES = 4
"""Tiles under way at a time."""


def not_hopper() -> str | None:
    """Why this machine's GPU does not run such kernels, or None; without a GPU they are interpreted or lowered only.

    Their instruction for matrix products is of compute capability 9.0 and no other, older or newer.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    return (
        None
        if capability == "9.0"
        else f"the GPU kernel is for Hopper, 9.0, and this GPU is of capability {capability}"
    )


def split(steps: int, tiles: int, programs: int) -> int:
    """Into how many parts the inputs are cut, a divisor of their steps: the fewest that give as many programs.

    >>> split(32, 32, 264), split(32, 1024, 264), split(6, 1, 264)
    (16, 1, 6)
    """
    return next((n for n in range(1, steps + 1) if steps % n == 0 and n * tiles >= programs), steps)


def swizzled(nbytes: int, itemsize: int) -> tuple[Any, ...]:
    """How the tensor cores read a tile: 8 rows of ``nbytes`` at a time, swizzled against bank conflicts."""
    return plgpu.TilingTransform((8, nbytes // itemsize)), plgpu.SwizzleTransform(nbytes)


def interpreter(interpret: bool) -> Any:
    """The argument of ``plgpu.kernel``: Mosaic GPU has an interpreter of its own, with threads and barriers."""
    if not interpret:
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        # Before jax 0.12 it is there, but not public.
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams()
    return plgpu.InterpretGPUParams()
