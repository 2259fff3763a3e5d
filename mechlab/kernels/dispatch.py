"""Which backend computes a call, and why: shared by the ``api.py`` of every operation.

A call names the package of its operation and a step in it: a function that ``reference.py``, ``tpu.py`` and ``gpu.py``
all have, with the same arguments. Modules with kernels also have ``refusal``, which says what they do not take.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

IMPLS = ("auto", "jnp", "tpu", "gpu")
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
"""Backends of Pallas, and the platform that each is lowered for."""

Refuse = Callable[[Any], str | None]
"""Asks a module with kernels why it does not take a call; None where it does."""


class Choice(NamedTuple):
    """Which backend computes a call: "jnp", "tpu" or "gpu", and why."""

    impl: str
    reason: str


def require_impl(name: str, impl: str, interpret: bool) -> None:
    """Refuse an unknown backend, and interpretation without the name of a kernel."""
    if impl not in IMPLS:
        raise ValueError(f"{name}: impl must be one of {', '.join(IMPLS)}, got {impl!r}.")
    if interpret and impl not in PLATFORMS:
        raise ValueError(f'{name}: interpret=True needs impl "tpu" or "gpu", got "{impl}".')


def choose(package: str, refuse: Refuse) -> Choice:
    """What ``impl="auto"`` does on this machine."""
    platform = jax.default_backend()
    if platform not in PLATFORMS:
        return Choice("jnp", f"there is no kernel for {platform}")
    refused = _refusal(package, platform, refuse)
    return Choice("jnp", refused) if refused else Choice(platform, f"the default backend is {platform}")


def call(package: str, step: str, *arrays: jax.Array, impl: str, interpret: bool, refuse: Refuse, **sizes: Any) -> Any:
    """Run one step of an operation.

    A kernel is differentiated as the reference is, from the same inputs. Under "auto" a program compiled for another
    platform than this machine's takes the reference.

    Args:
      package: of the operation, such as "mechlab.kernels.w8a8".
      step: name of the function.
      arrays: its arguments; nothing but arrays.
      impl: "auto", "jnp", "tpu" or "gpu".
      interpret: run the kernel that ``impl`` names by interpretation.
      refuse: see ``Refuse``.
      sizes: static arguments, the same for every backend.

    Raises:
      ValueError: as ``require_impl``.
      NotImplementedError: a kernel insisted on that this platform, or this call, does not have.
    """
    name = package.rpartition(".")[2]
    require_impl(name, impl, interpret)
    reference = functools.partial(getattr(load(package, "reference"), step), **sizes)
    chosen = choose(package, refuse).impl if impl == "auto" else impl
    if chosen == "jnp":
        return reference(*arrays)
    if impl != "auto":
        refused = None
        if not interpret and jax.default_backend() != impl:
            refused = f"this platform is {jax.default_backend()}; interpret=True runs the kernel anywhere"
        refused = refused or _refusal(package, impl, refuse)
        if refused:
            raise NotImplementedError(f'{name}: impl "{impl}": {refused}.')
    kernel = functools.partial(getattr(load(package, chosen), step), **sizes)

    @jax.custom_vjp
    def run(*arrays: jax.Array) -> Any:
        if impl == "auto":
            return jax.lax.platform_dependent(*arrays, default=reference, **{PLATFORMS[chosen]: kernel})
        return kernel(*arrays, interpret=interpret)

    run.defvjp(lambda *arrays: (run(*arrays), arrays), lambda kept, upstream: jax.vjp(reference, *kept)[1](upstream))
    return run(*arrays)


def load(package: str, module: str) -> Any:
    """A module of an operation. Pallas takes a while to import, so it is left until a kernel is wanted."""
    return importlib.import_module(f"{package}.{module}")


def _refusal(package: str, impl: str, refuse: Refuse) -> str | None:
    try:
        module = load(package, impl)
    except ImportError as error:
        return f"this jax does not have what the kernel needs ({error})"
    return refuse(module)
