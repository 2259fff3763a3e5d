"""A small convolutional classifier with named sites.

Sites, l = 0 .. number of convolutions - 1::

    conv_pre.l   (B, X, Y, F_l)  3 x 3 convolution, same padding
    conv_act.l   (B, X, Y, F_l)  ReLU, before the 2 x 2 max-pooling; an edit here also gets ``context.pre``
    logits       (B, C)

Parameters: ``conv_l/kernel`` (3, 3, in, out), ``conv_l/bias``, ``head/kernel`` (in, C), ``head/bias``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.model import Model
from mechlab.core.sites import site


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """Shape of the network.

    Attributes:
      size: (X, Y) of an image with one channel.
      channels: of each convolution; each is followed by a pooling that halves the image.
      classes: C.
    """

    size: tuple[int, int]
    channels: tuple[int, ...] = (16, 32)
    classes: int = 10

    def __post_init__(self) -> None:
        if min(self.size) < 2 ** len(self.channels):
            raise ValueError(f"an image of {self.size} cannot be halved {len(self.channels)} times.")


def cnn(config: CNNConfig) -> Model:
    """The model; inputs are flat (B, X * Y) float images, the output is logits (B, C)."""
    return Model(_CNN(config), (jax.ShapeDtypeStruct((1, config.size[0] * config.size[1]), jnp.float32),))


class _CNN(nn.Module):
    config: CNNConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        if x.ndim != 2 or x.shape[1] != config.size[0] * config.size[1]:
            raise ValueError(f"inputs must be (B, {config.size[0] * config.size[1]}), got {x.shape}.")
        he = nn.initializers.he_normal()
        x = x.reshape(-1, *config.size, 1)
        for layer, channels in enumerate(config.channels):
            z = nn.Conv(channels, (3, 3), kernel_init=he, name=f"conv_{layer}")(x)
            z = site(self, f"conv_pre.{layer}", z, "B X Y F")
            x = site(self, f"conv_act.{layer}", jax.nn.relu(z), "B X Y F", pre=z)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Dense(config.classes, name="head")(x.reshape(x.shape[0], -1))
        return site(self, "logits", x, "B V")
