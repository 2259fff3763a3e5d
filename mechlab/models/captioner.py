"""An image captioner: a vision transformer whose tokens are a prefix of a decoder's text, as in LLaVA.

Two models of ``models/vit.py`` and ``models/transformer.py``; the decoder's parameters are those of
``transformer(config)``, which reads and writes text without an image, so a decoder may be trained on text first and
given eyes later::

    prefix = look(captioner, params["vision"], pixels)                      # (B, P, D)
    logits = captioner.prefixed.apply({"params": params["text"]}, prefix, tokens)
    cache = fill(captioner, params["text"], prefix, start, slots=P + T)     # then captioner.text goes on from P + 1
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mechlab.core.model import Model
from mechlab.core.sites import site
from mechlab.models.blocks import Cache, views
from mechlab.models.generate import new_cache
from mechlab.models.transformer import TokenModule, check_tokens, transformer
from mechlab.models.transformer_config import TransformerConfig
from mechlab.models.vit import ViTConfig, vit

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Captioner:
    """The parts. Parameters are ``{"vision": ..., "text": ...}``.

    Attributes:
      vision: pixels to hidden states (B, P, D), class token first.
      text: the decoder alone.
      prefixed: the same decoder behind a prefix: ``prefix (B, P, D), tokens (B, T)`` to logits (B, T, V). Its sites are
        the decoder's, over all P + T positions.
    """

    vision: Model
    text: Model
    prefixed: Model

    @property
    def prefix(self) -> int:
        """P, the number of positions of an image."""
        tokens: int = self.vision.module.config.tokens
        return tokens

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters."""
        vision, text = jax.random.split(key)
        return {"vision": self.vision.init(vision), "text": self.text.init(text)}


def captioner(image: ViTConfig, text: TransformerConfig) -> Captioner:
    """A captioner of these parts.

    Raises:
      ValueError: different widths, an encoder with classes, or a decoder that is not causal.
    """
    if image.width != text.width:
        raise ValueError(f"captioner: encoder and decoder need one width, got {image.width} and {text.width}.")
    if image.classes is not None or not text.causal or not text.unembed or text.embed_conv:
        raise ValueError("captioner: wanted an encoder without classes, and a plain causal decoder with logits.")
    example = (
        jax.ShapeDtypeStruct((1, image.tokens, image.width), jnp.float32),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
    )
    return Captioner(vit(image), transformer(text), Model(_Prefixed(text), example))


def look(model: Captioner, params: Any, pixels: Float[Array, "B h w C"]) -> Float[Array, "B P D"]:
    """The prefix of images; ``params`` are the encoder's.

    Raises:
      ValueError: images of another size, with both shapes.
    """
    prefix: jax.Array = model.vision.apply({"params": params}, pixels)
    return prefix


def fill(model: Captioner, params: Any, prefix: Float[Array, "B P D"], tokens: Int[Array, "B T"], slots: int) -> Cache:
    """A cache of ``slots`` positions with the prefix and T >= 1 tokens (such as the start token) in it.

    Args:
      model: the captioner.
      params: the decoder's.
      prefix: from ``look``.
      tokens: read behind the prefix.
      slots: at least P + T.
    """
    cache: Cache
    _, cache = model.prefixed.apply({"params": params}, prefix, tokens, new_cache(model.text, len(prefix), slots))
    return cache


class _Prefixed(TokenModule):
    """``TokenModule`` with a prefix of vectors; its parameters are the same."""

    def __call__(self, prefix: jax.Array, tokens: jax.Array, cache: Cache | None = None) -> Any:  # type: ignore[override]
        config = self.config
        size = prefix.shape[1]
        length = size + tokens.shape[1]
        positions = jnp.arange(length)
        if cache is not None:
            positions = jnp.broadcast_to(positions, (len(prefix), length))
        check_tokens(config, tokens, positions[..., size:])
        x, _ = self.embed(tokens, positions[..., size:], None, None)
        x = jnp.concatenate([prefix.astype(x.dtype), x], 1)
        x = site(self, "embed", x, "B T D", positions=positions)
        slots = None if cache is None else cache.k.shape[2]
        (x, cache), _ = self.blocks((x, cache), positions, views(config, positions, slots), jnp.arange(config.layers))
        out = self.read_out(x[:, size:], positions[..., size:])
        return out if cache is None else (out, cache)
