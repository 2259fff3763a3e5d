"""A corpus of emotional texts made in three stages over the world of tales, as that of arXiv 2510.04064 was.

- classify: the beginnings of stories as they come, up to what happens; the label is the mood whose words they hold, by
  a lexicon, and a story without one such mood is left out.
- rewrite: a neutral text, its last sentence replaced by an event or a behaviour of an emotion.
- synthesise: new texts from free templates: an event and a behaviour after a neutral sentence.

    corpus = emotion_corpus(jax.random.key(0), 420, split="train")
    corpus.texts[0], MOODS[corpus.labels[0]], STAGES[corpus.stages[0]]

Classes and stages are balanced. No text holds a label word, and no cue word stands in two splits (``tales.moods``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from mechlab.core.rng import streams
from mechlab.data.worlds import tales
from mechlab.data.worlds.tales import tables
from mechlab.data.worlds.tales.moods import COMMON, MOODS

if TYPE_CHECKING:
    from jaxtyping import Int

STAGES = ("classify", "rewrite", "synthesise")


class EmotionCorpus(NamedTuple):
    """N texts; classes in turn within each stage.

    Attributes:
      texts: what the tokenizer of tales encodes.
      labels: (N,) index into ``MOODS``.
      stages: (N,) index into ``STAGES``.
      templates: (N,) the plot of the story that the text, or its first sentence, is from; -1 in the third stage.
      cues: (N,) index into ``tales.CUES`` of the first cue: a group of texts that no split may cut.
      names: the person of each text.
    """

    texts: list[str]
    labels: Int[np.ndarray, " N"]
    stages: Int[np.ndarray, " N"]
    templates: Int[np.ndarray, " N"]
    cues: Int[np.ndarray, " N"]
    names: list[str]


def cue_lexicon(split: str) -> dict[str, int]:
    """Words that stand in cues of one mood only, of this split, and that mood's index."""
    of_word: dict[str, set[int]] = {}
    for cue in _cue_ids(split):
        for word in re.findall(r"[a-z]+(?![a-z]*\})", tables.CUES[cue]):
            if word not in COMMON:
                of_word.setdefault(word, set()).add(_mood_of(cue))
    return {word: next(iter(moods)) for word, moods in of_word.items() if len(moods) == 1}


def emotion_corpus(key: jax.Array, n: int, *, split: str = "train") -> EmotionCorpus:
    """Balanced texts of all three stages.

    Args:
      key: typed key.
      n: N, a multiple of 21 (seven moods, three stages).
      split: "train", "dev" or "test": cues of this part, and, but for what is classified, its names.

    Returns:
      The corpus, one stage after the other.

    Raises:
      ValueError: n is no positive multiple of 21.
      UnknownName: a KeyError, for a split that does not exist.
    """
    moods = len(MOODS)
    if n < 1 or n % (moods * len(STAGES)):
        raise ValueError(f"emotion_corpus: n must be a positive multiple of {moods * len(STAGES)}, got {n}.")
    tables.split_number(split)
    share = n // len(STAGES)
    makers = (_classified, _rewritten, _synthesised)
    rows = [
        (*row, stage)
        for stage, (maker, stage_key) in enumerate(zip(makers, streams(key, " ".join(STAGES)), strict=True))
        for row in maker(stage_key, share, split)
    ]
    texts, labels, templates, cues, names, stages = zip(*rows, strict=True)
    return EmotionCorpus(
        texts=list(texts),
        labels=np.asarray(labels, np.int32),
        stages=np.asarray(stages, np.int32),
        templates=np.asarray(templates, np.int32),
        cues=np.asarray(cues, np.int32),
        names=list(names),
    )


Row = tuple[str, int, int, int, str]
"""Text, label, template, cue and name."""


def _stories(key: jax.Array, attempt: int) -> tales.Documents:
    """Beginnings of stories as NumPy arrays; always as many, so that one program serves all splits and sizes."""
    drawn = tales.documents(jax.random.fold_in(key, attempt), _STORIES, genre="story", length=_LENGTH)
    found: tales.Documents = jax.tree.map(np.asarray, drawn)
    return found


def _classified(key: jax.Array, n: int, split: str) -> list[Row]:
    lexicon, allowed = cue_lexicon(split), _cue_ids(split)
    names = set(tables.NAMES.tolist())
    found: list[list[Row]] = [[] for _ in MOODS]
    for attempt in range(100):
        stories = _stories(key, attempt)
        ends, cues = np.asarray(stories.spans["mood"])[:, 1], np.asarray(stories.event_cues)
        for row in np.flatnonzero((ends > 0) & (ends < _LENGTH) & np.isin(cues, allowed)):
            tokens = np.asarray(stories.tokens)[row, : ends[row]]
            moods = {lexicon[word] for word in (tables.VOCABULARY[token] for token in tokens) if word in lexicon}
            if len(moods) == 1 and len(found[label := moods.pop()]) < n // len(MOODS):
                name = next(tables.VOCABULARY[token] for token in tokens if token in names)
                text = tales.tokenizer.decode(tokens)
                found[label].append((text, label, int(stories.templates[row]), int(cues[row]), name))
        if min(map(len, found)) == n // len(MOODS):
            return [row for rows in zip(*found, strict=True) for row in rows]
    raise RuntimeError(f"emotion_corpus: too few stories of some mood: {list(map(len, found))}.")


def _rewritten(key: jax.Array, n: int, split: str) -> list[Row]:
    frame_key, neutral_key, cue_key = streams(key, "frames neutral cues")
    frames = _frames(frame_key, n, split)
    between = _neutral_sentences(neutral_key, n)
    rows = []
    for i, draw in enumerate(np.asarray(jax.random.randint(cue_key, (n,), 0, 1 << 20))):
        opening, person, plot = frames[i]
        cue = _choose(int(draw), i % len(MOODS), split, ("event", "behaviour")[i // len(MOODS) % 2])
        text = f"{tales.tokenizer.decode(opening)} {between[i]} {_fill(cue, person)}"
        rows.append((text, i % len(MOODS), plot, cue, tables.VOCABULARY[person]))
    return rows


def _frames(key: jax.Array, n: int, split: str) -> list[tuple[np.ndarray, int, int]]:
    """Opening sentences about persons of this split, with the person and the plot of the story they open."""
    persons = set(_persons(split).tolist())
    opens, found = tales.STAGES.index("opening"), list[tuple[np.ndarray, int, int]]()
    for attempt in range(100):
        stories = _stories(key, attempt)
        for row in np.flatnonzero(np.asarray(stories.stages)[:, 1] == opens):
            opening = _first_sentence(np.asarray(stories.tokens)[row, 1:])
            named = [int(token) for token in opening if token in persons]
            if named and len(found) < n:
                found.append((opening, named[0], int(stories.templates[row])))
        if len(found) == n:
            return found
    raise RuntimeError(f"emotion_corpus: too few opening sentences, {len(found)} of {n}.")


def _synthesised(key: jax.Array, n: int, split: str) -> list[Row]:
    name_key, neutral_key, cue_key = streams(key, "names neutral cues")
    persons = _persons(split)[np.asarray(jax.random.randint(name_key, (n,), 0, tables.POOL_SIZE))]
    before = _neutral_sentences(neutral_key, n)
    rows = []
    for i, draws in enumerate(np.asarray(jax.random.randint(cue_key, (n, 2), 0, 1 << 20))):
        both = [_choose(int(draw), i % len(MOODS), split, kind) for draw, kind in zip(draws, _KINDS, strict=True)]
        told = " ".join(_fill(cue, int(persons[i])) for cue in both)
        rows.append((f"{before[i]} {told}", i % len(MOODS), -1, both[0], tables.VOCABULARY[persons[i]]))
    return rows


_KINDS = ("event", "behaviour")

_STORIES, _LENGTH = 512, 64
"""Stories drawn at once, and their tokens."""


def _persons(split: str) -> np.ndarray:
    start = tables.split_number(split) * tables.POOL_SIZE
    return tables.NAMES[start : start + tables.POOL_SIZE]


def _cue_ids(split: str, kind: str | None = None) -> list[int]:
    """Cues of a split, of all moods."""
    first, last = tables.SPLIT_STARTS[tables.split_number(split) :][:2]
    half = len(tables.CUES) // 2
    inside = [cue for cue in range(len(tables.CUES)) if first <= cue % tables.CUES_PER_MOOD < last]
    return [cue for cue in inside if kind is None or (cue >= half) == (kind == "behaviour")]


def _mood_of(cue: int) -> int:
    return cue // tables.CUES_PER_MOOD % len(MOODS)


def _choose(draw: int, mood: int, split: str, kind: str) -> int:
    options = [cue for cue in _cue_ids(split, kind) if _mood_of(cue) == mood]
    return options[draw % len(options)]


def _fill(cue: int, person: int) -> str:
    """A cue sentence about the person whose name has this token."""
    index = tables.NAMES.tolist().index(person)
    words = {"A": tables.VOCABULARY[person]} | {
        kind: tables.VOCABULARY[forms[index]] for kind, forms in tables.PRONOUNS.items()
    }
    return tales.tokenizer.decode(tales.tokenizer.encode(tables.CUES[cue].format_map(words)))


def _first_sentence(tokens: np.ndarray) -> np.ndarray:
    """Up to the first full stop; all tokens where there is none."""
    stops = np.flatnonzero(tokens == tales.tokenizer.id("."))
    return tokens[: int(stops[0]) + 1] if stops.size else tokens


def _neutral_sentences(key: jax.Array, n: int) -> list[str]:
    """Neutral sentences of stories, as they come."""
    neutral, found = tales.STAGES.index("filler"), list[str]()
    for attempt in range(100):
        stories = _stories(key, attempt)
        tokens, inside = np.asarray(stories.tokens), np.asarray(stories.stages) == neutral
        for row in np.flatnonzero(inside.any(1)):
            sentence = _first_sentence(tokens[row, np.argmax(inside[row]) :])
            if tales.VOCABULARY[sentence[-1]] == "." and len(found) < n:
                found.append(tales.tokenizer.decode(sentence))
        if len(found) == n:
            return found
    raise RuntimeError(f"emotion_corpus: too few neutral sentences, {len(found)} of {n}.")
