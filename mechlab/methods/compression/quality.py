"""What quantisation costs a decoder: how far its next-token distribution moves, and how much worse it predicts.

Over all tokens of some texts but the first of each, with p the model and q what became of it, in nats::

    kl = mean sum_v p_v log (p_v / q_v),   perplexity = exp(mean -log q(next token)),   flips = share of other argmax
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import softmax_cross_entropy_with_integer_labels

from mechlab.analysis.metrics import kl_divergence
from mechlab.core.model import Model

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Int


class Quality(NamedTuple):
    """One number per text, (B,); means over texts of equal length are those over tokens.

    Attributes:
      kl: nats per token.
      loss: of the changed model, nats per token; ``base_loss`` of the model itself.
      flips: share of tokens after which another token is likeliest.
    """

    kl: jax.Array
    loss: jax.Array
    base_loss: jax.Array
    flips: jax.Array

    @property
    def perplexity(self) -> jax.Array:
        """exp of the mean loss."""
        return jnp.exp(self.loss.mean())

    @property
    def base_perplexity(self) -> jax.Array:
        """The same of the model itself."""
        return jnp.exp(self.base_loss.mean())


def quality(
    model: Model, params: Any, changed: Any, tokens: Int[ArrayLike, "B T"], *, edits: Any = None, batch: int = 16
) -> Quality:
    """Compare a model with what became of it.

    Args:
      model: a decoder.
      params: its parameters.
      changed: others of the same model, with quantised kernels or without.
      tokens: texts without padding.
      edits: of the changed model's activations, such as dynamic rounding.
      batch: texts per forward.

    Raises:
      ValueError: no texts, or texts of one token.
    """
    return qualities(model, params, {"": (changed, edits or {})}, tokens, batch=batch)[""]


def qualities(
    model: Model,
    params: Any,
    variants: Mapping[str, tuple[Any, Any]],
    tokens: Int[ArrayLike, "B T"],
    *,
    batch: int = 16,
) -> dict[str, Quality]:
    """Compare a model with many variants of it: the model itself runs once, variants of one structure share a program.

    Args:
      model, params, tokens, batch: as in ``quality``.
      variants: ``{name: (parameters, edits)}``.

    Raises:
      ValueError: no texts, or texts of one token.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(f"quality: wanted texts (B, T) of two tokens at least, got shape {tokens.shape}.")
    rows: dict[str, list[Quality]] = {name: [] for name in variants}
    for first in range(0, len(tokens), batch):
        part = tokens[first : first + batch]
        base = _logits(model, params, part)
        for name, (changed, edits) in variants.items():
            rows[name].append(_compare(model, base, changed, edits, part))
    return {name: jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts) for name, parts in rows.items()}


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Model, params: Any, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens)[:, :-1]


@functools.partial(jax.jit, static_argnames="model")
def _compare(model: Model, p: jax.Array, changed: Any, edits: Any, tokens: jax.Array) -> Quality:
    q = model.apply({"params": changed, "edits": edits}, tokens)[:, :-1]
    following = tokens[:, 1:]
    return Quality(
        kl=kl_divergence(p, q).mean(1),
        loss=softmax_cross_entropy_with_integer_labels(q, following).mean(1),
        base_loss=softmax_cross_entropy_with_integer_labels(p, following).mean(1),
        flips=(p.argmax(-1) != q.argmax(-1)).mean(1),
    )
