"""What attention heads attend to: shares of attention on the previous token, on duplicates, on induction keys.

A head is characterised by how much of its attention goes to a marked set of keys. A marking is a boolean (B, T, S),
query by key; ``attention_to`` averages over the queries that have a marked key::

    score = mean over queries t with a marked key of  sum over marked s of  pattern[t, s]

In "A B ... A" the head that predicts B attends, from the second A, to the token *after* the first one: the induction
key (Elhage et al. 2021; Olsson et al. 2022, arXiv 2209.11895). The token before it is the anti-induction key. Repeated
random tokens show these heads best, because nothing but the repetition can be used on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def attention_to(pattern: Float[Array, "L B H T S"], keys: Bool[Array, "B T S"]) -> Float[Array, "L H"]:
    """The share of its attention that every head gives to the marked keys.

    Args:
      pattern: (L, B, H, T, S) from ``model.capture(..., sites=("attn_pattern",))``.
      keys: (B, T, S) bool; queries without a marked key do not count, so unmark those to be left out.

    Returns:
      (L, H) in [0, 1].

    Raises:
      ValueError: shapes that do not fit, or nothing marked, where that is known.
    """
    if pattern.ndim != 5 or keys.shape != (pattern.shape[1], *pattern.shape[3:]):
        raise ValueError(
            f"pattern, keys: wanted shapes (L, B, H, T, S) and (B, T, S), got {pattern.shape} and {keys.shape}."
        )
    queries = keys.any(-1)
    if not isinstance(queries, jax.core.Tracer) and not queries.any():
        raise ValueError("keys: no query has a marked key.")
    attended = jnp.einsum("lbhts,bts->lh", pattern.astype(jnp.float32), keys.astype(jnp.float32))
    return attended / queries.sum()


def previous_keys(tokens: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Marks key t - 1 of query t.

    >>> previous_keys(jnp.asarray([[5, 5, 7]]))[0].astype(int).tolist()
    [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    """
    return jnp.broadcast_to(jnp.eye(tokens.shape[1], k=-1, dtype=bool), (*tokens.shape, tokens.shape[1]))


def duplicate_keys(tokens: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Marks the earlier keys that hold the query's own token.

    >>> duplicate_keys(jnp.asarray([[5, 6, 5]]))[0, 2].astype(int).tolist()
    [1, 0, 0]
    """
    earlier = jnp.tri(tokens.shape[1], k=-1, dtype=bool)
    return (tokens[:, :, None] == tokens[:, None, :]) & earlier


def induction_keys(tokens: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Marks the key *after* every earlier occurrence of the query's token, unless that is the query itself.

    >>> induction_keys(jnp.asarray([[5, 6, 7, 5]]))[0, 3].astype(int).tolist()
    [0, 1, 0, 0]
    """
    after = jnp.pad(duplicate_keys(tokens)[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    return after & jnp.tri(tokens.shape[1], k=-1, dtype=bool)


def anti_induction_keys(tokens: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Marks the key *before* every earlier occurrence of the query's token (arXiv 2509.22947).

    >>> anti_induction_keys(jnp.asarray([[5, 6, 7, 6]]))[0, 3].astype(int).tolist()
    [1, 0, 0, 0]
    """
    return jnp.pad(duplicate_keys(tokens)[:, :, 1:], ((0, 0), (0, 0), (0, 1)))


def repeated_tokens(
    key: jax.Array, batch: int, length: int, vocabulary: int | Int[Array, " N"], *, start: int | None = None
) -> Int[Array, "B T"]:
    """Random texts that are said twice: T = 2 ``length``, one more with ``start``.

    Within a text no token comes twice before the repetition, so that every query of it has exactly one earlier
    occurrence.

    Args:
      key: typed key.
      batch: B.
      length: tokens before the repetition, at least 2.
      vocabulary: V, tokens are drawn from 0..V - 1; or (N,) the tokens to draw from.
      start: a token put before everything, such as BOS, where heads that look for nothing rest.

    Returns:
      (B, T) int32.

    Raises:
      ValueError: a length below 2, or fewer tokens than the length to draw from.
    """
    pool = jnp.arange(vocabulary) if isinstance(vocabulary, int) else jnp.asarray(vocabulary)
    if not 2 <= length <= len(pool):
        raise ValueError(f"repeated_tokens: length must be 2..{len(pool)}, the tokens to draw from, got {length}.")
    keys = jax.random.split(key, batch)
    once = jax.vmap(lambda k: jax.random.choice(k, pool, (length,), replace=False))(keys).astype(jnp.int32)
    first = [] if start is None else [jnp.full((batch, 1), start, jnp.int32)]
    return jnp.concatenate([*first, once, once], axis=1)
