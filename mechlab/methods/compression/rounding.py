"""Rounding weights to a grid.

Symmetric, b bits, one step per group of weights (arXiv 2303.08302, section 3)::

    step = max |w| / (2^(b-1) - 1),    code = round(w / step),  half to even
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mechlab.core.kernel_forms import QTensor
from mechlab.core.select import as_matrix


def round_symmetric(kernel: jax.Array, *, bits: int = 8, group: int | None = None, inputs: int = 1) -> QTensor:
    """Round a kernel to the nearest point of a grid around 0, each output (and group of inputs) with its own step.

    Args:
      kernel: input axes first, then output axes; map over a layer axis with ``jax.vmap``.
      bits: b, 2..8.
      group: G consecutive inputs share a step; all inputs by default.
      inputs: number of input axes, as in ``select.as_matrix``.

    Returns:
      Codes (in, out) with steps (in / G, out). A group of zeros has step 1.

    Raises:
      ValueError: bits out of range, or a group that does not divide the inputs.

    >>> q = round_symmetric(jnp.asarray([[1.0], [-0.5]]), bits=3)
    >>> q.codes.ravel().tolist(), q.dequantise().ravel().tolist()      # step 1/3, and -1.5 steps round to -2
    ([3, -2], [1.0, -0.6666666865348816])
    """
    matrix = as_matrix(kernel, inputs=inputs).astype(jnp.float32)
    fan_in, fan_out = matrix.shape
    group = fan_in if group is None else group
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be between 2 and 8, got {bits}.")
    if group < 1 or fan_in % group:
        raise ValueError(f"group must divide the {fan_in} inputs, got {group}.")
    grouped = matrix.reshape(fan_in // group, group, fan_out)
    step = jnp.abs(grouped).max(1) / (2 ** (bits - 1) - 1)
    step = jnp.where(step == 0, 1, step)
    codes = jnp.round(grouped / step[:, None]).astype(jnp.int8).reshape(matrix.shape)
    return QTensor(codes, step, shape=kernel.shape)
