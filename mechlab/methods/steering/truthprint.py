"""TruthPrInt (Duan et al., ICCV 2025, arXiv 2503.10602): hallucinated objects are seen one token early, and avoided.

Whether the object word y_t of a caption is hallucinated is read from h, the residual stream after one block at the
position that *predicts* it, t - 1. A detector G of such states is trained on captions whose truth is known:

    G(h_{t-1}) = sigmoid(MLP((h_{t-1} - mean) / std)),    hallucinated if G >= tau                           (detector)

While decoding, a flagged object word is not written. The text goes back to the least confident token of the current
sentence, which is forbidden there as long as what precedes it stays the same (pre-intervention):

    i* = argmin_{s <= i < t} p(y_i | y_<i, image),    B_{i*} <- B_{i*} + {y_{i*}},    t <- i*                 (rollback)

``rollback.py`` has that loop. ComnHallu carries G to another model or other images without labels. With V_s, V_t the
leading k eigenvectors of the centred second moments of source and target states:

    Z_s = (X_s - mean_s) V_s,    Z_t = (X_t - mean_t) V_t M,    M = V_tᵀ V_s                                (alignment)

No official code is public. Our choices, because the public record leaves them open: the size and training of G, the
first minimum, a limit of interventions per sentence, a budget of forwards, and the direction of the alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.linalg import truncated_svd
from mechlab.analysis.metrics import auroc
from mechlab.core.rng import require_typed, streams

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


class Detector(NamedTuple):
    """G.

    Attributes:
      mean, std: (D,) of the training states.
      layers: (kernel (in, out), bias (out,)) of each layer, ReLU between them.
      dev_auroc: of the epoch that was kept.
    """

    mean: Float[Array, " D"]
    std: Float[Array, " D"]
    layers: tuple[tuple[jax.Array, jax.Array], ...]
    dev_auroc: Float[Array, ""]


class Alignment(NamedTuple):
    """ComnHallu's maps of new states into the source's subspace; rows of the bases are orthonormal.

    Attributes:
      source_mean, target_mean: (D,).
      source_basis, target_basis: (k, D), largest variance first, largest entry positive.
      source_variance, target_variance: (k,) eigenvalues.
    """

    source_mean: Float[Array, " D"]
    source_basis: Float[Array, "k D"]
    source_variance: Float[Array, " k"]
    target_mean: Float[Array, " D"]
    target_basis: Float[Array, "k D"]
    target_variance: Float[Array, " k"]

    def leading(self, k: int) -> Alignment:
        """The maps of a lower rank: directions are in order."""
        first = {name: getattr(self, name)[:k] for name in self._fields if not name.endswith("mean")}
        return self._replace(**first)

    def source(self, x: Float[Array, "... D"]) -> Float[Array, "... k"]:
        """Z_s of source states."""
        return (x - self.source_mean) @ self.source_basis.T

    def target(self, x: Float[Array, "... D"]) -> Float[Array, "... k"]:
        """Z_t of target states. Unchanged by a flip or rotation inside the target's subspace."""
        return (x - self.target_mean) @ self.target_basis.T @ (self.target_basis @ self.source_basis.T)


# The detector.


def balanced(key: jax.Array, labels: Bool[ArrayLike, " N"], each: int | None = None) -> Int[np.ndarray, " M"]:
    """Rows with as many of either class, chosen at random: by default all of the rarer one.

    A detector that is trained on them is not calibrated for the true rate.

    Args:
      key: typed key.
      labels: (N,).
      each: rows of a class; a number that several sets have makes their detectors lanes of one ``vmap``.

    Raises:
      ValueError: a single class, or fewer than ``each`` rows of one.
    """
    labels = np.asarray(labels, bool)
    _two_classes("balanced", labels)
    order = np.asarray(jax.random.permutation(key, len(labels)))
    rarer = int(min(labels.sum(), (~labels).sum()))
    each = rarer if each is None else each
    if not 1 <= each <= rarer:
        raise ValueError(f"balanced: each must be in 1..{rarer}, the rows of the rarer class, got {each}.")
    return np.sort(np.concatenate([order[labels[order]][:each], order[~labels[order]][:each]]))


def fit_detector(
    key: jax.Array,
    x: Float[ArrayLike, "N D"],
    y: Bool[ArrayLike, " N"],
    dev_x: Float[ArrayLike, "M D"],
    dev_y: Bool[ArrayLike, " M"],
    *,
    hidden: Sequence[int] = (128, 64),
    epochs: int = 50,
    batch: int = 128,
    rate: float = 1e-3,
    decay: float = 1e-2,
) -> Detector:
    """G by binary cross-entropy and AdamW; the epoch with the best AUROC on dev is kept.

    Args:
      key: typed key.
      x: (N, D) states one token before object words.
      y: (N,) True for hallucinated; both classes occur.
      dev_x, dev_y: of other images.
      hidden: widths; () is a linear detector, a single direction.
      epochs, batch, rate, decay: of AdamW; a batch has at most N rows.

    Returns:
      The detector. ``jax.vmap`` over (key, x, dev_x) trains one per depth, or per seed.

    Raises:
      ValueError: shapes that do not fit or, where values are known, a single class or states that are not finite.
    """
    require_typed(key)
    for name, states, labels in (("x, y", x, y), ("dev_x, dev_y", dev_x, dev_y)):
        if np.ndim(states) != 2 or np.shape(labels) != np.shape(states)[:1]:
            raise ValueError(f"{name}: wanted (N, D) and (N,), got {np.shape(states)} and {np.shape(labels)}.")
        if not isinstance(states, jax.core.Tracer) and not np.isfinite(np.asarray(states)).all():
            raise ValueError(f"{name}: the states are not finite.")
        if not isinstance(labels, jax.core.Tracer):
            _two_classes(name, np.asarray(labels, bool))
    batch = min(batch, np.shape(x)[0])
    return _fit(key, *map(jnp.asarray, (x, y, dev_x, dev_y)), tuple(hidden), epochs, batch, rate, decay)


def detector_logit(detector: Detector, x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """The logit of G, for ranking: it does not saturate."""
    x = (x - detector.mean) / detector.std
    for kernel, bias in detector.layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = detector.layers[-1]
    return (x @ kernel + bias)[..., 0]


def detector_prob(detector: Detector, x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """G: how probably the object word that follows is hallucinated, (...)."""
    return jax.nn.sigmoid(detector_logit(detector, x))


def threshold_at_fpr(scores: Float[ArrayLike, " N"], labels: Bool[ArrayLike, " N"], fpr: float = 0.05) -> float:
    """The lowest tau of which at most a share ``fpr`` of truthful words is flagged, score >= tau.

    Raises:
      ValueError: a single class, or fpr outside [0, 1).
    """
    labels = np.asarray(labels, bool)
    _two_classes("threshold_at_fpr", labels)
    return threshold_at_rate(np.asarray(scores)[~labels], fpr)


def threshold_at_rate(scores: Float[ArrayLike, " N"], rate: float) -> float:
    """The lowest tau that flags at most a share ``rate`` of the scores: needs no labels, so it serves a new domain.

    Raises:
      ValueError: no scores, or rate outside [0, 1).

    >>> round(threshold_at_rate([0.1, 0.2, 0.3, 0.4], 0.25), 4)
    0.3
    """
    scores = np.sort(np.asarray(scores, np.float32))[::-1]
    if not scores.size or not 0 <= rate < 1:
        raise ValueError(f"threshold_at_rate: wanted scores and a rate in [0, 1), got {scores.size} and {rate}.")
    # The first score that may not be flagged, and what lies just above it; shares are counts, not floats.
    return float(np.nextafter(scores[int(rate * len(scores) + 1e-6)], np.float32(np.inf)))


# ComnHallu.


def subspace(
    x: Float[ArrayLike, "N D"], k: int, *, center: bool = True
) -> tuple[Float[Array, " D"], Float[Array, "k D"], Float[Array, " k"]]:
    """Mean, leading eigenvectors (rows) and eigenvalues of the second moment XᵀX / N.

    Args:
      x: (N, D) states.
      k: 1..min(N - 1, D).
      center: take the mean off first. Without, the first direction is the mean state, and aligning is mostly matching
        means.

    Raises:
      ValueError: k out of range or, where values are known, states that are not finite.
    """
    shape = np.shape(x)
    if len(shape) != 2 or not 1 <= k <= min(shape[0] - 1, shape[1]):
        raise ValueError(f"subspace: wanted states (N, D) and 1 <= k <= min(N - 1, D), got {shape} and k={k}.")
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
        raise ValueError("subspace: the states are not finite.")
    x = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    mean = x.mean(0) if center else jnp.zeros_like(x[0])
    _, s, basis = truncated_svd(x - mean, k)
    return mean, basis, jnp.square(s) / shape[0]


def choose_k(variances: Float[ArrayLike, " R"], *, share: float = 0.9, most: int = 64) -> int:
    """The smallest k whose directions hold a share of the variance, at most ``most``.

    Args:
      variances: of all directions, decreasing: ``subspace(x, min(N - 1, D))[2]``.
      share: in (0, 1].
      most: cap.
    """
    held = np.cumsum(np.asarray(variances)) / np.asarray(variances).sum()
    return min(int(np.searchsorted(held, share - 1e-6)) + 1, most, len(held))


def comnhallu(x_s: Float[ArrayLike, "N D"], x_t: Float[ArrayLike, "M D"], k: int, *, center: bool = True) -> Alignment:
    """Align target states with the source's subspace; needs no labels.

    Args:
      x_s: (N, D) source states.
      x_t: (M, D) target states, of the same width: for another the map is not defined.
      k: 1..min(N - 1, M - 1, D).
      center: as in ``subspace``.

    Raises:
      ValueError: different widths, or as ``subspace``.
    """
    if np.shape(x_s)[-1:] != np.shape(x_t)[-1:]:
        raise ValueError(f"comnhallu: source and target need one width D, got {np.shape(x_s)} and {np.shape(x_t)}.")
    return Alignment(*subspace(x_s, k, center=center), *subspace(x_t, k, center=center))


def _two_classes(name: str, labels: np.ndarray) -> None:
    if labels.all() or not labels.any():
        raise ValueError(f"{name}: wanted truthful and hallucinated words, got {labels.sum()} of {labels.size}.")


@partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _fit(
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    dev_x: jax.Array,
    dev_y: jax.Array,
    hidden: tuple[int, ...],
    epochs: int,
    batch: int,
    rate: float,
    decay: float,
) -> Detector:
    init, order = streams(key, "init order")
    mean, std = x.mean(0), x.std(0)
    std = jnp.where(std == 0, 1, std)
    widths = (x.shape[1], *hidden, 1)
    layers = tuple(
        (jax.random.normal(k, (inputs, out)) * jnp.sqrt(2 / inputs), jnp.zeros(out))
        for k, inputs, out in zip(jax.random.split(init, len(widths) - 1), widths[:-1], widths[1:], strict=True)
    )
    optimiser = optax.adamw(rate, weight_decay=decay)

    def loss(layers: Any, rows: jax.Array) -> jax.Array:
        logits = detector_logit(Detector(mean, std, layers, jnp.zeros(())), x[rows])
        return optax.sigmoid_binary_cross_entropy(logits, y[rows].astype(jnp.float32)).mean()

    def update(state: Any, rows: jax.Array) -> tuple[Any, None]:
        layers, opt_state = state
        updates, opt_state = optimiser.update(jax.grad(loss)(layers, rows), opt_state, layers)
        return (optax.apply_updates(layers, updates), opt_state), None

    def epoch(state: Any, number: jax.Array) -> tuple[Any, None]:
        now, best = state
        rows = jax.random.permutation(jax.random.fold_in(order, number), len(x))
        now, _ = jax.lax.scan(update, now, rows[: len(x) // batch * batch].reshape(-1, batch))
        one = Detector(mean, std, now[0], jnp.zeros(()))
        one = one._replace(dev_auroc=auroc(detector_logit(one, dev_x), dev_y))
        better = one.dev_auroc > best.dev_auroc
        return (now, jax.tree.map(lambda new, old: jnp.where(better, new, old), one, best)), None

    start = Detector(mean, std, layers, jnp.asarray(-1.0))
    (_, best), _ = jax.lax.scan(epoch, ((layers, optimiser.init(layers)), start), jnp.arange(epochs))
    return best
