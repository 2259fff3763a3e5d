"""The norm to call: arguments checked, a backend chosen. ``choose`` says which one, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from mechlab.kernels import dispatch
from mechlab.kernels.dispatch import Choice

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8

PACKAGE = "mechlab.kernels.norm_int8"


def norm_int8(
    x: Float[Array, "... C"],
    gain: Float[Array, " C"],
    bias: Float[Array, " C"] | None = None,
    *,
    centred: bool,
    bits: int = 8,
    eps: float = 1e-5,
    impl: Literal["auto", "jnp", "tpu", "gpu"] = "auto",
    interpret: bool = False,
) -> Int8[Array, "... C"]:
    """LayerNorm or RMSNorm straight to integers, for ``w8a8_matmul``; equations in ``reference.py``.

    Args:
      x: (..., C), floating.
      gain, bias: (C,), with the static step of each channel divided out; no bias by default.
      centred: subtract the mean: LayerNorm; otherwise RMSNorm.
      bits: b, 2..8; codes of fewer than 8 bits are int8 as well.
      eps: added to the mean square.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" and "gpu" insist on a kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Returns:
      (..., C), -2^(b-1) to 2^(b-1) - 1. Not differentiable: integers.

    Raises:
      ValueError: shapes that do not fit, bits out of range, or an unknown impl.
      TypeError: x, gain or bias not floating.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.

    >>> norm_int8(jnp.asarray([3.0, -4.0]), jnp.full(2, 10.0), centred=False, eps=0.0).tolist()  # x / 3.54
    [8, -11]
    """
    bias = jnp.zeros(x.shape[-1:], jnp.float32) if bias is None else bias
    _check(x, gain, bias, bits)
    flat = x.reshape(-1, x.shape[-1])
    codes = dispatch.call(
        PACKAGE,
        "norm",
        flat,
        gain,
        bias,
        impl=impl,
        interpret=interpret,
        refuse=lambda module: module.refusal(*flat.shape, jnp.dtype(x.dtype)),
        bits=bits,
        centred=centred,
        eps=eps,
    )
    return codes.reshape(x.shape)


def choose(x: Any) -> Choice:
    """What ``norm_int8(..., impl="auto")`` would do on this machine; x may be a ``jax.ShapeDtypeStruct``."""
    rows = x.size // max(x.shape[-1], 1)
    return dispatch.choose(PACKAGE, lambda module: module.refusal(rows, x.shape[-1], jnp.dtype(x.dtype)))


def _check(x: Any, gain: Any, bias: Any, bits: int) -> None:
    for name, array in (("x", x), ("gain", gain), ("bias", bias)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"norm_int8: {name} must be floating, got {array.dtype}.")
    problems = [
        f"{name} must be {x.shape[-1:]} for x {x.shape}, got {array.shape}"
        for name, array in (("gain", gain), ("bias", bias))
        if x.ndim < 1 or array.shape != x.shape[-1:]
    ]
    if not 2 <= bits <= 8:
        problems.append(f"bits must be between 2 and 8, got {bits}")
    if problems:
        raise ValueError(f"norm_int8: {'; '.join(problems)}.")
