"""Activation patching of the residual stream, layer by position, in one program.

Put the residual stream of a source run (say, the clean prompt) into another run (the corrupted prompt) at one layer and
one position, and see what the output does (Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262, the
restored states of causal tracing).

It differs from a loop over forwards in three ways, none of which changes a number beyond rounding: all positions of a
layer run as one batch; each forward starts at the patched layer, because nothing below it changes; only the position
that the metric reads is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mechlab.core.model import Model
from mechlab.models.transformer import run_layers, unembed

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def patch_residual(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T D"],
    metric: Callable[[jax.Array], jax.Array],
    *,
    read: int = -1,
    batch: int | None = None,
) -> Float[Array, "L T ..."]:
    """The metric after patching ``resid_post`` of every layer at every position, one at a time.

    Cost: about L T / 2 forwards of B prompts, in one program; memory of ``batch`` forwards.

    Args:
      model: a decoder from ``models.transformer``.
      params: its parameters.
      tokens: prompts of the run that is patched, all of the same length.
      source: ``resid_post`` of the source run on prompts of the same shape, from ``model.capture``.
      metric: of the logits (B, V) at position ``read``; any array.
      read: position whose logits the metric sees; the last by default.
      batch: positions patched at once; all by default.

    Returns:
      (L, T, ...): the metric for each patched layer and position.

    Raises:
      ValueError: if the source does not fit the prompts.
    """
    length = tokens.shape[1]
    if source.shape[1:3] != tokens.shape:
        raise ValueError(f"source is (L, B, T, D) = {source.shape}, but tokens are (B, T) = {tokens.shape}.")
    variables = {"params": params}
    base = model.capture(variables, tokens, sites=("resid_post",))[1]["resid_post"]

    def at_layer(layer: jax.Array) -> jax.Array:
        def at_position(position: jax.Array) -> jax.Array:
            patched = base[layer].at[:, position].set(source[layer][:, position])
            final = run_layers(model, variables, patched, layer + 1)
            return metric(unembed(model, variables, final[:, read % length, None])[:, 0])

        return jax.lax.map(at_position, jnp.arange(length), batch_size=batch or length)

    return jax.lax.map(at_layer, jnp.arange(base.shape[0]))
