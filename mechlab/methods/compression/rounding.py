"""Rounding to a grid: the vocabulary of all quantisation here (arXiv 2303.08302, section 3; arXiv 2306.00978).

With b bits, one step and one zero for each group of numbers w::

    symmetric       step = max |w| / (2^(b-1) - 1)                        code = round(w / step)          in -2^(b-1) ..
    asymmetric      step = max(max w - min w, 1e-5) / (2^b - 1)           zero = clip(-round(min w / step), 0, 2^b - 1)
                    code = clip(round(w / step) + zero, 0, 2^b - 1)       w ~ step (code - zero)
    include_zero    asymmetric with min(min w, 0) and max(max w, 0), and no floor: 0 is on the grid

all rounding half to even. A group of one sign far from 0 is not reached by the plain asymmetric grid, whose zero is
clipped: that is the released code of AWQ and AdaDim, kept for parity. A group of equal numbers 0 has step 1.

Groups run along the inputs of one output, ``axis="oc"`` (the usual way: per output channel), or along the outputs of
one input, ``axis="ic"`` (arXiv 2309.15531). Both words are the papers'; our kernels are (in, out), so "oc" is axis 0.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.core.kernel_forms import QTensor
from mechlab.core.select import as_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

AXES = ("oc", "ic")


@struct.dataclass
class Grid:
    """Evenly spaced numbers ``step (code - zero)`` with low <= code <= high.

    Attributes:
      step: positive; broadcasts against what is rounded.
      zero: the code of 0, a whole number; 0 for a grid around 0.
      low, high: smallest and largest code.
    """

    step: Float[Array, "..."]
    zero: Float[Array, "..."]
    low: int = struct.field(pytree_node=False)
    high: int = struct.field(pytree_node=False)

    def encode(self, x: jax.Array) -> jax.Array:
        """The code of the nearest point, as a float."""
        return jnp.clip(jnp.round(x / self.step) + self.zero, self.low, self.high)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The number of a code."""
        return (codes - self.zero) * self.step

    def nearest(self, x: jax.Array) -> jax.Array:
        """The nearest point: fake quantisation."""
        return self.decode(self.encode(x))


def find_grid(
    x: Float[ArrayLike, "..."],
    *,
    bits: int,
    symmetric: bool = False,
    include_zero: bool = False,
    axis: int | Sequence[int] | None = -1,
) -> Grid:
    """The grid of each group of numbers; see the module's equations.

    Args:
      x: numbers.
      bits: b, 2..8.
      symmetric: around 0, with one code more below than above.
      include_zero: asymmetric grids reach from min(x, 0) to max(x, 0).
      axis: the axes along which a group runs; None for one grid of all numbers. They are kept, with length 1.

    Raises:
      ValueError: bits out of range.
    """
    require_bits(bits)
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if symmetric:
        step = _not_zero(jnp.abs(x).max(axis, keepdims=True) / (2 ** (bits - 1) - 1))
        return Grid(step, jnp.zeros_like(step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    top = 2**bits - 1
    if include_zero:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        step = _not_zero((high - low) / top)
    else:
        step = jnp.maximum(high - low, 1e-5) / top
    return Grid(step, jnp.clip(-jnp.round(low / step), 0, top), 0, top)


def quantise(
    kernel: jax.Array,
    *,
    bits: int,
    group: int | None = None,
    axis: str = "oc",
    symmetric: bool = False,
    include_zero: bool = False,
    inputs: int = 1,
) -> QTensor:
    """Round a kernel to the nearest points of a grid per group (RTN); nothing is calibrated.

    Args:
      kernel: input axes first, then output axes, floating; map over a layer axis with ``jax.vmap``.
      bits: b, 2..8.
      group: G numbers that share a step, one after another along ``axis``; all of them by default.
      axis: "oc" or "ic"; see the module.
      symmetric, include_zero: kind of grid.
      inputs: number of input axes, as in ``select.as_matrix``.

    Returns:
      Codes (in, out), int8 around 0 or uint8, with scales (in / G, out) for "oc" and (in, out / G) for "ic".

    Raises:
      ValueError: bits out of range, an unknown axis, a group that does not divide it, or numbers that are not finite.
      TypeError: a kernel of integers.

    >>> q = quantise(jnp.asarray([[1.0], [-0.5]]), bits=3, symmetric=True)
    >>> q.codes.ravel().tolist(), q.dequantise().ravel().tolist()      # step 1/3, and -1.5 steps round to -2
    ([3, -2], [1.0, -0.6666666865348816])
    """
    matrix = require_matrix(kernel, inputs)
    group = require_group(matrix.shape, group, axis)
    require_bits(bits)
    options = {"bits": bits, "symmetric": symmetric, "include_zero": include_zero}
    return _coded(matrix, group=group, axis=axis, shape=kernel.shape, **options)


@functools.partial(jax.jit, static_argnames=("group", "axis", "shape", "bits", "symmetric", "include_zero"))
def _coded(matrix: jax.Array, *, group: int, axis: str, shape: tuple[int, ...], **options: Any) -> QTensor:
    cut, along = in_groups(matrix, group, axis)
    grid = find_grid(cut, axis=along, **options)
    return as_qtensor(grid.encode(cut).reshape(matrix.shape), grid, along, shape)


def nearest(
    kernel: jax.Array,
    *,
    bits: int,
    group: int | None = None,
    axis: str = "oc",
    symmetric: bool = False,
    include_zero: bool = False,
    inputs: int = 1,
) -> jax.Array:
    """``quantise(...).dequantise()`` without the codes in between: for training, and where only the numbers matter."""
    matrix = require_matrix(kernel, inputs)
    cut, along = in_groups(matrix, require_group(matrix.shape, group, axis), axis)
    grid = find_grid(cut, bits=bits, symmetric=symmetric, include_zero=include_zero, axis=along)
    return grid.nearest(cut).reshape(kernel.shape)


def quantise_activations(
    x: Float[ArrayLike, "... D"], *, bits: int, symmetric: bool = True, mode: str = "token", group: int | None = None
) -> Float[Array, "... D"]:
    """Activations rounded to grids that are found on the spot: dynamic, and back in their own dtype.

    Args:
      x: (..., D).
      bits: 2..8, or 16 for no rounding.
      symmetric: around 0; otherwise from min(x, 0) to max(x, 0).
      mode: "token" for a grid per token, "group" for one per ``group`` channels of a token, "tensor" for one of all.
      group: channels, for the mode "group".

    Raises:
      ValueError: bits out of range, another mode, or a group that does not divide the channels.
    """
    x = jnp.asarray(x)
    if bits == 16:
        return x
    if mode not in ("token", "group", "tensor"):
        raise ValueError(f'quantise_activations: mode must be token, group or tensor, got "{mode}".')
    if (mode == "group") != (group is not None) or (group is not None and (group < 1 or x.shape[-1] % group)):
        raise ValueError(f"quantise_activations: group {group} does not divide {x.shape[-1]} channels, or mode {mode}.")
    cut = x if group is None else x.reshape(*x.shape[:-1], -1, group)
    grid = find_grid(cut, bits=bits, symmetric=symmetric, include_zero=True, axis=None if mode == "tensor" else -1)
    return grid.nearest(cut.astype(jnp.float32)).reshape(x.shape).astype(x.dtype)


def in_groups(matrix: jax.Array, group: int, axis: str) -> tuple[jax.Array, int]:
    """A matrix (in, out) with the group as an axis of its own, and which one: (in / G, G, out) or (in, out / G, G)."""
    fan_in, fan_out = matrix.shape
    if axis == "oc":
        return matrix.reshape(fan_in // group, group, fan_out), 1
    return matrix.reshape(fan_in, fan_out // group, group), 2


def as_qtensor(codes: jax.Array, grid: Grid, along: int, shape: tuple[int, ...]) -> QTensor:
    """Codes (in, out) of a grid that still has the group's axis, with length 1."""
    step, zero = grid.step.squeeze(along), grid.zero.squeeze(along)
    if grid.low < 0:
        return QTensor(codes.astype(jnp.int8), step, shape=shape)
    return QTensor(codes.astype(jnp.uint8), step, zero, shape=shape)


def require_bits(bits: int) -> None:
    """Refuse what is not a width of 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be between 2 and 8, got {bits}.")


def require_matrix(kernel: Any, inputs: int) -> jax.Array:
    """The kernel as a float32 matrix (in, out), if it can be quantised."""
    if not jnp.issubdtype(jnp.result_type(kernel), jnp.floating):
        raise TypeError(f"a kernel to quantise holds floating numbers, got {jnp.result_type(kernel)}.")
    matrix = as_matrix(jnp.asarray(kernel), inputs=inputs).astype(jnp.float32)
    if not isinstance(matrix, jax.core.Tracer) and not np.isfinite(np.asarray(matrix)).all():
        raise ValueError("a kernel to quantise contains numbers that are not finite.")
    return matrix


def require_group(size: tuple[int, ...], group: int | None, axis: str) -> int:
    """G, if it divides the axis along which it runs."""
    if axis not in AXES:
        raise ValueError(f'axis must be "oc" or "ic", got "{axis}".')
    length, name = (size[0], "inputs") if axis == "oc" else (size[1], "outputs")
    group = length if group is None else group
    if group < 1 or length % group:
        raise ValueError(f'group must divide the {length} {name}, along which axis "{axis}" runs, got {group}.')
    return group


def _not_zero(step: jax.Array) -> jax.Array:
    return jnp.where(step == 0, 1, step)
