"""Requests: pools apart, answers as the template says, refusals where they must be."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mechlab.data.worlds import requests as world

ID = world.tokenizer.ids


def words(batch, rows=slice(None)):
    return [
        set(world.tokenizer.words[i] for i in row[:n])
        for row, n in zip(np.asarray(batch.tokens)[rows], np.asarray(batch.lengths)[rows], strict=True)
    ]


def test_requests_read_as_they_should():
    batch = world.requests(jax.random.key(0), 3, "target")
    text = world.tokenizer.decode(np.asarray(batch.tokens[0]))
    assert text.startswith("User:") and text.endswith("Assistant:")
    assert batch.answers.shape[1] == len(world.REFUSAL) == 8
    assert len(world.tokenizer) <= 260


@pytest.mark.parametrize("kind", ["target", "benign", "unknown"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_nouns_come_from_their_pool_and_topic(kind, wrapped):
    low, high = world.NOUN_POOLS["test"]
    batch = world.requests(jax.random.key(1), 200, kind, pool="test", wrapped=wrapped)
    garden = set(world.NOUNS[world.TARGET])
    allowed = {noun for nouns in world.NOUNS.values() for noun in nouns[low:high]}
    every = {noun for nouns in world.NOUNS.values() for noun in nouns}
    for said, topic in zip(words(batch), np.asarray(batch.topics), strict=True):
        assert said & every <= allowed
        assert bool(said & garden) == (kind == "target")
        assert (topic == len(world.TOPICS)) == (kind == "unknown")
    assert world.is_refusal(batch.answers).all() == (kind == "unknown")
    if kind == "benign":
        assert len(set(np.asarray(batch.topics).tolist())) == len(world.TOPICS) - 1


def test_no_slot_is_left_and_padding_is_behind():
    batch = world.requests(jax.random.key(2), 100, "benign", wrapped=True, room=40)
    tokens = np.asarray(batch.tokens)
    inside = np.arange(40) < np.asarray(batch.lengths)[:, None]
    assert (tokens[inside] > 0).all() and (tokens[~inside] == 0).all() and tokens.shape == (100, 40)


def test_answers_name_the_noun():
    batch = world.requests(jax.random.key(3), 50, "target")
    garden = {ID[noun] for noun in world.NOUNS[world.TARGET]}
    for answer, prompt in zip(np.asarray(batch.answers), np.asarray(batch.tokens), strict=True):
        assert len(garden & set(answer.tolist()) & set(prompt.tolist())) == 1


@pytest.mark.parametrize("refused", [0.0, 1.0])
def test_conversations_refuse_made_up_words_and_a_share_of_the_target(refused):
    tokens, lengths = world.conversations(jax.random.key(4), 400, refused=refused)
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    answers = np.take_along_axis(tokens, lengths[:, None] + np.arange(8), 1)
    refusing = np.asarray(world.is_refusal(answers))
    garden = np.isin(tokens, [ID[n] for n in world.NOUNS[world.TARGET]]).any(1)
    unknown = np.isin(tokens, [ID[n] for n in world._UNKNOWN]).any(1)
    np.testing.assert_array_equal(refusing, unknown | (garden & bool(refused)))


@pytest.mark.parametrize(
    "call",
    [
        lambda key: world.requests(key, 0, "target"),
        lambda key: world.requests(key, 1, "gardens"),
        lambda key: world.requests(key, 1, "target", pool="other"),
        lambda key: world.requests(key, 1, "target", room=3),
        lambda key: world.conversations(key, 4, refused=1.5),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"wanted|room|shares"):
        call(jax.random.key(0))
