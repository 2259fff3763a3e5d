"""Lowering a kernel for a platform that is not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mechlab.kernels.dispatch import PLATFORMS
from tests.kernels.devices import DEVICES


def lowered(function: Callable[..., Any], *arguments: Any, impl: str) -> str:
    """The program of a function for "tpu" or "gpu", as text."""
    with jax.sharding.use_abstract_mesh(DEVICES[impl]):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(PLATFORMS[impl],)).as_text()
