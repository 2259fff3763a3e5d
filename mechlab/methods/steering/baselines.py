"""What steering methods are compared with: CAA, ITI and SADI, whole blocks, and units chosen in other orders.

CAA, contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681): the mean difference of paired activations
of the residual stream, added in one layer, h <- h + alpha mean(A+ - A-).

ITI, inference-time intervention (Li et al. 2023, arXiv 2306.03341): the heads whose output tells true from false best
are shifted, before the output projection,

    z_lh <- z_lh + alpha sigma_lh theta_lh,    theta the unit vector from the mean of false to the mean of true items,
                                               sigma the standard deviation (ddof 0) of <z_lh, theta_lh>

Heads are ranked by a logistic probe's accuracy on validation items; theta and sigma are of train and validation items
together. In the original two-fold evaluation everything is fitted anew in each fold (``iti_two_folds``).

SADI, semantics-adaptive intervention (Wang et al. 2025, arXiv 2410.12299): the k dimensions with the largest
|mean(A+ - A-)| are scaled, y <- y + delta (y . mask); a mask, for ``austeer.au_edits``.

Controls of AUSteer: ``whole_block`` steers every unit of a layer by its own score; ``matched_mask`` steers k units of
another order by its strengths, each with the sign of its own score, so that only the choice differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.analysis.directions import mean_difference
from mechlab.analysis.probes import held_out_accuracy
from mechlab.core.edits import Add, at
from mechlab.core.model import Model
from mechlab.core.rng import streams
from mechlab.data.splits import split_indices
from mechlab.methods.steering.austeer import au_mask, au_momentum, au_ranks, require_budget, require_finite
from mechlab.methods.steering.vectors import SITE

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int


@struct.dataclass
class ITI:
    """Heads to shift, and by how much at alpha = 1.

    Attributes:
      shift: (L, H, K) sigma theta of every head.
      accuracy: (L, H) of the heads' probes on validation items.
      ranks: (L, H) place of every head by accuracy, 0 the best; ties in the order (layer, head).
    """

    shift: Float[Array, "L H K"]
    accuracy: Float[Array, "L H"]
    ranks: Int[Array, "L H"]


def caa_vector(acts_pos: Float[ArrayLike, "N L D"], acts_neg: Float[ArrayLike, "N L D"]) -> Float[Array, "L D"]:
    """mean(A+ - A-) at every layer.

    Args:
      acts_pos, acts_neg: (N, L, D) states of pairs at ``resid_post``.

    Raises:
      ValueError: as ``au_momentum``.
    """
    return au_momentum(acts_pos, acts_neg).mean(0)


def caa_shift(vector: Float[Array, "L D"], layer: Any, alpha: Any) -> Float[Array, "L D"]:
    """alpha times the vector in one layer, 0 in the others: what ``caa_edits`` adds; both may be traced.

    Raises:
      ValueError: an alpha that is not finite, where it is known.
    """
    require_finite("alpha", alpha)
    inside = jnp.arange(len(vector)) == layer
    return jnp.where(inside[:, None], alpha * vector, 0.0)


def caa_edits(model: Model, shift: Float[ArrayLike, "L D"]) -> dict[str, Any]:
    """Add a shift (L, D) to the residual stream after every block, at all positions.

    Raises:
      ValueError: a shift of another shape.
    """
    return at(model.sites, SITE, Add(_require_shape(model, SITE, shift)), stacked=True)


def iti_fit(
    acts: Float[ArrayLike, "N L H K"],
    labels: Int[ArrayLike, " N"],
    train: Int[ArrayLike, " M"],
    validation: Int[ArrayLike, " M"],
) -> ITI:
    """Probe every head, and read its direction and spread.

    Args:
      acts: (N, L, H, K) outputs of heads at the last token, before the output projection.
      labels: (N,) 1 for true, 0 for false.
      train, validation: indices of items; other items are not looked at. Items that belong together (a question's true
        and false answer) must be on one side.

    Raises:
      ValueError: shapes that do not fit, an item on both sides, or one class only.
    """
    if np.ndim(acts) != 4 or np.shape(labels) != np.shape(acts)[:1]:
        raise ValueError(f"iti_fit: wanted acts (N, L, H, K), labels (N,), got {np.shape(acts)}, {np.shape(labels)}.")
    by_head = jnp.moveaxis(jnp.asarray(acts, jnp.float32), 0, 2)
    accuracy = held_out_accuracy(by_head, labels, train, validation)
    tuning = np.concatenate([np.asarray(train), np.asarray(validation)])
    seen = by_head[:, :, tuning]
    theta = mean_difference(seen, np.asarray(labels)[tuning]).unit
    sigma = jnp.einsum("lhnk,lhk->lhn", seen, theta).std(-1)
    return ITI(sigma[..., None] * theta, accuracy, au_ranks(accuracy))


def iti_two_folds(
    key: jax.Array,
    acts: Float[ArrayLike, "N L H K"],
    labels: Int[ArrayLike, " N"],
    groups: Int[ArrayLike, " N"],
    *,
    validation: float = 0.2,
) -> tuple[tuple[ITI, Int[np.ndarray, " M"]], ...]:
    """The original evaluation: groups are halved; each half's fit goes with the items of the *other* half.

    Args:
      key: typed key.
      acts, labels: as in ``iti_fit``.
      groups: (N,) which question an item belongs to.
      validation: share of a half's groups that ranks its heads.

    Returns:
      Twice a fit, with the indices of the items to test it on.

    Raises:
      ValueError: fewer than four groups, or as ``iti_fit``.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 4:
        raise ValueError(f"iti_two_folds: wanted at least four groups, got {len(names)}.")
    halves, *inner = streams(key, "halves first second")
    first, second = split_indices(halves, len(names), (len(names) // 2, len(names) - len(names) // 2))

    def fit(half: jax.Array, key: jax.Array) -> ITI:
        held = max(1, int(validation * len(half)))
        parts = split_indices(key, len(half), (len(half) - held, held))
        train, ranking = (np.flatnonzero(np.isin(group, np.asarray(half[part]))) for part in parts)
        return iti_fit(acts, labels, train, ranking)

    return tuple(
        (fit(half, inner_key), np.flatnonzero(np.isin(group, np.asarray(other))))
        for half, other, inner_key in ((first, second, inner[0]), (second, first, inner[1]))
    )


def iti_shift(iti: ITI, k: int | Int[Array, ""], alpha: float | Float[Array, ""]) -> Float[Array, "L H K"]:
    """alpha sigma theta of the k best heads, 0 elsewhere; k and alpha may be traced.

    Raises:
      ValueError: k outside 1..L H, or an alpha that is not finite, where they are known.
    """
    require_budget(k, iti.ranks.size)
    require_finite("alpha", alpha)
    return jnp.where((iti.ranks < k)[..., None], alpha * iti.shift, 0.0)


def iti_edits(
    model: Model,
    shift: Float[Array, "L H K"],
    start: Int[ArrayLike, " B"] | None = None,
) -> dict[str, Any]:
    """Shift heads at positions from ``start`` on.

    Args:
      model: the model that was read.
      shift: from ``iti_shift``; may be traced.
      start: (B,) first shifted position of every row; all positions by default. The original shifts the token that is
        being read at each step of generation, beginning with the prompt's last: ``lengths - 1``.

    Raises:
      ValueError: a shift of another shape.
    """
    _require_shape(model, "attn_z", shift)
    span = None if start is None else (jnp.asarray(start), jnp.asarray(start) * 0 + model.module.config.context)
    return at(model.sites, "attn_z", Add(shift), span=span, stacked=True)


def sadi_mask(momentum: Float[ArrayLike, "N L D"], k: Any, delta: Any) -> Float[Array, "L D"]:
    """delta on the k dimensions with the largest |mean momentum| of all layers together, 0 elsewhere.

    Args:
      momentum: (N, L, D), as of ``au_momentum``.
      k, delta: may be traced.

    Raises:
      ValueError: as ``au_mask``.
    """
    size = jnp.abs(jnp.asarray(momentum).mean(0))
    return jnp.where(au_mask(size, k, 1.0) > 0, delta, 0.0)


def whole_block(scores: Float[ArrayLike, "L D"], layer: Any, alpha: Any) -> Float[Array, "L D"]:
    """alpha beta on every unit of one layer: the block that single units are said to beat; both may be traced."""
    beta = jnp.asarray(scores)
    return jnp.where((jnp.arange(len(beta)) == layer)[:, None], alpha * beta, 0.0)


def matched_mask(scores: Float[ArrayLike, "L D"], ranks: Int[Array, "L D"], k: Any, alpha: Any) -> Float[Array, "L D"]:
    """The k first units of another order, as strong as AUSteer's: the unit of rank r gets the r-th largest |beta|.

    Each keeps the sign of its own score. With ``au_ranks(scores)`` this is ``au_mask``, where no score is 0.

    Args:
      scores: (L, D).
      ranks: (L, D), a permutation of 0..L D - 1: ``random_ranks``, or ``inverse_ranks``.
      k, alpha: may be traced.

    Raises:
      ValueError: shapes that differ, k or alpha as in ``au_mask``.
    """
    require_budget(k, np.size(scores))
    require_finite("alpha", alpha)
    if np.shape(scores) != np.shape(ranks):
        raise ValueError(f"scores, ranks: wanted one shape, got {np.shape(scores)} and {np.shape(ranks)}.")
    beta = jnp.asarray(scores)
    strengths = -jnp.sort(-jnp.abs(beta).ravel())
    return jnp.where(ranks < k, alpha * jnp.where(beta < 0, -1, 1) * strengths[ranks], 0.0)


def random_ranks(key: jax.Array, shape: tuple[int, ...]) -> Int[Array, "L D"]:
    """All units of all layers in a random order."""
    return jax.random.permutation(key, int(np.prod(shape))).reshape(shape)


def inverse_ranks(scores: Float[ArrayLike, "L D"]) -> Int[Array, "L D"]:
    """The least consistent units first."""
    return np.size(scores) - 1 - au_ranks(scores)


def _require_shape(model: Model, site: str, shift: ArrayLike) -> jax.Array:
    entry = model.sites.named(site)[0]
    wanted = (entry.layers, *entry.value.shape[2:])
    if np.shape(shift) != wanted:
        raise ValueError(f'shift: wanted shape {wanted} at "{site}", got {np.shape(shift)}.')
    return jnp.asarray(shift)
