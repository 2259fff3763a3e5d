"""Tiny decoders of both kinds, no parameter of them at its neutral value (biases, norm scales)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model
from mechlab.models.transformer import TransformerConfig, gpt2, llama, transformer

SIZES = {"vocabulary": 11, "layers": 3, "width": 16, "heads": 4, "hidden": 24, "context": 12}

CONFIGS: dict[str, TransformerConfig] = {
    "gpt2": gpt2(**SIZES),
    "llama": llama(**SIZES, kv_heads=2, tied=False),
}

TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def scrambled(params: Any, seed: int = 0) -> Any:
    """Random numbers in place of every leaf; norm scales stay around 1."""
    rng = np.random.default_rng(seed)

    def draw(keys: Any, leaf: jax.Array) -> jax.Array:
        middle = 1.0 if keys[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, params)


@functools.cache
def decoder(kind: str) -> tuple[Model, Any]:
    """The model and its parameters."""
    model = transformer(CONFIGS[kind])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, scrambled(shapes)
