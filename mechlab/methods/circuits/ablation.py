"""Ablation: what a model does without some of its heads, neurons or layers.

A part is taken out by filling its activation with what says nothing about the prompt: zeros, its mean over a set of
prompts (Wang et al. 2022, arXiv 2211.00593, section 2.1: by position, over prompts of one template), or its value on
another, random prompt ("resample", Chan et al. 2022, causal scrubbing). Zero is the crudest: no model ever computes
with an output of zero there. Which parts are out is an array, so a sweep over parts is one mapped program.

Parts are heads at ``attn_z`` (query heads, before the output projection: with grouped key-value heads, ablating ``v``
would take out a whole group), neurons at ``mlp_act``, whole outputs at ``attn_out`` and ``mlp_out``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.edits import Edit, Mask, Replace, at
from mechlab.core.model import Model
from mechlab.core.sites import SiteTable
from mechlab.core.sweeps import grid, sweep
from mechlab.methods.circuits.reading import Metric, Read, logits_at

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


def zero_fill(acts: Float[Array, "L B T ..."]) -> Float[Array, " L"]:
    """Zeros, for ``keep_only`` and ``ablation_effects``."""
    return jnp.zeros(acts.shape[0], acts.dtype)


def mean_fill(
    acts: Float[Array, "L B T ..."], mask: Bool[ArrayLike, "B T"] | None = None, *, by_position: bool = False
) -> Float[Array, "L ..."]:
    """The mean activation over prompts and positions, or over prompts at each position.

    Args:
      acts: (L, B, T, ...) from ``model.capture``.
      mask: (B, T) tokens that count; all by default. A position where none counts gets 0.
      by_position: keep the positions apart; means something only for prompts of one form.

    Returns:
      (L, ...), or (L, T, ...) with ``by_position``.

    Raises:
      ValueError: a mask that does not fit.
    """
    mask = jnp.ones(acts.shape[1:3]) if mask is None else jnp.asarray(mask, jnp.float32)
    if mask.shape != acts.shape[1:3]:
        raise ValueError(f"mask: wanted shape (B, T) = {acts.shape[1:3]}, got {mask.shape}.")
    over = (0,) if by_position else (0, 1)
    weight = mask / jnp.maximum(mask.sum(over, keepdims=True), 1)
    return jnp.einsum("bt,lbt...->lt..." if by_position else "bt,lbt...->l...", weight, acts)


def resample_fill(key: jax.Array, acts: Float[Array, "L B T ..."]) -> Float[Array, "L B T ..."]:
    """Every prompt's activation from another prompt, at the same position; no prompt keeps its own.

    Args:
      key: typed key.
      acts: (L, B, T, ...) with B >= 2.

    Returns:
      (L, B, T, ...).

    Raises:
      ValueError: a single prompt.
    """
    batch = acts.shape[1]
    if batch < 2:
        raise ValueError("resample_fill: wanted at least 2 prompts, got 1.")
    # A random cycle through all prompts: a random permutation would leave about one prompt where it is.
    order = jax.random.permutation(key, batch)
    return acts[:, jnp.zeros(batch, int).at[order].set(jnp.roll(order, 1))]


def keep_only(
    sites: SiteTable, name: str, keep: Bool[ArrayLike, "L ..."], fill: Float[Array, "L ..."]
) -> dict[str, Edit]:
    """The edit that leaves some parts of a site as they are and fills all others.

    Args:
      sites: ``model.sites``.
      name: "attn_z", "mlp_act", "mlp_out" or any other site of a scanned model.
      keep: (L, H) at sites with heads, (L, F) at ``mlp_act``, (L,) for whole layers; may be traced.
      fill: (L, ...) from ``zero_fill``, ``mean_fill`` or ``resample_fill``.

    Returns:
      The edit, for ``model.apply`` or ``combine``.

    Raises:
      KeyError: unknown site.
      ValueError: ``keep`` does not fit the site.
    """
    sizes = _parts(sites, name)
    keep = jnp.asarray(keep, bool)
    wanted = tuple(sizes.values())
    if keep.shape not in (wanted, wanted[:1]):
        raise ValueError(f'keep: wanted shape {wanted} at site "{name}", got {keep.shape}.')
    # From the right of a value in one layer: (H, K), (F,) or (D,).
    trailing = 1 if "head" in sizes and keep.ndim == 2 else 0
    return {name: Mask(keep.reshape(*keep.shape, *(1,) * trailing), fill)}


def ablation_effects(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    metric: Metric,
    name: str,
    fill: Float[Array, "L ..."],
    *,
    read: Read = -1,
    batch: int | None = None,
) -> Float[np.ndarray, "L ..."]:
    """The metric with one part taken out, for every part of a site, in one compiled program.

    Cost: L H forwards for heads, L F for neurons, L for whole outputs, in chunks that fit memory (``core.sweeps``).

    Args:
      model: a decoder from ``models.transformer``.
      params: its parameters.
      tokens: (B, T).
      metric: of the logits (B, V) that are read; any array.
      name: "attn_z" (heads), "mlp_act" (neurons), "attn_out" or "mlp_out" (whole layers).
      fill: (L, ...) what stands in for the part, in the shape of the whole site.
      read: the position that the metric sees, see ``reading.at_read``.
      batch: parts per chunk; as many as fit memory by default.

    Returns:
      NumPy array (L, H, ...), (L, F, ...) or (L, ...): the metric without that part. Subtract the metric of the
      untouched model for the effect.

    Raises:
      KeyError: unknown site.
      ValueError: a site without layers.
    """
    sizes = _parts(model.sites, name)

    def without(part: dict[str, Any], params: Any, tokens: jax.Array, fill: jax.Array) -> jax.Array:
        edits = at(model.sites, name, Replace(fill), **part, stacked=True)
        return metric(logits_at(model, {"params": params, "edits": edits}, tokens, read))

    cells = grid(**{kind: jnp.arange(size) for kind, size in sizes.items()})
    found = sweep(without, cells, params, tokens, fill, batch=batch)
    return found.reshape(*sizes.values(), *found.shape[1:])


def faithfulness(circuit: ArrayLike, full: ArrayLike, empty: ArrayLike) -> Float[Array, "..."]:
    """How much of the behaviour a circuit has by itself: (m(C) - m(none)) / (m(all) - m(none)).

    1 where the circuit does what the model does, 0 where it does no more than a model whose every part is ablated
    (arXiv 2403.17806, section 2). Take means over prompts first: a mean of ratios is noise.

    Args:
      circuit: the metric with everything but the circuit ablated.
      full: the metric of the untouched model.
      empty: the metric with everything ablated.

    >>> float(faithfulness(2.5, 3.0, 1.0))
    0.75
    """
    circuit, full, empty = (jnp.asarray(x, jnp.float32) for x in (circuit, full, empty))
    return (circuit - empty) / (full - empty)


def _parts(sites: SiteTable, name: str) -> dict[str, int]:
    """How many layers, and heads or units in each, by the names that ``at`` gives them."""
    entry = sites[name]
    if entry.layers is None:
        raise ValueError(f'site "{name}" is not stacked over layers.')
    sizes = dict(zip(entry.context.axes, entry.value.shape, strict=True))
    inner = {kind: sizes[axis] for kind, axis in (("head", "H"), ("unit", "F")) if axis in sizes}
    return {"layer": entry.layers, **inner}
