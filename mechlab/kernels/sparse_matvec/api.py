"""The sparse product to call: arguments checked, a backend chosen. ``choose`` says which one, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.kernels import dispatch
from mechlab.kernels.dispatch import Choice

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PACKAGE = "mechlab.kernels.sparse_matvec"
LANES = 128


def sparse_matvec(
    x: Float[Array, "... K"],
    w: Float[Array, "K N"],
    threshold: Float[Array, " K"] | float = 0.0,
    *,
    impl: Literal["auto", "jnp", "tpu", "gpu"] = "auto",
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """``x @ w`` over the inputs with ``|x| > threshold``; see ``reference.py``. The kernels take a single vector.

    Args:
      x: (..., K), floating.
      w: (K, N), of x's type, or in slabs as from ``as_slabs``, which TPUs need.
      threshold: t >= 0, one per input or one for all: tau / c for WINA, tau for TEAL, 0 for an x that is masked.
        Infinity switches an input off.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" and "gpu" insist on a kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Returns:
      (..., N), summed in float32 and rounded once, to x's type. The gradient treats the mask as a constant.

    Raises:
      ValueError: shapes that do not fit, a threshold that is negative or not a number, or an unknown impl.
      TypeError: x, w or threshold not floating, or x and w of different types.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.

    >>> sparse_matvec(jnp.asarray([3.0, -0.1]), jnp.asarray([[1.0, 2.0], [100.0, 100.0]]), 0.5).tolist()
    [3.0, 6.0]
    """
    t = jnp.asarray(threshold)
    _check(x, w, t)
    flat = x.reshape(-1, x.shape[-1])
    y = dispatch.call(
        PACKAGE,
        "matvec",
        flat,
        jnp.broadcast_to(t.astype(jnp.float32), w.shape[:1]),
        w,
        impl=impl,
        interpret=interpret,
        refuse=lambda module: module.refusal(flat.shape[0], w.shape, jnp.dtype(w.dtype)),
    )
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def as_slabs(w: Float[Array, "K N"]) -> Float[Array, "K N/128 128"]:
    """A matrix as a TPU kernel reads its rows: each one contiguous. To be done once, when weights are loaded.

    Raises:
      ValueError: not a matrix, or N not a multiple of 128.
    """
    if w.ndim != 2 or w.shape[1] % LANES:
        raise ValueError(f"as_slabs: wanted a matrix with a multiple of {LANES} columns, got {w.shape}.")
    return w.reshape(w.shape[0], -1, LANES)


def choose(x: Any, w: Any) -> Choice:
    """What ``sparse_matvec(..., impl="auto")`` would do on this machine; x, w may be ``jax.ShapeDtypeStruct``."""
    m = x.size // max(x.shape[-1], 1)
    return dispatch.choose(PACKAGE, lambda module: module.refusal(m, w.shape, jnp.dtype(w.dtype)))


def _check(x: Any, w: Any, threshold: jax.Array) -> None:
    for name, array in (("x", x), ("w", w), ("threshold", threshold)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"sparse_matvec: {name} must be floating, got {array.dtype}.")
    if x.dtype != w.dtype:
        raise TypeError(f"sparse_matvec: x and w must be of one type, got {x.dtype} and {w.dtype}.")
    problems = []
    if w.ndim not in (2, 3) or (w.ndim == 3 and w.shape[2] != LANES):
        problems.append(f"w must be (K, N) or in slabs (K, N / {LANES}, {LANES}), got {w.shape}")
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        problems.append(f"x must end in the {w.shape[0]} inputs of w, got {x.shape}")
    if threshold.shape not in ((), w.shape[:1]):
        problems.append(f"threshold must be one number or {w.shape[:1]}, got {threshold.shape}")
    if not isinstance(threshold, jax.core.Tracer) and not (np.asarray(threshold, np.float32) >= 0).all():
        problems.append("threshold must not be negative or NaN")
    if problems:
        raise ValueError(f"sparse_matvec: {'; '.join(problems)}.")
