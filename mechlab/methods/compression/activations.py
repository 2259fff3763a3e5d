"""Rounded activations of a decoder, as edits: what every linear map of the blocks reads is put on a grid.

    schemes = (Scheme(), Scheme(bits=8, symmetric=True), Scheme(bits=8))       # off; around 0; from lowest to highest
    edits = round_inputs(model, schemes, which=2)
    model.apply({"params": params, "edits": edits}, tokens)

Grids are found on the spot for every token (or group of channels, or tensor) by ``rounding.quantise_activations``; a
static one comes from calibration texts. Which scheme acts is an array, so that one compiled program serves all of them
and a layer may have its own. Only inputs of linear maps are rounded, never the residual stream or the softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mechlab.core.edits import at, edit
from mechlab.core.estimators import straight_through
from mechlab.core.model import Model
from mechlab.core.sites import Context
from mechlab.methods.compression.decoders import sites_of
from mechlab.methods.compression.rounding import Grid, find_grid, quantise_activations


class Scheme(NamedTuple):
    """How activations are rounded.

    Attributes:
      bits: 2..8, or 16 for no rounding.
      symmetric: around 0; otherwise from min(x, 0) to max(x, 0).
      mode: a grid per "token", per "group" of channels, for the whole "tensor", or "static" for a known one.
      group: channels, for the mode "group".
    """

    bits: int = 16
    symmetric: bool = False
    mode: str = "token"
    group: int | None = None


@edit
class RoundInputs:
    """x on the grid of one of several schemes; the gradient passes straight through.

    Attributes:
      which: number of the scheme, without axes.
      static: the grid of the mode "static", step and zero without axes; None where no scheme has it.
      schemes: to choose from.
    """

    which: jax.Array
    static: Grid | None
    schemes: tuple[Scheme, ...] = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, context: Context | None = None) -> jax.Array:
        # What o reads has its channels on two axes, heads and their width, and one grid.
        flat = x.reshape(*x.shape[:2], -1)
        rounded = jax.lax.switch(self.which, [functools.partial(self._rounded, s) for s in self.schemes], flat)
        return straight_through(rounded.reshape(x.shape), x)

    def _rounded(self, scheme: Scheme, x: jax.Array) -> jax.Array:
        if scheme.mode == "static":
            if self.static is None:
                raise ValueError("RoundInputs: a static scheme needs the grid that calibration found.")
            return self.static.nearest(x.astype(jnp.float32)).astype(x.dtype)
        return quantise_activations(x, **scheme._asdict())


def round_inputs(
    model: Model,
    schemes: tuple[Scheme, ...],
    which: int | jax.Array = 0,
    *,
    static: Mapping[str, Grid] | None = None,
) -> dict[str, Any]:
    """The edits that round what every kernel of a decoder's blocks reads.

    Args:
      model: a decoder from ``models.transformer``.
      schemes: to choose from.
      which: number of the scheme that acts, in all layers, or (L,); may be traced.
      static: from ``static_grids``, where a scheme is static.

    Raises:
      ValueError: a number without a scheme; later, as ``rounding.quantise_activations``.
    """
    if not isinstance(which, jax.core.Tracer) and not all(0 <= int(i) < len(schemes) for i in jnp.ravel(which)):
        raise ValueError(f"round_inputs: which must be one of the {len(schemes)} schemes, 0 the first, got {which}.")
    config = model.module.config
    numbers = jnp.broadcast_to(jnp.asarray(which), (config.layers,))
    placed: dict[str, Any] = {}
    for site in sites_of(config):
        grid = None if static is None else static[site]
        placed |= at(model.sites, site, RoundInputs(numbers, grid, schemes), stacked=True)
    return placed


def static_grids(acts: Mapping[str, jax.Array], *, bits: int, symmetric: bool = False) -> dict[str, Grid]:
    """One grid per layer and site, from the smallest to the largest activation on calibration texts.

    Args:
      acts: from ``decoders.calibrate``, (L, B, T, ...) by site.
      bits, symmetric: as in ``Scheme``.

    Raises:
      ValueError: bits out of range.
    """

    def one(x: jax.Array) -> Grid:
        grid = find_grid(x, bits=bits, symmetric=symmetric, include_zero=True, axis=None)
        return jax.tree.map(lambda leaf: leaf.reshape(()), grid)

    return {site: jax.vmap(one)(x) for site, x in acts.items()}
