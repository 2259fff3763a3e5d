"""Networks for the tests of bounds: the stored one, whose arrays are in PyTorch's layouts, and small random ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.methods.architectures.networks import dense
from mechlab.methods.architectures.piecewise import (
    AveragePool,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    ReLU,
    Residual,
)


def from_torch(v, dtype):
    """The stored network: conv kernels (out, in, h, w) to HWIO, dense ones (out, in) to (in, out)."""

    def take(name):
        return jnp.asarray(v[name].astype(dtype))

    def conv(name, stride):
        return Conv(take(f"{name}.weight").transpose(2, 3, 1, 0), take(f"{name}.bias"), stride=stride)

    def norm(name):
        return BatchNorm(take(f"{name}.weight"), take(f"{name}.bias"))

    # The stored network flattens (C, X, Y), ours (X, Y, C).
    hidden = take("7.weight").reshape(7, 3, 3, 3).transpose(2, 3, 1, 0).reshape(27, 7)
    return (
        conv("0", 1),
        norm("1"),
        ReLU(),
        conv("3", 2),
        norm("4"),
        ReLU(),
        Flatten(),
        Dense(hidden, take("7.bias")),
        norm("8"),
        ReLU(),
        Dense(take("10.weight").T, take("10.bias")),
    )


def images(x, dtype):
    """(B, C, X, Y) to (B, X, Y, C)."""
    return jnp.asarray(np.asarray(x, dtype).transpose(0, 2, 3, 1))


def channels_first(x):
    """Activations of ours in the stored order of axes."""
    return np.asarray(x).transpose(0, 3, 1, 2) if x.ndim == 4 else np.asarray(x)


def conv(key, inputs, outputs, stride=1):
    kernel = 0.4 * jax.random.normal(key, (3, 3, inputs, outputs))
    return Conv(kernel, 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (outputs,)), stride=stride)


def norm(key, units):
    keys = jax.random.split(key)
    return BatchNorm(jax.random.normal(keys[0], (units,)), jax.random.normal(keys[1], (units,)))


@jax.jit
def every_layer(key):
    """A network of every kind of layer, with two residual sums in a row; inputs (B, 6, 6, 2), 4 classes."""
    k = jax.random.split(key, 9)
    down = Residual((conv(k[1], 3, 5, 2), norm(k[2], 5), ReLU(), conv(k[3], 5, 4)), (conv(k[4], 3, 4, 2),))
    return (
        conv(k[0], 2, 3),
        ReLU(),
        AveragePool(1),
        down,
        ReLU(),
        Residual((conv(k[5], 4, 4), norm(k[6], 4), ReLU())),
        AveragePool(3),
        Flatten(),
        dense(k[7], 4, 6),
        ReLU(),
        dense(k[8], 6, 4),
    )


def two_layers(key, inputs=5, hidden=8, classes=3):
    keys = jax.random.split(key)
    return (dense(keys[0], inputs, hidden), ReLU(), dense(keys[1], hidden, classes))
