"""The transformer over tokens, layers scanned: every decoder family, and BERT, by configuration.

Sites (scanned ones have a leading axis L; S is the key's position; F is the hidden width)::

    embed                       (B, T, D)
    resid_pre, resid_mid, resid_post, attn_out, mlp_out   (B, T, D)
    attn_in, mlp_in             (B, T, D)      normed inputs; q_in, k_in, v_in: attn_in as each of its readers sees it
    q, attn_z                   (B, T, H, K)   q after norm and rotary positions; z before the output projection
    k, v                        (B, T, G, K)   G key-value heads; k after norm and rotary positions
    attn_scores, attn_pattern   (B, H, T, S)   before and after the softmax
    mlp_pre, mlp_act            (B, T, F)      before and after the activation; in a gated MLP the gate's, and the
                                               product that the down-projection reads
    mlp_up                      (B, T, F)      gated MLPs only
    final_norm, logits          (B, T, D), (B, T, V)

``attn_out`` and ``mlp_out`` are what is added to the stream, after the second norm of a sandwich. Parallel blocks and
blocks of attention only have no ``resid_mid``; post-norm models have no ``final_norm``.

Parameters: kernels are (in, out), attention kernels q, k, v (L, D, H, K) and o (L, H, K, D).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mechlab.core.model import Model, Variables
from mechlab.core.sites import site
from mechlab.models.blocks import Block, Cache, stacked, views, write
from mechlab.models.layers import Linear, Norm, softcap
from mechlab.models.transformer_config import TransformerConfig

LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "**/embed/tokens": ("vocabulary", "residual"),
    "**/embed/positions|**/embed/types|**/embed/conv": (None, "residual"),
    "**/blocks/attn/[qkv]/kernel": ("layer", "residual", "head", "width"),
    "**/blocks/attn/[qkv]/bias": ("layer", "head", "width"),
    "**/blocks/attn/o/kernel": ("layer", "head", "width", "residual"),
    "**/blocks/mlp/up/kernel|**/blocks/mlp/gate/kernel": ("layer", "residual", "hidden"),
    "**/blocks/mlp/up/bias": ("layer", "hidden"),
    "**/blocks/mlp/down/kernel": ("layer", "hidden", "residual"),
    "**/unembed/kernel": ("residual", "vocabulary"),
}
"""Logical axis names of the parameters, for ``core/sharding.py``; what is not named is replicated."""


def gpt2(**sizes: Any) -> TransformerConfig:
    """GPT-2's kind of decoder, GPT-2 small unless sizes are given: ``gpt2(layers=2, width=64, heads=4, hidden=99)``."""
    small: dict[str, Any] = {
        "vocabulary": 50257,
        "layers": 12,
        "width": 768,
        "heads": 12,
        "hidden": 3072,
        "context": 1024,
    }
    return TransformerConfig(**(small | sizes))


def llama(**sizes: Any) -> TransformerConfig:
    """Llama's kind of decoder; the 15 M parameter one of llama2.c unless sizes are given."""
    small: dict[str, Any] = {"vocabulary": 32000, "layers": 6, "width": 288, "heads": 6, "hidden": 768, "context": 256}
    kind = {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "bias": False}
    return TransformerConfig(**(small | kind | sizes))


def transformer(config: TransformerConfig) -> Model:
    """The model. Inputs: tokens (B, T) int; optionally positions, token types, a cache, and which tokens to read.

    - positions: (T,) or (B, T) int, 0, 1, 2 ... by default. A position of -1 marks padding: no token attends to it.
      Left and right padding give the same numbers at the real tokens.
    - types: (B, T) int, 0 by default, for models that have token types.
    - cache: ``Cache`` of the tokens before these, see ``models/generate.py``; positions must then be (B, T).
    - read: (B,) int, one token of each row; only its logits are computed, and T is 1 in the output.

    Output: float32 logits (B, T, V), or hidden states (B, T, D) without ``config.unembed``. With a cache a pair: that,
    and the cache with these tokens in it.
    """
    return Model(TokenModule(config), (jax.ShapeDtypeStruct((1, min(2, config.context)), jnp.int32),))


def run_layers(
    model: Model, variables: Variables, resid: jax.Array, start: jax.Array | int = 0, positions: jax.Array | None = None
) -> jax.Array:
    """The residual stream after the last layer, given the one that enters layer ``start``.

    A sweep that changes only ``resid_pre`` of layer l need not run the layers below: one program serves every l, since
    ``start`` may be traced. Not reverse-differentiable (a loop of traced length). Edits at ``embed`` are ignored here.

    Args:
      model: from ``transformer``.
      variables: params and edits, as for ``model.apply``.
      resid: (B, T, D).
      start: first layer to run, 0..L.
      positions: as for the model.

    Returns:
      (B, T, D); ``unembed`` turns it, or chosen positions of it, into logits.
    """
    config = model.module.config
    nested = model.nested(variables, jax.ShapeDtypeStruct(resid.shape[:2], jnp.int32))
    layers = {name: tree["blocks"] for name, tree in nested.items() if "blocks" in tree}
    positions = jnp.arange(resid.shape[1]) if positions is None else positions
    seen = views(config, positions)

    def layer(index: jax.Array, x: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)
        (x, _), _ = Block(config).apply(one, (x, None), positions, seen, index)
        return x

    return jax.lax.fori_loop(start, config.layers, layer, resid)


def unembed(model: Model, variables: Variables, resid: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Final norm and logits of a residual stream, any positions of it; edits at these two sites apply.

    Args:
      model: from ``transformer``.
      variables: params and edits, as for ``model.apply``.
      resid: (B, T', D).
      positions: absolute positions of the T', needed by edits that are limited to positions.

    Returns:
      (B, T', V) float32.
    """
    nested = model.nested(variables, jax.ShapeDtypeStruct(resid.shape[:2], jnp.int32))
    logits: Any = model.module.apply(nested, resid, positions, method="read_out")
    return logits


class TokenModule(nn.Module):
    """The Flax module behind ``transformer``, for models that contain one."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        self.embed = _Embed(config)
        self.blocks = stacked(config)
        if config.norm_order != "post":
            self.final_norm = Norm(config.norm, config.norm_eps, config.has_bias("norm"))
        if config.unembed and not config.tied:
            self.unembed = Linear((config.vocabulary,), use_bias=False)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
        cache: Cache | None = None,
        read: jax.Array | None = None,
    ) -> Any:
        config = self.config
        check_tokens(config, tokens, positions, types)
        positions = jnp.arange(tokens.shape[1]) if positions is None else positions
        slots = None
        if cache is not None:
            slots = cache.k.shape[2]
            if not config.causal or positions.shape != tokens.shape:
                raise ValueError(f"a cache needs a causal model and positions (B, T), got {positions.shape}.")
        x, cache = self.embed(tokens, positions, types, cache)
        x = site(self, "embed", x, "B T D", positions=positions)
        (x, cache), _ = self.blocks((x, cache), positions, views(config, positions, slots), jnp.arange(config.layers))
        if read is not None:
            rows = jnp.arange(len(x))
            positions = jnp.broadcast_to(positions, tokens.shape)[rows, read][:, None]
            x = x[rows, read][:, None]
        out = self.read_out(x, positions)
        return out if cache is None else (out, cache)

    def read_out(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        config = self.config
        if config.norm_order != "post":
            x = site(self, "final_norm", self.final_norm(x), "B T D", positions=positions)
        x = x.astype(jnp.float32)
        if not config.unembed:
            return x
        logits = self.embed.attend(x) if config.tied else self.unembed(x)
        return site(self, "logits", softcap(logits, config.logit_softcap), "B T V", positions=positions)


class _Embed(nn.Module):
    config: TransformerConfig

    def setup(self) -> None:
        config = self.config

        def table(name: str, rows: int) -> jax.Array:
            return self.param(name, nn.initializers.normal(0.02), (rows, config.width))

        self.tokens = table("tokens", config.vocabulary)
        if config.positions == "learned":
            self.positions = table("positions", config.context)
        if config.token_types:
            self.types = table("types", config.token_types)
        if config.embed_norm:
            self.norm = Norm(config.norm, config.norm_eps, config.has_bias("norm"))
        if config.embed_conv:
            self.conv = table("conv", config.embed_conv)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, types: jax.Array | None, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        x = self.tokens[tokens]
        if config.embed_scale != 1.0:
            x = x * config.embed_scale
        if config.positions == "learned":
            x = x + self.positions[jnp.maximum(positions, 0)]
        if config.token_types:
            x = x + self.types[jnp.zeros_like(tokens) if types is None else types]
        if config.embed_norm:
            x = self.norm(x)
        if config.embed_conv:
            x, cache = self.convolve(x, positions, cache)
        return x.astype(config.dtype), cache

    def convolve(self, x: jax.Array, positions: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """x plus kernel[i - 1] times the embedding i tokens earlier, i = 1, 2 ...; shifted adds, or looked up."""
        total = x
        if cache is not None and cache.embed is not None:
            slots = write(cache.embed, x, positions)
            for back in range(1, len(self.conv) + 1):
                earlier = jnp.take_along_axis(slots, jnp.maximum(positions - back, 0)[..., None], axis=1)
                total = total + jnp.where((positions >= back)[..., None], earlier, 0) * self.conv[back - 1]
            return total, dataclasses.replace(cache, embed=slots)
        rows = jnp.broadcast_to(positions, x.shape[:2])
        for back in range(1, min(len(self.conv), x.shape[1] - 1) + 1):
            # Padding to the left is no earlier token, whatever its embedding.
            real = (rows[:, :-back] >= 0)[..., None]
            total = total.at[:, back:].add(jnp.where(real, x[:, :-back], 0) * self.conv[back - 1])
        return total, cache

    def attend(self, x: jax.Array) -> jax.Array:
        return x @ self.tokens.T


def check_tokens(config: TransformerConfig, tokens: Any, positions: Any = None, types: Any = None) -> None:
    """Refuse inputs that the model would read wrongly: wrong kinds and shapes, and concrete values out of range.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{tokens.shape}.")
    if positions is None and tokens.shape[1] > config.context:
        raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {config.context}.")
    if positions is not None and (
        positions.shape not in (tokens.shape, tokens.shape[1:]) or not jnp.issubdtype(positions.dtype, jnp.integer)
    ):
        raise ValueError(
            f"positions must be integers of shape (T,) or (B, T) for tokens {tokens.shape}, got "
            f"{positions.dtype}{positions.shape}."
        )
    if types is not None and not config.token_types:
        raise ValueError("token types were given, but the model has none (token_types=0).")
    _check_range("tokens", tokens, 0, config.vocabulary)
    _check_range("positions", positions, -1, config.context)
    _check_range("token types", types, 0, config.token_types)


def _check_range(name: str, values: Any, low: int, stop: int) -> None:
    if values is None or isinstance(values, jax.core.Tracer) or not values.size:
        return
    least, most = np.asarray(values).min(), np.asarray(values).max()
    if least < low or most >= stop:
        raise ValueError(f"{name} must be in {low}..{stop - 1}, got {least}..{most}.")
