"""Shelves: pictures of 3 x 3 cells with handwritten digits in some of them, and captions that name what is there.

A picture has 2 to 5 different objects (the ten digits), drawn by its *theme*: each of four themes favours four classes.
Objects differ in contrast, and pixels are noisy, so some are hard to see. A training caption names the objects in
random order, "there is a three and a seven .", and with some probability one that is absent but fits the theme: a model
that learns from them hallucinates for the usual reasons, a prior and weak evidence.

Two domains have the same ten classes: MNIST with the words zero ... nine, and scikit-learn's digits with other nouns.
Token ids come from ``tokenizer``; ``CLASS_OF`` says which class a token names, whichever domain's word it is. Pictures
are made with NumPy: they are data, and every shape of random numbers would be a program of its own to compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import require_typed
from mechlab.data.images import Images
from mechlab.data.text import BOS, PAD, WordTokenizer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CELL, CELLS, CLASSES = 14, 9, 10
"""Pixels of a cell's side, cells of a picture, kinds of object."""

SIDE = 3 * CELL
"""Pixels of a picture's side."""

NOUNS = (
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("ring", "stick", "swan", "bird", "chair", "hook", "pipe", "axe", "snowman", "balloon"),
)
"""The words for the classes in each domain."""

EOS, END = "<eos>", "."

tokenizer = WordTokenizer(words=(PAD, BOS, EOS, END, "there", "is", "a", "and", *NOUNS[0], *NOUNS[1]))
"""Ids 0, 1, 2, 3 are padding, start, end of the caption and end of a sentence."""

CLASS_OF = np.full(len(tokenizer), -1, np.int32)
CLASS_OF[[[tokenizer.ids[noun] for noun in nouns] for nouns in NOUNS]] = np.arange(CLASSES)

OBJECT_IDS = tuple(np.flatnonzero(CLASS_OF >= 0).tolist())

THEMES = np.array([[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 0, 5, 7]])
"""The classes that each theme favours."""

MAX_LEN = 28
"""Tokens of the longest caption: six objects in three sentences, and its end."""


class Bank(NamedTuple):
    """Objects to put on shelves, cut to one size: images (M, 14, 14) in [0, 1], and the rows of each class (10, m)."""

    images: Float[np.ndarray, "M 14 14"]
    rows: Int[np.ndarray, "10 m"]


class Shelves(NamedTuple):
    """Pictures and captions.

    Attributes:
      pixels: (N, 42, 42, 1), objects times their contrast, plus noise.
      cells: (N, 9) the class in each cell, row by row, -1 where it is empty.
      truth: (N, 10) which classes are there.
      captions: (N, MAX_LEN) tokens without start, end included, then padding.
    """

    pixels: Float[np.ndarray, "N 42 42 1"]
    cells: Int[np.ndarray, "N 9"]
    truth: Bool[np.ndarray, "N 10"]
    captions: Int[np.ndarray, "N T"]


def banks(images: Images) -> tuple[Bank, Bank]:
    """The objects for training pictures and those for test pictures: MNIST halved, or digits scaled up, to 14 x 14."""

    def bank(x: np.ndarray, y: np.ndarray) -> Bank:
        if x.shape[1:] == (2 * CELL, 2 * CELL):
            x = x.reshape(-1, CELL, 2, CELL, 2).mean((2, 4))
        elif x.shape[1:] != (CELL, CELL):
            x = np.clip(np.asarray(jax.image.resize(jnp.asarray(x), (len(x), CELL, CELL), "linear")), 0, 1)
        by_class = [np.flatnonzero(y == c) for c in range(CLASSES)]
        fewest = min(map(len, by_class))
        return Bank(x.astype(np.float32), np.stack([rows[:fewest] for rows in by_class]))

    return bank(images.train_x, images.train_y), bank(images.test_x, images.test_y)


def shelves(
    key: jax.Array,
    bank: Bank,
    n: int,
    *,
    domain: int,
    favour: float = 6.0,
    lowest: float = 0.15,
    noise: float = 0.15,
    invent: float = 0.25,
    theme_mix: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
) -> Shelves:
    """Pictures of one domain.

    Args:
      key: typed key.
      bank: of the domain.
      n: number of pictures.
      domain: 0 or 1, which nouns captions use.
      favour: how many times likelier a theme's own classes are.
      lowest: contrast is uniform in [lowest, 1].
      noise: standard deviation of the Gaussian noise of every pixel.
      invent: probability that a caption names an absent object of the theme.
      theme_mix: probabilities of the four themes.

    Raises:
      ValueError: fewer than one picture, another domain, or numbers out of range.
    """
    if n < 1 or domain not in (0, 1) or favour <= 0 or noise < 0 or not 0 <= lowest <= 1 or not 0 <= invent <= 1:
        raise ValueError(
            f"shelves: wanted n >= 1, domain 0 or 1, favour > 0, noise >= 0, lowest and invent in [0, 1], got {n}, "
            f"{domain}, {favour}, {noise}, {lowest}, {invent}."
        )
    require_typed(key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    mix = np.asarray(theme_mix, float)
    theme = rng.choice(len(THEMES), n, p=mix / mix.sum())
    weight = np.ones((len(THEMES), CLASSES))
    np.put_along_axis(weight, THEMES, favour, 1)
    # The largest of log weight + Gumbel noise are a weighted draw without replacement.
    ranked = np.argsort(-(np.log(weight)[theme] + rng.gumbel(size=(n, CLASSES))), 1)
    count = rng.integers(2, 6, n)
    places = rng.permuted(np.tile(np.arange(CELLS), (n, 1)), axis=1)
    drawn = rng.integers(0, bank.rows.shape[1], (n, CELLS))
    order, false = rng.random((n, CELLS)), rng.random((n, 1 + CLASSES))
    contrast = rng.uniform(lowest, 1, (n, CELLS)).astype(np.float32)

    cells, truth = np.full((n, CELLS), -1, np.int32), np.zeros((n, CLASSES), bool)
    pixels = noise * rng.standard_normal((n, SIDE, SIDE), np.float32)
    grid = pixels.reshape(n, 3, CELL, 3, CELL)
    captions = np.zeros((n, MAX_LEN), np.int32)
    for i in range(n):
        there = ranked[i, : count[i]]
        truth[i, there] = True
        for c, place, choice in zip(there, places[i], drawn[i], strict=False):
            cells[i, place] = c
            grid[i, place // 3, :, place % 3] += contrast[i, place] * bank.images[bank.rows[c, choice]]
        named = there.tolist()
        absent = [c for c in THEMES[theme[i]].tolist() if not truth[i, c]]
        if absent and false[i, 0] < invent:
            named.append(max(absent, key=lambda c: false[i, 1 + c]))
        named = [named[j] for j in np.argsort(order[i, : len(named)])]
        written = caption(named, domain)
        captions[i, : len(written)] = written
    return Shelves(pixels[..., None], cells, truth, captions)


def caption(classes: list[int], domain: int) -> list[int]:
    """Tokens of the caption that names classes in this order, two to a sentence.

    >>> tokenizer.decode(caption([3, 7, 0], 0)[:-1])
    'There is a three and a seven. There is a zero.'
    """
    words: list[str] = []
    for first in range(0, len(classes), 2):
        pair = [NOUNS[domain][c] for c in classes[first : first + 2]]
        words += ["there", "is", "a", *" and a ".join(pair).split(), END]
    return [tokenizer.ids[word] for word in [*words, EOS]]
