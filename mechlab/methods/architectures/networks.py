"""The networks of certified training and their initial weights: IBP initialisation and those it is compared with.

``perceptron`` and ``cnn7`` make a network in PyTorch's default weights; an initialiser is a transform of a network that
draws every kernel but the classifier's anew. Only the kernels differ between the networks of one key.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mechlab.core import linalg
from mechlab.core.rng import stream
from mechlab.methods.architectures.piecewise import (
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    Network,
    ReLU,
    Residual,
)

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def perceptron(key: jax.Array, widths: tuple[int, ...], *, batch_norm: bool) -> Network:
    """Dense layers with ReLU between, batch norm before each ReLU; PyTorch's default weights.

    Args:
      key: typed key.
      widths: (in, hidden ..., classes).
      batch_norm: after every hidden dense layer.

    Returns:
      The network; inputs (B, X, Y) or (B, in) are flattened.
    """
    net: list[Any] = [Flatten()]
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        net += [dense(stream(key, layer), inputs, outputs)]
        if layer < len(widths) - 2:
            net += [*_norm(outputs, batch_norm), ReLU()]
    return tuple(net)


def cnn7(
    key: jax.Array,
    size: tuple[int, int, int],
    classes: int,
    *,
    width: int = 64,
    hidden: int = 512,
    batch_norm: bool,
) -> Network:
    """CNN-7: 3 x 3 convolutions of widths w, w, 2w (stride 2), 2w, 2w, a dense layer, the classifier.

    Args:
      key: typed key.
      size: (X, Y, F) of an input.
      classes: K.
      width: w.
      hidden: units of the dense layer.
      batch_norm: after every convolution and after the hidden dense layer.

    Returns:
      The network; PyTorch's default weights.
    """
    net: list[Any] = []
    channels = size[2]
    for layer, (outputs, stride) in enumerate([(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)]):
        kernel, bias = _uniform(stream(key, layer), (3, 3, channels, outputs))
        net += [Conv(kernel, bias, stride=stride), *_norm(outputs, batch_norm), ReLU()]
        channels = outputs
    pixels = -(-size[0] // 2) * -(-size[1] // 2)
    net += [Flatten(), dense(stream(key, "hidden"), pixels * channels, hidden), *_norm(hidden, batch_norm), ReLU()]
    return (*net, dense(stream(key, "classes"), hidden, classes))


def dense(key: jax.Array, inputs: int, outputs: int) -> Dense:
    """A dense layer with PyTorch's default weights and biases, both uniform within ±1/√inputs."""
    return Dense(*_uniform(key, (inputs, outputs)))


def ibp_init(key: jax.Array, net: Network) -> Network:
    """IBP initialisation: N(0, 2π/n²) for every kernel but the classifier's.

    For independent weights E[δ_i] = n E|W| E[δ_{i−1}], and a ReLU halves it. A Gaussian has E|W| = σ √(2/π), so
    σ = √(2π)/n makes the gain (n/2) E|W| of a layer 1. Layers that read a residual sum, whose radius is that of two
    branches, get half of it. With the classifier's kernel drawn so too, margins would start near 0: it stays, and so do
    biases.

    Args:
      key: typed key.
      net: a network, in PyTorch's default weights, as ``perceptron`` makes them.

    Returns:
      The same network with other kernels.
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return math.sqrt(2 * math.pi) / math.prod(shape[:-1]) * jax.random.normal(key, shape)

    return _redrawn(key, net, draw, after_sum=0.5)


def xavier_init(key: jax.Array, net: Network) -> Network:
    """Xavier (Glorot) initialisation, N(0, 2/(n_in + n_out)), of every kernel but the classifier's: the baseline.

    Radii grow by about 0.4 √n per layer.
    """
    return _redrawn(key, net, jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal"))


def kaiming_init(key: jax.Array, net: Network) -> Network:
    """Kaiming (He) initialisation, N(0, 2/n_in), of every kernel but the classifier's."""
    return _redrawn(key, net, jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal"))


def orthogonal_init(key: jax.Array, net: Network) -> Network:
    """Orthogonal initialisation of every kernel but the classifier's, as a matrix (inputs, outputs)."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = linalg.qr(jax.random.normal(key, (max(rows, columns), min(rows, columns))))
        # With these signs q is drawn evenly from all orthogonal matrices (arXiv math-ph/0609050).
        q = q * jnp.sign(jnp.diagonal(r))
        return (q if rows >= columns else q.T).reshape(shape)

    return _redrawn(key, net, draw)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    kernel, bias = (stream(key, name) for name in ("kernel", "bias"))
    return (
        jax.random.uniform(kernel, shape, minval=-bound, maxval=bound),
        jax.random.uniform(bias, shape[-1:], minval=-bound, maxval=bound),
    )


def _norm(units: int, wanted: bool) -> list[BatchNorm]:
    return [BatchNorm(jnp.ones(units), jnp.zeros(units))] if wanted else []


def _redrawn(key: jax.Array, net: Network, draw: Draw, after_sum: float = 1.0) -> Network:
    """New kernels for all but the last layer, times ``after_sum`` where the input is a residual sum."""
    head = net[-1]
    if not isinstance(head, Dense):
        raise TypeError(f"initialisation: the last layer must be Dense, got {type(head).__name__}.")
    hidden, _, _ = _redrawn_body(key, net[:-1], draw, after_sum, 0, False)
    return (*hidden, head)


def _redrawn_body(
    key: jax.Array, net: Network, draw: Draw, after_sum: float, number: int, summed: bool
) -> tuple[Network, int, bool]:
    """The layers, the number of kernels drawn so far, and whether what comes out is a residual sum."""
    layers: list[Any] = []
    for layer in net:
        if isinstance(layer, Residual):
            body, number, _ = _redrawn_body(key, layer.body, draw, after_sum, number, summed)
            shortcut, number, _ = _redrawn_body(key, layer.shortcut, draw, after_sum, number, summed)
            layer, summed = Residual(body, shortcut), True
        elif isinstance(layer, Dense | Conv):
            kernel = draw(stream(key, number), layer.kernel.shape) * (after_sum if summed else 1.0)
            layer = dataclasses.replace(layer, kernel=kernel)
            number, summed = number + 1, False
        layers.append(layer)
    return tuple(layers), number, summed
