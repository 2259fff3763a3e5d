"""Piecewise linear networks as lists of layers: what can be read for values, for intervals and for linear relaxations.

A network is a tuple of layers, and a layer is a pytree of its own arrays, so a network is what ``jax.grad`` and optax
work on::

    net = (Dense(kernel, bias), BatchNorm(scale, bias), ReLU(), Dense(kernel, bias))

An affine layer f(x) = A x + b says three things: ``linear(x)`` = A x, ``absolute()``, the layer with ``|A|``, and
``offset``, b. Everything else follows: ``interval.py`` needs ``|A|``, ``crown.py`` the transpose of A.

Batch norm is affine only once its statistics are known. ``clean_pass`` takes them from the batch itself (training) and
``fix`` from running averages (testing), both in ``batch_norm.py``; they give back the network with every ``BatchNorm``
replaced by the ``ChannelAffine`` that it is for these statistics. Bounds are computed on such a *fixed* network only,
so they cannot use statistics of their own.

Axes: B batch, X and Y of an image, F channels or units, always last. Kernels are (in, out) and HWIO.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

EPSILON = 1e-5
"""Added to every variance, as in PyTorch."""

Network = tuple[Any, ...]


@struct.dataclass
class Dense:
    """x W + b; kernel (in, out), bias (out,)."""

    kernel: jax.Array
    bias: jax.Array

    @property
    def offset(self) -> jax.Array:
        return self.bias

    def linear(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel

    def absolute(self) -> Dense:
        return Dense(jnp.abs(self.kernel), self.bias)


@struct.dataclass
class Conv:
    """A two-dimensional convolution; kernel (h, w, in, out), bias (out,), zeros around the image."""

    kernel: jax.Array
    bias: jax.Array
    stride: int = struct.field(pytree_node=False, default=1)
    padding: int = struct.field(pytree_node=False, default=1)

    @property
    def offset(self) -> jax.Array:
        return self.bias

    def linear(self, x: jax.Array) -> jax.Array:
        around = [(self.padding, self.padding)] * 2
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, self.kernel, (self.stride,) * 2, around, dimension_numbers=axes)

    def absolute(self) -> Conv:
        return Conv(jnp.abs(self.kernel), self.bias, self.stride, self.padding)


@struct.dataclass
class ChannelAffine:
    """a x + b per channel: a batch norm whose statistics are given; both (F,)."""

    scale: jax.Array
    shift: jax.Array

    @property
    def offset(self) -> jax.Array:
        return self.shift

    def linear(self, x: jax.Array) -> jax.Array:
        return self.scale * x

    def absolute(self) -> ChannelAffine:
        return ChannelAffine(jnp.abs(self.scale), self.shift)


@struct.dataclass
class AveragePool:
    """Means of windows of ``size`` by ``size`` that do not overlap; the image must divide into them."""

    size: int = struct.field(pytree_node=False, default=2)

    offset = None

    def linear(self, x: jax.Array) -> jax.Array:
        batch, rows, columns, channels = x.shape
        windows = (batch, rows // self.size, self.size, columns // self.size, self.size, channels)
        return x.reshape(windows).mean((2, 4))

    def absolute(self) -> AveragePool:
        return self


@struct.dataclass
class Flatten:
    """(B, X, Y, F) to (B, X Y F)."""

    offset = None

    def linear(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)

    def absolute(self) -> Flatten:
        return self


@struct.dataclass
class ReLU:
    """max(x, 0)."""


@struct.dataclass
class Residual:
    """body(x) + shortcut(x); an empty shortcut is the identity."""

    body: Network
    shortcut: Network = ()


class Moments(NamedTuple):
    """Mean and variance per channel, (F,) each. Of a batch, the variance is biased: divided by the count."""

    mean: jax.Array
    variance: jax.Array


@struct.dataclass
class BatchNorm:
    """γ (x − μ) / √(v + 1e-5) + β with statistics (μ, v) from elsewhere, see ``clean_pass`` and ``fix``.

    Attributes:
      scale, bias: γ and β, (F,); None leaves them out.
      centred: subtract μ. False is an ablation.
      scaled: divide by √(v + 1e-5). False is an ablation.
    """

    scale: jax.Array | None
    bias: jax.Array | None
    centred: bool = struct.field(pytree_node=False, default=True)
    scaled: bool = struct.field(pytree_node=False, default=True)

    def at(self, moments: Moments) -> ChannelAffine:
        """The affine map that this layer is for these statistics."""
        one = jnp.ones_like(moments.mean)
        scale = one if self.scale is None else self.scale
        scale = scale / jnp.sqrt(moments.variance + EPSILON) if self.scaled else scale
        shift = jnp.zeros_like(one) if self.bias is None else self.bias
        return ChannelAffine(scale, shift - scale * moments.mean if self.centred else shift)


AFFINE = (Dense, Conv, ChannelAffine, AveragePool, Flatten)


def affine(layer: Any, x: jax.Array) -> jax.Array:
    """A x + b of one affine layer."""
    y: jax.Array = layer.linear(x)
    return y if layer.offset is None else y + layer.offset


def apply(net: Network, x: jax.Array) -> jax.Array:
    """The values of a fixed network.

    Args:
      net: a network without ``BatchNorm``: one that has none, or one from ``clean_pass`` or ``fix``.
      x: (B, ...) inputs.

    Returns:
      (B, K) logits, or whatever the last layer gives.

    Raises:
      TypeError: a layer that is not known, or a batch norm without statistics.

    >>> net = (Dense(jnp.ones((2, 1)), jnp.zeros(1)), ReLU())
    >>> apply(net, jnp.asarray([[1.0, 2.0], [1.0, -2.0]])).tolist()
    [[3.0], [0.0]]
    """
    for layer in net:
        if isinstance(layer, ReLU):
            x = jax.nn.relu(x)
        elif isinstance(layer, Residual):
            x = apply(layer.body, x) + apply(layer.shortcut, x)
        elif isinstance(layer, AFFINE):
            x = affine(layer, x)
        else:
            raise unsupported(layer)
    return x


def unsupported(layer: Any) -> TypeError:
    """The error for a layer that an interpreter does not know."""
    if isinstance(layer, BatchNorm):
        return TypeError("BatchNorm has no statistics here: give the network that clean_pass or fix returns.")
    known = ", ".join(kind.__name__ for kind in (*AFFINE, ReLU, Residual))
    return TypeError(f"layer of type {type(layer).__name__} is not supported. Known: {known}.")
