"""A behaviour put into a random model by hand: a check of the method, not a model of anything."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering._tales_tasks import POOLS, Draw, Items, listed
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.methods.steering.vectors import Texts
from mechlab.models.transformer import llama, transformer

PLANTED_RIGHT, PLANTED_WRONG = tuple(range(8, 12)), tuple(range(12, 16))
"""Units of ``mlp_out`` in layer 0 that carry the right answer and the wrong one."""

_GOOD, _BAD, _CONTEXT = slice(1, 17), slice(17, 33), slice(33, 81)


def planted(key: jax.Array) -> tuple[Model, Any, Draw]:
    """A random two-layer model, its parameters, and the items that it is asked.

    Tokens are good, bad, or context. A neuron of layer 0 copies each of the channels 0..7 of the stream to the channels
    8..15; nothing else reads or writes these. Good tokens have 1 in channels 0..3, bad ones in 4..7, context tokens a
    and b of their own, so that the last token of a prompt votes a for every good token and b for every bad one. The
    right candidate is a good token, the wrong one a bad token: half of the contexts vote for the wrong one.
    """
    sizes = {"vocabulary": 81, "layers": 2, "width": 32, "heads": 4, "hidden": 64, "context": 8}
    kind: dict[str, Any] = {"gated": False, "activation": "relu", "tied": False, "init_std": None}
    model = transformer(llama(**sizes, **kind))
    # On the host: a few dozen small operations, each of which would be compiled.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shapes = jax.eval_shape(model.init, key)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    for norm in (params["final_norm"], params["blocks"]["norm_attn"], params["blocks"]["norm_mlp"]):
        norm["scale"][:] = 1
    tokens, attn, mlp = params["embed"]["tokens"], params["blocks"]["attn"], params["blocks"]["mlp"]
    tokens *= 5
    tokens[:, :16] = 0
    tokens[_GOOD, :4] = tokens[_BAD, 4:8] = 1
    tokens[_CONTEXT, :8] = rng.uniform(0.2, 1, (48, 2)).repeat(4, 1)
    for reader in (attn["v"]["kernel"], mlp["up"]["kernel"]):
        reader[:, :16] = 0
    for writer in (attn["o"]["kernel"], mlp["down"]["kernel"]):
        writer[..., :16] = 0
    copied = np.arange(8)
    mlp["up"]["kernel"][0, :, copied] = mlp["down"]["kernel"][0, copied] = 0
    mlp["up"]["kernel"][0, copied, copied] = mlp["down"]["kernel"][0, copied, copied + 8] = 1
    unembed = params["unembed"]["kernel"]
    unembed *= 0.01
    unembed[:16] = 0
    unembed[8:12, _GOOD] = unembed[12:16, _BAD] = 1
    return model, jax.tree.map(jnp.asarray, params), _draw


@functools.partial(jax.jit, static_argnames=("n", "pool"))
def _draw(key: jax.Array, n: int, pool: str) -> Items:
    part = POOLS.index(pool)
    context = jax.random.randint(stream(key, "context"), (n, 4), 33 + 16 * part, 49 + 16 * part)
    good = jax.random.randint(stream(key, "good"), (n,), 1, 17)
    bad = jax.random.randint(stream(key, "bad"), (n,), 17, 33)
    right = jnp.arange(n) % 2
    both = jnp.where(right[:, None] == 0, jnp.stack([good, bad], 1), jnp.stack([bad, good], 1))
    return listed(Texts(context, jnp.full(n, 4)), both, right)


def spelled(ids: Sequence[int]) -> str:
    """Its tokens as words."""
    return " ".join("good" if i < 17 else "bad" if i < 33 else f"c{i - 33}" for i in ids)
