"""Tasks with levels of difficulty, questions of deduction and sums, and the texts that vectors are contrasted with.

In deduction and sums the list of answers is the same for all items, in one order; the other tasks are ``_tales_tasks``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering._tales_tasks import Draw, Items, listed
from mechlab.data.worlds import reasoning
from mechlab.methods.steering.vectors import Texts


class Task(NamedTuple):
    """Where items come from.

    Attributes:
      levels: items by level of difficulty, easiest first; the first level at most 90 % right on dev is taken.
      scrambled: negatives are prompts whose answers are mixed up; else they are random tokens.
    """

    levels: dict[int, Draw]
    scrambled: bool = False


def deduce_task(hops: int, facts: int) -> Draw:
    """Deduction from so many facts."""

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        return _asked(reasoning.deduce(key, n, facts=(facts, facts), hops=hops, pool=pool), reasoning.DEDUCE_ANSWERS)

    return draw


def arith_task(people: int) -> Draw:
    """Sums in a story of so many people."""

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        return _asked(reasoning.arith(key, n, people=(people, people), pool=pool), reasoning.ARITH_ANSWERS)

    return draw


@functools.partial(jax.jit, static_argnames=("vocabulary", "scrambled"))
def negatives(key: jax.Array, items: Items, vocabulary: int, scrambled: bool) -> Texts:
    """Texts as long as the solved ones that answer nothing: the pairs of the contrast vectors.

    Args:
      key: typed key.
      items: their solved texts are the positives.
      vocabulary: V; the first two tokens are padding and BOS, which stays in front.
      scrambled: every word of the answer list in the text, the answer included, is replaced by a random one of the list
        (the corrupted prompts of IOI); otherwise all tokens are random (the column ``rand`` of bAbI).
    """
    texts, answers = items.solved, items.answers
    at_tokens = jnp.arange(texts.tokens.shape[1])
    if scrambled:
        other = jnp.take_along_axis(answers, jax.random.randint(key, texts.tokens.shape, 0, answers.shape[1]), 1)
        replaced = (texts.tokens[..., None] == answers[:, None]).any(-1)
    else:
        other = jax.random.randint(key, texts.tokens.shape, 2, vocabulary)
        replaced = (at_tokens > 0) & (at_tokens < texts.lengths[:, None])
    return Texts(jnp.where(replaced, other, texts.tokens), texts.lengths)


def few_shot(items: Items, examples: Items, end: int) -> Texts:
    """Each prompt behind one solved example: example, answer, the token ``end``, prompt without its BOS."""
    solved = examples.solved
    rows = jnp.arange(len(solved.tokens))
    first = jnp.pad(solved.tokens, ((0, 0), (0, 1))).at[rows, solved.lengths].set(end)
    behind = items.texts.tokens[:, 1:]
    tokens = jnp.concatenate([first, behind], 1)
    kept = jnp.concatenate(
        [
            jnp.arange(first.shape[1]) <= solved.lengths[:, None],
            jnp.arange(behind.shape[1]) < items.texts.lengths[:, None] - 1,
        ],
        1,
    )
    order = jnp.argsort(~kept, axis=1, stable=True)
    return Texts(jnp.take_along_axis(jnp.where(kept, tokens, 0), order, 1), kept.sum(1))


def _asked(questions: reasoning.Questions, answers: np.ndarray) -> Items:
    right = (questions.answers[:, None] == jnp.asarray(answers)).argmax(1)
    listing = jnp.broadcast_to(jnp.asarray(answers), (len(right), len(answers)))
    return listed(Texts(questions.tokens, questions.lengths), listing, right, candidates=len(answers))
