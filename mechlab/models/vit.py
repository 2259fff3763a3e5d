"""The vision transformer (arXiv 2010.11929), and DeiT (arXiv 2012.12877): patches as tokens through the same blocks.

Sites are those of ``models/transformer.py``; T counts the class token, the distillation token if there is one, then the
patches row by row. ``logits`` is (B, V) with V classes.

Parameters: ``embed/patch/kernel`` (p, p, C, D), ``embed/class`` (D,), ``embed/positions`` (T, D), ``blocks`` as in the
transformer, ``final_norm``, ``head/kernel`` (D, V), or with two heads ``class_head`` and ``distilled_head``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.model import Model
from mechlab.core.sites import site
from mechlab.models.blocks import stacked, views
from mechlab.models.layers import Linear, Norm
from mechlab.models.transformer_config import MLPKind, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a vision transformer.

    Attributes:
      image: (h, w) of an image in pixels.
      patch: p, side of a patch in pixels; it divides h and w.
      layers, width, heads, hidden: L, D, H, F.
      channels: C of a pixel.
      classes: V; None puts out hidden states instead of logits.
      distilled: a distillation token behind the class token (DeiT).
      distilled_head: the logits are the mean over the heads of both tokens.
      norm_eps, activation, mlp, init_std, dtype: as in ``TransformerConfig``.
      bias_qkv, bias_patch: biases of q, k, v, and of the patch embedding.
      embed_norm: norm after the embeddings are summed (CLIP).
    """

    image: tuple[int, int]
    patch: int
    layers: int
    width: int
    heads: int
    hidden: int
    channels: int = 3
    classes: int | None = None
    distilled: bool = False
    distilled_head: bool = False
    norm_eps: float = 1e-6
    activation: str = "gelu"
    mlp: MLPKind | None = None
    init_std: float | None = 0.02
    bias_qkv: bool = True
    bias_patch: bool = True
    embed_norm: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        problems = []
        if self.patch < 1 or any(side < 1 or side % self.patch for side in self.image):
            problems.append(f"patch={self.patch} does not divide image={self.image}")
        if self.channels < 1 or (self.classes is not None and self.classes < 1):
            problems.append(f"channels and classes must be at least 1, got {self.channels} and {self.classes}")
        if self.distilled_head and not (self.distilled and self.classes):
            problems.append("distilled_head needs distilled=True and classes")
        if problems:
            raise ValueError(f"ViTConfig: {'; '.join(problems)}.")
        _ = self.trunk  # refuses what the blocks cannot have

    @property
    def tokens(self) -> int:
        """T: the patches and the one or two tokens in front of them."""
        return (self.image[0] // self.patch) * (self.image[1] // self.patch) + 1 + self.distilled

    @property
    def trunk(self) -> TransformerConfig:
        """The blocks' configuration: all tokens see all tokens."""
        return TransformerConfig(
            vocabulary=0,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            context=self.tokens,
            norm_eps=self.norm_eps,
            activation=self.activation,
            mlp=self.mlp,
            init_std=self.init_std,
            bias_qkv=self.bias_qkv,
            causal=False,
            unembed=False,
            dtype=self.dtype,
        )


def vit(config: ViTConfig) -> Model:
    """The model. Input: pixels (B, h, w, C) float, scaled as the checkpoint wants them (often to [-1, 1]).

    Output: logits (B, V), or final hidden states (B, T, D) where ``config.classes`` is None; float32.
    """
    return Model(ViTModule(config), (jax.ShapeDtypeStruct((1, *config.image, config.channels), jnp.float32),))


class ViTModule(nn.Module):
    """The Flax module behind ``vit``, for models that contain one."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        config, trunk = self.config, self.config.trunk
        wanted = (*config.image, config.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted or not jnp.issubdtype(pixels.dtype, jnp.floating):
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"pixels must be floats of shape (B, {shape}), got {pixels.dtype}{pixels.shape}.")
        positions = jnp.arange(config.tokens)
        x = site(self, "embed", _Embed(config, name="embed")(pixels), "B T D", positions=positions)
        layers = jnp.arange(trunk.layers)
        (x, _), _ = stacked(trunk, name="blocks")((x, None), positions, views(trunk, positions), layers)
        x = Norm("layer", config.norm_eps, name="final_norm")(x)
        x = site(self, "final_norm", x, "B T D", positions=positions).astype(jnp.float32)
        if config.classes is None:
            return x
        logits = Linear((config.classes,), name="class_head" if config.distilled_head else "head")(x[:, 0])
        if config.distilled_head:
            logits = (logits + Linear((config.classes,), name="distilled_head")(x[:, 1])) / 2
        return site(self, "logits", logits, "B V")


class _Embed(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        config = self.config
        (rows, columns), side = (size // config.patch for size in config.image), config.patch
        patches = pixels.astype(config.dtype).reshape(-1, rows, side, columns, side, config.channels)
        patches = patches.swapaxes(2, 3).reshape(-1, rows * columns, side, side, config.channels)
        x = Linear((config.width,), inputs=3, use_bias=config.bias_patch, name="patch")(patches)

        def parameter(name: str, *shape: int) -> Any:
            return self.param(name, nn.initializers.normal(0.02), shape)

        first = [parameter("class", config.width)]
        if config.distilled:
            first.append(parameter("distilled", config.width))
        front = jnp.broadcast_to(jnp.stack(first).astype(x.dtype), (len(x), len(first), config.width))
        x = jnp.concatenate([front, x], axis=1) + parameter("positions", config.tokens, config.width)
        if config.embed_norm:
            x = Norm("layer", config.norm_eps, name="norm")(x)
        return x.astype(config.dtype)
