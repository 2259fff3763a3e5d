"""Drawing and writing documents of tales, in pure JAX: everything here is about one document or one row; ``vmap`` it.

A document is drawn in three steps. ``draw_cast``: the persons and what is true of them. ``draw_script``: which sentence
stands at which step of the plot, and whom it is about. ``write``: the tokens. Writing is done from the output: for
every position the sentence that covers it is looked up in the running sum of lengths, so texts of all lengths cost the
same and several documents are packed by writing their scripts one after another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.data.worlds.tales import tables
from mechlab.data.worlds.tales.moods import MOODS
from mechlab.data.worlds.tales.tables import ENTITIES, KINDS, Plots

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int


class Cast(NamedTuple):
    """The persons of a document, E of them; the first is the one it is mostly about.

    Attributes:
      values: (K, E) int32, the token of every kind (``KINDS``) for every person.
      moods: (E,) int32, 0..6; the first seven differ.
      truth: (E,) int32, 1 where the thing asked for (kind "asked") is the person's own.
      period: of a list, 2..8.
    """

    values: Int[Array, "K E"]
    moods: Int[Array, " E"]
    truth: Int[Array, " E"]
    period: Int[Array, ""]


class Script(NamedTuple):
    """The steps of a document, S of them.

    Attributes:
      templates: (S,) int32; 0, the empty sentence, where a step is left out.
      subjects: (S,) int32, whom the sentence is about, 0..E-1.
      stages: (S,) int32, the step's pool of sentences.
      places: (S,) int32, place in a repeated group.
    """

    templates: Int[Array, " S"]
    subjects: Int[Array, " S"]
    stages: Int[Array, " S"]
    places: Int[Array, " S"]


class Written(NamedTuple):
    """Tokens of a row and where each came from; all (T,), right-padded.

    Attributes:
      tokens: int32.
      inside: bool, false for padding.
      step: int32, step of the script (of all scripts of the row, counted through).
      kind: int32, the kind of the slot that was filled, -1 for a word of the sentence itself.
      person: int32, whose value it is, -1 likewise.
    """

    tokens: Int[Array, " T"]
    inside: Bool[Array, " T"]
    step: Int[Array, " T"]
    kind: Int[Array, " T"]
    person: Int[Array, " T"]


def draw_cast(
    key: jax.Array, pool: int | None = None, mood: jax.Array | None = None, truth: jax.Array | None = None
) -> Cast:
    """Persons with different names, things, places, colours, goods and moods.

    Args:
      key: typed key.
      pool: 0..2, names and things from this pool only; from all by default.
      mood: the first person's; random by default.
      truth: of everybody's "asked"; random by default.
    """
    allowed = slice(None) if pool is None else slice(pool * tables.POOL_SIZE, (pool + 1) * tables.POOL_SIZE)
    names, all_things = np.arange(len(tables.NAMES))[allowed], tables.THINGS[allowed]
    places, feelings = np.arange(len(tables.PLACES)), np.arange(len(MOODS))
    drawn_from = (names, all_things, places, tables.COLOURS, tables.GOODS, feelings)
    *of_each, number, true, period = _draws(key, *map(len, drawn_from), 2 * ENTITIES, ENTITIES, 1)
    who, things, where, colours, goods = map(_different, of_each[:-1], drawn_from[:-1])
    moods = _different(of_each[-1], feelings, len(feelings))[jnp.arange(ENTITIES) % len(feelings)]
    if mood is not None:
        moods = (moods - moods[0] + mood) % len(MOODS)
    many, more = _below(number, 4).reshape(2, ENTITIES) + jnp.asarray([[2], [1]])
    truths = _below(true, 2) if truth is None else jnp.full((ENTITIES,), truth)
    values = {kind: jnp.asarray(words)[who] for kind, words in tables.PRONOUNS.items()} | {
        "name": jnp.asarray(tables.NAMES)[who],
        "thing": things,
        "place": jnp.asarray(tables.PLACES)[where],
        "in": jnp.asarray(tables.PREPOSITIONS)[where],
        "colour": colours,
        "goods": goods,
        "mood": jnp.asarray(tables.LABELS)[moods],
        "many": jnp.asarray(tables.NUMBERS)[many - 1],
        "more": jnp.asarray(tables.NUMBERS)[more - 1],
        "sum": jnp.asarray(tables.NUMBERS)[many + more - 1],
        # A false question is about the thing of the neighbour: first and second person, third and fourth, ...
        "asked": jnp.where(truths == 1, things, things[jnp.arange(ENTITIES) ^ 1]),
        "yes": jnp.asarray(tables.NO_YES)[truths],
    }
    stacked = jnp.stack([values[kind] for kind in KINDS]).astype(jnp.int32)
    return Cast(stacked, moods, truths, 2 + _below(period, tables.MAX_PERIOD - 1)[0])


def draw_script(
    key: jax.Array, plot: Plots, cast: Cast, split: int | None = None, order: jax.Array | None = None
) -> Script:
    """Sentences for the steps of one plot.

    Args:
      key: typed key.
      plot: one row of a table, leaves (S,).
      cast: its persons.
      split: 0..2, mood cues of this split only; of all by default.
      order: the person whom ``@R`` means, 0 or 1; random by default.
    """
    stage, subject, first, place, low, high = (jnp.asarray(column) for column in plot)
    steps = stage.shape[0]
    *of_step, shuffle, either = _draws(key, *(steps,) * 5, tables.POOLS["filler"].size, 1)
    sentence, cue, react, repeats, among = of_step
    counts = low + _below(repeats, high - low + 1)
    present = place < counts[first]

    order = _below(either, 2)[0] if order is None else order
    subjects = jnp.where(subject == tables.EITHER, order, subject)
    subjects = jnp.where(subjects == tables.OTHER, 1 - order, subjects)
    subjects = jnp.where(subjects == tables.AROUND, place % cast.period, subjects)
    among_first = jnp.maximum(subject - tables.AROUND, 1)
    subjects = jnp.where(subject > tables.AROUND, _below(among, among_first), subjects)

    pools = [tables.POOLS[stage] for stage in tables.STAGES]
    start = jnp.asarray([pool.start for pool in pools])[stage]
    size = jnp.asarray([pool.size for pool in pools])[stage]
    cue_low, cue_high = (0, tables.CUES_PER_MOOD) if split is None else tables.SPLIT_STARTS[split : split + 2]
    firsts = jnp.asarray(tables.SPLIT_STARTS[:3] if split is None else (cue_low,))

    choice = _below(sentence, size)
    of_mood = cast.moods[subjects] * tables.CUES_PER_MOOD
    cued = of_mood + cue_low + _below(cue, cue_high - cue_low)
    reacted = of_mood + firsts[_below(react, len(firsts))]
    choice = jnp.where(is_stage(stage, "event", "behaviour"), cued, choice)
    choice = jnp.where(is_stage(stage, "react"), reacted, choice)
    choice = jnp.where(is_stage(stage, "filler"), _filler_order(shuffle, steps), choice)
    return Script(jnp.where(present, start + choice, 0), subjects, stage, place)


def write(key: jax.Array, scripts: Script, casts: Cast, length: int) -> Written:
    """The tokens of D documents one after another, cut or padded to ``length``.

    Args:
      key: typed key, for the words that are drawn anew.
      scripts, casts: leaves with a leading axis D.
      length: T.
    """
    per_document = scripts.templates.shape[1]
    templates, subjects = scripts.templates.reshape(-1), scripts.subjects.reshape(-1)
    ends = jnp.cumsum(jnp.asarray(tables.LENGTH)[templates])
    # One position more than is kept: "a" must know the word that follows.
    at = jnp.arange(length + 1)
    step = jnp.searchsorted(ends, at, side="right", method="compare_all")
    inside = at < ends[-1]
    step = jnp.minimum(step, templates.shape[0] - 1)
    template = templates[step]
    offset = at - ends[step] + jnp.asarray(tables.LENGTH)[template]
    code = jnp.asarray(tables.CODES)[jnp.where(inside, jnp.asarray(tables.START)[template] + offset, 0)]

    is_slot = (code >= tables.V) & (code < tables.CLASS_CODES) & inside
    slot = jnp.clip(code - tables.V, 0, 2 * len(KINDS) - 1)
    subject = subjects[step]
    person = jnp.where(slot % 2 == 0, subject, _other(subject))
    filled = casts.values[step // per_document, slot // 2, person]

    group = jnp.maximum(code - tables.CLASS_CODES, 0)
    size = jnp.asarray(tables.CLASS_SIZE)[group]
    drawn = jnp.asarray(tables.CLASS_WORDS)[
        jnp.asarray(tables.CLASS_START)[group] + _below(jax.random.bits(key, at.shape), size)
    ]

    tokens = jnp.where(code < tables.V, code, jnp.where(is_slot, filled, drawn))
    tokens = jnp.where(inside, tokens, 0).astype(jnp.int32)
    vowel_next = jnp.asarray(tables.STARTS_WITH_VOWEL)[jnp.roll(tokens, -1)]
    tokens = jnp.where((tokens == tables.A) & vowel_next, tables.AN, tokens)
    nothing = jnp.int32(-1)
    written = (tokens, inside, step, jnp.where(is_slot, slot // 2, nothing), jnp.where(is_slot, person, nothing))
    return Written(*(leaf[:length] for leaf in written))


def write_one(key: jax.Array, script: Script, cast: Cast, length: int) -> Written:
    """The tokens of one document, as ``write``."""
    scripts, casts = jax.tree.map(lambda leaf: leaf[None], (script, cast))
    return write(key, scripts, casts, length)


def _other(person: jax.Array) -> jax.Array:
    """Whom ``{B}`` means in a sentence about ``person``: the first one, and for the first one the second."""
    return jnp.where(person == 0, 1, 0)


def is_stage(stage: jax.Array, *names: str) -> jax.Array:
    """Where a stage is one of those named."""
    return jnp.isin(stage, jnp.asarray([tables.STAGES.index(name) for name in names]))


def _draws(key: jax.Array, *sizes: int) -> list[jax.Array]:
    """Random bits (size,) uint32 for every purpose, from one call: a dozen calls would compile a dozen times longer."""
    return jnp.split(jax.random.bits(key, (sum(sizes),), jnp.uint32), np.cumsum(sizes)[:-1])


def _below(bits: jax.Array, limit: jax.Array | int) -> jax.Array:
    """Integers 0 .. limit-1, by whole-number arithmetic: the same on every platform (bias < 1e-6 below 4096)."""
    return (bits % jnp.asarray(limit, jnp.uint32)).astype(jnp.int32)


def _different(bits: jax.Array, values: np.ndarray, n: int = ENTITIES) -> jax.Array:
    """n of the values, no two at the same place."""
    # 24 bits are exact in float32, for which top_k is fastest; of equal ones the first comes first everywhere.
    order = jax.lax.top_k((bits >> 8).astype(jnp.float32), n)[1]
    return jnp.asarray(values)[order]


def _filler_order(bits: jax.Array, n: int) -> jax.Array:
    """n neutral sentences by number, none twice (n is at most their number)."""
    return _different(bits, np.arange(bits.shape[0], dtype=np.int32), n)
