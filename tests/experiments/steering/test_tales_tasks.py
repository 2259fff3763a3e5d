"""Items of tales and of small stories: answers in an order that means something and does not tell, pools apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.steering import _tales_tasks as tasks
from mechlab.methods.steering.vectors import Texts


class Spelling:
    """One token a letter."""

    def encode(self, text):
        return [ord(letter) for letter in text]


def last_tokens(texts):
    return np.asarray(texts.tokens)[np.arange(len(texts.tokens)), np.asarray(texts.lengths) - 1]


@pytest.mark.parametrize("kind", ["recall", "agree"])
def test_orders_of_answers_mean_something_and_do_not_tell(kind):
    items = tasks.tales_task(kind, 0)(jax.random.key(0), 20, "dev")
    assert np.bincount(np.asarray(items.right)).tolist() == [10, 10] and items.answers.shape[1] >= 6
    last = last_tokens(items.ended).reshape(2, 20)
    answers = np.asarray(items.answers)
    gold = answers[np.arange(20), np.asarray(items.right)]
    np.testing.assert_array_equal(last, [gold, answers[:, :2].sum(1) - gold])
    np.testing.assert_array_equal(last_tokens(items.solved), last[0])
    if kind == "agree":
        assert len(set(answers[:, 0].tolist())) == 1
    else:  # the facts name both, and the first answer belongs to the first person
        where = (np.asarray(items.texts.tokens)[:, :, None] == answers[:, None, :2]).argmax(1)
        assert (where[:, 0] < where[:, 1]).all()


def test_items_are_taken_with_their_endings():
    items = tasks.tales_task("recall", 0)(jax.random.key(1), 6, "train")
    some = items.take(np.asarray([4, 1]))
    np.testing.assert_array_equal(some.texts.tokens, items.texts.tokens[jnp.asarray([4, 1])])
    np.testing.assert_array_equal(some.ended.tokens, items.ended.tokens[jnp.asarray([4, 1, 10, 7])])


def test_wrong_answers_of_longer_lists_are_the_next():
    texts = Texts(jnp.asarray([[1, 5], [1, 0]]), jnp.asarray([2, 1]))
    answers = jnp.asarray([[7, 8, 9], [7, 8, 9]])
    items = tasks.listed(texts, answers, jnp.asarray([1, 2]), candidates=3)
    assert items.ended.tokens.tolist() == [[1, 5, 8], [1, 9, 0], [1, 5, 9], [1, 7, 0]]
    assert items.ended.lengths.tolist() == [3, 2, 3, 2]


def test_candidates_are_compared_where_they_first_differ():
    items = tasks.encoded(Spelling().encode, ["a", "bc"], [("xyz", "xq"), ("m", "n")], np.asarray([1, 0]))
    assert items.texts.lengths.tolist() == [3, 3]  # "a x", "bc "
    assert items.answers.tolist() == [[ord("y"), ord("q")], [ord("m"), ord("n")]]
    assert bytes(items.ended.tokens[0, :4].tolist()).decode() == "a xq"
    assert items.ended.lengths.tolist() == [4, 4, 5, 4]


def test_seeds_are_padded_to_one_width():
    narrow, wide = (
        tasks.encoded(Spelling().encode, [text], [("x", "y")], np.asarray([0])) for text in ("short", "long " * 5)
    )
    both = tasks.stacked([narrow, wide])
    assert both.texts.tokens.shape == (2, 1, 32) and both.answers.shape == (2, 1, 2)
    np.testing.assert_array_equal(both.texts.tokens[0, 0, :16], narrow.texts.tokens[0])
    assert not both.texts.tokens[0, 0, 16:].any()


def test_stories_are_balanced_and_split_by_cue():
    assert len(tasks.HAPPY) == len(tasks.SAD) == 20 and len(set(tasks.HAPPY + tasks.SAD)) == 40
    for kind in tasks.STORIES:
        drawn = {pool: tasks.story_task(kind, Spelling())(jax.random.key(1), 60, pool) for pool in tasks.POOLS}
        texts = {
            pool: [
                bytes(row[:n].tolist()).decode()
                for row, n in zip(np.asarray(x.texts.tokens), x.texts.lengths, strict=True)
            ]
            for pool, x in drawn.items()
        }
        assert np.asarray(drawn["test"].right).tolist() == [0, 1] * 30
        names = {pool: {name for name in tasks.NAMES if any(name in text for text in texts[pool])} for pool in texts}
        assert not names["train"] & names["test"] and not names["dev"] & names["test"]
        if kind == "stories_mood":
            cues = {
                pool: {cue for cue in tasks.HAPPY + tasks.SAD if any(cue + "." in t for t in texts[pool])}
                for pool in texts
            }
            assert not cues["train"] & cues["test"] and not cues["dev"] & cues["test"]
            assert all(("happy" in t) is False for t in texts["test"])
