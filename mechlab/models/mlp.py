"""Multilayer perceptron with named sites: the smallest model, and the classifier of many image experiments.

Sites, l = 0 .. number of hidden layers - 1 (layers are not scanned, their widths may differ)::

    mlp_pre.l   (B, F_l)  z_l = h_{l-1} W_l + b_l
    mlp_act.l   (B, F_l)  h_l = activation(z_l); an edit here also gets z_l, as ``context.pre``
    logits      (B, C)    never passed through an activation

Parameters: ``layer_l/kernel`` (in, out) and ``layer_l/bias`` (out,), the output layer last.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.errors import unknown
from mechlab.core.model import Model
from mechlab.core.sites import site
from mechlab.models.layers import ACTIVATIONS, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Shape of a perceptron.

    Attributes:
      widths: (in, hidden ..., out).
      activation: one of ``models.layers.ACTIVATIONS``.
    """

    widths: tuple[int, ...]
    activation: str = "relu"

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths needs at least an input and an output, all positive, got {self.widths}.")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)


def mlp(config: MLPConfig) -> Model:
    """The model; inputs are flat (B, widths[0]) float arrays, the output is logits (B, widths[-1])."""
    return Model(_MLP(config), (jax.ShapeDtypeStruct((1, config.widths[0]), jnp.float32),))


class _MLP(nn.Module):
    config: MLPConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = self.config.widths
        if x.ndim != 2 or x.shape[-1] != widths[0]:
            raise ValueError(f"inputs must be (B, {widths[0]}), got {x.shape}.")
        for layer, width in enumerate(widths[1:-1]):
            z = site(self, f"mlp_pre.{layer}", _Layer(width, name=f"layer_{layer}")(x), "B F")
            x = site(self, f"mlp_act.{layer}", ACTIVATIONS[self.config.activation](z), "B F", pre=z)
        return site(self, "logits", _Layer(widths[-1], name=f"layer_{len(widths) - 2}")(x), "B V")


class _Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # He initialisation (arXiv 1502.01852, eq. 10): plain normal, variance 2 / fan-in.
        he = nn.initializers.normal(math.sqrt(2 / x.shape[-1]))
        kernel = self.param("kernel", he, (x.shape[-1], self.width))
        return linear(x, kernel, self.param("bias", nn.initializers.zeros, (self.width,)))
