"""What a frozen decoder holds and what it says: residual states of texts at every depth, log-probabilities of labels.

    texts = encode_texts(tokenizer, ["The lights went out.", ...], context)
    x = capture_residuals(model, {"params": params}, texts)                # (N, L + 1, D), last token
    y = states_at(model, {"params": params}, texts, places)                # (N, P, L + 1, D), any tokens
    logp = label_logprob(model, {"params": params}, prompts, labels)       # (N, K), zero-shot prompting

Depths are the embedding and the stream after each block, before the final norm; many libraries give the last one after
it. Texts run in chunks of one number of rows and of a width rounded up to a multiple of 32, so that few programs are
compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model, Variables
from mechlab.methods.steering.vectors import Texts, pad
from mechlab.models.generate import TextTokenizer, new_cache

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int


def encode_texts(tokenizer: TextTokenizer, texts: Sequence[str], context: int) -> Texts:
    """Texts as tokens, right-padded; nothing is cut.

    Raises:
      ValueError: no texts, an empty one, or one that is longer than the ``context`` of the model.
    """
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty or not texts:
        raise ValueError(f"encode_texts: wanted texts with words in them, got {len(texts)}; empty: {empty[:8]}.")
    rows = [list(map(int, tokenizer.encode(text))) for text in texts]
    longest = max(range(len(rows)), key=lambda index: len(rows[index]))
    if len(rows[longest]) > context:
        raise ValueError(
            f"encode_texts: text {longest} has {len(rows[longest])} tokens, the context is {context}; it is not cut."
        )
    return pad(rows)


def pool_states(states: Float[Array, "... B T D"], mask: Bool[ArrayLike, "B T"], pool: str) -> Float[Array, "... B D"]:
    """One vector per text: the state of its last real token, or the mean over its real tokens.

    Args:
      states: (..., B, T, D); what stands in the padding, on either side, is never used.
      mask: (B, T), true at real tokens.
      pool: "last" or "mean". A mean is mostly an average of the words' identities.

    Raises:
      ValueError: another pool, a mask that does not fit or, where it is known, a text without tokens.
    """
    if pool not in ("last", "mean"):
        raise ValueError(f'pool: wanted "last" or "mean", got "{pool}".')
    if np.shape(mask) != np.shape(states)[-3:-1]:
        raise ValueError(f"mask: wanted shape (B, T) = {np.shape(states)[-3:-1]}, got {np.shape(mask)}.")
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(-1).all():
        raise ValueError("mask: every text needs a token, got one of length 0.")
    states, mask = jnp.asarray(states), jnp.asarray(mask, bool)
    if pool == "last":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        return states[..., jnp.arange(len(mask)), last, :]
    # Selected, not multiplied by 0: padding may hold anything.
    inside = jnp.where(mask[..., None], states, 0)
    return inside.sum(-2) / mask.sum(-1, keepdims=True)


def capture_residuals(
    model: Model, variables: Variables, texts: Texts, *, pool: str = "last", batch: int = 64
) -> Float[Array, "N L+1 D"]:
    """The residual stream of every text at every depth: ``embed``, then ``resid_post`` of each block.

    Args:
      model: a decoder from ``models.transformer``.
      variables: params and edits, as for ``model.apply``.
      texts: N texts.
      pool: as in ``pool_states``.
      batch: texts per forward.

    Returns:
      (N, L + 1, D) float32, before the final norm.

    Raises:
      ValueError: an unknown pool; lengths that do not fit; texts longer than the model's context; states that are not
        finite, naming the depth.
    """
    if pool not in ("last", "mean"):
        raise ValueError(f'pool: wanted "last" or "mean", got "{pool}".')
    tokens, lengths = _checked_texts(model, texts)

    def read(rows: np.ndarray) -> jax.Array:
        return _pooled(model, dict(variables), tokens[rows], lengths[rows], pool=pool)

    return _require_finite(_in_chunks(read, len(tokens), batch))


def states_at(
    model: Model, variables: Variables, texts: Texts, places: Int[ArrayLike, "N P"], *, batch: int = 64
) -> Float[Array, "N P L+1 D"]:
    """The residual stream at P tokens of every text: what a probe can still read p tokens later.

    Args:
      model, variables, texts, batch: as in ``capture_residuals``.
      places: (N, P) tokens, counted from 0, inside the texts.

    Returns:
      (N, P, L + 1, D) float32.

    Raises:
      ValueError: places outside the texts; otherwise as ``capture_residuals``.
    """
    tokens, lengths = _checked_texts(model, texts)
    places = np.asarray(places)
    if places.ndim != 2 or len(places) != len(tokens) or (places < 0).any() or (places >= lengths[:, None]).any():
        raise ValueError(f"places: wanted (N, P) = ({len(tokens)}, P) tokens inside the texts, got {places.shape}.")

    def read(rows: np.ndarray) -> jax.Array:
        return _states_at(model, dict(variables), tokens[rows], lengths[rows], places[rows])

    return _require_finite(_in_chunks(read, len(tokens), batch))


def label_logprob(
    model: Model,
    variables: Variables,
    texts: Texts,
    labels: Sequence[Sequence[int]],
    *,
    normalise: bool = False,
    batch: int = 64,
) -> Float[Array, "N K"]:
    """log p(label | prompt) in nats, summed over the label's tokens: zero-shot prompting is its arg max.

    The prompt is read once and its keys and values are kept for all K labels.

    Args:
      model, variables, texts, batch: as in ``capture_residuals``; texts are prompts.
      labels: K labels as tokens, without BOS.
      normalise: mean instead of sum over the tokens.

    Returns:
      (N, K). Less the same of a prompt without a text, it is calibrated: what the model prefers anyway cancels.

    Raises:
      ValueError: fewer than two labels, an empty one, two that are equal, or a prompt that leaves no room for them.
    """
    rows = [tuple(label) for label in labels]
    if len(rows) < 2 or not all(rows) or len(set(rows)) < len(rows):
        raise ValueError(f"labels: wanted at least two, none empty, no two equal, got {rows}.")
    tokens, lengths = _checked_texts(model, texts, room=max(map(len, rows)))
    known = pad(rows)

    def score(chosen: np.ndarray) -> jax.Array:
        return _label_logprob(model, dict(variables), tokens[chosen], lengths[chosen], *known)

    found = _in_chunks(score, len(tokens), batch)
    return found / known.lengths if normalise else found


_WIDTH = 32


def _depths(model: Model, variables: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """(L + 1, B, T, D) float32."""
    positions = Texts(tokens, lengths).positions
    acts = model.capture(variables, tokens, positions, sites=("embed", "resid_post"))[1]
    return jnp.concatenate([acts["embed"][None], acts["resid_post"]]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "pool"))
def _pooled(model: Model, variables: Any, tokens: jax.Array, lengths: jax.Array, *, pool: str) -> jax.Array:
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.moveaxis(pool_states(_depths(model, variables, tokens, lengths), mask, pool), 0, 1)


@functools.partial(jax.jit, static_argnames=("model",))
def _states_at(model: Model, variables: Any, tokens: jax.Array, lengths: jax.Array, places: jax.Array) -> jax.Array:
    states = _depths(model, variables, tokens, lengths)
    return jnp.moveaxis(states[:, jnp.arange(len(tokens))[:, None], places], 0, 2)


@functools.partial(jax.jit, static_argnames=("model",))
def _label_logprob(
    model: Model, variables: Any, tokens: jax.Array, lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
    batch, width = len(tokens), labels.shape[1]
    cache = new_cache(model, batch, tokens.shape[1] + width)
    logits, cache = model.apply(variables, tokens, Texts(tokens, lengths).positions, None, cache, lengths - 1)
    first = jax.nn.log_softmax(logits)
    at = jnp.arange(width)

    def one(label: jax.Array, length: jax.Array) -> jax.Array:
        scores = first
        if width > 1:
            # Position -1: behind the end of a shorter label, nothing is read or written.
            places = jnp.where(at[:-1] < length - 1, lengths[:, None] + at[:-1], -1)
            later, _ = model.apply(variables, jnp.tile(label[:-1], (batch, 1)), places, None, cache)
            scores = jnp.concatenate([first, jax.nn.log_softmax(later)], 1)
        return jnp.where(at < length, scores[:, at, label], 0).sum(1)

    return jax.vmap(one)(labels, label_lengths).T


def _in_chunks(read: Callable[[np.ndarray], jax.Array], n: int, batch: int) -> jax.Array:
    """``read`` on chunks of one size; the last repeats its last text instead of compiling a second program."""
    parts = [read(np.minimum(np.arange(start, start + batch), n - 1)) for start in range(0, n, batch)]
    return jnp.concatenate(parts)[:n]


def _checked_texts(model: Model, texts: Texts, room: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens, lengths = map(np.asarray, texts)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
        raise ValueError(f"texts: wanted tokens (N, T) and lengths (N,), got {tokens.shape} and {lengths.shape}.")
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"texts: lengths must be in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}.")
    context = model.module.config.context
    if lengths.max() + room > context:
        raise ValueError(f"texts: the longest needs {lengths.max() + room} tokens, the model's context is {context}.")
    width = min(context - room, -(-int(lengths.max()) // _WIDTH) * _WIDTH)
    return np.pad(tokens, ((0, 0), (0, max(0, width - tokens.shape[1]))))[:, :width], lengths


def _require_finite(states: Float[Array, "N ... L+1 D"]) -> jax.Array:
    finite = np.isfinite(np.asarray(states))
    finite = finite.all(tuple(axis for axis in range(finite.ndim) if axis != finite.ndim - 2))
    if not finite.all():
        raise ValueError(f"states are not finite at depth {int(np.argmin(finite))}.")
    return states
