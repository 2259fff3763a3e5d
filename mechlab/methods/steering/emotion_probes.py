"""Decoding Emotion in the Deep (Zhang and Zhong 2025, arXiv 2510.04064): probes of emotion in hidden states.

The model is frozen. At every depth l = 0..L (the embedding, then the stream after each block, *before* the final norm)
a text is one vector x, the state of its last token or the mean over its tokens, and a small network reads K classes:

    x' = (x - mu) / (sd + 1e-6)                 mu, sd of the training texts                                        (1)
    z  = W2 relu(W1 x' + b1) + b2,  p = softmax(z)                                                                  (2)

- Where and how: probes of all depths in one program (``fit_probes``), the geometry of the classes (``geometry``):

      silhouette,   tr S_b / tr S_w,   cos(m_j - m, m_k - m)                                                        (3)
      S_w = 1/N sum over k and i in k of |x_i - m_k|^2,   S_b = sum over k of n_k/N |m_k - m|^2

- Malleable: the same probe on neutral texts behind an emotional instruction (``prompt_shift``, ``override_rates``).
- Persistent: the same probe p tokens after the emotional text (``readouts.states_at``); the half-life is the first p
  at which acc(p) - 1/K is under half of what it is at p = 0.
- Baselines: the model is asked (``readouts.label_logprob``); and a control task, labels at random for every type of
  sentence (``control_labels``): accuracy less that on the control task is the probe's *selectivity* (Hewitt and Liang
  2019, arXiv 1909.03368).

Differs from the paper: its code could not be read. Sizes and the optimiser are ours: 256 hidden units, AdamW at 1e-3,
dropout 0.1, early stopping; so are the calibrated and the few-shot prompts, and the control task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.directions import class_means
from mechlab.analysis.linalg import unit
from mechlab.analysis.metrics import cross_entropy
from mechlab.core.errors import unknown
from mechlab.core.rng import streams

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

Params = dict[str, jax.Array]

EPSILON = 1e-6
"""Added to the standard deviation of equation 1: a feature that is constant in training stays finite."""

LABEL_WORDS = {
    "anger": "angry",
    "disgust": "disgusted",
    "fear": "afraid",
    "joy": "happy",
    "happiness": "happy",
    "sadness": "sad",
    "surprise": "surprised",
    "neutral": "calm",
}
"""What a model is asked to say for each class."""


def label_words(names: Sequence[str]) -> list[str]:
    """The label words of classes.

    Raises:
      UnknownName: a KeyError, for a class without one.
      ValueError: two classes with the same word.
    """
    for name in names:
        if name not in LABEL_WORDS:
            raise unknown("class", name, LABEL_WORDS)
    words = [LABEL_WORDS[name] for name in names]
    if len(set(words)) < len(words):
        raise ValueError(f"label_words: two classes have the same word: {words}.")
    return words


class Probe(NamedTuple):
    """A trained probe, or one per leading index (depth, seed, fold).

    Attributes:
      params: ``{"W1": (..., D, F), "b1": (..., F), "W2": (..., F, K), "b2": (..., K)}``.
      mean, deviation: (..., D), of the training features.
      dev_accuracy: (...) in [0, 1], of the epoch that was kept.
      epochs: (...) epochs run.
    """

    params: Params
    mean: Float[Array, "... D"]
    deviation: Float[Array, "... D"]
    dev_accuracy: Float[Array, "..."]
    epochs: Int[Array, "..."]

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N K"]:
        """Logits of features that are not standardised; one probe, see ``read_depths`` for all."""
        return probe_apply(self.params, standardise(x, self.mean, self.deviation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How a probe is trained.

    Attributes:
      hidden: F.
      rate, decay: AdamW's learning rate and weight decay.
      dropout: share of hidden units left out.
      batch: texts per step, or all of them where there are fewer.
      epochs: at most.
      patience: training ends after so many epochs without a better accuracy on the dev texts.
    """

    hidden: int = 256
    rate: float = 1e-3
    decay: float = 1e-2
    dropout: float = 0.1
    batch: int = 256
    epochs: int = 30
    patience: int = 5

    def __post_init__(self) -> None:
        if min(self.hidden, self.batch, self.epochs, self.patience) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"ProbeConfig: sizes must be at least 1 and dropout in [0, 1), got {self}.")


def standardise(x: Float[Array, "... D"], mean: Float[Array, " D"], deviation: Float[Array, " D"]) -> jax.Array:
    """(x - mu) / (sd + 1e-6), equation 1."""
    return (x - mean) / (deviation + EPSILON)


def init_probe(key: jax.Array, d: int, k: int, hidden: int = 256) -> Params:
    """LeCun-normal kernels (in, out), zero biases: ``{"W1": (d, hidden), "b1", "W2": (hidden, k), "b2"}``."""
    first, second = streams(key, "W1 W2")
    lecun = jax.nn.initializers.lecun_normal()
    return {
        "W1": lecun(first, (d, hidden)),
        "b1": jnp.zeros(hidden),
        "W2": lecun(second, (hidden, k)),
        "b2": jnp.zeros(k),
    }


def probe_apply(params: Params, x: Float[Array, "N D"], keep: Float[ArrayLike, "N F"] = 1.0) -> Float[Array, "N K"]:
    """Logits of standardised features, equation 2; ``keep`` multiplies the hidden units (dropout)."""
    return (jax.nn.relu(x @ params["W1"] + params["b1"]) * keep) @ params["W2"] + params["b2"]


def fit_probes(
    key: jax.Array,
    x: Float[Array, "N L+1 D"],
    y: Int[ArrayLike, " N"],
    train: Int[ArrayLike, " n"],
    dev: Int[ArrayLike, " m"],
    *,
    classes: int,
    config: ProbeConfig,
) -> Probe:
    """One probe per depth, all with the same key, batches and budget, so that no depth is ahead by its optimisation.

    It may be mapped over keys (seeds), ``y`` (control tasks) and ``train``, ``dev`` (folds).

    Args:
      key: typed key.
      x: (N, L + 1, D) features, not standardised.
      y: (N,) classes 0..K - 1.
      train, dev: texts to fit and to stop by; equal numbers in every fold. Test texts are in neither.
      classes: K.
      config: see ``ProbeConfig``.

    Returns:
      The probes, leaves (L + 1, ...): the parameters of the epoch with the best dev accuracy, the first of equals.

    Raises:
      ValueError: shapes that do not fit; where values are known: labels out of range, a class without a training text,
        a text in both parts, or features that are not finite.
    """
    if np.ndim(x) != 3 or np.shape(y) != np.shape(x)[:1]:
        raise ValueError(f"x, y: wanted (N, L + 1, D) and (N,), got {np.shape(x)} and {np.shape(y)}.")
    if not any(isinstance(a, jax.core.Tracer) for a in (x, y, train, dev)):
        _require_trainable(np.asarray(x), np.asarray(y), np.asarray(train), np.asarray(dev), classes)
    fit = functools.partial(_fit_probe, classes=classes, config=config)
    return jax.vmap(fit, (None, 1, None, None, None))(key, *(jnp.asarray(a) for a in (x, y, train, dev)))


def read_depths(probes: Probe, x: Float[Array, "N L+1 D"]) -> Float[Array, "L+1 N K"]:
    """Logits of every depth's probe on that depth's features."""
    return jax.vmap(lambda probe, x: probe(x), (0, 1))(probes, jnp.asarray(x))


def control_labels(key: jax.Array, groups: Int[ArrayLike, " N"], classes: int) -> Int[Array, " N"]:
    """A class at random for every group (a cue, a type of sentence), the same for all of its texts.

    Args:
      key: typed key.
      groups: (N,) integers >= 0.
      classes: K. Groups are shared out evenly, so that every class occurs where there are at least K groups.
    """
    found, index = np.unique(np.asarray(groups), return_inverse=True)
    return (jax.random.permutation(key, len(found)) % classes)[index.reshape(-1)]


class Geometry(NamedTuple):
    """How classes lie, equation 3; leading axes (depths) are those of the features.

    Attributes:
      silhouette: mean over texts, Euclidean, in [-1, 1].
      fisher: tr S_b / tr S_w.
      cosine: (..., K, K), between class means less the mean of all.
    """

    silhouette: Float[Array, "..."]
    fisher: Float[Array, "..."]
    cosine: Float[Array, "... K K"]


def geometry(x: Float[Array, "... N D"], y: Int[ArrayLike, " N"], classes: int) -> Geometry:
    """The geometry of classes; standardise first, or a few large dimensions decide it.

    Memory grows with 64 N D, not with N^2 D.

    Args:
      x: (..., N, D).
      y: (N,) classes, each at least once.
      classes: K >= 2.

    Raises:
      ValueError: labels that do not fit, a class without texts, or fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"geometry: wanted at least 2 classes, got {classes}.")
    x, means = jnp.asarray(x), class_means(x, y, classes)
    y = jnp.asarray(y)
    share = jax.nn.one_hot(y, classes, dtype=x.dtype).mean(0)
    centred = means - x.mean(-2, keepdims=True)
    within = ((x - means[..., y, :]) ** 2).sum(-1).mean(-1)
    between = jnp.einsum("k,...kd->...", share, centred**2)
    flat = jax.lax.map(lambda one: _silhouette(one, y, classes), x.reshape(-1, *x.shape[-2:]))
    directions = unit(centred)
    return Geometry(flat.reshape(x.shape[:-2]), between / within, directions @ jnp.swapaxes(directions, -1, -2))


def prompt_shift(logits: Float[Array, "P N K"], plain: Float[Array, "N K"]) -> tuple[jax.Array, jax.Array]:
    """What the probe reads in neutral texts behind each prompt: mean probabilities (P, K), and how far they moved.

    Args:
      logits: (P, N, K) of the same N texts behind P prompts.
      plain: (N, K) without a prompt.
    """
    read = jax.nn.softmax(logits, -1).mean(1)
    return read, read - jax.nn.softmax(plain, -1).mean(0)


def override_rates(
    logits: Float[Array, "P N K"], prompts: Int[ArrayLike, " P"], labels: Int[ArrayLike, " N"]
) -> tuple[jax.Array, jax.Array]:
    """Of emotional texts behind a prompt of *another* emotion: the shares read as the prompt's, and as the text's."""
    read = logits.argmax(-1)
    wanted, own = jnp.asarray(prompts)[:, None], jnp.asarray(labels)[None]
    pairs = (wanted != own).sum()
    return tuple(((read == a) & (wanted != own)).sum() / pairs for a in (wanted, own))  # type: ignore[return-value]


def half_life(curve: Float[ArrayLike, " P"], offsets: Sequence[int], classes: int) -> float:
    """The first offset at which acc(p) - 1/K is under half of its value at the first offset; infinite if none is.

    >>> half_life([0.9, 0.6, 0.4, 0.2], [0, 10, 20, 40], 10)
    20.0
    """
    above = np.asarray(curve, float) - 1 / classes
    if above.ndim != 1 or len(above) != len(offsets):
        raise ValueError(f"curve, offsets: wanted P values of both, got {above.shape} and {len(offsets)}.")
    under = np.flatnonzero(above < above[0] / 2)
    return float(offsets[under[0]]) if under.size else float("inf")


def _fit_probe(
    key: jax.Array, x: jax.Array, y: jax.Array, train: jax.Array, dev: jax.Array, classes: int, config: ProbeConfig
) -> Probe:
    """One probe: epochs until the dev accuracy has not risen for ``patience`` of them."""
    init, order, drop = streams(key, "init order dropout")
    seen = x[train]
    mean, deviation = seen.mean(0), seen.std(0)
    x = standardise(x, mean, deviation)
    batch = min(config.batch, len(train))
    optimiser = optax.adamw(config.rate, weight_decay=config.decay)
    params = init_probe(init, x.shape[-1], classes, config.hidden)

    def loss(params: Params, rows: jax.Array, key: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 1 - config.dropout, (batch, config.hidden)) / (1 - config.dropout)
        return cross_entropy(probe_apply(params, x[rows], keep), y[rows])

    def epoch(state: Any, number: jax.Array) -> Any:
        params, moments, best, best_accuracy, waited, epochs = state
        # The number of the epoch is no part of the state: batches and dropout are drawn once for all depths.
        shuffled = train[jax.random.permutation(jax.random.fold_in(order, number), len(train))]

        def step(carry: Any, i: jax.Array) -> Any:
            params, moments = carry
            rows = jax.lax.dynamic_slice_in_dim(shuffled, i * batch, batch)
            grads = jax.grad(loss)(params, rows, jax.random.fold_in(jax.random.fold_in(drop, number), i))
            updates, moments = optimiser.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), None

        (params, moments), _ = jax.lax.scan(step, (params, moments), jnp.arange(len(train) // batch))
        found = (probe_apply(params, x[dev]).argmax(-1) == y[dev]).mean()
        # A probe that has stopped goes on beside those that have not, but is no longer looked at.
        going = waited < config.patience
        better = (found > best_accuracy) & going
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        best_accuracy = jnp.where(better, found, best_accuracy)
        return (params, moments, best, best_accuracy, jnp.where(better, 0, waited + 1), epochs + going), None

    start = (params, optimiser.init(params), params, jnp.float32(-1), jnp.int32(0), jnp.int32(0))
    (_, _, best, accuracy, _, epochs), _ = jax.lax.scan(epoch, start, jnp.arange(config.epochs))
    return Probe(best, mean, deviation, accuracy, epochs)


def _silhouette(x: jax.Array, y: jax.Array, classes: int) -> jax.Array:
    one_hot = jax.nn.one_hot(y, classes, dtype=x.dtype)
    count = one_hot.sum(0)

    def one(own: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, label = own
        # Differences, not |a|^2 + |b|^2 - 2 a b: in float32 that would not be 0 between a text and itself.
        sums = jnp.sqrt(((x - row) ** 2).sum(-1)) @ one_hot
        inner = sums[label] / jnp.maximum(count[label] - 1, 1)
        outer = jnp.where(jnp.arange(classes) == label, jnp.inf, sums / count).min()
        width = (outer - inner) / jnp.maximum(jnp.maximum(outer, inner), jnp.finfo(x.dtype).tiny)
        return jnp.where(count[label] == 1, 0, width)

    return jax.lax.map(one, (x, y), batch_size=64).mean()


def _require_trainable(x: np.ndarray, y: np.ndarray, train: np.ndarray, dev: np.ndarray, classes: int) -> None:
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"y: wanted classes 0..{classes - 1}, got {y.min()}..{y.max()}.")
    missing = sorted(set(range(classes)) - set(y[train].tolist()))
    if missing:
        raise ValueError(f"y: classes {missing} have no training text.")
    if np.intersect1d(train, dev).size:
        raise ValueError(f"train and dev share {np.intersect1d(train, dev).size} texts.")
    if not np.isfinite(x).all():
        raise ValueError(f"x: {int((~np.isfinite(x)).sum())} features are not finite.")
