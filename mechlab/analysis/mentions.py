"""Objects that a caption mentions against those that are in the picture: CHAIR and POPE-style questions.

Captions are token ids (N, T), padded with any token that names nothing. ``class_of`` (V,) gives the object that a token
names, -1 for other words; synonyms have the same object. ``truth`` (N, C) says which objects are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


class Chair(NamedTuple):
    """Counts of each caption, (N,) each; ``chair_i`` and ``chair_s`` are made of them.

    Attributes:
      mentions: object words.
      hallucinated: object words for an object that is not there.
      recalled: objects that are there and are mentioned.
      present: objects that are there.
    """

    mentions: Int[Array, " N"]
    hallucinated: Int[Array, " N"]
    recalled: Int[Array, " N"]
    present: Int[Array, " N"]

    @property
    def chair_i(self) -> jax.Array:
        """Hallucinated mentions of all object mentions, in [0, 1]; 0 where nothing is mentioned."""
        return self.hallucinated.sum() / jnp.maximum(self.mentions.sum(), 1)

    @property
    def chair_s(self) -> jax.Array:
        """Captions with at least one hallucinated mention, of all captions."""
        return (self.hallucinated > 0).mean()

    @property
    def recall(self) -> jax.Array:
        """Objects mentioned, of all that are there."""
        return self.recalled.sum() / jnp.maximum(self.present.sum(), 1)


class Pope(NamedTuple):
    """Yes-and-no questions: accuracy, F1 of "yes", and the share answered "yes"."""

    accuracy: Float[Array, ""]
    f1: Float[Array, ""]
    yes_rate: Float[Array, ""]


def chair(tokens: Int[ArrayLike, "N T"], truth: Bool[ArrayLike, "N C"], class_of: Int[ArrayLike, " V"]) -> Chair:
    """CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): every mention counts, synonyms are one object.

    Raises:
      ValueError: as ``label_mentions``.

    >>> found = chair(jnp.array([[1, 2, 0]]), jnp.array([[True, False]]), jnp.array([-1, 0, 1]))
    >>> float(found.chair_i), float(found.recall)
    (0.5, 1.0)
    """
    mask, labels = label_mentions(tokens, truth, class_of, first_only=False)
    there = mentioned(tokens, class_of, np.shape(truth)[1]) & jnp.asarray(truth, bool)
    return Chair(mask.sum(1), (mask & labels).sum(1), there.sum(1), jnp.asarray(truth, bool).sum(1))


def label_mentions(
    tokens: Int[ArrayLike, "N T"],
    truth: Bool[ArrayLike, "N C"],
    class_of: Int[ArrayLike, " V"],
    *,
    first_only: bool = True,
) -> tuple[Bool[Array, "N T"], Bool[Array, "N T"]]:
    """Which tokens mention an object, and which of these are hallucinated.

    Args:
      tokens: (N, T).
      truth: (N, C).
      class_of: (V,) -1..C - 1.
      first_only: leave out a caption's later mentions of an object.

    Returns:
      mask (N, T), and labels (N, T): True for an object that is not there (False outside the mask).

    Raises:
      ValueError: shapes that do not fit or, where values are known, tokens or objects out of range, or no object word.
    """
    if np.ndim(tokens) != 2 or np.ndim(truth) != 2 or np.shape(tokens)[0] != np.shape(truth)[0]:
        raise ValueError(f"tokens, truth: wanted (N, T) and (N, C), got {np.shape(tokens)} and {np.shape(truth)}.")
    _check_words(tokens, class_of, np.shape(truth)[1])
    named = jnp.asarray(class_of)[jnp.asarray(tokens)]
    mask = named >= 0
    if first_only:
        one_hot = jax.nn.one_hot(named, np.shape(truth)[1], dtype=jnp.int32)
        mask &= jnp.take_along_axis(jnp.cumsum(one_hot, 1), jnp.maximum(named, 0)[..., None], 2)[..., 0] == 1
    there = jnp.take_along_axis(jnp.asarray(truth, bool), jnp.maximum(named, 0), 1)
    return mask, mask & ~there


def mentioned(tokens: Int[ArrayLike, "N T"], class_of: Int[ArrayLike, " V"], classes: int) -> Bool[Array, "N C"]:
    """Which of the objects each caption names at all."""
    return jax.nn.one_hot(jnp.asarray(class_of)[jnp.asarray(tokens)], classes).any(1)


def pope_negatives(
    key: jax.Array, truth: Bool[ArrayLike, "N C"], kind: Literal["random", "popular", "adversarial"]
) -> Bool[Array, "N C"]:
    """Absent objects to ask for, as many as are there (or all absent ones, if they are fewer).

    Args:
      key: typed key: the choice of "random", and of equals in the others.
      truth: (N, C).
      kind: "random"; "popular", the objects most frequent in ``truth``; "adversarial", those that occur most often
        together with the ones that are there (Li et al. 2023, arXiv 2305.10355).

    Raises:
      ValueError: an unknown kind.
    """
    there = jnp.asarray(truth, jnp.float32)
    if kind == "random":
        wanted = jnp.zeros_like(there)
    elif kind == "popular":
        wanted = jnp.broadcast_to(there.sum(0), there.shape)
    elif kind == "adversarial":
        wanted = there @ (there.T @ there)
    else:
        raise ValueError(f'pope_negatives: kind must be random, popular or adversarial, got "{kind}".')
    wanted = jnp.where(there > 0, -jnp.inf, wanted + jax.random.uniform(key, there.shape, maxval=0.5))
    rank = jnp.argsort(jnp.argsort(-wanted, 1), 1)
    return (rank < there.sum(1, keepdims=True)) & (there == 0)


def pope(said: Bool[ArrayLike, "N C"], truth: Bool[ArrayLike, "N C"], negatives: Bool[ArrayLike, "N C"]) -> Pope:
    """ "Is there a ...?", asked of the caption: yes if it mentions the object.

    Args:
      said: (N, C) from ``mentioned``.
      truth: (N, C): each object that is there is asked for.
      negatives: (N, C) from ``pope_negatives``: and these.
    """
    yes, truth = jnp.asarray(said, bool), jnp.asarray(truth, bool)
    asked = truth | jnp.asarray(negatives, bool)
    right, total = (asked & (yes == truth)).sum(), asked.sum()
    hits, answered = (yes & truth).sum(), (asked & yes).sum()
    return Pope(right / total, 2 * hits / jnp.maximum(answered + truth.sum(), 1), answered / total)


def _check_words(tokens: Any, class_of: Any, classes: int) -> None:
    if np.ndim(class_of) != 1:
        raise ValueError(f"class_of: wanted shape (V,), got {np.shape(class_of)}.")
    if isinstance(class_of, jax.core.Tracer):
        return
    named = np.asarray(class_of)
    if named.max(initial=-1) < 0:
        raise ValueError("class_of: no word names an object; there would be nothing to count.")
    if named.min() < -1 or named.max() >= classes:
        raise ValueError(f"class_of: objects must be in -1..{classes - 1}, got {named.min()}..{named.max()}.")
    if not isinstance(tokens, jax.core.Tracer) and np.size(tokens):
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= len(named):
            raise ValueError(f"tokens: wanted ids in 0..{len(named) - 1}, got {low}..{high}.")
