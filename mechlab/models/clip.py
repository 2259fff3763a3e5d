"""CLIP (arXiv 2103.00020): two towers, one of text and one of images, that put out vectors of one space.

Each tower is a model of its own, with the sites of its transformer (``models/transformer.py``, ``models/vit.py``)::

    clip = clip_model(config)
    texts = clip.text.apply({"params": params["text"]}, tokens)          # (N, P)
    images = clip.vision.apply({"params": params["vision"]}, pixels)     # (B, P)
    similarity(params, images, texts)                                    # (B, N)

Parameters of a tower: ``tower`` and ``projection/kernel`` (D, P); beside the towers ``logit_scale``, a logarithm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.model import Model
from mechlab.models.layers import Linear
from mechlab.models.transformer import TokenModule
from mechlab.models.transformer_config import TransformerConfig
from mechlab.models.vit import ViTConfig, ViTModule


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Shape of both towers.

    Attributes:
      text: causal, without unembedding.
      vision: without classes.
      projection: P, width of the common space.
      end: token at which a text is read, its first occurrence; None reads at the largest token of each text.
    """

    text: TransformerConfig
    vision: ViTConfig
    projection: int
    end: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.text.unembed or self.vision.classes is not None:
            problems.append("the towers put out hidden states: text needs unembed=False, vision classes=None")
        if self.projection < 1:
            problems.append(f"projection must be at least 1, got {self.projection}")
        if self.end is not None and not 0 <= self.end < self.text.vocabulary:
            problems.append(f"end must be a token, 0..{self.text.vocabulary - 1}, got {self.end}")
        if problems:
            raise ValueError(f"CLIPConfig: {'; '.join(problems)}.")


@dataclasses.dataclass(frozen=True)
class CLIP:
    """Both towers.

    Attributes:
      config: their shape.
      text: tokens (N, T), and optionally positions, to (N, P).
      vision: pixels (B, h, w, 3) to (B, P).
    """

    config: CLIPConfig
    text: Model
    vision: Model

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters; the scale is exp(2.6592), about 1 / 0.07."""
        text, vision = jax.random.split(key)
        return {"text": self.text.init(text), "vision": self.vision.init(vision), "logit_scale": jnp.asarray(2.6592)}


def clip_model(config: CLIPConfig) -> CLIP:
    """The two towers of ``config``."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, *config.vision.image, config.vision.channels), jnp.float32)
    return CLIP(config, Model(_Text(config), (tokens,)), Model(_Vision(config), (pixels,)))


def similarity(params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
    """exp(logit_scale) times the cosine of every image (B, P) with every text (N, P): (B, N)."""
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
    return jnp.exp(params["logit_scale"].astype(jnp.float32)) * unit[0] @ unit[1].T


class _Text(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        hidden = TokenModule(self.config.text, name="tower")(tokens, positions)
        read = jnp.argmax(tokens if self.config.end is None else tokens == self.config.end, axis=-1)
        chosen = jnp.take_along_axis(hidden, read[:, None, None], axis=1)[:, 0]
        return Linear((self.config.projection,), use_bias=False, name="projection")(chosen)


class _Vision(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        hidden = ViTModule(self.config.vision, name="tower")(pixels)
        return Linear((self.config.projection,), use_bias=False, name="projection")(hidden[:, 0])
