"""Text to token ids and back. Here: a closed list of words; every word is one token.

Tokenizers share three functions' worth of behaviour, and no base class: ``encode(text) -> ids`` with BOS first,
``decode(ids) -> text``, and an id for padding. Rows of different lengths are put together by ``pad``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mechlab.core.errors import unknown

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Int

PAD = "<pad>"
BOS = "<bos>"

_CLOSING = frozenset(".,?!:;”")
_OPENING = frozenset("“")
_SENTENCE_END = frozenset(".?!:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordTokenizer:
    """A vocabulary of lower-case words and punctuation marks.

    Text is compared in lower case, so case carries no information; ``decode`` writes capitals where English wants them
    (sentence starts, names, "I"). A line of text is a document and begins with BOS. Straight quotes are read as
    alternately opening and closing.

    Attributes:
      words: every token, its id is its place; contains ``<pad>`` and ``<bos>``.
      proper: words that are written with a capital everywhere.
    """

    words: tuple[str, ...]
    proper: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        repeated = sorted({word for word in self.words if self.words.count(word) > 1})
        missing = [word for word in (PAD, BOS) if word not in self.words]
        if repeated or missing:
            raise ValueError(f"WordTokenizer: words come twice: {repeated}; words are missing: {missing}.")

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every word."""
        return {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """The id of one word.

        Raises:
          UnknownName: a KeyError that names the word and the nearest known one.
        """
        if word.lower() not in self.ids:
            raise unknown("word", word, self.words)
        return self.ids[word.lower()]

    def encode(self, text: str, *, bos: bool = True) -> Int[np.ndarray, " T"]:
        """Token ids of a text, (T,) int32; every line is a document and begins with BOS unless ``bos`` is false.

        Raises:
          UnknownName: a word that is not in the vocabulary; it is never replaced by another token.
          ValueError: an empty text.

        >>> small = WordTokenizer(words=("<pad>", "<bos>", "tom", "ran", "."), proper=frozenset({"tom"}))
        >>> small.encode("Tom ran.").tolist()
        [1, 2, 3, 4]
        >>> small.decode([1, 2, 3, 4])
        'Tom ran.'
        """
        if not text.strip():
            raise ValueError("encode: the text is empty.")
        ids: list[int] = []
        for line in text.strip().split("\n"):
            line = re.sub(r'"([^"]*)"', r"“\1”", line)
            ids += [self.ids[BOS]] if bos else []
            ids += [self.id(piece) for piece in re.findall(r"<\w+>|[^\W\d_]+|\d+|\S", line)]
        return np.asarray(ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids (T,): padding left out, a new line at every BOS but the first.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        flat = np.asarray(ids).reshape(-1)
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self.words):
            raise ValueError(f"decode: ids must be in 0..{len(self.words) - 1}, got {flat.min()}..{flat.max()}.")
        text, glue, capital = "", True, True
        for word in (self.words[index] for index in flat):
            if word == PAD:
                continue
            if word == BOS:
                text, glue, capital = text + ("\n" if text else ""), True, True
                continue
            written = word.capitalize() if capital or word in self.proper or word == "i" else word
            text += written if glue or word in _CLOSING else f" {written}"
            glue = word in _OPENING
            # A closing quote ends nothing by itself: “Where is it?” asked Tom.
            capital = word in _SENTENCE_END or word in _OPENING or (capital and word in _CLOSING and word != "”")
        return text

    def pad(self, rows: Sequence[ArrayLike], length: int) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, " N"]]:
        """Rows of ids put together, padded on the right.

        Args:
          rows: N sequences of ids, each at least 1 long.
          length: T.

        Returns:
          (N, T) int32 and the lengths (N,) int32.

        Raises:
          ValueError: an empty row, or one longer than T; nothing is cut silently.
        """
        lengths = np.asarray([np.size(row) for row in rows], np.int32)
        if lengths.size == 0 or lengths.min() < 1 or lengths.max() > length:
            raise ValueError(f"pad: rows must have 1..{length} tokens, got lengths {sorted(set(lengths.tolist()))}.")
        padded = np.full((len(rows), length), self.ids[PAD], np.int32)
        for out, row in zip(padded, rows, strict=True):
            out[: np.size(row)] = np.asarray(row)
        return padded, lengths
