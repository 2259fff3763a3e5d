"""Texts of tales for experiments on moods: texts of one mood, neutral filler, instructions.

Names and things of an experiment's train, dev and test parts are disjoint (pools), and so are its mood cues (splits).
A model of this world was trained on all of them, so that none is an unknown word or an unheard event to it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mechlab.core.errors import unknown
from mechlab.core.rng import stream, streams
from mechlab.data.worlds.tales import grammar, tables
from mechlab.data.worlds.tales.machine import Cast, Script, draw_cast, draw_script, write, write_one
from mechlab.data.worlds.tales.moods import LABELS, MOODS
from mechlab.data.worlds.tales.tables import parse_plots, split_number

if TYPE_CHECKING:
    from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoodTexts:
    """N short texts of one mood each, without a label word.

    Attributes:
      tokens: (N, T) int32, BOS first, right-padded; the text ends with the cue's full stop.
      lengths: (N,) int32.
      labels: (N,) int32, index into ``MOODS``; equally many of each.
      cues: (N,) int32, index into ``CUES``.
      frames: (N,) int32, the opening sentence.
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    labels: Int[Array, " N"]
    cues: Int[Array, " N"]
    frames: Int[Array, " N"]


def mood_texts(key: jax.Array, n: int, *, split: str = "train", stage: str = "event") -> MoodTexts:
    """Texts for probes of mood: an opening sentence and an event, or a behaviour.

    Args:
      key: typed key.
      n: N, at least 1.
      split: "train", "dev" or "test": cues (8, 2 and 3 per mood and stage), names and things of this part only.
      stage: "event" (what happens to somebody) or "behaviour" (what somebody does who feels so).

    Returns:
      The texts, moods in turn.

    Raises:
      ValueError: n < 1.
      UnknownName: a KeyError, for a split or stage that does not exist.
    """
    if n < 1:
        raise ValueError(f"mood_texts: wanted n >= 1, got {n}.")
    if stage not in ("event", "behaviour"):
        raise unknown("stage", stage, ("event", "behaviour"))
    return _mood_texts(jax.random.split(key, n), stage=stage, split=split_number(split))


def filler(key: jax.Array, n: int, length: int) -> Int[Array, "N M"]:
    """Neutral sentences without persons, cue words or label words, to be put after a text.

    Args:
      key: typed key.
      n: N.
      length: M, tokens per row; the last sentence is cut off. All sentences come once before one comes again.

    Returns:
      (N, M) int32, without BOS.

    Raises:
      ValueError: n < 1 or length < 1.
    """
    if n < 1 or length < 1:
        raise ValueError(f"filler: wanted n >= 1 and length >= 1, got {n} and {length}.")
    return _filler(jax.random.split(key, n), length=length)


def instructions() -> dict[str, tuple[str, ...]]:
    """Sentences that may stand before a tale: three for every mood, and three under "flat" that ask for none.

    The same ones open documents of the genre "instruction", whose tale then has that mood (any mood after a flat one).

    >>> instructions()["fear"][0]
    'Tell a tale as if you were afraid.'
    """
    tokenizer = tables.tokenizer

    def written(pool: str, label: str = "") -> tuple[str, ...]:
        lines = [line.replace("{mood}", label) for line in tables.lines(grammar.SENTENCES[pool])]
        return tuple(tokenizer.decode(tokenizer.encode(line)) for line in lines)

    named = {mood: written("instruction", label) for mood, label in zip(MOODS, LABELS, strict=True)}
    return named | {"flat": written("instruction_flat")}


@functools.partial(jax.jit, static_argnames=("stage", "split"))
def _mood_texts(keys: jax.Array, *, stage: str, split: int) -> MoodTexts:
    plots = parse_plots([f"opening {stage}"])
    length = int(tables.longest(plots)[0])

    def one(key: jax.Array, index: jax.Array) -> MoodTexts:
        cast_key, script_key, word_key = streams(key, "cast script words")
        mood = index % len(MOODS)
        cast = draw_cast(cast_key, pool=split, mood=mood)
        script = draw_script(script_key, tables.Plots(*(c[0] for c in plots)), cast, split)
        written = write_one(word_key, script, cast, length)
        return MoodTexts(
            tokens=written.tokens,
            lengths=written.inside.sum(dtype=jnp.int32),
            labels=mood,
            cues=script.templates[2] - tables.CUE_START,
            frames=script.templates[1] - tables.POOLS["opening"].start,
        )

    return jax.vmap(one)(keys, jnp.arange(keys.shape[0], dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("length",))
def _filler(keys: jax.Array, *, length: int) -> jax.Array:
    pool = tables.POOLS["filler"]
    rounds = -(-length // int(tables.LENGTH[pool.start : pool.start + pool.size].sum()))
    # Every round brings each sentence once.
    plots = parse_plots([f"filler*{pool.size}-{pool.size}"])
    plot = tables.Plots(*(column[0, 1:] for column in plots))
    plot = plot._replace(first=plot.first - 1)

    def one(key: jax.Array) -> jax.Array:
        def script(key: jax.Array) -> tuple[Script, Cast]:
            cast_key, script_key = streams(key, "cast script")
            cast = draw_cast(cast_key)
            return draw_script(script_key, plot, cast), cast

        round_keys = jax.random.split(stream(key, "rounds"), rounds)
        return write(stream(key, "words"), *jax.vmap(script)(round_keys), length).tokens

    return jax.vmap(one)(keys)
