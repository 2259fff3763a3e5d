"""Two-candidate items of tales: a prompt whose next word is one of two, and which follows from the text alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mechlab.core.errors import unknown
from mechlab.core.rng import streams
from mechlab.data.worlds.tales import grammar, tables
from mechlab.data.worlds.tales.machine import Cast, draw_cast, draw_script, is_stage, write_one
from mechlab.data.worlds.tales.moods import MOODS
from mechlab.data.worlds.tales.tables import parse_plots, split_number

if TYPE_CHECKING:
    from jaxtyping import Array, Int

ITEM_KINDS = tuple(grammar.ITEMS)

MAX_DISTRACTORS = {"ioi": 16, "recall": 16, "mood": 6, "agree": 16}
"""Distractors of each kind at most: the longest items fit a model's context of 256 tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """N prompts, each to be continued by one of two words.

    Attributes:
      tokens: (N, T) int32, BOS first, right-padded; the answer would be the next token, at ``lengths``.
      lengths: (N,) int32.
      candidates: (N, 2) int32, the right word's token and the wrong one's.
      alternatives: (N, A) int32, A >= 4 further words of the same sort, for scores within a list of answers.
      orders: (N,) int32: 0 if the right answer belongs to the person told of first, 1 if to the second; half of each.
      truths: (N,) int32: 1 if the right answer is "yes", half of the items; only for "agree", otherwise -1.
      groups: (N,) int32, the sentence that decides (for "mood" the event's cue id): for grouped splits and bootstraps.
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    candidates: Int[Array, "N 2"]
    alternatives: Int[Array, "N A"]
    orders: Int[Array, " N"]
    truths: Int[Array, " N"]
    groups: Int[Array, " N"]


def items(key: jax.Array, kind: str, n: int, *, distractors: int = 0, pool: str = "train") -> Items:
    """Two-candidate items. The answer follows from the text alone.

    - "ioi": "Tom and Mia went to the park. Mia gave a ball to" -> Tom (wrong: Mia).
    - "recall": "Tom had a ball. Mia found a kite. Tom played with the" -> ball (wrong: kite).
    - "mood": "Tom won first prize in the race. Tom began to" -> laugh (wrong: cry). The wrong mood is that of the
      second person, who enters with the first distractor.
    - "agree": "Tom had a ball. Mia found a kite. Question: does Mia have the ball? Answer:" -> no (wrong: yes).

    Args:
      key: typed key.
      kind: one of ``ITEM_KINDS``.
      n: N, at least 1.
      distractors: sentences of the same sort about six further persons in turn, between the facts and the question,
        from 0 to ``MAX_DISTRACTORS[kind]``: the more, the harder.
      pool: "train", "dev" or "test", for names, things and mood cues.

    Returns:
      The items; orders (and for "agree" truths) are balanced to within one item (up to three for both together).

    Raises:
      ValueError: n < 1, or distractors out of range.
      UnknownName: a KeyError, for a kind or pool that does not exist.
    """
    if kind not in ITEM_KINDS:
        raise unknown("kind of item", kind, ITEM_KINDS)
    most = MAX_DISTRACTORS[kind]
    if n < 1 or not 0 <= distractors <= most:
        raise ValueError(f'items: wanted n >= 1 and for "{kind}" distractors 0..{most}, got {n} and {distractors}.')
    return _items(jax.random.split(key, n), kind=kind, distractors=distractors, split=split_number(pool))


_DECIDES = {"ioi": "pair", "recall": "fact", "mood": "event", "agree": "fact"}


def _item_plot(kind: str, distractors: int) -> str:
    told, distractor, asked = grammar.ITEMS[kind]
    # In "mood" only one person is told of at first.
    further = "BCDEFG" if kind == "mood" else "CDEFGH"
    persons = itertools.islice(itertools.cycle(further), distractors)
    told_of = [f"{step}@{person}" for person in persons for step in distractor.split()]
    return " ".join([told, *told_of, f"{asked}@R"])


@functools.partial(jax.jit, static_argnames=("kind", "distractors", "split"))
def _items(keys: jax.Array, *, kind: str, distractors: int, split: int) -> Items:
    plots = parse_plots([_item_plot(kind, distractors)])
    length = int(tables.longest(plots)[0])
    only_first = kind == "mood" and distractors == 0

    def one(key: jax.Array, index: jax.Array) -> Items:
        cast_key, script_key, word_key = streams(key, "cast script words")
        order = jnp.int32(0) if only_first else index % 2
        truth = index // 2 % 2
        cast = draw_cast(cast_key, pool=split, truth=truth)
        script = draw_script(script_key, tables.Plots(*(c[0] for c in plots)), cast, split, order)
        written = write_one(word_key, script, cast, length)
        # The last sentence ends with the answer and a full stop, which are taken off.
        end = written.inside.sum(dtype=jnp.int32) - 2
        wrong, alternatives = _other_answers(kind, cast, order, truth, split)
        person = 0 if kind == "ioi" else order
        decides = script.templates[jnp.argmax(is_stage(script.stages, _DECIDES[kind]) & (script.subjects == person))]
        return Items(
            tokens=jnp.where(jnp.arange(length) < end, written.tokens, 0)[: length - 2],
            lengths=end,
            candidates=jnp.stack([written.tokens[end], wrong]),
            alternatives=alternatives,
            orders=order,
            truths=truth if kind == "agree" else jnp.int32(-1),
            groups=decides - tables.CUE_START if kind == "mood" else decides,
        )

    return jax.vmap(one)(keys, jnp.arange(keys.shape[0], dtype=jnp.int32))


def _other_answers(
    kind: str, cast: Cast, order: jax.Array, truth: jax.Array, split: int
) -> tuple[jax.Array, jax.Array]:
    """The wrong candidate and the alternatives to both."""
    if kind == "agree":
        return jnp.asarray(tables.NO_YES)[1 - truth], jnp.asarray(tables.ids(grammar.AGREE_ALTERNATIVES))
    if kind == "mood":
        words = jnp.asarray(tables.REACTIONS)[cast.moods[: len(MOODS)], split]
    else:
        words = cast.values[tables.KINDS.index({"ioi": "name", "recall": "thing"}[kind])]
    return words[1 - order], words[2:]
