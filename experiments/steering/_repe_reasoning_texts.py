"""The paper's inductive and deductive items as text, for any model with a tokenizer: IOI, and deduction as in bAbI 15.

    Then, Anna and Max went to the park. Max gave a ball to                                         -> Anna
    Mice are afraid of wolves. Cats are afraid of sheep. Ada is a mouse. What is Ada afraid of? A   -> wolf

Names are those of one pool; animals and places are shared. An answer is scored at its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering._repe_reasoning_tasks import Task
from experiments.steering._tales_tasks import Draw, Items, listed
from mechlab.core.errors import UserError
from mechlab.methods.steering.vectors import pad

POOLS = {
    "train": ("Anna", "Max", "Lily", "Tom", "Sue", "Ben", "Jane", "Leo"),
    "dev": ("Mary", "John", "Kate", "Paul", "Rose", "Mark", "Alice", "Peter"),
    "test": ("Emma", "Jack", "Laura", "David", "Helen", "Simon", "Sarah", "James"),
}
PLACES = ("park", "shop", "school", "beach", "garden", "library")
THINGS = ("ball", "book", "cake", "pen", "hat", "drink")
BEHIND = (
    "It was a long day and everyone was tired.",
    "The sun was out and the street was quiet.",
    "Nobody had seen them since the morning.",
    "The bus came late, as it often did.",
)
ANIMALS = {"mouse": "Mice", "wolf": "Wolves", "cat": "Cats", "sheep": "Sheep", "lion": "Lions", "horse": "Horses"}


def ioi_text(rng: np.random.Generator, level: int, names: tuple[str, ...]) -> tuple[str, list[str], int]:
    """A sentence, its answers and the right one; the level is the number of sentences in front (families AL, BL).

    The first two answers are the persons in the order in which they come, so the right one's place is the family:
    0 for A (ABBA), 1 for B (BABA). The others are two names that do not occur.
    """
    first, second, *absent = rng.permutation(names)[:4].tolist()
    family = int(rng.integers(0, 2))
    giver = (second, first)[family]
    front = "".join(f"{sentence} " for sentence in rng.permutation(BEHIND)[:level])
    went = f"Then, {first} and {second} went to the {rng.choice(PLACES)}."
    return f"{front}{went} {giver} gave a {rng.choice(THINGS)} to", [first, second, *absent], family


def deduce_text(rng: np.random.Generator, level: int, names: tuple[str, ...]) -> tuple[str, list[str], int]:
    """Rules about all animals in question, facts about ``level`` persons, and a question; answers are the animals."""
    animals = list(ANIMALS)
    feared = (np.arange(len(animals)) + rng.integers(1, len(animals))) % len(animals)
    people = rng.permutation(names)[:level].tolist()
    kinds = rng.permutation(len(animals))[:level]
    plural = [ANIMALS[animals[k]].lower() for k in range(len(animals))]
    lines = [f"{ANIMALS[animals[k]]} are afraid of {plural[feared[k]]}." for k in rng.permutation(kinds)]
    lines += [f"{person} is a {animals[k]}." for person, k in zip(people, kinds, strict=True)]
    asked = int(rng.integers(0, level))
    question = f"What is {people[asked]} afraid of? A"
    return " ".join([*lines, question]), animals, int(feared[kinds[asked]])


def text_task(
    write: Callable[[np.random.Generator, int, tuple[str, ...]], tuple[str, list[str], int]], level: int, tokenizer: Any
) -> Draw:
    """Items of one of the two kinds in the tokens of a model.

    Raises:
      UserError: when items are drawn, if two answers of a list begin with the same token.
    """

    def first_token(text: str, word: str) -> int:
        return int(tokenizer.encode(f"{text} {word}")[len(tokenizer.encode(text))])

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        found = [write(rng, level, POOLS[pool]) for _ in range(n)]
        answers = [[first_token(text, word) for word in words] for text, words, _ in found]
        for row, (_, words, _) in zip(answers, found, strict=True):
            if len(set(row)) < len(row):
                raise UserError(f"the tokenizer begins two of the answers {', '.join(words)} with the same token.")
        rows = [[int(token) for token in tokenizer.encode(text)] for text, _, _ in found]
        right = jnp.asarray([place for _, _, place in found])
        return listed(pad(rows, max(map(len, rows)) // 16 * 16 + 16), jnp.asarray(answers), right)

    return draw


def reader_tasks(tokenizer: Any) -> dict[str, Task]:
    """Both kinds; the level is the number of sentences in front, or of persons."""
    return {
        "reader_ioi": Task({level: text_task(ioi_text, level, tokenizer) for level in (0, 2, 4)}, scrambled=True),
        "reader_deduce": Task({level: text_task(deduce_text, level, tokenizer) for level in (2, 3, 4, 5)}),
    }
