"""Path patching: what one head tells another, or the logits, with every other way kept as it was.

Patching a head's output changes everything after it. Path patching lets the change reach only one receiver (Wang et al.
2022, arXiv 2211.00593, section 3.1 and appendix B; Goldowsky-Dill et al. 2023, arXiv 2304.05969):

1. Run the base and the source prompts, keep the output of every head.
2. Run the base prompts with the sender's output from the source run, and the outputs of all other heads as they were in
   the base run. Keep what the receiver now reads.
3. Run the base prompts with the receiver reading that, everything else free, and see what the metric does.

The change can reach the receiver directly and, unless ``freeze_mlps``, through MLPs between the two; never through
another head. All senders of one receiver run in one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.edits import Edit, Placed, Replace, at, combine
from mechlab.core.model import Model
from mechlab.core.sweeps import grid, sweep
from mechlab.methods.circuits.reading import Metric, Read, logits_at

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def paths_to_logits(
    model: Model,
    params: Any,
    tokens: Int[jax.Array, "B T"],
    source: Int[jax.Array, "B T"],
    metric: Metric,
    *,
    read: Read = -1,
    freeze_mlps: bool = False,
    batch: int | None = None,
) -> Float[np.ndarray, "L H ..."]:
    """The metric after patching the path from every head to the final residual stream: the heads' direct effects.

    Cost: L H + 2 forwards.

    Args:
      model: a decoder from ``models.transformer``.
      params: its parameters.
      tokens: (B, T) base prompts.
      source: (B, T) source prompts, aligned with the base prompts.
      metric: of the logits (B, V) that are read; any array.
      read: the position that the metric sees, see ``reading.at_read``.
      freeze_mlps: MLPs keep their output of the base run too, so that only the residual stream carries the change.
      batch: senders per chunk; as many as fit memory by default.

    Returns:
      NumPy array (L, H, ...): the metric for each sender. Subtract the metric of the base run for the effect.

    Raises:
      ValueError: prompts of different shapes.
    """
    runs = _runs(model, params, tokens, source)

    def through(sender: dict[str, jax.Array], params: Any, tokens: jax.Array, runs: Any) -> jax.Array:
        # With every head frozen, the logits are what the final residual stream hears: there is no third run.
        edits = _sender(model, sender, runs, freeze_mlps)
        return metric(logits_at(model, {"params": params, "edits": edits}, tokens, read))

    return _over_heads(model, through, batch, params, tokens, runs)


def paths_to_heads(
    model: Model,
    params: Any,
    tokens: Int[jax.Array, "B T"],
    source: Int[jax.Array, "B T"],
    metric: Metric,
    via: str,
    heads: Sequence[tuple[int, int]],
    *,
    read: Read = -1,
    freeze_mlps: bool = False,
    batch: int | None = None,
) -> Float[np.ndarray, "L H ..."]:
    """The metric after patching the paths from every head to the queries, keys or values of some heads at once.

    Cost: 2 L H + 2 forwards. Senders that are in no layer below a receiver cannot reach it: their cells hold the metric
    of the base run.

    Args:
      model, params, tokens, source, metric, read, freeze_mlps, batch: as in ``paths_to_logits``.
      via: "q", "k" or "v".
      heads: (layer, head) of the receivers; for "k" and "v" key-value heads, which several query heads may share.

    Returns:
      NumPy array (L, H, ...): the metric for each sender.

    Raises:
      KeyError: another ``via``.
      ValueError: prompts of different shapes, no receivers, or one that does not exist.
    """
    if via not in ("q", "k", "v"):
        raise KeyError(f'via must be "q", "k" or "v", got "{via}".')
    config = model.module.config
    count = config.heads if via == "q" else config.n_kv_heads
    is_receiver = np.zeros((config.layers, count), np.float32)
    for layer, head in heads:
        if not (0 <= layer < config.layers and 0 <= head < count):
            raise ValueError(f'receiver {(layer, head)} is out of range: "{via}" has {config.layers} x {count} heads.')
        is_receiver[layer, head] = 1
    if not is_receiver.any():
        raise ValueError("heads: wanted at least one (layer, head).")

    def hear(reads: jax.Array) -> Edit:
        return Placed(Replace(reads), head=jnp.asarray(is_receiver))

    return _paths_to(model, params, tokens, source, metric, via, hear, read, freeze_mlps, batch)


def paths_to_mlp(
    model: Model,
    params: Any,
    tokens: Int[jax.Array, "B T"],
    source: Int[jax.Array, "B T"],
    metric: Metric,
    layer: int,
    *,
    read: Read = -1,
    freeze_mlps: bool = False,
    batch: int | None = None,
) -> Float[np.ndarray, "L H ..."]:
    """The metric after patching the path from every head to the input of one MLP.

    Cost: 2 L H + 2 forwards. Heads of the MLP's own layer reach it, except in parallel blocks.

    Args:
      model, params, tokens, source, metric, read, freeze_mlps, batch: as in ``paths_to_logits``.
      layer: of the MLP.

    Returns:
      NumPy array (L, H, ...): the metric for each sender.

    Raises:
      KeyError: a model without MLPs.
      ValueError: prompts of different shapes, or a layer out of range.
    """
    layers = model.sites["mlp_in"].layers or 0
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} is out of range: the model has {layers} layers.")

    def hear(reads: jax.Array) -> Edit:
        return Placed(Replace(reads), gate=jnp.zeros(layers).at[layer].set(1))

    return _paths_to(model, params, tokens, source, metric, "mlp_in", hear, read, freeze_mlps, batch)


def _paths_to(
    model: Model,
    params: Any,
    tokens: jax.Array,
    source: jax.Array,
    metric: Metric,
    receiver: str,
    hear: Callable[[jax.Array], Edit],
    read: Read,
    freeze_mlps: bool,
    batch: int | None,
) -> np.ndarray:
    """``hear`` makes the edit of the third run from what the site ``receiver`` held in the second."""
    runs = _runs(model, params, tokens, source)

    def through(sender: dict[str, jax.Array], params: Any, tokens: jax.Array, runs: Any) -> jax.Array:
        edits = _sender(model, sender, runs, freeze_mlps)
        reads = model.capture({"params": params, "edits": edits}, tokens, sites=(receiver,))[1][receiver]
        return metric(logits_at(model, {"params": params, "edits": {receiver: hear(reads)}}, tokens, read))

    return _over_heads(model, through, batch, params, tokens, runs)


def _runs(model: Model, params: Any, tokens: jax.Array, source: jax.Array) -> dict[str, jax.Array]:
    """What is held fixed, and what is sent: heads and MLPs of the base run, heads of the source run."""
    if tokens.shape != source.shape:
        raise ValueError(f"tokens and source must be of one shape (B, T), got {tokens.shape} and {source.shape}.")
    outputs = ("attn_z",) if model.module.config.hidden is None else ("attn_z", "mlp_out")
    base = model.capture({"params": params}, tokens, sites=outputs)[1]
    sent = model.capture({"params": params}, source, sites=("attn_z",))[1]["attn_z"]
    return {"base": base["attn_z"], "sent": sent, "mlps": base.get("mlp_out", jnp.zeros(0))}


def _sender(
    model: Model, sender: dict[str, jax.Array], runs: dict[str, jax.Array], freeze_mlps: bool
) -> dict[str, Edit]:
    """All heads as in the base run but the sender, which is as in the source run."""
    layers, heads = runs["base"].shape[0], runs["base"].shape[3]
    is_sender = (jnp.arange(layers)[:, None] == sender["layer"]) & (jnp.arange(heads) == sender["head"])
    z = jnp.where(is_sender[:, None, None, :, None], runs["sent"], runs["base"])
    edits = at(model.sites, "attn_z", Replace(z), stacked=True)
    if freeze_mlps and runs["mlps"].size:
        edits = combine(edits, at(model.sites, "mlp_out", Replace(runs["mlps"]), stacked=True))
    return edits


def _over_heads(model: Model, through: Callable[..., Any], batch: int | None, *shared: Any) -> np.ndarray:
    config = model.module.config
    cells = grid(layer=jnp.arange(config.layers), head=jnp.arange(config.heads))
    found: np.ndarray = sweep(through, cells, *shared, batch=batch)
    return found.reshape(config.layers, config.heads, *found.shape[1:])
