"""Attention scores against loops, planted heads, an independent reference, and limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.circuits.heads import (
    anti_induction_keys,
    attention_to,
    duplicate_keys,
    induction_keys,
    previous_keys,
    repeated_tokens,
)

TOKENS = jnp.asarray([[0, 3, 4, 3, 5, 4, 3], [0, 6, 6, 6, 7, 0, 6]])


def test_markings_equal_their_definitions():
    marked = {name: np.zeros((2, 7, 7), bool) for name in ("previous", "duplicate", "induction", "anti")}
    for b, row in enumerate(np.asarray(TOKENS)):
        for t in range(7):
            for s in range(t):
                marked["previous"][b, t, s] = s == t - 1
                marked["duplicate"][b, t, s] = row[s] == row[t]
                marked["induction"][b, t, s] = s > 0 and row[s - 1] == row[t]
                marked["anti"][b, t, s] = s + 1 < t and row[s + 1] == row[t]
    for name, keys in (
        ("previous", previous_keys),
        ("duplicate", duplicate_keys),
        ("induction", induction_keys),
        ("anti", anti_induction_keys),
    ):
        np.testing.assert_array_equal(keys(TOKENS), marked[name], err_msg=name)


def test_the_share_equals_a_loop():
    pattern = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 2, 3, 7, 7)), -1)
    keys = np.asarray(duplicate_keys(TOKENS))
    shares = [[] for _ in range(6)]
    for b in range(2):
        for t in range(7):
            for cell in range(6 * keys[b, t].any()):
                row = np.asarray(pattern)[cell // 3, b, cell % 3, t]
                shares[cell].append(sum(row[s] for s in np.flatnonzero(keys[b, t])))
    np.testing.assert_allclose(attention_to(pattern, keys).ravel(), np.mean(shares, 1), rtol=1e-5)


def test_scores_of_an_independent_implementation(vectors):
    stored = vectors("bi_induct")
    pattern = jnp.asarray(np.moveaxis(stored["attn"], 0, 1))
    period = (stored["probe_fwd"].shape[1] - 1) // 2
    # The stored scores leave out the last token of the copy, which nothing follows the first time.
    queries = (np.arange(2 * period + 1) > period) & (np.arange(2 * period + 1) < 2 * period)
    forward, backward = jnp.asarray(stored["probe_fwd"]), jnp.asarray(stored["probe_bwd"])
    induction = attention_to(pattern, induction_keys(forward) & queries[:, None])
    anti = attention_to(pattern, anti_induction_keys(backward) & queries[:, None])
    np.testing.assert_allclose(induction, stored["induction_score"], rtol=1e-5)
    np.testing.assert_allclose(anti, stored["anti_score"], rtol=1e-5)


def test_perfect_heads_score_one_and_uniform_attention_its_closed_form():
    tokens = repeated_tokens(jax.random.key(0), 4, 6, 20, start=19)
    keys = induction_keys(tokens)
    perfect = keys / jnp.maximum(keys.sum(-1, keepdims=True), 1)
    uniform = jnp.tril(jnp.ones((13, 13))) / jnp.arange(1, 14)[:, None]
    pattern = jnp.stack([perfect, jnp.broadcast_to(uniform, perfect.shape)], 1)[None]
    found = attention_to(pattern, keys)
    queries = np.flatnonzero(np.asarray(keys[0]).any(-1))
    assert queries.tolist() == list(range(7, 13))
    np.testing.assert_allclose(found[0], [1.0, np.mean(1 / (queries + 1))], rtol=1e-5)


def test_repeated_tokens_repeat_and_hold_no_token_twice():
    tokens = np.asarray(repeated_tokens(jax.random.key(1), 5, 8, jnp.arange(30, 40), start=1))
    assert tokens.shape == (5, 17) and (tokens[:, 0] == 1).all()
    np.testing.assert_array_equal(tokens[:, 1:9], tokens[:, 9:])
    assert all(len(set(row[1:9])) == 8 for row in tokens) and tokens[:, 1:].min() >= 30 and tokens[:, 1:].max() < 40
    assert len({tuple(row) for row in tokens}) == 5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="length must be"):
        repeated_tokens(jax.random.key(0), 1, 5, 4)
    with pytest.raises(ValueError, match="no query"):
        attention_to(jnp.ones((1, 1, 1, 3, 3)), jnp.zeros((1, 3, 3), bool))
    with pytest.raises(ValueError, match="wanted shapes"):
        attention_to(jnp.ones((1, 1, 1, 3, 3)), jnp.ones((2, 3, 3), bool))
