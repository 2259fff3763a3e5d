"""Batch norm for certified training: statistics of the clean pass, running averages for testing.

In training, μ and v are those of the batch's own activations (biased variance), and the bounds of the same step use
them as constants of an affine map; gradients flow through them. In testing, running averages take their place, moved in
every step by PyTorch's rule::

    r ← r + 0.1 (t − r),   t = (μ, v n/(n − 1)),   n the numbers per channel: B, or B X Y
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mechlab.methods.architectures.piecewise import BatchNorm, Moments, Network, Residual, apply


class CleanPass(NamedTuple):
    """What a forward of the inputs themselves gives in training.

    Attributes:
      output: logits (B, K).
      fixed: the network with each batch norm at the statistics of this batch; gradients flow through them.
      moments: of every batch norm, in order of the forward.
      counts: numbers that each channel's moments are over, B or B X Y.
    """

    output: jax.Array
    fixed: Network
    moments: tuple[Moments, ...]
    counts: tuple[int, ...]


def clean_pass(net: Network, x: jax.Array) -> CleanPass:
    """Forward with batch norm at the statistics of this batch, biased variance.

    Args:
      net: a network.
      x: (B, ...) inputs, without perturbation.

    Returns:
      Logits, the fixed network, and the statistics for ``running_pull``.
    """
    fixed: list[Any] = []
    moments: tuple[Moments, ...] = ()
    counts: tuple[int, ...] = ()
    for layer in net:
        if isinstance(layer, Residual):
            body, shortcut = clean_pass(layer.body, x), clean_pass(layer.shortcut, x)
            x, layer = body.output + shortcut.output, Residual(body.fixed, shortcut.fixed)
            moments += body.moments + shortcut.moments
            counts += body.counts + shortcut.counts
        else:
            if isinstance(layer, BatchNorm):
                axes = tuple(range(x.ndim - 1))
                moments += (Moments(x.mean(axes), x.var(axes)),)
                counts += (math.prod(x.shape[:-1]),)
                layer = layer.at(moments[-1])
            x = apply((layer,), x)
        fixed.append(layer)
    return CleanPass(x, tuple(fixed), moments, counts)


def fix(net: Network, running: Iterable[Moments]) -> Network:
    """The network for testing: each batch norm at its running statistics.

    Args:
      net: a network.
      running: one ``Moments`` per batch norm, in order of the forward.

    Raises:
      ValueError: more or fewer statistics than batch norms.
    """
    left = list(running)
    wanted, given = len(batch_norms(net)), len(left)
    if wanted != given:
        raise ValueError(f"fix: the network has {wanted} batch norms, got {given} running statistics.")

    def one(layer: Any) -> Any:
        if isinstance(layer, Residual):
            return Residual(tuple(map(one, layer.body)), tuple(map(one, layer.shortcut)))
        return layer.at(left.pop(0)) if isinstance(layer, BatchNorm) else layer

    return tuple(map(one, net))


def batch_norms(net: Network) -> list[BatchNorm]:
    """Every batch norm in order of the forward."""
    found: list[BatchNorm] = []
    for layer in net:
        if isinstance(layer, Residual):
            found += batch_norms(layer.body) + batch_norms(layer.shortcut)
        elif isinstance(layer, BatchNorm):
            found.append(layer)
    return found


def initial_running(net: Network, x: jax.Array) -> tuple[Moments, ...]:
    """Running statistics before training: mean 0 and variance 1 of every batch norm.

    Args:
      net: a network.
      x: (B, ...) inputs, for their shape only.
    """
    shapes = jax.eval_shape(lambda net, x: clean_pass(net, x).moments, net, x)
    return tuple(Moments(jnp.zeros(s.mean.shape, s.mean.dtype), jnp.ones(s.mean.shape, s.mean.dtype)) for s in shapes)


def running_targets(clean: CleanPass) -> tuple[Moments, ...]:
    """What running statistics move towards: the batch's, with the unbiased variance v n/(n − 1), as in PyTorch."""
    pairs = zip(clean.moments, clean.counts, strict=True)
    return tuple(Moments(m.mean, m.variance * (n / max(n - 1, 1))) for m, n in pairs)


def update_running(
    running: tuple[Moments, ...], targets: tuple[Moments, ...], momentum: float = 0.1
) -> tuple[Moments, ...]:
    """r ← r + momentum (t − r): PyTorch's sense of momentum, 0.1 there is 0.9 in Flax."""
    return jax.tree.map(lambda r, t: r + momentum * (t - r), running, targets)


def running_pull(running: tuple[Moments, ...], targets: tuple[Moments, ...], momentum: float = 0.1) -> jax.Array:
    """A term of value 0 whose gradient descent, at rate 1, is ``update_running``.

    Its gradient with respect to ``running`` is momentum (r − t). A training loop that only knows a loss and its
    gradient can so carry running statistics among its parameters, under ``optax.sgd(1.0)``.

    Returns:
      Scalar 0.
    """
    gaps = jax.tree.map(lambda r, t: ((r - jax.lax.stop_gradient(t)) ** 2).sum(), running, targets)
    pull = momentum / 2 * sum(jax.tree.leaves(gaps), start=jnp.zeros(()))
    return pull - jax.lax.stop_gradient(pull)
