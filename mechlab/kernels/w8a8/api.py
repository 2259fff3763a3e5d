"""The product to call: arguments checked, a backend chosen. ``choose`` says which one, and why.

On a GPU keep w as (N, K) and pass its transpose: the tensor cores read int8 along K only, and the kernel transposes
again, which XLA cancels. Otherwise it copies w in every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.kernels import dispatch
from mechlab.kernels.dispatch import Choice
from mechlab.kernels.w8a8.cost import INPUTS

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8

PACKAGE = "mechlab.kernels.w8a8"


def w8a8_matmul(
    x: Int8[Array, "... K"],
    w: Int8[Array, "K N"],
    w_scale: Float[Array, " N"],
    *,
    x_scale: Float[Array, "..."] | None = None,
    bias: Float[Array, " N"] | None = None,
    out_dtype: Any = jnp.float32,
    impl: Literal["auto", "jnp", "tpu", "gpu"] = "auto",
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """``s (x @ w) t + b`` for integers; see ``reference.py``.

    Args:
      x: (..., K) int8; codes of fewer bits are int8 too.
      w: (K, N) int8.
      w_scale: s, one step per output, positive.
      x_scale: t, (...), one step per row of x; none for static steps that are in w.
      bias: b (N,).
      out_dtype: of y; floating.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" and "gpu" insist on a kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Returns:
      (..., N). Differentiable with respect to the scales and the bias.

    Raises:
      ValueError: shapes that do not fit, K > 131072, scales that are not positive and finite, or an unknown impl.
      TypeError: x or w not int8, scales, bias or out_dtype not floating.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.

    >>> x, w = jnp.asarray([[1, -2]], jnp.int8), jnp.asarray([[3], [4]], jnp.int8)
    >>> w8a8_matmul(x, w, jnp.asarray([0.5])).tolist()
    [[-2.5]]
    """
    rows, n = x.shape[:-1], w.shape[-1]
    x_scale = jnp.ones(rows, jnp.float32) if x_scale is None else x_scale
    bias = jnp.zeros(n, jnp.float32) if bias is None else bias
    _check(x, w, w_scale, x_scale, bias, out_dtype)
    flat = x.reshape(-1, x.shape[-1])
    y = dispatch.call(
        PACKAGE,
        "matmul",
        flat,
        w,
        w_scale.astype(jnp.float32)[None],
        x_scale.astype(jnp.float32).reshape(-1, 1),
        bias.astype(jnp.float32)[None],
        impl=impl,
        interpret=interpret,
        refuse=lambda module: module.refusal(*flat.shape, n, jnp.dtype(out_dtype)),
        out_dtype=jnp.dtype(out_dtype),
    )
    return y.reshape(*rows, n)


def choose(x: Any, w: Any, *, out_dtype: Any = jnp.float32) -> Choice:
    """What ``w8a8_matmul(..., impl="auto")`` would do on this machine; x, w may be ``jax.ShapeDtypeStruct``."""
    m = x.size // max(x.shape[-1], 1)
    return dispatch.choose(PACKAGE, lambda module: module.refusal(m, *w.shape, jnp.dtype(out_dtype)))


def _check(x: Any, w: Any, w_scale: Any, x_scale: Any, bias: Any, out_dtype: Any) -> None:
    for name, array in (("x", x), ("w", w)):
        if array.dtype != jnp.int8:
            raise TypeError(f"w8a8_matmul: {name} must be int8, got {array.dtype}.")
    floating = {"w_scale": w_scale.dtype, "x_scale": x_scale.dtype, "bias": bias.dtype, "out_dtype": out_dtype}
    for name, dtype in floating.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"w8a8_matmul: {name} must be floating, got {jnp.dtype(dtype)}.")
    problems = []
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        problems.append(f"x must end in the inputs of w (K, N), got x {x.shape} and w {w.shape}")
    elif w.shape[0] > INPUTS:
        problems.append(f"a sum of more than {INPUTS} products may leave int32, got {w.shape[0]} inputs")
    problems += [
        f"{name} must be {wanted}, got {array.shape}"
        for name, array, wanted in (
            ("w_scale", w_scale, w.shape[-1:]),
            ("x_scale", x_scale, x.shape[:-1]),
            ("bias", bias, w.shape[-1:]),
        )
        if array.shape != wanted
    ]
    for name, scale in (("w_scale", w_scale), ("x_scale", x_scale)):
        if not isinstance(scale, jax.core.Tracer):
            values = np.asarray(scale, np.float32)
            if not (np.isfinite(values) & (values > 0)).all():
                problems.append(f"{name} must be positive and finite")
    if problems:
        raise ValueError(f"w8a8_matmul: {'; '.join(problems)}.")
