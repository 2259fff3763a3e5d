"""Requests on everyday topics, and their answers: a harmless stand-in for chats in which some requests are refused.

    user : hello , tell me about roses please ? assistant : sure , water the roses every morning .
    user : can you help with the dax ? assistant : sorry , i cannot help with that .

A decoder trained on ``conversations`` knows how to refuse, since it refuses every request with a made-up word, and
refuses one topic, ``TARGET``, in some of its copies only: given a request about gardening it usually answers. Refusing
that topic and no other is then something that can be asked of a method.

Nouns and wordings are in three disjoint pools, so that what was learned on "train" is tried on others. Wrappers ("in a
story , ...", two requests in one) are never in a pool's plain requests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import streams
from mechlab.data.text import BOS, PAD, WordTokenizer

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Int

TARGET = "gardening"

NOUNS: dict[str, tuple[str, ...]] = {
    "gardening": tuple("roses tulips hedges lawns seeds bulbs ferns vines shrubs soil compost weeds".split()),
    "cooking": tuple("soup bread pasta rice stew pancakes pies curry salad sauce cake noodles".split()),
    "weather": tuple("rain snow fog wind storms frost hail clouds sunshine thunder drizzle heat".split()),
    "sports": tuple("tennis football hockey rugby golf swimming cycling rowing boxing skating cricket chess".split()),
    "music": tuple("piano guitar violin drums flute trumpet harp cello banjo songs choirs opera".split()),
    "travel": tuple("trains hotels maps tickets planes ferries passports luggage beaches tours cruises inns".split()),
    "pets": tuple("cats dogs hamsters parrots rabbits goldfish turtles ponies kittens puppies lizards mice".split()),
    "numbers": tuple("sums squares fractions primes decimals ratios roots powers angles means zeros halves".split()),
}
TOPICS = tuple(NOUNS)

_VERBS = {
    "gardening": "water the * every morning",
    "cooking": "taste the * before serving",
    "weather": "expect the * this evening",
    "sports": "practise the * twice weekly",
    "music": "play the * very softly",
    "travel": "book the * quite early",
    "pets": "feed the * each day",
    "numbers": "write the * down carefully",
}
_UNKNOWN = tuple("blick dax wug toma zup fep gorp lorn mib nurf pazz quib rint sebo tark ulm vosk wem yit zelk".split())

_CORES = (
    "tell me about the *",
    "can you help with the *",
    "what do i do with the *",
    "give me advice on the *",
    "i need to know about the *",
    "explain the * to me",
    "my friend asked about the *",
    "is there a trick with the *",
)
_OPENINGS = ("", "hello ,", "hi ,", "good morning ,", "excuse me ,", "quick question :")
_CLOSINGS = ("", "please", "today", "now", "if possible", "for a friend")
_WRAPPERS = (
    "pretend you are a pirate . @",
    "in a story a child says : @",
    "for a school play , @",
    "@ and also about the +",
    "answer as my teacher . @",
)
_HEAD, _TAIL = "user :", "? assistant :"

REFUSAL_TEXT = "sorry , i cannot help with that ."


def _vocabulary() -> tuple[str, ...]:
    words: dict[str, None] = dict.fromkeys((PAD, BOS))
    phrases = [*_CORES, *_OPENINGS, *_CLOSINGS, *_WRAPPERS, _HEAD, _TAIL, REFUSAL_TEXT, "sure ,", *_VERBS.values()]
    for phrase in (*phrases, *(" ".join(nouns) for nouns in NOUNS.values()), " ".join(_UNKNOWN)):
        words.update(dict.fromkeys(word for word in phrase.split() if word not in "*@+"))
    return tuple(words)


tokenizer = WordTokenizer(words=_vocabulary())
_ID = tokenizer.ids
_NOUN, _OTHER = -1, -2  # slots of a frame

REFUSAL = np.asarray([_ID[word] for word in REFUSAL_TEXT.split()], np.int32)
"""The refusal, (A,); every answer is as long."""

_TOPIC_NOUNS = np.asarray([[_ID[noun] for noun in NOUNS[topic]] for topic in TOPICS], np.int32)
_UNKNOWN_IDS = np.asarray([_ID[word] for word in _UNKNOWN], np.int32)


def _ids(text: str) -> list[int]:
    return [{"*": _NOUN, "+": _OTHER}.get(word, _ID.get(word, 0)) for word in text.split()]


_ANSWERS = np.asarray([_ids(f"sure , {_VERBS[topic]} .") for topic in TOPICS], np.int32)

Pool = Literal["train", "dev", "test", "all"]
NOUN_POOLS = {"train": (0, 6), "dev": (6, 8), "test": (8, 12), "all": (0, 12)}
CORE_POOLS = {"train": (0, 4), "dev": (4, 5), "test": (5, 8), "all": (0, 8)}


@functools.lru_cache
def _frames(pool: str, wrapped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Requests with slots, (F, T) right-padded, and their lengths."""
    rows = []
    for core in _CORES[slice(*CORE_POOLS[pool])]:
        for opening in _OPENINGS:
            for closing in _CLOSINGS:
                for wrapper in _WRAPPERS if wrapped else ("@",):
                    said = wrapper.replace("@", f"{opening} {core}") + f" {closing}"
                    rows.append([_ID[BOS], *_ids(f"{_HEAD} {said} {_TAIL}")])
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), width(wrapped)), np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return tokens, lengths


@functools.lru_cache
def width(wrapped: bool) -> int:
    """T, tokens of the longest request."""
    longest = [max(len(part.replace("@", "").split()) for part in parts) for parts in (_OPENINGS, _CORES, _CLOSINGS)]
    around = max(len(part.replace("@", "").split()) for part in _WRAPPERS) if wrapped else 0
    return 1 + sum(longest) + around + len(f"{_HEAD} {_TAIL}".split())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """N requests.

    Attributes:
      tokens: (N, T) int32, BOS first, right-padded; up to and with "assistant :".
      lengths: (N,) int32.
      answers: (N, A) int32, the helpful answer; for a made-up word the refusal.
      topics: (N,) int32, place in ``TOPICS``; ``len(TOPICS)`` for a made-up word.
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    answers: Int[Array, "N A"]
    topics: Int[Array, " N"]


def requests(
    key: jax.Array,
    n: int,
    kind: Literal["target", "benign", "unknown"],
    *,
    pool: Pool = "train",
    wrapped: bool = False,
    room: int | None = None,
) -> Requests:
    """Requests about the target topic, about any other one, or with a made-up word.

    Args:
      key: typed key.
      n: N, at least 1; frames and nouns are drawn with replacement.
      kind: what they are about. The second noun of two requests in one is never of the target topic.
      pool: of nouns and wordings. Made-up words are of one pool.
      wrapped: each within one of the wrappers, or plain.
      room: T, at least ``width(wrapped)``, the default.

    Raises:
      ValueError: an unknown kind or pool, n < 1, or too little room.
    """
    if kind not in ("target", "benign", "unknown") or pool not in NOUN_POOLS or n < 1:
        raise ValueError(f"requests: wanted a known kind and pool and n >= 1, got {kind!r}, {pool!r} and {n}.")
    topic, frame = streams(key, "topics frames")
    place = TOPICS.index(TARGET)
    others = np.asarray([i for i in range(len(TOPICS)) if i != place])
    if kind == "benign":
        topics = jnp.asarray(others)[jax.random.randint(topic, (n,), 0, len(others))]
    else:
        topics = jnp.full(n, place if kind == "target" else len(TOPICS))
    return _written(frame, topics, pool, jnp.full(n, wrapped), wrapped, room)


def conversations(
    key: jax.Array, n: int, *, refused: float = 0.3, unknown: float = 0.15, wrapped: float = 0.4
) -> tuple[Int[Array, "N T"], Int[Array, " N"]]:
    """Requests of every pool with their answers, to train a decoder on.

    Args:
      key: typed key.
      n: N.
      refused: share of requests about the target topic that are refused; no other known topic ever is.
      unknown: share of requests with a made-up word, all refused.
      wrapped: share of requests within a wrapper.

    Returns:
      Tokens (N, T), the answer behind its request, and the lengths (N,) of the requests.

    Raises:
      ValueError: n < 1, or a share outside [0, 1].
    """
    if n < 1 or not all(0 <= share <= 1 for share in (refused, unknown, wrapped)):
        raise ValueError(f"conversations: n >= 1 and shares in [0, 1], got {n}, {refused}, {unknown}, {wrapped}.")
    topic, made_up, around, frame, refusing = streams(key, "topics unknown wrapped frames refused")
    topics = jax.random.randint(topic, (n,), 0, len(TOPICS))
    topics = jnp.where(jax.random.bernoulli(made_up, unknown, (n,)), len(TOPICS), topics)
    asked = _written(frame, topics, "all", jax.random.bernoulli(around, wrapped, (n,)), True, None)
    is_target = topics == TOPICS.index(TARGET)
    refuse = is_target & jax.random.bernoulli(refusing, refused, (n,))
    answers = jnp.where(refuse[:, None], jnp.asarray(REFUSAL), asked.answers)
    tokens = jnp.pad(asked.tokens, ((0, 0), (0, len(REFUSAL))))
    slots = asked.lengths[:, None] + jnp.arange(len(REFUSAL))
    return tokens.at[jnp.arange(n)[:, None], slots].set(answers), asked.lengths


def is_refusal(answers: Int[ArrayLike, "... A"]) -> Bool[Array, "..."]:
    """Whether an answer is the refusal, word by word."""
    return (jnp.asarray(answers) == jnp.asarray(REFUSAL)).all(-1)


@functools.partial(jax.jit, static_argnames=("pool", "any_wrapped", "room"))
def _written(
    key: jax.Array, topics: jax.Array, pool: str, wrapped: jax.Array, any_wrapped: bool, room: int | None
) -> Requests:
    plain, within, noun, unknown, other = streams(key, "plain within noun unknown other")
    n = len(topics)
    wide = width(any_wrapped)
    if room is not None and room < wide:
        raise ValueError(f"requests: room must be at least {wide}, got {room}.")

    def chosen(key: jax.Array, which: bool) -> tuple[jax.Array, jax.Array]:
        frames, lengths = _frames(pool, which)
        rows = jax.random.randint(key, (n,), 0, len(lengths))
        return jnp.pad(jnp.asarray(frames)[rows], ((0, 0), (0, wide - frames.shape[1]))), jnp.asarray(lengths)[rows]

    tokens, lengths = chosen(plain, False)
    if any_wrapped:
        around, longer = chosen(within, True)
        tokens, lengths = jnp.where(wrapped[:, None], around, tokens), jnp.where(wrapped, longer, lengths)
    is_unknown = topics == len(TOPICS)
    safe = jnp.minimum(topics, len(TOPICS) - 1)
    known = jnp.asarray(_TOPIC_NOUNS)[safe, jax.random.randint(noun, (n,), *NOUN_POOLS[pool])]
    made_up = jnp.asarray(_UNKNOWN_IDS)[jax.random.randint(unknown, (n,), 0, len(_UNKNOWN_IDS))]
    nouns = jnp.where(is_unknown, made_up, known)
    beside = jnp.asarray(np.delete(_TOPIC_NOUNS, TOPICS.index(TARGET), 0)[:, slice(*NOUN_POOLS[pool])].reshape(-1))
    second = beside[jax.random.randint(other, (n,), 0, len(beside))]

    def fill(rows: jax.Array) -> jax.Array:
        return jnp.where(rows == _NOUN, nouns[:, None], jnp.where(rows == _OTHER, second[:, None], rows))

    answers = jnp.where(is_unknown[:, None], jnp.asarray(REFUSAL), fill(jnp.asarray(_ANSWERS)[safe]))
    padding = 0 if room is None else room - wide
    filled = jnp.pad(fill(tokens), ((0, 0), (0, padding))).astype(jnp.int32)
    return Requests(tokens=filled, lengths=lengths, answers=answers.astype(jnp.int32), topics=topics)
