"""The fake quantisers to call: arguments checked, gradients passed through, a backend chosen: ``choose`` says which."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.kernels import dispatch
from mechlab.kernels.dispatch import Choice

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Impl = Literal["auto", "jnp", "tpu", "gpu"]

PACKAGE = "mechlab.kernels.fake_quant"


def statsq(
    w: Float[Array, "... O I"],
    *,
    bits: int,
    axis: int = -1,
    allow_dead: bool = False,
    impl: Impl = "auto",
    interpret: bool = False,
) -> Float[Array, "... O I"]:
    """StatsQ (arXiv 2302.02210): a scale from the mean of each row; equations in ``reference.py``.

    The gradient is the identity, also where clipped; the scale has none.

    Args:
      w: at least two axes, floating; computed in float32.
      bits: b, 2..8; there are 2^b levels, and 0 is none of them.
      axis: along which a scale is shared: -1, or -2 for our kernels (in, out).
      allow_dead: give a row of zeros the scale 1e-8 instead of refusing it.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" and "gpu" insist on a kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Raises:
      ValueError: bits or axis out of range, numbers that are not finite, a row of zeros, or an unknown impl.
      TypeError: w not floating.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.

    >>> statsq(jnp.asarray([[1.0, -1.0, 0.1, 5.0]]), bits=2).tolist()  # alpha = 3.55
    [[0.887499988079071, -0.887499988079071, 0.887499988079071, 2.6624999046325684]]
    """
    _check("statsq", w, bits, axis)
    if not isinstance(w, jax.core.Tracer) and not allow_dead:
        dead = np.argwhere(~np.asarray(w, np.float32).any(axis))
        if dead.size:
            raise ValueError(
                f"statsq: row {', '.join(map(str, dead[0]))} of w {w.shape} is all zero and has no scale; "
                "allow_dead=True gives it 1e-8."
            )
    run = functools.partial(_call, "statsq", impl=impl, interpret=interpret, bits=bits)
    return _over_matrices(lambda w, axis: _straight_through(functools.partial(run, axis=axis), w), axis, w)


def round_groups(
    w: Float[Array, "... I"],
    *,
    bits: int,
    group: int | None = None,
    symmetric: bool = False,
    impl: Impl = "auto",
    interpret: bool = False,
) -> Float[Array, "... I"]:
    """The nearest points of the grid of each group along the last axis: ``methods.compression.rounding`` in one pass.

    The gradient is the identity.

    Args:
      w: floating; computed in float32.
      bits: b, 2..8.
      group: G, a divisor of I; all of I by default.
      symmetric: a grid around 0.
      impl, interpret: as in ``statsq``.

    Raises:
      ValueError: bits out of range, a group that does not divide I, numbers that are not finite, or an unknown impl.
      TypeError: w not floating.
      NotImplementedError: as ``statsq``.

    >>> round_groups(jnp.asarray([0.0, 1.0, 2.2, 3.0]), bits=2).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    _check("round_groups", w, bits, -1)
    group = w.shape[-1] if group is None else group
    if group < 1 or w.shape[-1] % group:
        raise ValueError(f"round_groups: the group must divide the last axis of w {w.shape}, got {group}.")
    run = functools.partial(
        _call, "round_groups", axis=1, impl=impl, interpret=interpret, bits=bits, symmetric=symmetric
    )
    return _straight_through(run, w.reshape(-1, group)).reshape(w.shape)


def lsq(
    x: Float[Array, "... I"],
    s: Float[Array, "..."],
    *,
    bits: int,
    signed: bool = True,
    axis: int = -1,
    gradient_scale: float = 1.0,
    impl: Impl = "auto",
    interpret: bool = False,
) -> Float[Array, "... I"]:
    """LSQ: a learnable scale, with the gradients of ``reference.py``.

    Args:
      x: at least two axes, floating; computed in float32.
      s: scales, positive; must broadcast to the shape of x without ``axis``: (T,) for one a position of x (B, T, C).
      bits: b, 2..8; codes are -2^(b-1) to 2^(b-1) - 1, or 0 to 2^b - 1 if not ``signed``.
      axis: along which a scale is shared: -1 or -2.
      gradient_scale: multiplies the gradient of s, such as 1 / sqrt(high I).
      impl, interpret: as in ``statsq``.

    Raises:
      ValueError: bits or axis out of range, scales of another shape, not positive or not finite, or an unknown impl.
      TypeError: x or s not floating.
      NotImplementedError: as ``statsq``.

    >>> lsq(jnp.asarray([[0.3, -0.9, 9.0]]), jnp.asarray([0.5]), bits=2).tolist()
    [[0.5, -1.0, 0.5]]
    """
    _check("lsq", x, bits, axis, finite=False)
    shared = tuple(np.delete(x.shape, axis).tolist())
    if not jnp.issubdtype(s.dtype, jnp.floating):
        raise TypeError(f"lsq: s must be floating, got {s.dtype}.")
    try:
        s = jnp.broadcast_to(s, shared)
    except ValueError:
        raise ValueError(
            f"lsq: s {s.shape} does not broadcast to {shared}, x {x.shape} without axis {axis}; scales per position "
            "serve one length only."
        ) from None
    if not isinstance(s, jax.core.Tracer):
        values = np.asarray(s, np.float32)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError("lsq: s must be positive and finite; was it initialised?")
    n = 2 ** (bits - 1)
    low, high = (-n, n - 1) if signed else (0, 2 * n - 1)

    def run(x: jax.Array, s: jax.Array, axis: int) -> jax.Array:
        return _lsq(x, s, low, high, axis, gradient_scale, impl, interpret)

    return _over_matrices(run, axis, x, jnp.expand_dims(s, axis))


def choose(x: Any, *, axis: int = -1) -> Choice:
    """What ``impl="auto"`` would do on this machine; x may be a ``jax.ShapeDtypeStruct``. For groups give (..., G)."""
    matrix, along = ((x.size // max(x.shape[-1], 1), x.shape[-1]), 1) if axis == -1 else (x.shape[-2:], 0)
    return dispatch.choose(PACKAGE, lambda module: module.refusal(matrix, jnp.dtype(x.dtype), along))


def _call(step: str, *arrays: jax.Array, axis: int, impl: str, interpret: bool, **sizes: Any) -> Any:
    x = arrays[0]
    if step != "round_groups":
        sizes["axis"] = axis
    # The passes of LSQ take the same backend, so the backward one, with three arrays like x, decides.
    like = 3 if step.startswith("lsq") else 2
    return dispatch.call(
        PACKAGE,
        step,
        *arrays,
        impl=impl,
        interpret=interpret,
        refuse=lambda module: module.refusal(x.shape, jnp.dtype(x.dtype), axis, like),
        **sizes,
    )


def _over_matrices(run: Callable[..., jax.Array], axis: int, x: jax.Array, *scales: jax.Array) -> jax.Array:
    """``run(matrix, *scales, axis)`` over leading axes: rows side by side are one long matrix, others are mapped."""
    if axis == -1:
        flat = (array.reshape(-1, array.shape[-1]) for array in (x, *scales))
        return run(*flat, axis=1).reshape(x.shape)
    one = functools.partial(run, axis=0)
    if x.ndim == 2:
        return one(x, *scales)
    stacked = (array.reshape(-1, *array.shape[-2:]) for array in (x, *scales))
    return jax.vmap(one)(*stacked).reshape(x.shape)


def _straight_through(run: Callable[[jax.Array], jax.Array], w: jax.Array) -> jax.Array:
    @jax.custom_vjp
    def quantised(w: jax.Array) -> jax.Array:
        return run(w)

    quantised.defvjp(lambda w: (run(w), None), lambda _, upstream: (upstream,))
    y: jax.Array = quantised(w)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6, 7))
def _lsq(
    x: jax.Array, s: jax.Array, low: int, high: int, axis: int, gradient_scale: float, impl: str, interpret: bool
) -> jax.Array:
    y: jax.Array = _call("lsq", x, s, axis=axis, impl=impl, interpret=interpret, low=low, high=high)
    return y


def _lsq_fwd(x: jax.Array, s: jax.Array, *static: Any) -> tuple[jax.Array, Any]:
    return _lsq(x, s, *static), (x, s)


def _lsq_bwd(
    low: int, high: int, axis: int, gradient_scale: float, impl: str, interpret: bool, kept: Any, upstream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, s = kept
    dx, ds = _call("lsq_backward", x, s, upstream, axis=axis, impl=impl, interpret=interpret, low=low, high=high)
    return dx, (gradient_scale * ds).astype(s.dtype)


_lsq.defvjp(_lsq_fwd, _lsq_bwd)


def _check(name: str, w: Any, bits: int, axis: int, finite: bool = True) -> None:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name}: the input must be floating, got {w.dtype}.")
    problems = []
    if not 2 <= bits <= 8:
        problems.append(f"bits must be between 2 and 8, got {bits}")
    if axis not in (-1, -2):
        problems.append(f"axis must be -1 or -2, got {axis}")
    if w.ndim < (1 if name == "round_groups" else 2):
        problems.append(f"the input must have at least two axes, got {w.shape}")
    if finite and not isinstance(w, jax.core.Tracer) and not np.isfinite(np.asarray(w, np.float32)).all():
        problems.append("the input contains numbers that are not finite")
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}.")
