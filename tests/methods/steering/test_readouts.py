"""Readouts of a decoder: pooling, places, padding on either side, log-probabilities of labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.steering import readouts
from mechlab.methods.steering.vectors import Texts, pad
from mechlab.models.transformer import llama, transformer

ROWS = [[1, 5, 7, 2], [1, 3], [1, 9, 4, 4, 8, 6]]


@pytest.fixture(scope="module")
def subject():
    model = transformer(llama(vocabulary=12, layers=2, width=16, heads=2, hidden=24, context=16))
    return model, {"params": model.init(jax.random.key(0))}


def test_both_poolings_equal_the_vectors_and_padding_does_not_leak(vectors):
    v = vectors("emotion_probes")
    for pool in ("last", "mean"):
        np.testing.assert_allclose(readouts.pool_states(v["hidden"], v["mask"], pool), v[pool], rtol=1e-5, atol=1e-6)
    padding = np.where(v["mask"][..., None] > 0, v["hidden"], np.nan)
    assert bool(jnp.isfinite(readouts.pool_states(padding, v["mask"], "mean")).all())


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_left_padding_right_padding_and_more_padding_give_the_same_features(subject, pool):
    model, variables = subject
    right = readouts.capture_residuals(model, variables, pad(ROWS), pool=pool)
    assert right.shape == (3, 3, 16)
    more = pad(ROWS, 9)
    np.testing.assert_allclose(
        readouts.capture_residuals(model, variables, more, pool=pool, batch=2), right, rtol=1e-5, atol=1e-6
    )
    width = 8
    tokens, positions = np.full((3, width), 11), np.full((3, width), -1)
    for row, (ids, places) in enumerate(zip(ROWS, positions, strict=True)):
        tokens[row, width - len(ids) :], places[width - len(ids) :] = ids, np.arange(len(ids))
    acts = model.capture(variables, jnp.asarray(tokens), jnp.asarray(positions), sites=("embed", "resid_post"))[1]
    states = jnp.concatenate([acts["embed"][None], acts["resid_post"]])
    left = readouts.pool_states(states, positions >= 0, pool)
    np.testing.assert_allclose(jnp.moveaxis(left, 0, 1), right, rtol=1e-5, atol=1e-6)


def test_states_at_the_last_token_are_the_pooled_ones(subject):
    model, variables = subject
    texts = pad(ROWS)
    places = np.stack([np.zeros(3, int), np.asarray(texts.lengths) - 1], 1)
    found = readouts.states_at(model, variables, texts, places, batch=2)
    np.testing.assert_allclose(found[:, 1], readouts.capture_residuals(model, variables, texts), rtol=1e-5, atol=1e-6)
    # All texts begin with the same token, which sees nothing else.
    np.testing.assert_allclose(found[0, 0], found[2, 0], rtol=1e-5, atol=1e-6)


def test_a_one_token_label_is_an_entry_of_the_log_softmax_and_longer_ones_are_sums(subject):
    model, variables = subject
    labels = [(3,), (4, 5), (6, 7, 8)]
    texts = pad(ROWS)
    found = readouts.label_logprob(model, variables, texts, labels, batch=2)
    for row, ids in enumerate(ROWS):
        for column, label in enumerate(labels):
            whole = jnp.asarray([[*ids, *label]])
            scores = jax.nn.log_softmax(model.apply(variables, whole))[0]
            wanted = sum(scores[len(ids) - 1 + i, token] for i, token in enumerate(label))
            np.testing.assert_allclose(found[row, column], wanted, rtol=1e-4, atol=1e-5)
    halved = readouts.label_logprob(model, variables, texts, labels, normalise=True)
    np.testing.assert_allclose(halved * jnp.asarray([1, 2, 3]), found, rtol=1e-5)
    single = readouts.label_logprob(model, variables, texts, [(3,), (4,)])
    last = texts.lengths - 1
    scores = jax.nn.log_softmax(model.apply(variables, texts.tokens, None, None, None, last)[:, 0])
    np.testing.assert_allclose(single, scores[:, 3:5], rtol=1e-5, atol=1e-6)


class Letters:
    def encode(self, text):
        return [1, *(2 + ord(letter) % 9 for letter in text)]

    def decode(self, ids):
        raise NotImplementedError


def test_what_cannot_be_read_is_refused(subject):
    model, variables = subject
    texts = pad(ROWS)
    with pytest.raises(ValueError, match='pool: wanted "last" or "mean", got "max"'):
        readouts.capture_residuals(model, variables, texts, pool="max")
    with pytest.raises(ValueError, match='got "max"'):
        readouts.pool_states(jnp.zeros((2, 3, 4)), np.ones((2, 3)), "max")
    with pytest.raises(ValueError, match="length 0"):
        readouts.pool_states(jnp.zeros((2, 3, 4)), np.asarray([[1, 1, 0], [0, 0, 0]]), "mean")
    with pytest.raises(ValueError, match=r"mask: wanted shape \(B, T\) = \(2, 3\)"):
        readouts.pool_states(jnp.zeros((2, 3, 4)), np.ones((3, 2)), "last")
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.6, got 0\.\.6"):
        readouts.capture_residuals(model, variables, Texts(texts.tokens, jnp.asarray([4, 0, 6])))
    with pytest.raises(ValueError, match=r"tokens \(N, T\) and lengths"):
        readouts.capture_residuals(model, variables, Texts(texts.tokens, texts.lengths[:2]))
    with pytest.raises(ValueError, match=r"needs 17 tokens, the model's context is 16"):
        readouts.capture_residuals(model, variables, pad([[1] * 17]))
    with pytest.raises(ValueError, match="places: wanted"):
        readouts.states_at(model, variables, texts, np.asarray([[0], [2], [0]]))
    broken = {"params": jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), variables["params"])}
    with pytest.raises(ValueError, match="not finite at depth 0"):
        readouts.capture_residuals(model, broken, texts)


def test_labels_that_cannot_be_compared_are_refused(subject):
    model, variables = subject
    texts = pad(ROWS)
    for labels in ([(3,), (3,)], [(3,)], [(3,), ()]):
        with pytest.raises(ValueError, match="labels: wanted at least two"):
            readouts.label_logprob(model, variables, texts, labels)
    with pytest.raises(ValueError, match="needs 18 tokens"):
        readouts.label_logprob(model, variables, pad([[1] * 15]), [(3,), (4, 5, 6)])


def test_texts_are_never_cut_nor_empty():
    texts = readouts.encode_texts(Letters(), ["abc", "a"], 16)
    assert texts.lengths.tolist() == [4, 2] and texts.tokens.shape == (2, 4)
    with pytest.raises(ValueError, match="text 1 has 18 tokens, the context is 16"):
        readouts.encode_texts(Letters(), ["abc", "a" * 17], 16)
    with pytest.raises(ValueError, match=r"empty: \[1\]"):
        readouts.encode_texts(Letters(), ["abc", " "], 16)
    with pytest.raises(ValueError, match="got 0"):
        readouts.encode_texts(Letters(), [], 16)
