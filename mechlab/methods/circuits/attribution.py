"""Attribution patching: the effect of patching any activation, all at once, to first order.

Patching activation a of a base run with its value in a source run changes the metric by about

    (a_source - a_base) . d metric / d a_base

(Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv 2310.10348, eq. 1), so that two forwards and one backward
estimate what exact patching needs one forward per cell for. The gradient is taken with respect to edits that add 0.
With several ``steps`` it is averaged along the straight line from the base's embeddings to the source's, the
integrated gradients of Sundararajan et al. 2017 (arXiv 1703.01365), which for inner activations is EAP-IG (Hanna et al.
2024, arXiv 2403.17806, eq. 4). That repairs the estimate where the metric is flat at the base, as after a saturated
softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mechlab.core.edits import Add, chain
from mechlab.core.model import Model
from mechlab.core.sweeps import zero_probes
from mechlab.methods.circuits.reading import Metric, Read, logits_at

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def attribution_patching(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    source: Int[Array, "B T"],
    metric: Metric,
    sites: Sequence[str],
    *,
    read: Read = -1,
    steps: int | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Estimated change of the metric when one activation takes its value in the source run, for all activations.

    Cost: two forwards and one backward (``steps`` backwards with integrated gradients), whatever the number of cells.

    Args:
      model: a decoder from ``models.transformer``.
      params: its parameters.
      tokens: (B, T) base prompts, those of the run that is patched.
      source: (B, T) source prompts, aligned with the base prompts token by token.
      metric: of the logits (B, V) that are read, one number per prompt (B,); see ``reading.logit_difference``.
      sites: where; any sites of the model, such as ``("resid_post", "attn_z", "mlp_act")``.
      read: the position that the metric sees, see ``reading.at_read``.
      steps: None for the plain gradient at the base; otherwise points of integrated gradients, 5 to 20.

    Returns:
      Site name to the estimate, in the metric's unit, with the shape of the site without its vector axes D and K, over
      which it is summed: (L, B, T) at residual sites, (L, B, T, H) at ``attn_z`` and ``q``, (L, B, T, F) at
      ``mlp_act``, (L, B, H, T, S) at ``attn_pattern``. Sum over positions for the effect of a head at all of them.

    Raises:
      ValueError: prompts of different shapes, no sites, ``steps`` < 1, or a metric that is not one number per prompt.

    Differs from the paper: the points of integrated gradients are the midpoints of ``steps`` intervals, not their upper
    ends, which makes the error quadratic in the length of an interval.
    """
    if tokens.shape != source.shape:
        raise ValueError(f"tokens and source must be of one shape (B, T), got {tokens.shape} and {source.shape}.")
    if not sites or isinstance(sites, str):
        raise ValueError(f'sites must name at least one site, as in ("resid_post",), got {sites!r}.')
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1 or None, got {steps}.")
    kept = tuple(dict.fromkeys((*sites, "embed")))
    base = model.capture({"params": params}, tokens, sites=kept)[1]
    other = model.capture({"params": params}, source, sites=kept)[1]
    difference = {name: other[name].astype(jnp.float32) - base[name].astype(jnp.float32) for name in kept}
    table = model.sites_for(tokens)
    probes = zero_probes(table, *sites)

    def gradient(way: jax.Array) -> Any:
        """At the run whose embeddings are the share ``way`` of the way from the base's to the source's."""
        moved = {"embed": Add(way * difference["embed"])}

        def total(probes: Any) -> jax.Array:
            value = metric(logits_at(model, {"params": params, "edits": chain(moved, probes)}, tokens, read))
            if value.shape != tokens.shape[:1]:
                raise ValueError(f"metric: wanted one number per prompt, {tokens.shape[:1]}, got {value.shape}.")
            # Prompts do not see each other, so the gradient of the sum is every prompt's own.
            return value.sum()

        return jax.grad(total)(probes)

    if steps is None:
        gradients = gradient(jnp.zeros(()))
    else:

        def add(mean: Any, way: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(lambda m, g: m + g / steps, mean, gradient(way)), None

        zero = jax.tree.map(jnp.zeros_like, probes)
        gradients, _ = jax.lax.scan(add, zero, (jnp.arange(steps) + 0.5) / steps)

    def effect(name: str) -> jax.Array:
        axes = table[name].context.axes
        vectors = tuple(i - len(axes) for i, axis in enumerate(axes) if axis in "DK")
        return (gradients[name].value * difference[name]).sum(vectors)

    return {name: effect(name) for name in sites}
