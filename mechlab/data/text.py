"""Text to token ids and back: a closed list of words, bytes, or pieces learned from a text; and small real texts.

Tokenizers have ``encode(text) -> ids`` and ``decode(ids) -> text``, and no base class. The 512 pieces of stories260K
(``models.subjects``) are one more, for texts that need a small vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mechlab.core.errors import UserError, did_you_mean, unknown
from mechlab.data.sources import EMOTIONS, GSM8K, TINYSHAKESPEARE, WIKITEXT2, locate

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


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8, and BOS as token 256.

    >>> ByteTokenizer().encode("né").tolist()
    [256, 110, 195, 169]
    """

    def __len__(self) -> int:
        return 257

    def encode(self, text: str, *, bos: bool = True) -> Int[np.ndarray, " T"]:
        """Token ids of a text, (T,) int32, with BOS first unless ``bos`` is false."""
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.concatenate([np.asarray([256], np.int32), ids]) if bos else ids

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids (T,); what is no UTF-8 becomes a replacement mark."""
        return bytes(index for index in np.asarray(ids).reshape(-1).tolist() if index < 256).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
    """Pieces learned from a text by ``train_bpe``; token 0 is BOS.

    Attributes:
      inner: the ``tokenizers.Tokenizer``, for all else it can do.
    """

    inner: Any

    def __len__(self) -> int:
        return int(self.inner.get_vocab_size())

    def encode(self, text: str, *, bos: bool = True) -> Int[np.ndarray, " T"]:
        """Token ids of a text, (T,) int32, with BOS first unless ``bos`` is false."""
        return np.asarray([0] * bos + self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids (T,), without BOS."""
        return str(self.inner.decode(np.asarray(ids).reshape(-1).tolist()))


def train_bpe(text: str, size: int) -> BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): every text can be spelled.

    Args:
      text: what the pieces are counted in.
      size: tokens at most, BOS and the 256 bytes included.

    Returns:
      The tokenizer; the same text and size give the same one.

    Raises:
      ValueError: size < 257.
      UserError: the package ``tokenizers`` (extra ``hub``) is not installed.
    """
    if size < 257:
        raise ValueError(f"train_bpe: size must be at least 257 (BOS and the bytes), got {size}.")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError('train_bpe needs the extra "hub": pip install mechlab[hub]') from error
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(text.splitlines(keepends=True), trainer)
    return BPETokenizer(inner)


TEXTS = ("shakespeare", "wikitext", "gsm8k")


def load_text(name: str, *, download: bool = True) -> tuple[str, str]:
    """A small real text in two parts, one to train on and one to test on.

    Args:
      name: "shakespeare": the first 90 % and the last 10 % of tiny-shakespeare. "wikitext": validation and test text of
        WikiText-2. "gsm8k": questions with their worked answers, a blank line between problems.
      download: fetch it if it is not on this machine.

    Returns:
      Both parts.

    Raises:
      ValueError: another name.
      MissingData, CorruptData: as ``data.sources.locate``.
    """
    if name not in TEXTS:
        raise ValueError(f'load_text: unknown text "{name}".{did_you_mean(name, TEXTS)} Known: {", ".join(TEXTS)}.')
    if name == "shakespeare":
        text = (locate(TINYSHAKESPEARE, download=download) / "input.txt").read_text()
        cut = text.index("\n\n", len(text) * 9 // 10) + 2
        return text[:cut], text[cut:]
    if name == "wikitext":
        folder = locate(WIKITEXT2, download=download)
        return (folder / "valid.txt").read_text(), (folder / "test.txt").read_text()
    train, test = load_problems(download=download)
    return "\n\n".join(map("\n".join, train)), "\n\n".join(map("\n".join, test))


def load_problems(*, download: bool = True) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """GSM8K's word problems in grade-school mathematics (arXiv 2110.14168), 7,473 to train on and 1,319 to test on.

    Args:
      download: fetch them if they are not on this machine.

    Returns:
      Pairs (question, answer) of both parts. An answer is worked steps, sums as ``<<48/2=24>>``, and "#### 72" last.

    Raises:
      MissingData, CorruptData: as ``data.sources.locate``.
    """
    folder = locate(GSM8K, download=download)

    def read(part: str) -> list[tuple[str, str]]:
        lines = map(json.loads, (folder / f"{part}.jsonl").read_text().splitlines())
        return [(line["question"], line["answer"]) for line in lines]

    return read("train"), read("test")


def load_emotions(*, download: bool = True) -> tuple[list[str], Int[np.ndarray, " N"], tuple[str, ...]]:
    """Scenarios for six emotions (Zou et al. 2023, arXiv 2310.01405): "Someone takes credit for your hard work."

    Args:
      download: fetch them if they are not on this machine.

    Returns:
      N = 1,250 texts, each with its class, and the names of the classes. A text that comes twice is kept once.

    Raises:
      MissingData, CorruptData: as ``data.sources.locate``.
    """
    folder = locate(EMOTIONS, download=download)
    names = tuple(file.removesuffix(".json") for file in EMOTIONS.files)
    found: dict[str, int] = {}
    for label, name in enumerate(names):
        for line in json.loads((folder / f"{name}.json").read_text()):
            found.setdefault(" ".join(line.split()), label)
    return list(found), np.asarray(list(found.values()), np.int32), names


def rows_of(ids: ArrayLike, length: int) -> Int[np.ndarray, "N T"]:
    """A long text cut into rows, one after another; the rest is left out.

    Args:
      ids: (n,) token ids.
      length: T.

    Returns:
      (n // T, T) int32.

    Raises:
      ValueError: the text is shorter than one row.
    """
    flat = np.asarray(ids, np.int32).reshape(-1)
    if not 1 <= length <= flat.size:
        raise ValueError(f"rows_of: length must be in 1..{flat.size}, the tokens given, got {length}.")
    return flat[: flat.size // length * length].reshape(-1, length)
