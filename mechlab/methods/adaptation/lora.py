"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685).

A kernel W stays frozen; its change has rank r::

    W' = W + (alpha / r) A B,    A (in, r) random, B (r, out) zero,    so that W' = W before training.   (section 4.1)

Kernels are (in, out), so A reads and B writes; the paper's W is the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mechlab.core import select
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState, Params

Initialiser = Callable[[jax.Array, tuple[int, ...], int], jax.Array]


def uniform_init(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)): what the released implementations use (variance 1 / (3 in))."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def normal_init(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """A ~ N(0, 1/in): the paper's Gaussian, 1.7 times larger than ``uniform_init``."""
    return jax.random.normal(key, shape) / math.sqrt(fan_in)


def lora(
    rank: int, *, pattern: str = "**/kernel", alpha: float | None = None, init: Initialiser = uniform_init
) -> Adapter:
    """LoRA on the kernels whose path matches.

    Args:
      rank: r >= 1.
      pattern: glob over parameter paths (``core/select.py``); matching leaves are (in, out), or (L, in, out) stacked.
      alpha: scale; r by default, which makes the scale 1.
      init: distribution of A.

    Returns:
      An adapter with state ``{path: {"A": (..., in, r), "B": (..., r, out)}}``: r (in + out) numbers per kernel. Its
      ``init`` raises ValueError for a kernel that is not a matrix, or for a rank above min(in, out).

    Raises:
      ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, got {rank}.")
    scale = (rank if alpha is None else alpha) / rank

    def init_state(key: jax.Array, params: Params) -> AdapterState:
        train = {}
        for path, kernel in select.get(params, pattern).items():
            if kernel.ndim not in (2, 3):
                raise ValueError(f'lora: "{path}" must be (in, out) or (L, in, out), got shape {kernel.shape}.')
            *stacked, fan_in, fan_out = kernel.shape
            if rank > min(fan_in, fan_out):
                raise ValueError(f'lora: rank {rank} is above what "{path}" of shape {kernel.shape} can have.')
            reads = init(stream(key, path), (*stacked, fan_in, rank), fan_in).astype(kernel.dtype)
            train[path] = {"A": reads, "B": jnp.zeros((*stacked, rank, fan_out), kernel.dtype)}
        return AdapterState(train)

    def merge(params: Params, state: AdapterState) -> Params:
        kernels = select.get(params, pattern)
        return select.put(
            params, {path: kernels[path] + scale * (ab["A"] @ ab["B"]) for path, ab in state.train.items()}
        )

    return Adapter(init_state, merge)
