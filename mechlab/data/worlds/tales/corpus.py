"""Documents of tales: rows for training a language model, and documents one by one with what is true in them.

In a training row documents follow each other, each with its own BOS, and attention is not cut between them: a model
learns that what stands before the last BOS does not matter. The last document of a row is cut off.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.errors import unknown
from mechlab.core.rng import stream, streams
from mechlab.data.worlds.tales import tables
from mechlab.data.worlds.tales.grammar import GENRE_SHARES
from mechlab.data.worlds.tales.machine import Cast, Script, Written, draw_cast, draw_script, is_stage, write, write_one
from mechlab.data.worlds.tales.tables import GENRES, STAGES, VOCABULARY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

CONTEXT = 256
"""Tokens per training row; no document is longer."""

# A document has about 60 tokens on average; of short ones this many fill a row (a rest would be padded, unmasked).
_TOKENS_PER_DOCUMENT = 30

# Latents that are the value of a slot: its kind and whose it is.
_SLOTS = {
    "who": ("name", 0),
    "other": ("name", 1),
    "where": ("place", 0),
    "thing": ("thing", 0),
    "preference": ("colour", 0),
    "goods": ("goods", 0),
    "count": ("sum", 0),
}

LATENTS = (*_SLOTS, "mood", "behaviour", "label", "truth", "period")
"""What is known of a document. "label" is the mood where it is named; the first seven are token ids but "count"."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """N documents and what is true in them.

    A latent that a document does not mention is -1, and so are both ends of its span.

    Attributes:
      tokens: (N, T) int32, BOS first, right-padded.
      lengths: (N,) int32.
      genres: (N,) int32, index into ``GENRES``.
      templates: (N,) int32, the plot.
      event_cues, behaviour_cues: (N,) int32, index into ``CUES`` of the first event and of the first behaviour of the
        first person; -1 where there is none.
      stages: (N, T) int32, index into ``STAGES``: what the sentence of a token does in the text; -1 for padding.
      latents: name -> (N,) int32. who, other, where, thing, preference (a colour), goods: token ids; count: a number;
        mood, behaviour, label: index into ``MOODS``; truth: 0 or 1, of the first yes-or-no question; period: of a list.
      spans: name -> (N, 2) int32, first token and one past the last: of the first mention; for mood and behaviour of
        the sentence; for truth of the answer; for period of the first round of the list.
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    genres: Int[Array, " N"]
    templates: Int[Array, " N"]
    event_cues: Int[Array, " N"]
    behaviour_cues: Int[Array, " N"]
    stages: Int[Array, "N T"]
    latents: dict[str, Int[Array, " N"]]
    spans: dict[str, Int[Array, "N 2"]]


def sample_batch(
    key: jax.Array, batch: int, *, length: int = CONTEXT, genres: Sequence[str] | None = None
) -> dict[str, Int[Array, "B T"] | Bool[Array, "B T"]]:
    """A batch for training a language model: rows of whole documents, the last one cut off.

    Args:
      key: typed key. Row b depends on the b-th key of ``jax.random.split(key, batch)`` only.
      batch: B.
      length: T, at least 2.
      genres: some of ``GENRES``, in the shares they have among all of them; all by default. One genre alone is a
        domain of its own, for shifts of calibration data.

    Returns:
      ``{"tokens": (B, T) int32, "mask": (B, T) bool, "fixed": (B, T) bool}``. ``mask[b, t]`` is true where the
      prediction made at position t (of token t + 1) counts: everywhere but at the last position and in the padding of a
      row that was not filled. ``fixed[b, t]`` is true where token t + 1 follows from what the document has told:
      values told before, answers, sums, the named mood and what somebody in that mood does.

    Raises:
      ValueError: batch < 1 or length < 2.
      UnknownName: a KeyError, for a genre that does not exist.
    """
    if batch < 1 or length < 2:
        raise ValueError(f"sample_batch: wanted batch >= 1 and length >= 2, got batch={batch} and length={length}.")
    wheel = _wheel(GENRES if genres is None else tuple(genres))
    rows, fixed = jax.vmap(lambda row_key: _row(row_key, wheel, length))(jax.random.split(key, batch))
    of_next = {"mask": rows.inside, "fixed": fixed}
    return {"tokens": rows.tokens} | {name: jnp.pad(at[:, 1:], ((0, 0), (0, 1))) for name, at in of_next.items()}


def documents(key: jax.Array, n: int, *, genre: str | None = None, length: int = CONTEXT) -> Documents:
    """Documents one by one, with their latents.

    Args:
      key: typed key. Document i depends on the i-th key of ``jax.random.split(key, n)`` only.
      n: N, at least 1.
      genre: one of ``GENRES``; all of them in their shares by default.
      length: T; longer documents are cut, which never happens at the default.

    Returns:
      The documents.

    Raises:
      ValueError: n < 1.
      UnknownName: a KeyError, for a genre that does not exist.
    """
    if n < 1:
        raise ValueError(f"documents: wanted n >= 1, got {n}.")
    return _documents(jax.random.split(key, n), genres=GENRES if genre is None else (genre,), length=length)


def digest() -> str:
    """A short hash of the vocabulary and of some text: another version of this world has another one.

    Weights belong to the digest they were trained with. It is the same on every platform.
    """
    text = np.asarray(sample_batch(jax.random.key(0), 64)["tokens"], "<i4")
    return hashlib.sha256(" ".join(VOCABULARY).encode() + text.tobytes()).hexdigest()[:16]


def _wheel(genres: tuple[str, ...]) -> np.ndarray:
    """Plot numbers, each as often as it should come."""
    for genre in genres:
        if genre not in GENRES:
            raise unknown("genre", genre, GENRES)
    if not genres:
        raise ValueError("genres: wanted at least one.")
    plots = {genre: tables.PLOTS_OF_GENRE[genre] for genre in genres}
    repeats = {genre: round(100 * GENRE_SHARES[genre] / len(plots[genre])) for genre in genres}
    return np.concatenate([np.repeat(plots[genre], repeats[genre]) for genre in genres])


def _draw(key: jax.Array, wheel: np.ndarray) -> tuple[jax.Array, Cast, Script]:
    plot_key, cast_key, script_key = streams(key, "plot cast script")
    plot = jnp.asarray(wheel)[jax.random.randint(plot_key, (), 0, len(wheel))]
    cast = draw_cast(cast_key)
    chosen = tables.Plots(*(jnp.asarray(column)[plot] for column in tables.PLOTS))
    return plot, cast, draw_script(script_key, chosen, cast)


def _row(key: jax.Array, wheel: np.ndarray, length: int) -> tuple[Written, jax.Array]:
    """A row of documents, and where its tokens follow from what the document told before, (T,) bool."""
    keys = jax.random.split(stream(key, "documents"), -(-length // _TOKENS_PER_DOCUMENT))
    _, casts, scripts = jax.vmap(lambda k: _draw(k, wheel))(keys)
    written = write(stream(key, "words"), scripts, casts, length)
    is_slot, stages = written.kind >= 0, scripts.stages.reshape(-1)[written.step]
    document = jnp.cumsum(written.tokens == tables.BOS_ID)
    same = (written.tokens[:, None] == written.tokens) & (document[:, None] == document) & is_slot
    # The first slot of a sentence says whom or what it is about, which follows from the text in lists only.
    latest = jax.lax.cummax(jnp.where(is_slot, written.step, -1))
    opens = (jnp.roll(latest, 1).at[0].set(-1) < written.step) & ~is_stage(stages, *_LISTS)
    told = is_slot & jnp.tril(same, -1).any(-1) & ~opens & (written.kind != tables.KINDS.index("asked"))
    worked_out = jnp.isin(written.kind, jnp.asarray([tables.KINDS.index(kind) for kind in ("sum", "mood", "yes")]))
    done_in_mood = is_stage(stages, "behaviour", "react")
    return written, (told | worked_out | (done_in_mood & ~opens)) & written.inside


@functools.partial(jax.jit, static_argnames=("genres", "length"))
def _documents(keys: jax.Array, *, genres: tuple[str, ...], length: int) -> Documents:
    wheel = _wheel(genres)

    def one(key: jax.Array) -> Documents:
        plot, cast, script = _draw(stream(key, "document"), wheel)
        written = write_one(stream(key, "words"), script, cast, length)
        return _describe(plot, cast, script, written)

    return jax.vmap(one)(keys)


def _describe(plot: jax.Array, cast: Cast, script: Script, written: Written) -> Documents:
    first_person = script.subjects[written.step] == 0
    stages = jnp.where(written.inside, script.stages[written.step], -1)

    def is_slot(kind: str, person: int | None = None) -> jax.Array:
        of_person = True if person is None else written.person == person
        return (written.kind == tables.KINDS.index(kind)) & of_person

    def stage(*names: str) -> jax.Array:
        return is_stage(stages, *names) & first_person

    def whole_step(where: jax.Array) -> jax.Array:
        """The step of the first true position."""
        return where & (written.step == written.step[jnp.argmax(where)])

    def one_word(where: jax.Array) -> jax.Array:
        return where & (jnp.arange(where.shape[0]) == jnp.argmax(where))

    in_list = is_stage(stages, *_LISTS)
    event, behaviour = whole_step(stage("event")), whole_step(stage("behaviour", "react"))
    where = {name: one_word(is_slot(*slot)) for name, slot in _SLOTS.items()} | {
        "mood": event,
        "behaviour": behaviour,
        "label": one_word(is_slot("mood", 0)),
        "truth": one_word(is_slot("yes")),
        "period": in_list & (script.places[written.step] < cast.period),
    }
    first_answer = written.person[jnp.argmax(where["truth"])]
    values = {name: cast.values[tables.KINDS.index(kind), person] for name, (kind, person) in _SLOTS.items()} | {
        "count": _number(cast.values[tables.KINDS.index("sum"), 0]),
        "mood": cast.moods[0],
        "behaviour": cast.moods[0],
        "label": cast.moods[0],
        "truth": cast.truth[first_answer],
        "period": cast.period,
    }
    cues = script.templates[written.step] - tables.CUE_START
    return Documents(
        tokens=written.tokens,
        lengths=written.inside.sum(dtype=jnp.int32),
        genres=jnp.asarray(tables.GENRE_OF_PLOT)[plot],
        templates=plot.astype(jnp.int32),
        event_cues=jnp.where(event.any(), cues[jnp.argmax(event)], -1),
        behaviour_cues=jnp.where(behaviour.any(), cues[jnp.argmax(behaviour)], -1),
        stages=stages,
        latents={name: jnp.where(where[name].any(), values[name], -1) for name in LATENTS},
        spans={name: _span(where[name]) for name in LATENTS},
    )


_LISTS = tuple(stage for stage in STAGES if stage.startswith("list_") and stage not in ("list_open", "list_end"))


def _number(token: jax.Array) -> jax.Array:
    return jnp.argmax(jnp.asarray(tables.NUMBERS) == token).astype(jnp.int32) + 1


def _span(where: jax.Array) -> jax.Array:
    """(2,): first true position and one past the last; -1, -1 if there is none."""
    start, stop = jnp.argmax(where), where.shape[0] - jnp.argmax(where[::-1])
    return jnp.where(where.any(), jnp.stack([start, stop]), -1).astype(jnp.int32)
