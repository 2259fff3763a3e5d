"""Reasoning by representation engineering (Højer, Jarvis and Heinrich, ICLR 2025, arXiv 2504.19483).

A control vector is read from the residual stream of texts that end in the right answer, and added back at inference,
in one middle layer, at every token. With H+ the states after block l at the last token of N such texts, and H- those of
N paired texts that cannot be solved:

    reading                v_l = mean_n H+                                                                        (R)
    reading contrast       v_l = mean_n (H+ - H-)                                                               (R-C)
    PCA contrast           v_l = u |mean_n (H+ - H-)|, u the first component of the centred H+ - H-           (PCA-C)
    PCA reading            the same with H+ alone                                                             (PCA-R)

    h <- h + alpha v_l,    with ``normalize``  h <- (h + alpha v_l) |h| / |h + alpha v_l|

What alpha does is described by the next token's distribution p_alpha: KL(p_0 | p_alpha) in *nats*
(``analysis.metrics.kl_divergence``), its entropy in *bits*, both with ``EPSILON`` added inside the logarithm, and its
probability mass on right and wrong answers.

Differs from the official code: u is turned to the side of the mean difference (there its sign is the solver's; a flip
mirrors the axis of alpha), states are read at each text's true last token (there a pad token, where texts are padded),
and the last layer's state is the residual stream, not its final norm. Centring removes the mean difference, so u may be
orthogonal to it: ``component_cosine`` says how far they agree.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.directions import pca_direction
from mechlab.analysis.margins import candidate_scores, list_correct, log_odds
from mechlab.core.model import Model
from mechlab.methods.steering.doses import dose_grid
from mechlab.methods.steering.vectors import SITE, SteeringVector, Texts, describe, steer, steered_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int

VECTORS = ("reading", "contrast", "pca_contrast", "pca_reading")
"""The types that ``control_vector`` knows; the paper's experiments use the first three."""

EPSILON = 1e-8
"""Added to probabilities inside logarithms, as in the official metrics."""


def reading_vector(h_pos: Float[ArrayLike, "N L D"]) -> Float[Array, "L D"]:
    """R: the mean state. It is dominated by what all texts of the model share.

    Args:
      h_pos: (N, L, D) states of texts with the right answer, N >= 1; ``vectors.last_states`` reads them.

    Raises:
      ValueError: another number of axes, or no texts.
    """
    return _states("h_pos", h_pos, 1).mean(0)


def contrast_vector(h_pos: Float[ArrayLike, "N L D"], h_neg: Float[ArrayLike, "N L D"]) -> Float[Array, "L D"]:
    """R-C: the mean difference of pairs.

    Args:
      h_pos, h_neg: (N, L, D), N >= 1; row n of both is a pair.

    Raises:
      ValueError: shapes that differ, or no texts.
    """
    return _differences(h_pos, h_neg, 1).mean(0)


def pca_contrast_vector(
    h_pos: Float[ArrayLike, "N L D"], h_neg: Float[ArrayLike, "N L D"], *, standardize: bool = True
) -> Float[Array, "L D"]:
    """PCA-C: the direction in which the pairs' differences vary most, <u, mean difference> >= 0.

    Args:
      h_pos, h_neg: (N, L, D), N >= 2.
      standardize: scale u to the length of the mean difference; of length 1 otherwise.

    Raises:
      ValueError: shapes that differ, N < 2 or, where values are known, a layer whose differences are all equal: they
        have no principal component.
    """
    return _principal("the differences of pairs", _differences(h_pos, h_neg, 2), standardize)


def pca_reading_vector(h_pos: Float[ArrayLike, "N L D"], *, standardize: bool = True) -> Float[Array, "L D"]:
    """PCA-R: the direction in which states of right answers vary most, by the length of their mean.

    In the official library, but in none of the paper's experiments.

    Args:
      h_pos: (N, L, D), N >= 2.
      standardize: as in ``pca_contrast_vector``.

    Raises:
      ValueError: as ``pca_contrast_vector``.
    """
    return _principal("the states", _states("h_pos", h_pos, 2), standardize)


def control_vector(
    kind: str, h_pos: Float[ArrayLike, "N L D"], h_neg: Float[ArrayLike, "N L D"] | None = None
) -> Float[Array, "L D"]:
    """The vector of one of the types in ``VECTORS``.

    Args:
      kind: its name.
      h_pos: (N, L, D).
      h_neg: (N, L, D), for "contrast" and "pca_contrast".

    Raises:
      ValueError: an unknown type, or a contrast without ``h_neg``; otherwise as the function of that type.
    """
    if kind not in VECTORS:
        raise ValueError(f'control_vector: unknown type "{kind}"; known: {", ".join(VECTORS)}.')
    if kind == "reading":
        return reading_vector(h_pos)
    if kind == "pca_reading":
        return pca_reading_vector(h_pos)
    if h_neg is None:
        raise ValueError(f'control_vector: "{kind}" needs h_neg, the states of the paired negative texts.')
    return contrast_vector(h_pos, h_neg) if kind == "contrast" else pca_contrast_vector(h_pos, h_neg)


def component_cosine(h_pos: Float[ArrayLike, "N L D"], h_neg: Float[ArrayLike, "N L D"]) -> Float[Array, " L"]:
    """cos(u, mean difference) by layer, in [0, 1]: near 0, PCA-C points elsewhere than R-C."""
    component = pca_contrast_vector(h_pos, h_neg, standardize=False)
    mean = contrast_vector(h_pos, h_neg)
    return (component * mean).sum(-1) / jnp.linalg.norm(mean, axis=-1)


def only_correct(states: Float[ArrayLike, "N L D"], correct: Bool[ArrayLike, " N"]) -> Float[Array, "M L D"]:
    """States of the texts that the unsteered model answers correctly, the paper's condition for a vector.

    Args:
      states: (N, L, D).
      correct: (N,) booleans; ``~correct`` gives the vector from wrong answers.

    Raises:
      ValueError: shapes that do not fit, or nothing is left.
    """
    keep = np.asarray(correct, bool)
    if keep.shape != np.shape(states)[:1]:
        raise ValueError(f"only_correct: wanted ({np.shape(states)[0]},) booleans, got shape {keep.shape}.")
    if not keep.any():
        raise ValueError(f"only_correct: none of the {keep.size} texts is left to read a vector from.")
    return jnp.asarray(states)[np.flatnonzero(keep)]


def control_edits(
    model: Model, v: Float[ArrayLike, "L D"], layer: Any, alpha: Any, *, normalize: bool = False
) -> dict[str, Any]:
    """The edit h + alpha v_l after block l, at all positions of the prompt and of what is generated.

    Args:
      model: the model that v was read from.
      v: (L, D).
      layer: 0..L - 1, or several; may be traced.
      alpha: strength of either sign; may be traced, so a grid of strengths is one ``vmap`` and its slope one ``jvp``.
      normalize: scale every token back to the length that it had.

    Raises:
      ValueError: a vector of another shape, a layer out of range, or an alpha that is not finite.
    """
    if not isinstance(layer, jax.core.Tracer) and np.min(layer) < 0:
        raise ValueError(f"control_edits: layers count from 0, got {layer}.")
    vector = SteeringVector(jnp.asarray(v), SITE, describe(model))
    return steer(model, vector, layer=layer, strength=alpha, renorm=normalize)


def alpha_sweep(
    model: Model,
    params: Any,
    texts: Texts,
    v: Float[ArrayLike, "L D"],
    layer: int,
    alphas: Float[ArrayLike, " A"],
    *,
    normalize: bool = False,
) -> Float[Array, "A N V"]:
    """Logits of the next token for every alpha, in one program: ``dose_grid`` of one vector and one layer.

    Args:
      model, params: the decoder.
      texts: N prompts.
      v: (L, D).
      layer: 0..L - 1.
      alphas: (A,).
      normalize: as in ``control_edits``.

    Raises:
      ValueError: as ``control_edits``.
    """
    one = jnp.asarray(v)[None]
    layers = np.asarray([layer])
    return dose_grid(model, params, one, texts, layers=layers, strengths=alphas, renorm=normalize)[0, 0]


def margin_slopes(
    model: Model,
    params: Any,
    vectors: Float[ArrayLike, "S L D"],
    layers: Int[ArrayLike, " S"],
    texts: Texts,
    answers: Int[ArrayLike, "N A"],
    right: Int[ArrayLike, " N"],
) -> tuple[Float[Array, " N"], Float[Array, "S N"]]:
    """The log-odds margin of the right answer at alpha = 0, and its derivative by alpha along every vector.

    Costs one forward, and one tangent forward per vector.

    Args:
      model, params: the decoder.
      vectors: (S, L, D).
      layers: (S,) the layer of each.
      texts: N prompts.
      answers: (N, A) tokens of each item's answers, or (A,) for all.
      right: (N,) which one is right.

    Returns:
      Margins (N,), nats, and slopes (S, N), nats per unit of alpha.

    Raises:
      ValueError: two answers of an item that are the same token.
    """

    ids, right = jnp.atleast_2d(jnp.asarray(answers)), jnp.asarray(right)
    answer_index(ids, jnp.broadcast_to(ids, (len(right), ids.shape[1]))[jnp.arange(len(right)), right])
    return _slopes(model, params, jnp.asarray(vectors), jnp.asarray(layers), texts, jnp.asarray(answers), right)


def entropy_bits(logits: Float[ArrayLike, "... V"], eps: float = EPSILON) -> Float[Array, "..."]:
    """-sum p log2(p + eps), *bits*.

    >>> round(float(entropy_bits(jnp.zeros(8))), 5)
    3.0
    """
    p = jax.nn.softmax(jnp.asarray(logits, jnp.float32), -1)
    return -(p * jnp.log2(p + eps)).sum(-1)


def answer_mass(
    logits: Float[ArrayLike, "... N V"],
    answer_ids: Int[ArrayLike, "N A"],
    y: Int[ArrayLike, " N"],
    *,
    masked: bool = True,
) -> tuple[Float[Array, "... N"], Float[Array, "... N"]]:
    """Probability on the right answer, and on the wrong answers together.

    Args:
      logits: (..., N, V).
      answer_ids: (N, A) first tokens of the answers, or (A,) for all items.
      y: (N,) token of the right one.
      masked: of the softmax over the answers alone, so that both sum to 1; otherwise of the whole vocabulary.

    Raises:
      ValueError: a right answer that is not in the list, or two answers with the same first token.
    """
    logits = jnp.asarray(logits, jnp.float32)
    right = answer_index(answer_ids, y)
    if masked:
        p = jax.nn.softmax(candidate_scores(logits, answer_ids), -1)
    else:
        p = candidate_scores(jax.nn.softmax(logits, -1), answer_ids)
    index = jnp.broadcast_to(right[:, None], (*p.shape[:-1], 1))
    correct = jnp.take_along_axis(p, index, -1)[..., 0]
    return correct, p.sum(-1) - correct


def logit_accuracy(
    logits: Float[ArrayLike, "... N V"], answer_ids: Int[ArrayLike, "N A"], y: Int[ArrayLike, " N"]
) -> Bool[Array, "... N"]:
    """Whether the right answer's first token has the largest logit of the list; arguments and errors as above."""
    return list_correct(candidate_scores(jnp.asarray(logits), answer_ids), answer_index(answer_ids, y))


def answer_index(answer_ids: Int[ArrayLike, "N A"], y: Int[ArrayLike, " N"]) -> Int[Array, " N"]:
    """Where in its list each right answer stands.

    Raises:
      ValueError: where values are known, a right answer that is not in its list, or two answers that share their first
        token.
    """
    ids = jnp.atleast_2d(jnp.asarray(answer_ids))
    found = ids == jnp.asarray(y)[:, None]
    if not isinstance(found, jax.core.Tracer):
        ordered = np.sort(np.asarray(ids), -1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("answer_ids: two answers share their first token, so logits cannot tell them apart.")
        missing = np.flatnonzero(~np.asarray(found).any(-1))
        if missing.size:
            raise ValueError(f"y: the right answers of items {missing[:8].tolist()} are not in the answer list.")
    return found.argmax(-1)


def exact_match(output: str, gold: str, *, stop: Sequence[str] = ("\n", "Passage:")) -> bool:
    """Whether the generated text, up to the first ``stop``, contains the right answer, in lower case.

    Containment rewards long outputs; the official metric is so.

    Raises:
      ValueError: an empty answer, which every text contains.

    >>> exact_match(" The wolf.\\nPassage: a cat", "Wolf"), exact_match(" A\\nwolf", "wolf")
    (True, False)
    """
    if not gold.strip():
        raise ValueError("exact_match: the right answer is empty, and so contained in every output.")
    for mark in stop:
        output = output.split(mark, 1)[0]
    return gold.strip().lower() in output.lower()


def final_number(text: str) -> float | None:
    """The number that a worked solution ends in (GSM8K): after "####", after "The answer is", after the last "=", or
    the last number at all; None without one.

    >>> final_number("2 + 3 = 5, so #### 1,005"), final_number("4 + 5 = 9 apples"), final_number("none")
    (1005.0, 9.0, None)
    """
    number = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
    for mark in ("####", "The answer is", "="):
        found = number.search(text.rpartition(mark)[2]) if mark in text else None
        if found:
            return float(found[0].replace(",", ""))
    numbers = number.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


@functools.partial(jax.jit, static_argnames="model")
def _slopes(
    model: Model,
    params: Any,
    vectors: jax.Array,
    layers: jax.Array,
    texts: Texts,
    answers: jax.Array,
    right: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def along(v: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        def margin(alpha: jax.Array) -> jax.Array:
            logits = steered_logits(model, params, control_edits(model, v, layer, alpha), texts)
            return log_odds(candidate_scores(logits, answers), right)

        return jax.jvp(margin, (jnp.zeros(()),), (jnp.ones(()),))

    margins, slope = jax.vmap(along)(vectors, layers)
    return margins[0], slope


def _states(name: str, states: ArrayLike, least: int) -> jax.Array:
    shape = np.shape(states)
    if len(shape) != 3 or shape[0] < least:
        raise ValueError(f"{name}: wanted (N, L, D) with N >= {least}, got shape {shape}.")
    return jnp.asarray(states, jnp.float32)


def _differences(h_pos: ArrayLike, h_neg: ArrayLike, least: int) -> jax.Array:
    if np.shape(h_pos) != np.shape(h_neg):
        raise ValueError(f"h_pos, h_neg: wanted pairs of one shape, got {np.shape(h_pos)} and {np.shape(h_neg)}.")
    return _states("h_pos", h_pos, least) - _states("h_neg", h_neg, least)


def _principal(what: str, x: jax.Array, standardize: bool) -> jax.Array:
    if not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)
        spread = np.ptp(known, axis=0).max(-1)
        flat = np.flatnonzero(spread <= 1e-6 * np.abs(known).max((0, 2)))
        if flat.size:
            raise ValueError(f"no principal component in layers {flat.tolist()}: {what} are all equal there.")
    found = pca_direction(jnp.moveaxis(x, 1, 0))
    return found.raw if standardize else found.unit
