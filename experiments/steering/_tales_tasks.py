"""Items of tales and of small stories in real English: a prompt, a list of answers, and which one is right.

The order of an answer list must not tell which answer is right, and must mean the same in all items, since margins are
answer 1 minus answer 2 and offsets are constants of places in the list: happy before sad, yes before no, what belongs
to the person told of first before what belongs to the second. Answers are scored at one token, the first that differs.
Names, things and cues of train, dev and test are disjoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.sources import MissingData
from mechlab.data.worlds import tales
from mechlab.methods.steering.vectors import Texts, pad
from mechlab.models.subjects import load_stories260k
from mechlab.reporting.log import Log

POOLS = ("train", "dev", "test")
STORIES = ("stories_mood", "stories_recall")

# Eight, four and eight cues of each mood for train, dev and test.
HAPPY = (
    *("got a new bike", "won a big race", "ate ice cream", "got a kiss from mom", "played with a puppy"),
    *("saw a pretty rainbow", "found a gold coin", "sang a fun song"),
    *("got a big gift", "made a new friend", "went to the zoo", "danced with dad"),
    *("got a shiny toy", "had a birthday cake", "played all day in the sun", "got a hug from grandma"),
    *("jumped in the puddles and laughed", "found the lost kitten", "went on a fun trip", "smiled at the baby"),
)
SAD = (
    *("lost a new bike", "fell and got a cut", "dropped the ice cream", "could not find mom", "broke the toy car"),
    *("had no one to play with", "lost a gold coin", "cried in bed"),
    *("lost a big gift", "missed an old friend", "was sick at home", "got hurt by a rock"),
    *("broke the shiny toy", "saw the cake fall on the floor", "was alone all day in the rain"),
    *("said goodbye to grandma", "hurt a leg and cried", "could not find the kitten", "missed the fun trip"),
    "had a bad dream",
)
CUES = (slice(0, 8), slice(8, 12), slice(12, 20))
NAMES = ("Tim", "Sue", "Ben", "Mia", "Tom", "Lily", "Max", "Anna", "Sam", "Amy", "Jack", "Sara", "Bob", "Jane", "Lucy")
THINGS = ("ball", "car", "doll", "book", "kite", "hat", "boat", "train", "bear", "cup", "drum", "box", "truck", "bag")
THIRDS = (slice(0, 5), slice(5, 10), slice(10, 15))
OPENINGS = (
    "One day,",
    "Once upon a time,",
    "It was a sunny day.",
    "There was a big park.",
    "It was late.",
    "That day,",
)
FEELS = ("was very", "felt so")


class Items(NamedTuple):
    """N items; leading axis S where seeds are stacked.

    Attributes:
      texts: prompts, up to the first token in which the candidates differ.
      answers: (N, A) tokens of that place: the two candidates, then others of their sort where there are any.
      right: (N,) place of the right answer.
      ended: 2 N prompts with their answers: the right ones of all items, then the wrong ones.
    """

    texts: Texts
    answers: jax.Array
    right: jax.Array
    ended: Texts

    @property
    def gold(self) -> jax.Array:
        """(N,) token of the right answer."""
        return jnp.take_along_axis(self.answers, self.right[:, None], 1)[:, 0]

    @property
    def solved(self) -> Texts:
        """N prompts with the right answer."""
        return Texts(*(x[: len(x) // 2] for x in self.ended))

    def take(self, rows: np.ndarray) -> Items:
        """Some of the items, by number."""
        texts, answers, right = jax.tree.map(lambda x: x[rows], self[:3])
        both = np.concatenate([rows, rows + len(self.right)])
        return Items(texts, answers, right, Texts(*(x[both] for x in self.ended)))


Draw = Callable[[jax.Array, int, str], Items]
"""Where items of a task come from: ``draw(key, n, pool)``."""


def load_stories(log: Log) -> tuple[Model, Any, Any] | None:
    """stories260K with its vocabulary; None, and a line in the log, where it is not on this machine."""
    try:
        return load_stories260k(download=False)
    except MissingData:
        log.say("stories260K is not on this machine; its tasks are left out")
        return None


def tales_task(kind: str, distractors: int) -> Draw:
    """An item kind of the world of tales."""

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        found = tales.items(key, kind, n, distractors=distractors, pool=pool)
        # For "agree" the right answer is yes where the statement is true.
        right = 1 - found.truths if kind == "agree" else found.orders
        both = jnp.where(right[:, None] == 0, found.candidates, found.candidates[:, ::-1])
        # Texts are padded to the longest that the grammar can write.
        width = min(found.tokens.shape[1], _rounded(int(found.lengths.max())))
        texts = Texts(found.tokens[:, :width], found.lengths)
        return listed(texts, jnp.concatenate([both, found.alternatives], 1), right)

    return draw


def story_task(kind: str, vocabulary: Any) -> Draw:
    """Items in real English for stories260K.

    - "stories_mood": "One day, Tim got a new bike. Sue was there. Tim was very" -> happy, or sad.
    - "stories_recall": "One day, Tim had a ball and Sue had a car. Tim played with the" -> ball, or car.
    """

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        part = POOLS.index(pool)
        # Host-side text; the draws come from the key.
        pick = np.asarray(jax.random.randint(stream(key, "picks"), (n, 8), 0, 1 << 20))
        prompts, answers = [], []
        for i, row in enumerate(pick):
            right = i % 2
            first, second = _two(NAMES[THIRDS[part]], row[0], row[1])
            opening = _one(OPENINGS, row[2])
            if kind == "stories_mood":
                cue = _one((HAPPY, SAD)[right][CUES[part]], row[3])
                told = f"{opening} {first} {cue}. {second} was there. {first}"
                prompts.append(f"{told} {_one(FEELS, row[4])}")
                answers.append(("happy", "sad"))
            else:
                things = _two(THINGS[THIRDS[part]], row[3], row[4])
                told = f"{opening} {first} had a {things[0]} and {second} had a {things[1]}."
                prompts.append(f"{told} {(first, second)[right]} played with the")
                answers.append(things)
        return encoded(vocabulary.encode, prompts, answers, np.arange(n) % 2)

    return draw


@functools.partial(jax.jit, static_argnames="candidates")
def listed(texts: Texts, answers: jax.Array, right: jax.Array, candidates: int = 2) -> Items:
    """Items whose answers are single tokens; the wrong text ends in the next of the first ``candidates`` answers."""
    ended = []
    for place in (right, (right + 1) % candidates):
        wider = jnp.pad(texts.tokens, ((0, 0), (0, 1)))
        token = jnp.take_along_axis(answers, place[:, None], 1)[:, 0]
        ended.append(Texts(wider.at[jnp.arange(len(wider)), texts.lengths].set(token), texts.lengths + 1))
    return Items(texts, answers, right, jax.tree.map(lambda *x: jnp.concatenate(x), *ended))


def encoded(
    encode: Callable[[str], list[int]], prompts: Sequence[str], answers: Sequence[tuple[str, str]], right: np.ndarray
) -> Items:
    """Items from strings, candidates compared at the first token that differs: the longer prompt is asked."""
    rows, tokens, ended = [], [], [[], []]  # type: ignore[var-annotated]
    for prompt, both, side in zip(prompts, answers, right, strict=True):
        whole = [encode(f"{prompt} {answer}") for answer in both]
        shared = next(i for i, (a, b) in enumerate(zip(*whole, strict=False)) if a != b)
        rows.append(whole[0][:shared])
        tokens.append([ids[shared] for ids in whole])
        ended[0].append(whole[side])
        ended[1].append(whole[1 - side])
    texts, finished = (pad(x, _rounded(max(map(len, x)))) for x in (rows, [*ended[0], *ended[1]]))
    return Items(texts, jnp.asarray(tokens), jnp.asarray(right), finished)


def stacked(items: Sequence[Items]) -> Items:
    """Items of several seeds, padded to one width: a leading axis S."""

    def together(texts: list[Texts]) -> Texts:
        width = max(one.tokens.shape[1] for one in texts)
        fitted = [np.pad(one.tokens, ((0, 0), (0, width - one.tokens.shape[1]))) for one in texts]
        return Texts(jnp.asarray(np.stack(fitted)), jnp.asarray(np.stack([one.lengths for one in texts])))

    return Items(
        together([one.texts for one in items]),
        jnp.asarray(np.stack([one.answers for one in items])),
        jnp.asarray(np.stack([one.right for one in items])),
        together([one.ended for one in items]),
    )


def cells_at_once(model: Model, prompts: int, width: int) -> int:
    """How many forwards of so many prompts to run together.

    On a CPU about 2 million numbers of the widest activation, which stay in its cache.
    """
    numbers = 2_000_000 if jax.default_backend() == "cpu" else 200_000_000
    return max(1, numbers // (prompts * width * model.module.config.hidden))


def _rounded(width: int) -> int:
    """The next multiple of 16: each width is a program of its own, so there should be few."""
    return -(-width // 16) * 16


def _one(options: Sequence[str], number: int) -> str:
    return options[number % len(options)]


def _two(options: Sequence[str], a: int, b: int) -> tuple[str, str]:
    """Two different ones."""
    first = a % len(options)
    second = (first + 1 + b % (len(options) - 1)) % len(options)
    return options[first], options[second]
