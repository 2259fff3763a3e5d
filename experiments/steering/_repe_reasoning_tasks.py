"""The items of each task, all in one shape: a prompt, a list of answers, and which one is right.

The order of an answer list must not tell which answer is right, and it must mean something, because the offset baseline
tunes one constant per place: in stories of two persons the first person's answer comes first, in deduction and sums the
list is the same for all items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import streams
from mechlab.data.worlds import reasoning, tales
from mechlab.methods.steering.vectors import Texts, pad

NAMES = ("Tim", "Sue", "Ben", "Mia", "Tom", "Lily", "Max", "Anna", "Sam", "Amy", "Leo", "Jane")
HAPPY = (
    *("got a new toy", "ate a big cake", "won the game", "went to a party", "saw a rainbow", "found a new friend"),
    *("got a present", "hugged mom", "played in the sun", "went to the zoo", "sang a nice song", "got a puppy"),
)
SAD = (
    *("lost the toy", "fell and cried", "lost the game", "broke a cup", "hurt a leg", "was all alone"),
    *("lost a friend", "could not find mom", "had to stay in bed", "missed the party", "dropped the cake", "was sick"),
)
THINGS = ("ball", "car", "dog", "toy", "hat", "book")
POOLS = ("train", "dev", "test")


class Items(NamedTuple):
    """N items.

    Attributes:
      texts: prompts.
      answers: (N, A) tokens.
      right: (N,) place of the right answer in its list.
    """

    texts: Texts
    answers: jax.Array
    right: jax.Array

    @property
    def gold(self) -> jax.Array:
        """(N,) token of the right answer."""
        return jnp.take_along_axis(self.answers, self.right[:, None], 1)[:, 0]


class Task(NamedTuple):
    """Where items come from.

    Attributes:
      draw: ``draw(key, n, pool, level)``.
      levels: of difficulty, easiest first; the first one at most 90 % right on dev is taken.
      scrambled: negatives are prompts whose answers are mixed up; else they are random tokens.
    """

    draw: Callable[[jax.Array, int, str, int], Items]
    levels: tuple[int, ...]
    scrambled: bool = False


def tales_task(kind: str, levels: tuple[int, ...]) -> Task:
    """An item kind of tales; the level is the number of distractors."""

    def draw(key: jax.Array, n: int, pool: str, level: int) -> Items:
        found = tales.items(key, kind, n, distractors=level, pool=pool)
        first = found.orders[:, None] == 0
        both = jnp.where(first, found.candidates, found.candidates[:, ::-1])
        return Items(Texts(found.tokens, found.lengths), jnp.concatenate([both, found.alternatives], 1), found.orders)

    return Task(draw, levels, scrambled=kind != "mood")


def deduce_task(hops: int, levels: tuple[int, ...]) -> Task:
    """Deduction; the level is the number of facts."""

    def draw(key: jax.Array, n: int, pool: str, level: int) -> Items:
        return _listed(reasoning.deduce(key, n, facts=(level, level), hops=hops, pool=pool), reasoning.DEDUCE_ANSWERS)

    return Task(draw, levels)


def arith_task(levels: tuple[int, ...]) -> Task:
    """Sums; the level is the number of people."""

    def draw(key: jax.Array, n: int, pool: str, level: int) -> Items:
        return _listed(reasoning.arith(key, n, people=(level, level), pool=pool), reasoning.ARITH_ANSWERS)

    return Task(draw, levels)


def story_task(kind: str, vocabulary: Any) -> Task:
    """Two-candidate items in real English for stories260K, scored at the first piece of each answer.

    - "mood": "Tim got a new toy. Tim was very" -> happy (or sad); events in three pools.
    - "recall": "Tim had a ball. Sue had a car. Tim played with the" -> ball (or car); names in three pools.
    """

    def first_piece(word: str) -> int:
        return int(vocabulary.encode(f"x {word}")[len(vocabulary.encode("x"))])

    # Answers are told apart by their first piece, so of things that share it one is left.
    things = list({first_piece(thing): thing for thing in THINGS}.values())

    def draw(key: jax.Array, n: int, pool: str, level: int) -> Items:
        part = slice(4 * POOLS.index(pool), 4 * POOLS.index(pool) + 4)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        rows: list[list[int]] = []
        answers: list[list[int]] = []
        right = rng.integers(0, 2, n)
        for which in right:
            if kind == "mood":
                name, event = rng.choice(NAMES), rng.choice((HAPPY, SAD)[which][part])
                text, words = f"{name} {event}. {name} was very", ["happy", "sad"]
            else:
                names, words = rng.permutation(NAMES[part])[:2], rng.permutation(things)[:2].tolist()
                told = " ".join(f"{name} had a {thing}." for name, thing in zip(names, words, strict=True))
                text = f"One day, {told} {names[which]} played with the"
            rows.append(vocabulary.encode(text))
            answers.append([first_piece(word) for word in words])
        width = 48
        return Items(pad(rows, width), jnp.asarray(answers), jnp.asarray(right))

    return Task(draw, (0,), scrambled=kind == "recall")


def with_answers(items: Items, answers: jax.Array) -> Texts:
    """Prompts with one more token each, the answer (N,)."""
    wider = jnp.pad(items.texts.tokens, ((0, 0), (0, 1)))
    rows = jnp.arange(len(wider))
    return Texts(wider.at[rows, items.texts.lengths].set(answers), items.texts.lengths + 1)


def negatives(key: jax.Array, items: Items, vocabulary: int, scrambled: bool) -> Texts:
    """Texts of the same lengths that answer nothing: the pairs of the contrast vectors.

    Args:
      key: typed key.
      items: the positive texts, without answers.
      vocabulary: V; the first two tokens are padding and BOS, which stays in front.
      scrambled: every word of the answer list in the prompt, and the answer, is replaced by a random one of the list
        (the corrupted prompts of IOI); otherwise all tokens are random (the column ``rand`` of bAbI).
    """
    inside, answer = streams(key, "inside answer")
    texts, answers = items.texts, items.answers
    at_tokens = jnp.arange(texts.tokens.shape[1])
    if scrambled:
        other = jnp.take_along_axis(answers, jax.random.randint(inside, texts.tokens.shape, 0, answers.shape[1]), 1)
        replaced = (texts.tokens[..., None] == answers[:, None]).any(-1)
    else:
        other = jax.random.randint(inside, texts.tokens.shape, 2, vocabulary)
        replaced = (at_tokens > 0) & (at_tokens < texts.lengths[:, None])
    mixed = items._replace(texts=texts._replace(tokens=jnp.where(replaced, other, texts.tokens)))
    if scrambled:
        places = jax.random.randint(answer, (len(answers), 1), 0, answers.shape[1])
        return with_answers(mixed, jnp.take_along_axis(answers, places, 1)[:, 0])
    return with_answers(mixed, jax.random.randint(answer, (len(answers),), 2, vocabulary))


def few_shot(items: Items, examples: Items, end: int) -> Texts:
    """Each prompt behind one solved example: example, answer, the token ``end``, prompt without its BOS."""
    solved = with_answers(examples, examples.gold)
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


def _listed(questions: reasoning.Questions, answers: np.ndarray) -> Items:
    right = (questions.answers[:, None] == jnp.asarray(answers)).argmax(1)
    listed = jnp.broadcast_to(jnp.asarray(answers), (len(right), len(answers)))
    return Items(Texts(questions.tokens, questions.lengths), listed, right)
