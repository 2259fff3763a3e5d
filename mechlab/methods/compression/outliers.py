"""Planted outliers: a few large channels in the input of chosen kernels, without a change of the function.

Small models have mild outliers; large ones have channels a hundred times the others, which is what activation-aware and
channel-wise methods are for. A share of the channels of a norm is multiplied by alpha, and the rows of all kernels that
read it are divided by alpha. AWQ's search can undo this exactly, so results on it are diagnostic and stand apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mechlab.core.rng import stream
from mechlab.models.fold import scale_inputs
from mechlab.models.transformer_config import TransformerConfig


def plant_outliers(
    key: jax.Array,
    config: TransformerConfig,
    params: Any,
    *,
    factor: float | jax.Array,
    share: float = 0.01,
    sites: tuple[str, ...] = ("attn_in", "mlp_in"),
) -> Any:
    """The same function with some channels of the normed inputs ``factor`` times as large.

    Args:
      key: typed key, of the channels, different in every layer and site.
      config, params: of the model.
      factor: alpha; 1 changes nothing.
      share: of the channels, at least one.
      sites: whose channels, of ``models.fold.READERS``.

    Raises:
      ValueError: a share outside (0, 1], or as ``models.fold.scale_inputs``.
    """
    if not 0 < share <= 1:
        raise ValueError(f"plant_outliers: share must be in (0, 1], got {share}.")
    for site in sites:
        width = config.hidden if site == "mlp_act" else config.width
        assert width is not None
        chosen = max(1, round(share * width))
        keys = jax.vmap(lambda layer, site=site: jax.random.fold_in(stream(key, site), layer))(
            jnp.arange(config.layers)
        )
        rank = jax.vmap(lambda k, n=width: jax.random.permutation(k, n))(keys)
        params = scale_inputs(config, params, site, jnp.where(rank < chosen, 1 / factor, 1.0))
    return params
