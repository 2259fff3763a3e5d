"""Decoders that others are compared with: beam search, nucleus sampling, contrast with a spoilt input or early layers.

A decoder is driven by a ``Step``::

    step(carry, tokens (B,), positions (B,)) -> (logits (B, V), hidden, carry)

It reads the token of each row at its position (counted in the written text, so position -1 is the start token's) and
gives the logits of the next one. ``hidden`` is what the model knew there, any pytree with a leading axis B. Reading a
position again overwrites what was read there, so going back in a text is reading from an earlier position on. Rows that
have ended come with position ``IDLE`` and must change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from mechlab.analysis.metrics import jensen_shannon
from mechlab.models.generate import restrict

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any, Any]]

IDLE = -2
"""The position given for rows that have ended."""


class Beams(NamedTuple):
    """Texts of beam search: tokens (B, T), 0 after the end, and lengths (B,)."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


def contrast_logits(
    logits: Float[Array, "... V"], spoilt: Float[Array, "... V"], *, strength: float = 1.0, plausible: float = 0.1
) -> Float[Array, "... V"]:
    """Visual contrastive decoding (Leng et al. 2023, arXiv 2311.16922): (1 + a) logits - a spoilt logits.

    Args:
      logits: with the image.
      spoilt: with a noised image.
      strength: a.
      plausible: tokens with less than this share of the likeliest token's probability are left out, -inf.
    """
    return jnp.where(_plausible(logits, plausible), (1 + strength) * logits - strength * spoilt, -jnp.inf)


def contrast_layers(
    logits: Float[Array, "... V"], early: Float[Array, "... J V"], *, plausible: float = 0.1
) -> Float[Array, "... V"]:
    """DoLa (Chuang et al. 2023, arXiv 2309.03883): log p - log p_j, j the early layer that differs most from p.

    It has the largest Jensen-Shannon divergence from p.

    Args:
      logits: of the whole model.
      early: what it would say after each of J earlier layers.
      plausible: as in ``contrast_logits``.
    """
    layer = jensen_shannon(logits[..., None, :], early).argmax(-1)
    chosen = jnp.take_along_axis(early, layer[..., None, None], axis=-2)[..., 0, :]
    grown = jax.nn.log_softmax(logits) - jax.nn.log_softmax(chosen)
    return jnp.where(_plausible(logits, plausible), grown, -jnp.inf)


def contrasted(step: Step, *, strength: float = 1.0, plausible: float = 0.1) -> Step:
    """A step whose carry is a pair: of the image, and of the spoilt image."""

    def both(carry: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any, Any]:
        logits, hidden, clear = step(carry[0], tokens, positions)
        spoilt, _, noised = step(carry[1], tokens, positions)
        return contrast_logits(logits, spoilt, strength=strength, plausible=plausible), hidden, (clear, noised)

    return both


def layered(step: Step, early: Callable[[Any], jax.Array], *, plausible: float = 0.1) -> Step:
    """A step of ``contrast_layers``; ``early(hidden)`` gives the logits (B, J, V) after earlier layers."""

    def contrast(carry: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any, Any]:
        logits, hidden, carry = step(carry, tokens, positions)
        return contrast_layers(logits, early(hidden), plausible=plausible), hidden, carry

    return contrast


def sampled(step: Step, key: jax.Array, *, top_p: float = 0.9) -> Step:
    """A step whose largest logit is a nucleus sample (arXiv 1904.09751), by adding Gumbel noise.

    The noise depends on the key, the row and the position.
    """

    def noisy(carry: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any, Any]:
        logits, hidden, carry = step(carry, tokens, positions)

        def draw(row: jax.Array, position: jax.Array) -> jax.Array:
            mine = jax.random.fold_in(jax.random.fold_in(key, row), position + 2)
            return jax.random.gumbel(mine, logits.shape[-1:])

        noise = jax.vmap(draw)(jnp.arange(len(tokens)), positions)
        return restrict(logits, top_p=top_p) + noise, hidden, carry

    return noisy


def beam_search(
    step: Step,
    carry: Any,
    reorder: Callable[[Any, jax.Array], Any],
    *,
    batch: int,
    width: int,
    start: int,
    eos: int,
    max_len: int,
) -> Beams:
    """The likeliest text among ``width`` kept at every length, by log-probability per token.

    Args:
      step: see above; its rows are text 0's beams, then text 1's, ...: B = batch * width.
      carry: of these B rows.
      reorder: ``reorder(carry, rows (B,))``: row i takes what row ``rows[i]`` has read.
      batch: number of texts.
      width: beams a text, at least 1.
      start: token before the text.
      eos: token that ends a text; it is written.
      max_len: longest text.

    Raises:
      ValueError: width, batch or max_len below 1.
    """
    if min(batch, width, max_len) < 1:
        raise ValueError(f"beam_search: batch, width and max_len must be at least 1, got {batch}, {width}, {max_len}.")
    rows = jnp.arange(batch * width)
    first = rows // width * width

    def write(t: jax.Array, state: Any) -> Any:
        tokens, score, lengths, done, carry = state
        before = jnp.where(t > 0, tokens[:, jnp.maximum(t - 1, 0)], start)
        logits, _, carry = step(carry, before, jnp.where(done, IDLE, t - 1))
        vocabulary = logits.shape[-1]
        # An ended text has one continuation, itself.
        itself = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)
        total = score[:, None] + jnp.where(done[:, None], itself, jax.nn.log_softmax(logits))
        # Beams compete by their mean; a beam that goes on has t + 1 tokens.
        mean = total / jnp.where(done, lengths, t + 1)[:, None]
        _, best = jax.lax.top_k(mean.reshape(batch, -1), width)
        best = best.reshape(-1)
        came, chosen = first + best // vocabulary, best % vocabulary
        was_done = done[came]
        tokens = tokens[came].at[:, t].set(jnp.where(was_done, 0, chosen))
        lengths = jnp.where(was_done, lengths[came], t + 1)
        done = was_done | (chosen == eos)
        return tokens, total[came, chosen], lengths, done, reorder(carry, came)

    # At first all beams are equal, so only one of them counts.
    score = jnp.where(rows == first, 0.0, -jnp.inf)
    state = (jnp.zeros((batch * width, max_len), jnp.int32), score, jnp.ones_like(rows), rows < 0, carry)
    tokens, _, lengths, _, _ = jax.lax.fori_loop(0, max_len, write, state)
    # top_k puts the best beam of each text first.
    return Beams(tokens[::width], lengths[::width])


def _plausible(logits: jax.Array, share: float) -> jax.Array:
    """Tokens with at least this share of the likeliest token's probability."""
    return logits >= logits.max(-1, keepdims=True) + jnp.log(share)
