"""The transformer block, scanned over layers: one compiled block for every family, of text and of images.

What differs between layers (which of them have a window) is an array that is scanned along with the parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from mechlab.core.model import Model
from mechlab.core.sites import LAYER_AXES, site
from mechlab.models.layers import ACTIVATIONS, Linear, Norm, attention, rotate, rotation
from mechlab.models.transformer_config import TransformerConfig


@struct.dataclass
class Cache:
    """Keys and values of the tokens that a decoder has read: what generation must not compute again.

    Slot s belongs to position s of the text, so a query at position p sees slots 0 .. p and nothing else: what stands
    in later slots does not matter, and going back in a text is no more than going on from an earlier position.

    Attributes:
      k, v: (L, B, S, G, K); S slots.
      embed: (B, S, D), the token embeddings, for models whose embeddings are convolved; else None.
    """

    k: jax.Array
    v: jax.Array
    embed: jax.Array | None = None


@struct.dataclass
class View:
    """What the queries of a layer see of the text.

    Attributes:
      allowed: (B or 1, 1, T, S) bool, which keys.
      cos_sin: rotation of queries and keys, (B or 1, T, 1, R / 2) each, or None.
    """

    allowed: jax.Array
    cos_sin: tuple[jax.Array, jax.Array] | None = None


def views(config: TransformerConfig, positions: jax.Array, slots: int | None = None) -> tuple[View, ...]:
    """The view of every kind of layer: one, or where some layers have a window that of the others and then theirs.

    Args:
      config: of the blocks.
      positions: (T,) or (B, T) absolute positions of the queries; -1 is padding, which no query sees.
      slots: S, where the keys are those of a cache; by default they are those of the queries' own tokens.

    Returns:
      One or two views.
    """
    rows = jnp.atleast_2d(positions)
    keys = rows if slots is None else jnp.arange(slots)[None]
    query, key = rows[:, None, :, None], keys[:, None, None, :]
    seen = (key >= 0) & ((key <= query) | (not config.causal))

    def view(local: bool) -> View:
        allowed = seen & (key > query - config.window) if local and config.window is not None else seen
        if config.positions == "learned":
            return View(allowed)
        frequencies, amplitude = config.frequencies(local=local), config.amplitude(local=local)
        return View(allowed, rotation(rows, jnp.asarray(frequencies, jnp.float32), amplitude))

    kinds = {False: len(config.windowed) < config.layers, True: bool(config.windowed)}
    return tuple(view(local) for local, present in kinds.items() if present)


def view_of(config: TransformerConfig, seen: tuple[View, ...], layer: jax.Array | int) -> View:
    """The one of ``views`` that a layer has; the layer may be traced."""
    if len(seen) == 1:
        return seen[0]
    local = jnp.asarray(np.isin(np.arange(config.layers), config.windowed))[layer]
    return jax.tree.map(lambda everywhere, near: jnp.where(local, near, everywhere), *seen)


def stacked(config: TransformerConfig, name: str | None = None) -> Any:
    """All blocks as one module, ``((x, cache), positions, views, layers)`` as in ``Block``, with layers 0 .. L-1.

    Parameters lead with axis L.
    """
    scanned = nn.scan(
        Block,
        variable_axes={**LAYER_AXES},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        length=config.layers,
    )
    return scanned(config, name=name)


def one_block(config: TransformerConfig) -> Model:
    """One block as a model of its own: ``(x (B, T, D), layer) -> (B, T, D)``, from ``resid_pre`` to ``resid_post``.

    Parameters are ``{"block": those of one layer}``. Its sites are the block's, none of them stacked, and take edits.
    The layer, an int array without axes, says whether the block has a window; texts are without padding.
    """
    example = (jax.ShapeDtypeStruct((1, 2, config.width), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    return Model(_OneBlock(config), example)


def run_attention(config: TransformerConfig, params: Any, x: jax.Array, layer: jax.Array | int = 0) -> jax.Array:
    """What a layer's attention adds to the stream, from its normed input.

    Args:
      config: of the blocks.
      params: of this layer's attention, ``blocks/attn`` without the layer axis.
      x: (B, T, D), the site ``attn_in``; texts without padding.
      layer: its number, which says whether it has a window; may be traced.

    Returns:
      (B, T, D), the site ``attn_out``.
    """
    positions = jnp.arange(x.shape[1])
    view = view_of(config, views(config, positions), layer)
    out: Any = _Attention(config).apply({"params": params}, x, positions, view, None, jnp.asarray(layer))
    return out[0]


def run_mlp(config: TransformerConfig, params: Any, x: jax.Array) -> jax.Array:
    """What a layer's MLP adds to the stream, from its normed input (B, T, D); parameters as in ``run_attention``."""
    assert config.hidden is not None
    out: Any = _MLP(config, config.hidden).apply({"params": params}, x, jnp.arange(x.shape[1]))
    return out


class _OneBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1])
        seen = views(self.config, positions)
        out: Any = Block(self.config, name="block")((x, None), positions, seen, layer)
        return out[0][0]


class Block(nn.Module):
    """Attention and MLP around the residual stream: ``((x, cache), positions, views, layer) -> ((x, cache), None)``.

    The cache may be None. It is carried along whole and written in place: slices of it would be copied in every step.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], positions: jax.Array, views: tuple[View, ...], layer: jax.Array
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        config = self.config
        x, cache = carry
        view = view_of(config, views, layer)
        post = config.norm_order == "post"

        x = site(self, "resid_pre", x, "B T D", positions=positions)
        norm = _norm(config, "norm_attn")
        out, cache = _Attention(config, name="attn")(x if post else norm(x), positions, view, cache, layer)
        if config.hidden is None:
            x = norm(x + out) if post else x + out
            return (site(self, "resid_post", x, "B T D", positions=positions), cache), None

        read = x
        x = norm(x + out) if post else x + out
        if not config.parallel:
            read = x = site(self, "resid_mid", x, "B T D", positions=positions)
        norm = _norm(config, "norm_mlp")
        kind = config.mlp
        mlp = _MLP(config, config.hidden, name="mlp") if kind is None else kind.module(config, name="mlp")
        out = mlp(read if post else norm(read), positions)
        x = norm(x + out) if post else x + out
        return (site(self, "resid_post", x, "B T D", positions=positions), cache), None


class _Attention(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, view: View, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        x = site(self, "attn_in", x, "B T D", positions=positions)

        def project(name: str, heads: int) -> jax.Array:
            read = site(self, f"{name}_in", x, "B T D", positions=positions)
            wide = (heads, config.d_head)
            return Linear(wide, use_bias=config.has_bias("qkv"), init_std=config.init_std, name=name)(read)

        q, k, v = project("q", config.heads), project("k", config.n_kv_heads), project("v", config.n_kv_heads)
        if config.qk_norm:
            q, k = _norm(config, "norm_q")(q), _norm(config, "norm_k")(k)
        if view.cos_sin is not None:
            q, k = rotate(q, view.cos_sin), rotate(k, view.cos_sin)
        q = site(self, "q", q, "B T H K", positions=positions)
        k = site(self, "k", k, "B T H K", positions=positions)
        v = site(self, "v", v, "B T H K", positions=positions)
        if cache is not None:
            k, v = (write(*pair, positions, layer) for pair in ((cache.k, k), (cache.v, v)))
            cache = dataclasses.replace(cache, k=k, v=v)
            k, v = cache.k[layer], cache.v[layer]
        z = attention(self, q, k, v, view.allowed, positions, scale=config.attn_scale, cap=config.attn_softcap)
        z = site(self, "attn_z", z, "B T H K", positions=positions)
        biased = config.has_bias("o")
        out = Linear((config.width,), inputs=2, use_bias=biased, init_std=config.init_std, name="o")(z)
        if config.norm_order == "sandwich":
            out = _norm(config, "norm_out")(out)
        return site(self, "attn_out", out, "B T D", positions=positions), cache


def write(slots: jax.Array, values: jax.Array, positions: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    """The slots (L, B, S, ...) of a cache, or (B, S, ...), with values (B, T, ...) written at positions (B, T).

    Nothing is written for padding, position -1.
    """
    rows = jnp.arange(values.shape[0])[:, None]
    # A negative index would count from the end; one past the end is dropped.
    where = jnp.where(positions < 0, slots.shape[-values.ndim + 1], positions)
    at = slots.at[rows, where] if layer is None else slots.at[layer, rows, where]
    return at.set(values.astype(slots.dtype), mode="drop")


class _MLP(nn.Module):
    config: TransformerConfig
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        biased = config.has_bias("mlp")
        x = site(self, "mlp_in", x, "B T D", positions=positions)

        def project(name: str) -> jax.Array:
            return Linear((self.hidden,), use_bias=biased, init_std=config.init_std, name=name)(x)

        up = project("up")
        if config.gated:
            up = site(self, "mlp_up", up, "B T F", positions=positions)
        pre = site(self, "mlp_pre", project("gate") if config.gated else up, "B T F", positions=positions)
        act = ACTIVATIONS[config.activation](pre)
        act = site(self, "mlp_act", act * up if config.gated else act, "B T F", positions=positions, pre=pre)
        out = Linear((config.width,), use_bias=biased, init_std=config.init_std, name="down")(act)
        if config.norm_order == "sandwich":
            out = _norm(config, "norm_out")(out)
        return site(self, "mlp_out", out, "B T D", positions=positions)


def _norm(config: TransformerConfig, name: str | None = None) -> Any:
    return Norm(config.norm, config.norm_eps, config.has_bias("norm"), name=name)
