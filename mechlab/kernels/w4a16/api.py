"""The product to call: arguments checked, a backend chosen. ``choose`` says which one, and why."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mechlab.kernels.w4a16 import reference
from mechlab.kernels.w4a16.layout import Packed4

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IMPLS = ("auto", "jnp", "tpu")
KERNELS = {"tpu": "tpu"}
"""Backends of Pallas, and the platform that each is lowered for."""


class Choice(NamedTuple):
    """Which backend computes a call: "jnp" or "tpu", and why."""

    impl: str
    reason: str


def w4a16_matmul(
    x: Float[Array, "... K"],
    kernel: Packed4,
    *,
    impl: Literal["auto", "jnp", "tpu"] = "auto",
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """``x @ kernel`` with a packed kernel of one layer, as a matrix (K, N).

    The kernel is never made whole where a Pallas kernel runs. Sums are in float32 and rounded once, to x's dtype.

    Args:
      x: (..., K), floating.
      kernel: packed, without a layer axis.
      impl: "auto" takes the kernel of the platform that the program is compiled for, else the reference; "jnp" is the
        reference, "tpu" insists on the kernel.
      interpret: run the Pallas kernel that ``impl`` names by interpretation, on any platform: for tests, slow.

    Raises:
      ValueError: shapes that do not fit, or an unknown impl.
      TypeError: x not floating.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.
    """
    _check(x, kernel, impl)
    if interpret and impl not in KERNELS:
        raise ValueError(f'w4a16_matmul: interpret=True needs impl "tpu", got "{impl}".')
    flat = x.reshape(-1, x.shape[-1])
    if impl in KERNELS:
        refused = _refusal(flat, kernel, impl, impl if interpret else jax.default_backend())
        if refused:
            raise NotImplementedError(f'w4a16_matmul: impl "{impl}": {refused}.')
        run: Callable[..., jax.Array] = functools.partial(_backend(impl).matmul, interpret=interpret)
    else:
        run = reference.matmul
        chosen = choose(x, kernel).impl if impl == "auto" else "jnp"
    arrays = (flat, kernel.bytes, kernel.scales, kernel.zeros)
    if impl == "auto" and chosen != "jnp":
        per_platform = {KERNELS[chosen]: functools.partial(_backend(chosen).matmul, block=kernel.block)}
        default = functools.partial(reference.matmul, block=kernel.block)
        y = jax.lax.platform_dependent(*arrays, default=default, **per_platform)
    else:
        y = run(*arrays, block=kernel.block)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def choose(x: Any, kernel: Packed4) -> Choice:
    """What ``w4a16_matmul(..., impl="auto")`` would do on this machine; x may be a ``jax.ShapeDtypeStruct``."""
    _check(x, kernel, "auto")
    platform = jax.default_backend()
    if platform not in KERNELS:
        return Choice("jnp", f"there is no kernel for {platform}")
    flat = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    refused = _refusal(flat, kernel, platform, platform)
    return Choice("jnp", refused) if refused else Choice(platform, f"the default backend is {platform}")


def _refusal(x: Any, kernel: Packed4, impl: str, platform: str) -> str | None:
    if platform != impl:
        return f"this platform is {platform}; interpret=True runs the kernel anywhere"
    m, k = x.shape
    if m == 0:
        return "x is empty"
    refused: str | None = _backend(impl).refusal(
        m, k, kernel.bytes.shape[1], kernel.group, kernel.block, jnp.dtype(x.dtype)
    )
    return refused


def _backend(impl: str) -> Any:
    # Pallas takes a while to import, so it is left until a kernel is wanted.
    return importlib.import_module(f"mechlab.kernels.w4a16.{impl}")


def _check(x: Any, kernel: Packed4, impl: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"w4a16_matmul: x must be floating, got {x.dtype}.")
    problems = []
    if kernel.bytes.ndim != 2:
        problems.append(f"the kernel must be that of one layer, got bytes {kernel.bytes.shape}")
    if x.ndim < 1 or x.shape[-1] != 2 * kernel.bytes.shape[-2]:
        problems.append(f"x must end in {2 * kernel.bytes.shape[-2]} inputs, got {x.shape}")
    if impl not in IMPLS:
        problems.append(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if problems:
        raise ValueError(f"w4a16_matmul: {'; '.join(problems)}.")
