"""The product to call: arguments checked, a backend chosen. ``choose`` says which one, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from mechlab.kernels import dispatch
from mechlab.kernels.dispatch import Choice
from mechlab.kernels.w4a16.layout import Packed4

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PACKAGE = "mechlab.kernels.w4a16"


def w4a16_matmul(
    x: Float[Array, "... K"],
    kernel: Packed4,
    *,
    impl: Literal["auto", "jnp", "tpu", "gpu"] = "auto",
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """``x @ kernel`` with a packed kernel of one layer, as a matrix (K, N).

    The kernel is never made whole where a Pallas kernel runs. Sums are in float32 and rounded once, to x's dtype.

    Args:
      x: (..., K), floating.
      kernel: packed, without a layer axis.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" and "gpu" insist on a kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Raises:
      ValueError: shapes that do not fit, or an unknown impl.
      TypeError: x not floating.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.
    """
    _check(x, kernel)
    flat = x.reshape(-1, x.shape[-1])
    y = dispatch.call(
        PACKAGE,
        "matmul",
        flat,
        kernel.bytes,
        kernel.scales,
        kernel.zeros,
        impl=impl,
        interpret=interpret,
        refuse=lambda module: _refusal(module, flat.shape[0], x, kernel),
        block=kernel.block,
    )
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def choose(x: Any, kernel: Packed4) -> Choice:
    """What ``w4a16_matmul(..., impl="auto")`` would do on this machine; x may be a ``jax.ShapeDtypeStruct``."""
    _check(x, kernel)
    return dispatch.choose(PACKAGE, lambda module: _refusal(module, x.size // x.shape[-1], x, kernel))


def _refusal(module: Any, m: int, x: Any, kernel: Packed4) -> str | None:
    k, n = x.shape[-1], kernel.bytes.shape[1]
    refused: str | None = module.refusal(m, k, n, kernel.group, kernel.block, jnp.dtype(x.dtype))
    return refused


def _check(x: Any, kernel: Packed4) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"w4a16_matmul: x must be floating, got {x.dtype}.")
    problems = []
    if kernel.bytes.ndim != 2:
        problems.append(f"the kernel must be that of one layer, got bytes {kernel.bytes.shape}")
    if x.ndim < 1 or x.shape[-1] != 2 * kernel.bytes.shape[-2]:
        problems.append(f"x must end in {2 * kernel.bytes.shape[-2]} inputs, got {x.shape}")
    if problems:
        raise ValueError(f"w4a16_matmul: {'; '.join(problems)}.")
