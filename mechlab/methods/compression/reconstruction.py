"""ZQ-Local and ZQ-Global: kernels trained so that rounding them hurts less (arXiv 2303.08302).

With x the inputs on calibration texts, x_q = x or x rounded, Q a grid and f a transformer block::

    ZQ-Local    min over W' of |x W - x_q Q(W')|^2                      each kernel alone                  ``zq_local``
    ZQ-Global   min over all W' of a block of |f(x; W) - f_q(x; Q(W'))|^2                                  ``zq_global``

f_q is the block with rounded kernels and inputs; both read what the unquantised blocks before them give (layer-by-layer
distillation). Gradients pass the rounding straight through, grids follow W' in every step, and Adam's step falls
linearly from a share of mean |W|. Of several shares, and no training at all, the one with the smallest loss on the
calibration texts is kept: for each kernel (Local), for each block (Global).

ZQ-Local needs no texts in its loop. With E = W - Q(W') and means over tokens::

    <|x W - x_q Q(W')|^2> = tr E^T H E + 2 tr E^T G + <|(x - x_q) W|^2>,   H = <x_q^T x_q>,   G = <x_q^T (x - x_q)> W

Differs from the paper: that loss of all texts in place of batches; rates and steps, which the paper does not settle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mechlab.core.estimators import straight_through
from mechlab.methods.compression.activations import RoundInputs, Scheme
from mechlab.methods.compression.decoders import Place, kernel_of, places, sites_of, with_kernels
from mechlab.methods.compression.rounding import nearest, require_matrix
from mechlab.models.blocks import one_block
from mechlab.models.transformer_config import TransformerConfig
from mechlab.training.batches import shuffled

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

RATES = (3e-3, 1e-2, 3e-2)
"""Adam's first step as a share of the mean |w| of a kernel, to choose from."""


class Reconstruction(NamedTuple):
    """Weights that were trained to be rounded, and the losses on the calibration texts; leaves (L, ...) of a decoder.

    Attributes:
      kernels: W' with the smallest loss, not rounded; by name where there are many.
      loss: (1 + R,) of plain rounding, and after training with every rate; by name for ``local_blocks``.
    """

    kernels: Any
    loss: Any


def zq_local(
    kernel: jax.Array,
    x: jax.Array,
    rounded: jax.Array,
    *,
    steps: int,
    rates: tuple[float, ...] = RATES,
    inputs: int = 1,
    **grid: Any,
) -> Reconstruction:
    """One kernel, trained alone to give the outputs that it gave.

    Args:
      kernel: input axes first.
      x: what it reads on calibration texts, ``(..., *in)``.
      rounded: the same as the quantised kernel will read it.
      steps: of Adam; 0 leaves plain rounding.
      rates: to choose from.
      inputs: number of input axes.
      **grid: of ``rounding.quantise``.

    Returns:
      W' shaped like the kernel, and the mean squared errors of an output of a token.

    Raises:
      ValueError: no calibration tokens, inputs that do not fit, steps < 0, no rate or one that is not positive;
        otherwise as ``rounding.quantise``.
      TypeError: a kernel of integers.
    """
    _require_steps(steps, rates)
    w = require_matrix(kernel, inputs)
    wanted = kernel.shape[:inputs]
    if x.shape[x.ndim - inputs :] != wanted or rounded.shape != x.shape or not x.size:
        raise ValueError(f"zq_local: wanted calibration inputs (..., *{wanted}), got {x.shape} and {rounded.shape}.")
    exact, seen = (jnp.asarray(z, jnp.float32).reshape(-1, len(w)) for z in (x, rounded))
    missing = (exact - seen) @ w
    h, g, rest = seen.T @ seen / len(seen), seen.T @ missing / len(seen), jnp.square(missing).sum() / len(seen)

    def loss(trained: jax.Array, step: Any = None) -> jax.Array:
        e = w - straight_through(nearest(trained, **grid), trained)
        return (jnp.vdot(e, h @ e + 2 * g) + rest) / w.shape[1]

    trained = jax.vmap(lambda rate: _descend(loss, w, rate, jnp.arange(steps)))(jnp.asarray(rates))
    tried = _with_start(w, trained)
    found = jax.vmap(loss)(tried)
    return Reconstruction(tried[found.argmin()].reshape(kernel.shape), found)


def local_blocks(
    config: TransformerConfig,
    params: Any,
    acts: Mapping[str, jax.Array],
    *,
    schemes: tuple[Scheme, ...] = (Scheme(),),
    which: int | jax.Array = 0,
    **options: Any,
) -> Reconstruction:
    """ZQ-Local for every kernel of a decoder's blocks; ``quantise_blocks`` with the same grid then rounds them.

    Args:
      config, params: of the decoder.
      acts: from ``decoders.calibrate``; may be mapped over, one set of texts a lane.
      schemes, which: how inputs will be rounded, as in ``activations.round_inputs``; ``which`` may be mapped over.
      **options: of ``zq_local``.

    Returns:
      Kernels (L, in, out) and losses (L, 1 + R), both by name.
    """
    rounding = RoundInputs(jnp.asarray(which), None, schemes)
    alike: dict[tuple[int, ...], list[Place]] = {}
    for place in places(config):
        alike.setdefault(_matrix_shape(params, place), []).append(place)
    kernels: dict[str, jax.Array] = {}
    losses: dict[str, jax.Array] = {}
    for shape, together in alike.items():

        def one(now: Any, shape: tuple[int, ...] = shape) -> Reconstruction:
            kernels, x = now
            flat = [value.reshape(*value.shape[:2], shape[0]) for value in x]
            train = jax.vmap(lambda kernel, x: zq_local(kernel, x, rounding(x), **options))
            return train(jnp.stack([kernel.reshape(shape) for kernel in kernels]), jnp.stack(flat))

        # Kernels of one shape are lanes of one program, layer after layer.
        found = jax.lax.map(one, ([kernel_of(params, p) for p in together], [acts[p.site] for p in together]))
        for i, place in enumerate(together):
            kernels[place.name] = found.kernels[:, i].reshape(kernel_of(params, place).shape)
            losses[place.name] = found.loss[:, i]
    return Reconstruction(kernels, losses)


def zq_global(
    key: jax.Array,
    config: TransformerConfig,
    params: Any,
    x: Float[ArrayLike, "B T D"],
    layer: int | jax.Array = 0,
    *,
    steps: int,
    rates: tuple[float, ...] = RATES,
    batch: int = 2,
    schemes: tuple[Scheme, ...] = (Scheme(),),
    which: int | jax.Array = 0,
    **grid: Any,
) -> Reconstruction:
    """All kernels of one block, trained together to give the stream that the block gave.

    Args:
      key: typed key, of the order of texts.
      config: of the decoder.
      params: of this layer, ``params["blocks"]`` without its layer axis.
      x: the stream that enters the block on calibration texts.
      layer: its number; may be traced.
      steps, rates, grid: as in ``zq_local``; one rate for the block.
      batch: texts per step.
      schemes, which: as in ``local_blocks``.

    Raises:
      ValueError: as ``zq_local``, or fewer texts than a batch.
    """
    _require_steps(steps, rates)
    x, layer = jnp.asarray(x), jnp.asarray(layer)
    if x.ndim != 3 or not x.size:
        raise ValueError(f"zq_global: wanted the stream (B, T, D) of calibration texts, got shape {x.shape}.")
    run, every = _rounded_block(config, which, schemes, grid), places(config)

    def loss(kernels: Any, rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.square(run(params, kernels, rows["x"], layer) - rows["y"]).mean()

    texts = {"x": x, "y": one_block(config).apply({"params": {"block": params}}, x, layer)}
    batches = shuffled(texts, batch)
    plan = batches.plan(key, jnp.asarray(0), steps)
    start = {place.name: kernel_of({"blocks": params}, place) for place in every}
    trained = jax.vmap(
        lambda rate: _descend(lambda kernels, rows: loss(kernels, batches.fetch(rows)), start, rate, plan)
    )(jnp.asarray(rates))
    tried = _with_start(start, trained)
    found = jax.lax.map(lambda kernels: loss(kernels, texts), tried)
    return Reconstruction(jax.tree.map(lambda leaf: leaf[found.argmin()], tried), found)


def global_blocks(
    key: jax.Array,
    config: TransformerConfig,
    params: Any,
    streams: Float[Array, "L B T D"],
    *,
    in_turn: bool = False,
    steps: int,
    rates: tuple[float, ...] = RATES,
    batch: int = 2,
    schemes: tuple[Scheme, ...] = (Scheme(),),
    which: int | jax.Array = 0,
    **grid: Any,
) -> Reconstruction:
    """ZQ-Global for every block of a decoder, as ``local_blocks``.

    Args:
      key: typed key, of the order of texts.
      config, params: of the decoder.
      streams: the site ``resid_pre`` on calibration texts, all layers: ``calibrate(..., also=("resid_pre",))``.
      in_turn: give block l what the quantised blocks before it make of the texts, instead of ``streams[l]``.
      steps, rates, batch, schemes, which, grid: of ``zq_global``.
    """
    run = _rounded_block(config, which, schemes, grid)
    options: dict[str, Any] = {"steps": steps, "rates": rates, "batch": batch, "schemes": schemes, "which": which}

    def one(stream: jax.Array, now: Any) -> tuple[jax.Array, Reconstruction]:
        own, x, layer = now
        x = stream if in_turn else x
        found = zq_global(jax.random.fold_in(key, layer), config, own, x, layer, **options, **grid)
        return run(own, found.kernels, x, layer) if in_turn else stream, found

    layers = (params["blocks"], streams, jnp.arange(config.layers))
    return jax.lax.scan(one, streams[0], layers)[1]


def _rounded_block(
    config: TransformerConfig, which: int | jax.Array, schemes: tuple[Scheme, ...], grid: dict[str, Any]
) -> Callable[[Any, Any, jax.Array, jax.Array], jax.Array]:
    """f_q(parameters of the block, W' by name, x, layer)."""
    block = one_block(config)
    edits = {site: RoundInputs(jnp.asarray(which), None, schemes) for site in sites_of(config)}

    def run(params: Any, kernels: Any, x: jax.Array, layer: jax.Array) -> jax.Array:
        rounded = {
            place.name: straight_through(nearest(kernels[place.name], inputs=place.inputs, **grid), kernels[place.name])
            for place in places(config)
        }
        own = with_kernels({"blocks": params}, rounded)["blocks"]
        out: jax.Array = block.apply({"params": {"block": own}, "edits": edits}, x, layer)
        return out

    return run


def _matrix_shape(params: Any, place: Place) -> tuple[int, ...]:
    shape = kernel_of(params, place).shape[1:]
    return math.prod(shape[: place.inputs]), math.prod(shape[place.inputs :])


def _descend(loss: Callable[[Any, Any], jax.Array], start: Any, rate: jax.Array, plan: jax.Array) -> Any:
    """Adam from ``start``, one step for every entry of the plan, of a size that falls to 0."""
    # Gradients can be as small as 1e-8, which is Adam's usual epsilon.
    adam = optax.scale_by_adam(eps=1e-12)
    size = jax.tree.map(lambda w: rate * jnp.abs(w).mean(), start)

    def step(carry: Any, now: Any) -> Any:
        kernels, state = carry
        i, batch = now
        update, state = adam.update(jax.grad(loss)(kernels, batch), state)
        left = 1 - i / max(len(plan), 1)
        return (jax.tree.map(lambda w, u, s: w - left * s * u, kernels, update, size), state), None

    (kernels, _), _ = jax.lax.scan(step, (start, adam.init(start)), (jnp.arange(len(plan)), plan))
    return kernels


def _with_start(start: Any, trained: Any) -> Any:
    """The candidates: no training, and every rate."""
    return jax.tree.map(lambda w, all_rates: jnp.concatenate([w[None], all_rates]), start, trained)


def _require_steps(steps: int, rates: tuple[float, ...]) -> None:
    if steps < 0 or not rates or min(rates) <= 0:
        raise ValueError(f"reconstruction: wanted steps >= 0 and positive rates, got {steps} and {rates}.")
