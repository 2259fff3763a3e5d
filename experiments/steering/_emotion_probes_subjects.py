"""Who is probed on what: a model, its texts with their classes, folds that cut no group, and how it is asked."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from mechlab.core.model import Model
from mechlab.core.rng import stream, streams
from mechlab.data.sources import MissingData
from mechlab.data.splits import group_folds, split_indices
from mechlab.data.text import load_emotions
from mechlab.data.worlds import tales
from mechlab.data.worlds.emotion_corpus import emotion_corpus
from mechlab.methods.steering.emotion_probes import label_words
from mechlab.models import hub
from mechlab.models.subjects import load_stories260k, load_tales
from mechlab.reporting.log import Log

ALIKE = 0.5
"""Scenarios that share this part of their words (intersection over union) are one group."""


class Folds(NamedTuple):
    """Parts of the texts: of F folds, equally large to train and to stop by.

    Attributes:
      train: (F, n) indices.
      dev: (F, m) indices.
      of_item: (N,) the fold in which a text is tested, -1 for none.
    """

    train: np.ndarray
    dev: np.ndarray
    of_item: np.ndarray

    @property
    def test(self) -> np.ndarray:
        """The texts that are tested, each in its own fold."""
        return np.flatnonzero(self.of_item >= 0)


class Subject(NamedTuple):
    """A model and its texts.

    Attributes:
      name: "emotions" or "tales".
      reader: name of the model.
      model, params: the model.
      tokenizer: with ``encode``.
      texts: N texts.
      labels: (N,).
      names: of the K classes.
      groups: (N,) texts of one group share a cue.
      folds: by group.
      question: what is asked behind a text, with ``{name}`` for its person.
      persons: of every text, or empty strings.
    """

    name: str
    reader: str
    model: Model
    params: Any
    tokenizer: Any
    texts: list[str]
    labels: np.ndarray
    names: tuple[str, ...]
    groups: np.ndarray
    folds: Folds
    question: str
    persons: list[str]

    @property
    def context(self) -> int:
        """Tokens that a text may have."""
        return int(self.model.module.config.context)

    @property
    def writes(self) -> bool:
        """Whether the model is a decoder: it can be asked, and texts can go on. An encoder is read only."""
        config = self.model.module.config
        return bool(config.causal and config.unembed)

    def ask(self, row: int) -> str:
        """The prompt about one text."""
        return f"{self.texts[row]} {self.question.format(name=self.persons[row])}"

    def answers(self) -> list[list[int]]:
        """Tokens of the K label words."""
        front = len(self.tokenizer.encode("It"))
        return [list(map(int, self.tokenizer.encode(f"It {word}")))[front:] for word in label_words(self.names)]


class Tales(NamedTuple):
    """The corpus of tales, the same for all sizes.

    Attributes:
      texts, labels, cues, names: of train, dev and test texts, one after the other.
      stages: (N,) of the corpus.
      grouped: no cue is in two parts; one fold.
      mixed: the same numbers of texts, at random.
    """

    texts: list[str]
    labels: np.ndarray
    cues: np.ndarray
    names: list[str]
    stages: np.ndarray
    grouped: Folds
    mixed: Folds


def tales_corpus(key: jax.Array, sizes: tuple[int, int, int]) -> Tales:
    """Texts of all three parts; ``sizes`` are multiples of 21."""
    corpus_key, mixed_key = streams(key, "corpus mixed")
    parts = [
        emotion_corpus(stream(corpus_key, split), n, split=split) for split, n in zip(tales.SPLITS, sizes, strict=True)
    ]
    ends = np.cumsum((0, *sizes))
    train, dev, test = (np.arange(start, stop) for start, stop in itertools.pairwise(ends))
    seen, stopping, rest = (np.asarray(part) for part in split_indices(mixed_key, int(ends[-1]), sizes))
    return Tales(
        texts=[text for part in parts for text in part.texts],
        labels=np.concatenate([part.labels for part in parts]),
        cues=np.concatenate([part.cues for part in parts]),
        names=[name.capitalize() for part in parts for name in part.names],
        stages=np.concatenate([part.stages for part in parts]),
        grouped=_one_fold(train, dev, test, int(ends[-1])),
        mixed=_one_fold(seen, stopping, rest, int(ends[-1])),
    )


def tales_subject(size: Any, corpus: Tales) -> Subject:
    """A shipped model of tales; it is asked the question that stands in its training texts."""
    model, params, tokenizer = load_tales(size)
    return Subject(
        name="tales",
        reader=f"tales-{size}",
        model=model,
        params=params,
        tokenizer=tokenizer,
        texts=corpus.texts,
        labels=corpus.labels,
        names=tales.MOODS,
        groups=corpus.cues,
        folds=corpus.grouped,
        question="Question: how does {name} feel? Answer:",
        persons=corpus.names,
    )


def scenario_subject(key: jax.Array, reader: str, folds: int, limit: int | None, log: Log) -> Subject | None:
    """A model of real text and the scenarios for six emotions; None, and a message that says why, where one is missing.

    Args:
      key: of the folds.
      reader: "stories260K", a hub id, or a folder, of a decoder or an encoder.
      folds: of cross-validation.
      limit: at most so many texts; all by default.
      log: is told.
    """
    try:
        texts, labels, names = load_emotions(download=False)
        if reader == "stories260K":
            model, params, tokenizer = load_stories260k(download=False)
        else:
            model, params, tokenizer = hub.load(reader)
    except MissingData as error:
        log.say(f"emotions: left out, and its claims are not judged. {error}")
        return None
    if limit is not None:
        chosen = np.sort(np.asarray(jax.random.permutation(stream(key, "limit"), len(texts)))[:limit])
        texts, labels = [texts[row] for row in chosen], labels[chosen]
    groups = alike(texts)
    log.say(f"emotions: {len(texts)} texts in {len(set(groups.tolist()))} groups")
    return Subject(
        name="emotions",
        reader=reader,
        model=model,
        params=params,
        tokenizer=tokenizer,
        texts=texts,
        labels=labels,
        names=names,
        groups=groups,
        folds=cross_folds(key, groups, folds),
        question="You feel very",
        persons=[""] * len(texts),
    )


def alike(texts: list[str], share: float = ALIKE) -> np.ndarray:
    """Groups of texts that share words: (N,), the smallest index of each group. Chains of such pairs are one group."""
    words = [set(text.lower().replace(".", "").replace(",", "").split()) for text in texts]
    vocabulary = {word: column for column, word in enumerate(sorted(set().union(*words)))}
    present = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, found in zip(present, words, strict=True):
        row[[vocabulary[word] for word in found]] = 1
    both = present @ present.T
    size = present.sum(1)
    linked = both >= share * (size[:, None] + size - both)
    groups = np.arange(len(texts))
    while True:
        smallest = np.where(linked, groups, len(texts)).min(1)
        if (smallest == groups).all():
            return groups
        groups = smallest


def cross_folds(key: jax.Array, groups: np.ndarray, folds: int) -> Folds:
    """Each fold tests two parts of 2 F, stops by the next one, and trains on the others, in equal numbers."""
    part = group_folds(stream(key, "folds"), groups, 2 * folds)
    order = np.asarray(jax.random.permutation(stream(key, "order"), len(groups)))
    train, dev = [], []
    for fold in range(folds):
        tested, stopping = (2 * fold, 2 * fold + 1), (2 * fold + 2) % (2 * folds)
        dev.append(order[part[order] == stopping])
        train.append(order[~np.isin(part[order], (*tested, stopping))])
    return Folds(_same_length(train), _same_length(dev), part // 2)


def _same_length(parts: list[np.ndarray]) -> np.ndarray:
    return np.stack([part[: min(map(len, parts))] for part in parts])


def _one_fold(train: np.ndarray, dev: np.ndarray, test: np.ndarray, n: int) -> Folds:
    of_item = np.full(n, -1)
    of_item[test] = 0
    return Folds(train[None], dev[None], of_item)
