"""Fine-grained activation steering (AUSteer, ICLR 2026, arXiv 2602.04428): scale a few single dimensions.

A linear map is a sum over its *atomic units* (AUs), y = W x = sum_i x_i W[:, i]: unit i is the scalar x_i with the
slice that it drives, and scaling the scalar is scaling the slice. Units of one block pull in different directions, so
single ones are steered, not the block. From N pairs of texts that end in the right and in the wrong answer, read at the
last token, with A+ and A- their activations in layer l at unit i:

    momentum        m_n = A+_n - A-_n
    score           |beta| = max(c+, c-) / N,   c+ = #{n: m_n > 0},  c- = #{n: m_n < 0},   beta < 0 iff c+ < c-
    choice          the k units with the largest |beta| of all layers together, ties in the order (layer, index)
    intervention    y_i <- (1 + alpha beta_i) y_i     on chosen units, at every token of prompt and answer

Sites: "attn", the input of the attention output projection, heads side by side; "ffn", what the MLP adds to the
residual stream; "layer", the residual stream after the block. At "ffn" a unit is an *output* of the down-projection, no
neuron. Shifts grow with the activation at hand; that is all the adaptivity there is, and factors like -11
(alpha 15, beta -0.8) are meant.

The first half of the paper, how units differ, is here as ``au_token_logits`` and ``au_js``: to first order, with the
scale of the final norm frozen, steering unit i moves the logits by  alpha beta x_i U (g . W[:, i]),  U the unembedding
and g the gain of the final norm.

Differs from the official code: activations are read in float32 (there fp16, where small momenta vanish); in models with
a second norm behind the MLP (Gemma 2) "ffn" is behind that norm; the mask of "attn" has width H K throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.metrics import jensen_shannon
from mechlab.core import select
from mechlab.core.edits import Scale, at
from mechlab.core.model import Model, Variables
from mechlab.methods.steering.vectors import Texts, last_states, steered_logits
from mechlab.models.layers import linear

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

SITES = {"attn": "attn_z", "ffn": "mlp_out", "layer": "resid_post"}
"""The paper's names of the places that are steered, and ours."""

K, ALPHA, SITE = 10, 5.0, "ffn"
"""The paper's defaults."""


def unit_states(
    model: Model, variables: Variables, texts: Texts, site: str = SITE, *, batch: int = 32
) -> Float[Array, "N L D"]:
    """The units' activations at the last token of every text: A+ or A-.

    Args:
      model, variables: as for ``model.apply``.
      texts: N texts, prompt and answer.
      site: "attn" (D = H K), "ffn" or "layer" (D the model's width).
      batch: texts per forward.

    Returns:
      (N, L, D) float32.

    Raises:
      ValueError: an unknown site; activations that are not finite, naming the layer.
      KeyError: the model lacks the site.
    """
    states = last_states(model, variables, texts, site=_site(site), batch=batch)
    return states.reshape(*states.shape[:2], -1)


def au_momentum(acts_pos: Float[ArrayLike, "N L D"], acts_neg: Float[ArrayLike, "N L D"]) -> Float[Array, "N L D"]:
    """m = A+ - A-, of every pair, layer and unit.

    Args:
      acts_pos, acts_neg: (N, L, D), row n of both a pair.

    Raises:
      ValueError: shapes that differ, no pairs or, where values are known, one that is not finite, naming the layer.
    """
    shape = np.shape(acts_pos)
    if shape != np.shape(acts_neg) or len(shape) != 3 or 0 in shape:
        raise ValueError(f"au_momentum: wanted pairs (N, L, D) with N >= 1, got {shape} and {np.shape(acts_neg)}.")
    for name, acts in (("acts_pos", acts_pos), ("acts_neg", acts_neg)):
        if not isinstance(acts, jax.core.Tracer):
            finite = np.isfinite(np.asarray(acts)).all((0, 2))
            if not finite.all():
                raise ValueError(f"{name}: values of layer {int(np.argmin(finite))} are not finite.")
    return jnp.asarray(acts_pos, jnp.float32) - jnp.asarray(acts_neg, jnp.float32)


def au_scores(momentum: Float[ArrayLike, "N L D"], kind: str = "sign") -> Float[Array, "L D"]:
    """beta, what units are ranked and steered by.

    Args:
      momentum: (N, L, D).
      kind: "sign", the released method: how consistent the sign of m is, in [-1, 1]; zeros of m count for neither side,
        so that |beta| may be below 1/2, and equally many of both signs are positive. "mean": the mean of m, in the unit
        of the activations, a variant that the released code keeps in comments.

    Raises:
      ValueError: another number of axes, no pairs, or an unknown kind.

    >>> au_scores(jnp.asarray([[[1.0, -2.0]], [[3.0, -1.0]], [[0.0, 5.0]], [[1.0, 0.0]]])).tolist()
    [[0.75, -0.5]]
    """
    if np.ndim(momentum) != 3 or not np.shape(momentum)[0]:
        raise ValueError(f"au_scores: wanted momenta (N, L, D) with N >= 1, got shape {np.shape(momentum)}.")
    m = jnp.asarray(momentum)
    if kind == "mean":
        return m.mean(0)
    if kind != "sign":
        raise ValueError(f'au_scores: unknown kind "{kind}"; known: "sign", "mean".')
    # Whole numbers: equal counts must give equal scores, to the bit.
    plus, minus = (m > 0).sum(0), (m < 0).sum(0)
    return jnp.where(plus < minus, -1, 1) * jnp.maximum(plus, minus) / len(m)


def au_steadiness(momentum: Float[ArrayLike, "N L D"]) -> Float[Array, "L D"]:
    """mean |m| / standard deviation of m, 0 where nothing moves: our option for breaking ties, see ``au_ranks``."""
    m = jnp.asarray(momentum)
    spread = m.std(0)
    return jnp.where(spread > 0, jnp.abs(m).mean(0) / jnp.where(spread > 0, spread, 1), 0)


def au_ranks(scores: Float[ArrayLike, "L D"], *, tie_break: Float[ArrayLike, "L D"] | None = None) -> Int[Array, "L D"]:
    """The place of every unit in the order of choice, 0 for the first: |beta| falling, all layers together.

    With few pairs many units reach |beta| = 1, and the official order of ties then prefers early layers.

    Args:
      scores: (L, D).
      tie_break: among equal |beta| the larger comes first, such as ``au_steadiness(momentum)``; by default, and where
        that too is equal, the order is (layer, index).

    Raises:
      ValueError: other shapes.
    """
    if np.ndim(scores) != 2 or (tie_break is not None and np.shape(tie_break) != np.shape(scores)):
        raise ValueError(
            f"au_ranks: wanted scores (L, D) and tie_break of the same shape, got {np.shape(scores)} and "
            f"{None if tie_break is None else np.shape(tie_break)}."
        )
    size = -jnp.abs(jnp.asarray(scores)).ravel()
    keys = (size,) if tie_break is None else (-jnp.asarray(tie_break).ravel(), size)
    order = jnp.lexsort(keys)  # stable; the last key is the first criterion
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order))).reshape(np.shape(scores))


def au_mask(
    scores: Float[ArrayLike, "L D"],
    k: int | Int[Array, ""],
    alpha: float | Float[Array, ""],
    *,
    tie_break: Float[ArrayLike, "L D"] | None = None,
) -> Float[Array, "L D"]:
    """alpha beta on the k chosen units, 0 elsewhere.

    Args:
      scores: (L, D).
      k: one budget for all layers, 1..L D; fewer are chosen where fewer scores are not 0. May be traced, like alpha: a
        grid over both is one ``vmap``.
      alpha: strength.
      tie_break: see ``au_ranks``.

    Raises:
      ValueError: k out of range, or an alpha that is not finite, where they are known.
    """
    require_budget(k, np.size(scores))
    require_finite("alpha", alpha)
    chosen = au_ranks(scores, tie_break=tie_break) < k
    return jnp.where(chosen, alpha * jnp.asarray(scores), 0.0)


def select_aus(
    scores: Float[ArrayLike, "L D"], k: int, *, tie_break: Float[ArrayLike, "L D"] | None = None
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """The chosen units as a list, for people: M = min(k, number of scores that are not 0).

    Returns:
      Layers, dimensions and beta, (M,) each, in the order of choice; on the host.

    Raises:
      ValueError: as ``au_mask``.
    """
    require_budget(k, np.size(scores))
    order = np.argsort(np.asarray(au_ranks(scores, tie_break=tie_break)), axis=None)[:k]
    beta = np.asarray(scores).ravel()[order]
    layers, dims = np.unravel_index(order[beta != 0], np.shape(scores))
    return layers, dims, beta[beta != 0]


def tie_count(scores: Float[ArrayLike, "L D"], k: int) -> int:
    """How many units share the |beta| of the k-th: above 1, their order decided who was chosen.

    >>> tie_count(jnp.asarray([[1.0, -1.0, 0.5], [1.0, 0.0, 0.2]]), 2)
    3
    """
    require_budget(k, np.size(scores))
    size = np.abs(np.asarray(scores)).ravel()
    return int((size == np.sort(size)[-k]).sum())


def au_edits(model: Model, mask: Float[ArrayLike, "L D"], site: str = SITE) -> dict[str, Any]:
    """The intervention y <- y + y . mask as an edit, for ``apply`` and ``generate``, at all positions.

    A mask of zeros leaves the model as it is, to the bit.

    Args:
      model: the model that the scores were read from.
      mask: (L, D); may be traced: ``vmap`` over (..., L, D) is a grid.
      site: "attn", "ffn" or "layer".

    Raises:
      ValueError: an unknown site, or a mask of another shape; at "attn" D is H K, not the model's width.
      KeyError: the model lacks the site.
    """
    shape = _shape(model, site)
    factor = (1 + _fitting(mask, shape, site)).reshape(shape)
    return at(model.sites, SITES[site], Scale(factor), stacked=True)


def fold_au_into_params(model: Model, params: Any, mask: Float[ArrayLike, "L D"], site: str) -> Any:
    """The same intervention in the weights: scale the slices that the units drive, or are driven by.

    "attn" scales rows of the output projection; "ffn" scales columns and bias of the down-projection or, where a second
    norm follows it (Gemma 2), that norm. The function of the model is that of ``au_edits``, and costs nothing to run.

    Args:
      model, params: the decoder. ``params`` is not changed.
      mask: (L, D).
      site: "attn" or "ffn".

    Raises:
      ValueError: "layer", which no weight writes alone; an unknown site; a mask of another shape; a quantised kernel,
        or an MLP of another kind.
    """
    if site == "layer":
        raise ValueError('site "layer" cannot be folded: the residual stream is a sum, no weight slice writes it.')
    factor = 1 + _fitting(mask, _shape(model, site), site)
    config = model.module.config
    if site == "attn":
        path = "blocks/attn/o/kernel"
        pattern, inputs = path, 1
    elif config.norm_order == "sandwich":
        path = "blocks/mlp/norm_out/scale"
        pattern, inputs = "blocks/mlp/norm_out/*", 0
    else:
        path = "blocks/mlp/down/kernel"
        pattern, inputs = "blocks/mlp/down/*", 0
    found = select.matching(params, pattern)
    if path not in found:
        raise ValueError(f'params have no plain "{path}": quantised kernels and other MLPs cannot be folded into.')
    plus_one = path.endswith("scale") and config.norm == "rms_plus_one"

    def scaled(leaf: jax.Array) -> jax.Array:
        if inputs:  # (L, H, K, D): units are the inputs
            changed = leaf * factor.reshape(*leaf.shape[:3], 1)
        else:  # (L, F, D) or (L, D): units are the outputs
            wide = factor if leaf.ndim == 2 else factor[:, None]
            changed = (1 + leaf) * wide - 1 if plus_one else leaf * wide
        return changed.astype(leaf.dtype)

    return select.put(params, {name: scaled(leaf) for name, leaf in found.items()})


def alpha_slope(
    model: Model, params: Any, mask: Float[ArrayLike, "L D"], site: str, texts: Texts
) -> Float[Array, "N V"]:
    """d logits / d alpha at alpha = 0, along ``mask`` (that of alpha = 1), after the last token of each text.

    For a single unit of "attn" it is beta x_i J W[:, i], J the Jacobian of the logits by what attention adds to the
    stream. Costs one forward with tangents.
    """

    def logits(alpha: jax.Array) -> jax.Array:
        return steered_logits(model, params, au_edits(model, alpha * jnp.asarray(mask), site), texts)

    return jax.jvp(logits, (jnp.zeros(()),), (jnp.ones(()),))[1]


def au_token_logits(model: Model, params: Any, layer: int, site: str = SITE) -> Float[Array, "D V"]:
    """What each unit of a layer writes into the logits directly: U (g . W[:, i]), the norm's scale frozen.

    At "ffn" and "layer" the slice of unit i is the i-th axis of the residual stream. Sums over a LayerNorm's mean are
    taken out; a second norm behind attention (Gemma 2) counts by its gain; logits are those before a soft cap.

    Args:
      model, params: a decoder with a final norm and an unembedding.
      layer: 0..L - 1.
      site: "attn", "ffn" or "layer".

    Returns:
      (D, V) float32, per unit of x_i divided by the final norm's scale.

    Raises:
      ValueError: an unknown site, a layer out of range, or a model without logits or final norm.
    """
    shape, config = _shape(model, site), model.module.config
    if not 0 <= layer < config.layers:
        raise ValueError(f"layer must be in 0..{config.layers - 1}, got {layer}.")
    if config.norm_order == "post" or not config.unembed:
        raise ValueError("au_token_logits needs a model with a final norm and logits.")

    def through(x: jax.Array, norm: Any) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        return centred * (norm["scale"].astype(jnp.float32) + (config.norm == "rms_plus_one"))

    if site == "attn":
        attn = jax.tree.map(lambda leaf: leaf[layer], params["blocks"]["attn"])
        # The slice of a unit is what the map makes of 1 in its place; so quantised kernels are read too.
        ones = jnp.eye(int(np.prod(shape[1:]))).reshape(-1, *shape[1:])
        slices = linear(ones, attn["o"]["kernel"], None, inputs=2)
        if config.norm_order == "sandwich":
            slices = through(slices, attn["norm_out"])
    else:
        slices = jnp.eye(config.width)
    direct = through(slices, params["final_norm"])
    if config.tied:
        return direct @ params["embed"]["tokens"].T.astype(jnp.float32)
    return linear(direct, params["unembed"]["kernel"], None)


def au_js(logits: Float[Array, "D V"]) -> Float[Array, "D D"]:
    """Jensen-Shannon divergence of softmax(logits_i) and softmax(logits_j), nats, in [0, log 2]: how unlike units are.

    Args:
      logits: (D, V), rows of ``au_token_logits``.
    """
    return jax.lax.map(lambda row: jensen_shannon(row, logits), logits)


def require_budget(k: Any, units: int) -> None:
    """Refuse a number of units outside 1..L D.

    Raises:
      ValueError: where k is known.
    """
    if not isinstance(k, jax.core.Tracer) and not (np.ndim(k) == 0 and 1 <= k <= units):
        raise ValueError(f"k: wanted 1 to L D = {units} units, got {k}.")


def require_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity.

    Raises:
      ValueError: where the value is known.
    """
    if not isinstance(value, jax.core.Tracer) and not np.isfinite(np.asarray(value)).all():
        raise ValueError(f"{name} must be finite, got {value}.")


def _site(site: str) -> str:
    if site not in SITES:
        raise ValueError(f'unknown site "{site}"; known: {", ".join(SITES)}.')
    return SITES[site]


def _shape(model: Model, site: str) -> tuple[int, ...]:
    """(L, H, K) at "attn", (L, D) elsewhere."""
    entry = model.sites.named(_site(site))[0]
    return entry.layers or 1, *entry.value.shape[2:]


def _fitting(mask: ArrayLike, shape: tuple[int, ...], site: str) -> jax.Array:
    wanted = shape[0], int(np.prod(shape[1:]))
    if np.shape(mask) != wanted:
        raise ValueError(f'mask: wanted (layers, width) = {wanted} at site "{site}", got {np.shape(mask)}.')
    return jnp.asarray(mask)
