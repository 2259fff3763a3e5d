"""The rational function to call: arguments checked, a backend chosen, gradients that keep (x, a, b) and nothing else.

``choose`` says which backend a call would take on this machine, and why. On several devices call it inside
``jax.shard_map``, as a Pallas kernel must be: the partitioner of ``jax.jit`` would gather x around it.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mechlab.kernels.dispatch import IMPLS, Choice
from mechlab.kernels.dispatch import PLATFORMS as KERNELS
from mechlab.kernels.rational import reference
from mechlab.kernels.rational.reference import DENOMINATOR, NUMERATOR

if TYPE_CHECKING:
    from jaxtyping import Array, Float

FORMS = ("A", "B")


def rational(
    x: Float[Array, "... D"],
    a: Float[Array, "g 6"],
    b: Float[Array, "G 4"],
    *,
    groups: int,
    form: Literal["A", "B"] = "A",
    impl: Literal["auto", "jnp", "tpu", "gpu"] = "auto",
    interpret: bool = False,
) -> Float[Array, "... D"]:
    """F(x) = P(x) / Q(x), element by element, with coefficients shared by groups of channels.

    Equations and gradients are in ``reference.py``. Computed in float32 (float64 for float64). Under ``jit``, ``vmap``,
    ``scan`` and ``shard_map``; gradients of the first order.

    Args:
      x: (..., D), floating; channel i is of group floor(i G / D). |x| < 5e7.
      a: numerators, (1, 6) for all groups or (G, 6).
      b: denominators, (G, 4).
      groups: G, a divisor of D.
      form: of the denominator: "A", 1 + sum |b_j| |x|^j (kernels, released models), or "B", 1 + |sum b_j x^j| (the
        paper's equation). They agree where all b >= 0 and x >= 0, or b = 0. "B" has no kernel and no saving of memory.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" and "gpu" insist on a kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Returns:
      Shaped and typed like x.

    Raises:
      ValueError: shapes that do not fit, or an unknown form or impl.
      TypeError: x, a or b not floating.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.

    >>> identity, zero = jnp.asarray([[0.0, 1, 0, 0, 0, 0]]), jnp.zeros((2, 4))
    >>> rational(jnp.asarray([-2.0, 0.5]), identity, zero, groups=2).tolist()
    [-2.0, 0.5]
    """
    _check(x, a, b, groups, form, impl)
    if interpret and impl not in KERNELS:
        raise ValueError(f'rational: interpret=True needs impl "tpu" or "gpu", got "{impl}".')
    if impl in KERNELS:
        refused = _refusal(x, groups, form, impl, impl if interpret else jax.default_backend())
        if refused:
            raise NotImplementedError(f'rational: impl "{impl}": {refused}.')
    if form == "B":
        return reference.forward(x, a, b, "B")
    if impl == "auto":
        plan = _Plan(choose(x, a, b, groups=groups).impl, fallback=True)
    else:
        plan = _Plan(impl, interpret)
    a, b = (_varying_like(coefficients, x) for coefficients in (a, b))
    return _rational(x.reshape(-1, x.shape[-1]), a, b, plan).reshape(x.shape)


def choose(x: Any, a: Any, b: Any, *, groups: int, form: Literal["A", "B"] = "A") -> Choice:
    """What ``rational(..., impl="auto")`` would do on this machine.

    Args:
      x, a, b, groups, form: as in ``rational``; arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      The backend and the reason.

    Raises:
      As ``rational``.
    """
    _check(x, a, b, groups, form, "auto")
    platform = jax.default_backend()
    if platform not in KERNELS:
        return Choice("jnp", f"there is no kernel for {platform}")
    refused = _refusal(x, groups, form, platform, platform)
    return Choice("jnp", refused) if refused else Choice(platform, f"the default backend is {platform}")


def _refusal(x: Any, groups: int, form: str, kernel: str, platform: str) -> str | None:
    if platform != kernel:
        return f"this platform is {platform}; interpret=True runs the kernel anywhere"
    if form != "A":
        return f'the kernels compute form "A", not "{form}"'
    if 0 in x.shape:
        return "x is empty"
    try:
        module = _backend(kernel)
    except ImportError as error:
        return f"this jax does not have what the kernel needs ({error})"
    flat = (x.size // x.shape[-1], x.shape[-1])
    refused: str | None = module.refusal(flat, jnp.dtype(x.dtype), groups)
    return refused


class _Plan(NamedTuple):
    """The backend of a call, and whether a program compiled for another platform may take the reference instead."""

    impl: str
    interpret: bool = False
    fallback: bool = False

    def run(self, step: str, *arrays: jax.Array) -> Any:
        """``forward`` or ``backward`` of the backend."""
        if self.impl == "jnp":
            return getattr(reference, step)(*arrays)
        kernel = getattr(_backend(self.impl), step)
        if self.fallback:
            per_platform = {KERNELS[self.impl]: kernel}
            return jax.lax.platform_dependent(*arrays, default=getattr(reference, step), **per_platform)
        return kernel(*arrays, interpret=self.interpret)


def _backend(kernel: str) -> Any:
    # Pallas takes a while to import, so it is left until a kernel is wanted.
    return importlib.import_module(f"mechlab.kernels.rational.{kernel}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rational(x: jax.Array, a: jax.Array, b: jax.Array, plan: _Plan) -> jax.Array:
    y: jax.Array = plan.run("forward", x, a, b)
    return y


def _rational_fwd(x: jax.Array, a: jax.Array, b: jax.Array, plan: _Plan) -> tuple[jax.Array, Any]:
    return _rational(x, a, b, plan), (x, a, b)


def _rational_bwd(plan: _Plan, kept: tuple[jax.Array, ...], upstream: jax.Array) -> Any:
    return plan.run("backward", *kept, upstream)


_rational.defvjp(_rational_fwd, _rational_bwd)


def _varying_like(coefficients: jax.Array, x: jax.Array) -> jax.Array:
    """The coefficients, typed as x is inside ``shard_map``: the transpose of this sums their gradients over devices."""
    # The sum of nothing is 0 and still differs between devices as far as jax's types know.
    return coefficients + jax.lax.stop_gradient(x).reshape(-1)[:0].sum().astype(coefficients.dtype)


def _check(x: Any, a: Any, b: Any, groups: int, form: str, impl: str) -> None:
    for name, array in (("x", x), ("a", a), ("b", b)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"rational: {name} must be floating, got {array.dtype}.")
    problems = []
    if groups < 1 or x.ndim < 1 or x.shape[-1] % max(groups, 1):
        problems.append(f"groups must be at least 1 and divide the last axis of x {x.shape}, got {groups}")
    if a.shape not in ((1, NUMERATOR), (groups, NUMERATOR)):
        problems.append(f"a must be (1, {NUMERATOR}) or ({groups}, {NUMERATOR}), got {a.shape}")
    if b.shape != (groups, DENOMINATOR):
        problems.append(f"b must be ({groups}, {DENOMINATOR}), got {b.shape}")
    if form not in FORMS:
        problems.append(f'form must be "A" or "B", got "{form}"')
    if impl not in IMPLS:
        problems.append(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if problems:
        raise ValueError(f"rational: {'; '.join(problems)}.")
