"""The grammar of tales as integer arrays: every sentence a row of codes, every plot a row of steps.

A code below V is a word. V + 2 kind + role is a slot: a value of kind ``KINDS[kind]`` of the person whom the sentence
is about (role 0) or of the other one (role 1). Codes from ``CLASS_CODES`` on are word classes, drawn anew.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import numpy as np

from mechlab.core.errors import unknown
from mechlab.data.text import BOS, PAD, WordTokenizer
from mechlab.data.worlds.tales import grammar, moods

ENTITIES = 8
"""Persons per document at most, with a thing, a place, a mood ... each."""

MAX_PERIOD = ENTITIES

KINDS = tuple("name he him his girl thing place in colour goods mood many more sum asked yes".split())

SPLITS = ("train", "dev", "test")

GENRES = tuple(grammar.GENRE_SHARES)

_NAMED_SLOTS = {"A": ("name", 0), "B": ("name", 1)}
_PRONOUNS = {"he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his"), "girl": ("girl", "boy")}


def lines(text: str) -> list[str]:
    """The lines of a text of the grammar."""
    return [line.strip() for line in text.strip().split("\n")]


def _cues() -> list[str]:
    cues = []
    for table in (moods.EVENTS, moods.BEHAVIOURS):
        for mood in moods.MOODS:
            written = lines(table[mood])
            if len(written) != sum(moods.SPLIT_SIZES):
                raise ValueError(f"tales: {mood} has {len(written)} cues, wanted {sum(moods.SPLIT_SIZES)}.")
            cues += written
    return cues


CUES = tuple(_cues())
"""Every event cue, by mood, then every behaviour cue, by mood; a cue id is a place in this tuple."""

CUES_PER_MOOD = sum(moods.SPLIT_SIZES)
SPLIT_STARTS = tuple(int(start) for start in np.cumsum((0, *moods.SPLIT_SIZES)))


def split_number(name: str) -> int:
    """The number of a split (or pool) by name."""
    if name not in SPLITS:
        raise unknown("split", name, SPLITS)
    return SPLITS.index(name)


class Pool(NamedTuple):
    """Sentences that may stand in for each other: ``size`` templates from ``start`` on."""

    start: int
    size: int


def _collect() -> tuple[list[str], dict[str, Pool]]:
    """All sentences, each once, and where each pool of them lies; 0 is the empty sentence."""
    half = len(CUES) // 2
    pools = {"bos": [BOS], "event": list(CUES[:half]), "behaviour": list(CUES[half:]), "filler": lines(grammar.FILLER)}
    pools |= {name: lines(text) for name, text in grammar.SENTENCES.items()}
    templates, places = [""], {}
    for name, sentences in pools.items():
        places[name] = Pool(len(templates), len(sentences))
        templates += sentences
    # Only the behaviours "began to ...": they are no sentences of their own.
    places["react"] = places["behaviour"]
    return templates, places


TEMPLATES, POOLS = _collect()
CUE_START = POOLS["event"].start
STAGES = tuple(POOLS)
"""The pools by number: what a sentence does in its document."""


def _vocabulary() -> tuple[str, ...]:
    words = {"an", "yes", "no", *moods.LABELS}
    lists = (*grammar.GIRLS, *grammar.BOYS, *grammar.THINGS, *grammar.PLACES.values(), grammar.NUMBERS)
    words.update(*(text.split() for text in (*lists, *grammar.CLASSES.values())))
    words.update(grammar.PLACES, *_PRONOUNS.values())
    words.update(piece for line in TEMPLATES for piece in line.split() if piece[0] not in "{[")
    return PAD, BOS, *sorted(words - {BOS})


VOCABULARY = _vocabulary()
_PROPER = " ".join((*grammar.GIRLS, *grammar.BOYS, grammar.CLASSES["weekday"]))
tokenizer = WordTokenizer(words=VOCABULARY, proper=frozenset(_PROPER.split()))

V = len(VOCABULARY)
BOS_ID = tokenizer.id(BOS)
CLASS_CODES = V + 2 * len(KINDS)


def ids(words: str | tuple[str, ...]) -> np.ndarray:
    """Token ids of blank-separated words, or of a tuple of them, (n,) int32."""
    listed = words.split() if isinstance(words, str) else words
    return np.asarray([tokenizer.id(word) for word in listed], np.int32)


def _code(piece: str) -> int:
    if piece[0] == "[":
        return CLASS_CODES + list(grammar.CLASSES).index(piece[1:-1])
    if piece[0] == "{":
        name = piece[1:-1]
        kind, role = _NAMED_SLOTS.get(name, (name.removesuffix("2"), int(name.endswith("2"))))
        return V + 2 * KINDS.index(kind) + role
    return tokenizer.id(piece)


# Sentences end to end: the codes of template i are CODES[START[i] : START[i] + LENGTH[i]].
_coded = [[_code(piece) for piece in line.split()] for line in TEMPLATES]
LENGTH = np.asarray([len(row) for row in _coded], np.int32)
START = np.asarray(np.cumsum(LENGTH) - LENGTH, np.int32)
CODES = np.asarray([code for row in _coded for code in row], np.int32)

_classes = [ids(words) for words in grammar.CLASSES.values()]
CLASS_SIZE = np.asarray([len(members) for members in _classes], np.int32)
CLASS_START = np.asarray(np.cumsum(CLASS_SIZE) - CLASS_SIZE, np.int32)
CLASS_WORDS = np.concatenate(_classes)

# Names in the order of the pools; girls first in each.
_pools_of_names = [ids(girls + " " + boys) for girls, boys in zip(grammar.GIRLS, grammar.BOYS, strict=True)]
NAMES = np.concatenate(_pools_of_names)
POOL_SIZE = len(_pools_of_names[0])
_girls = set(ids(" ".join(grammar.GIRLS)).tolist())
_is_boy = np.asarray([int(name not in _girls) for name in NAMES.tolist()])
PRONOUNS = {kind: ids(words)[_is_boy] for kind, words in _PRONOUNS.items()}
THINGS = np.concatenate([ids(things) for things in grammar.THINGS])
PLACES = np.concatenate([ids(places) for places in grammar.PLACES.values()])
PREPOSITIONS = np.concatenate([[tokenizer.id(word)] * len(p.split()) for word, p in grammar.PLACES.items()])
COLOURS, GOODS, NUMBERS = ids(grammar.CLASSES["colour"]), ids(grammar.CLASSES["goods"]), ids(grammar.NUMBERS)
LABELS = ids(moods.LABELS)
NO_YES = ids("no yes")
A, AN = ids("a an")
STARTS_WITH_VOWEL = np.asarray([word[0] in "aeiou" for word in VOCABULARY])


def _reactions() -> np.ndarray:
    """(7, 3): the last word of the first behaviour of each mood in each split."""
    first = len(CUES) // 2 + CUES_PER_MOOD * np.arange(len(moods.MOODS))[:, None] + np.asarray(SPLIT_STARTS[:3])
    return np.vectorize(lambda cue: tokenizer.id(CUES[cue].split()[-2]))(first).astype(np.int32)


REACTIONS = _reactions()

EITHER, OTHER, AROUND = ENTITIES, ENTITIES + 1, ENTITIES + 2
"""Subjects that are no fixed person: ``@R``, ``@S``, ``@%``. AROUND + n is ``@n``, one of the first n."""


class Plots(NamedTuple):
    """Plots as arrays (P, S), one column per possible step.

    Step s stands in the text if ``place[s] < low[s] + draw``, the draw (0..high - low) being that of step ``first[s]``.

    Attributes:
      stage: which pool of sentences; the empty steps at the end have ``low = high = 0``.
      subject: 0..7, or EITHER, OTHER, AROUND, or AROUND + n.
      first, place: first step of a repeated group, and the place in it.
      low, high: how often the group is repeated.
    """

    stage: np.ndarray | jax.Array
    subject: np.ndarray | jax.Array
    first: np.ndarray | jax.Array
    place: np.ndarray | jax.Array
    low: np.ndarray | jax.Array
    high: np.ndarray | jax.Array


_TIMES = r"(?P<maybe>\?)|\*(?P<low>\d+)-(?P<high>\d+)"
_STEP = re.compile(rf"(?P<bound>&)?(?P<pool>\w+)(@(?P<subject>[A-HRS%2-8]))?({_TIMES})?")
_SUBJECTS = {letter: index for index, letter in enumerate("ABCDEFGHRS%12345678")}


def parse_plots(texts: list[str]) -> Plots:
    """Plots from their text, each ``"step step ..."``; BOS is put in front of each."""
    rows = [_parse_plot(f"bos {text}") for text in texts]
    width = max(len(row) for row in rows)
    never: list[list[tuple[int, ...]]] = [[(0, 0, step, 0, 0, 0) for step in range(len(row), width)] for row in rows]
    table = np.asarray([row + rest for row, rest in zip(rows, never, strict=True)], np.int32)
    return Plots(*np.moveaxis(table, -1, 0))


def _parse_plot(line: str) -> list[tuple[int, ...]]:
    steps: list[tuple[int, ...]] = []
    for text in line.split():
        found = _STEP.fullmatch(text)
        if found is None or found["pool"] not in POOLS:
            raise ValueError(f'tales: "{text}" is no step of a plot ("{line}").')
        low, high = (0, 1) if found["maybe"] else (int(found["low"] or 1), int(found["high"] or 1))
        stage, subject = STAGES.index(found["pool"]), _SUBJECTS[found["subject"] or "A"]
        if found["bound"]:
            steps.append((stage, subject, *steps[-1][2:]))
        else:
            first = len(steps)
            steps += [(stage, subject, first, index, low, high) for index in range(high)]
    return steps


def longest(plots: Plots) -> np.ndarray:
    """Tokens that each plot can have at most, (P,). A neutral sentence does not come twice."""
    lengths = [LENGTH[pool.start : pool.start + pool.size] for pool in (POOLS[stage] for stage in STAGES)]
    filler = STAGES.index("filler")
    others = np.where(plots.stage == filler, 0, np.asarray([pool.max() for pool in lengths])[plots.stage])
    neutral = np.cumsum([0, *sorted(lengths[filler], reverse=True)])[(plots.stage == filler).sum(1)]
    return (others * (plots.high > 0)).sum(1) + neutral


def _genres() -> tuple[Plots, dict[str, np.ndarray]]:
    plots: list[str] = []
    of_genre = {}
    for genre, text in grammar.PLOTS.items():
        weighted = [line.split(maxsplit=1) for line in lines(text)]
        of_genre[genre] = np.repeat(len(plots) + np.arange(len(weighted)), [int(weight) for weight, _ in weighted])
        plots += [plot for _, plot in weighted]
    return parse_plots(plots), of_genre


PLOTS, PLOTS_OF_GENRE = _genres()
"""All plots, and for every genre the numbers of its plots, each as often as its share says."""

GENRE_OF_PLOT = np.asarray(
    [next(g for g, genre in enumerate(GENRES) if plot in PLOTS_OF_GENRE[genre]) for plot in range(len(PLOTS.stage))],
    np.int32,
)
